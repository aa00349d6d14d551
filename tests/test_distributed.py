"""Two processes under torchrun, by gloo, on ports that the system chooses; each with a time limit of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")
HERE = Path(__file__).parent


def torchrun(*command: str, limit: float = 120) -> str:
    """What both processes print. At the limit torchrun is told to end, and ends them: they are not in its group."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        try:
            output = process.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            process.terminate()
            pytest.fail(f"not done after {limit} s:\n{process.communicate(timeout=60)[0]}")
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_training_by_two_is_training_by_one() -> None:
    ways = ("ddp", "fsdp", "ddp compiled")
    output = torchrun(str(HERE / "distributed_worker.py"), *ways)
    assert all(f"{way}: rank {rank} of 2 agrees" in output for way in ways for rank in (0, 1)), output


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--shard"]], ids=["ddp", "fsdp"])
def test_the_example_learns(options: list[str]) -> None:
    sizes = ["--hidden=32", "--batch=8", "--length=16", "--steps=40"]
    output = torchrun(str(HERE.parent / "examples/train_torchrun.py"), *sizes, *options)
    losses = [float(line.split()[-1]) for line in output.splitlines() if line.startswith("step ")]
    assert len(losses) == 4 and losses[-1] < losses[0]
