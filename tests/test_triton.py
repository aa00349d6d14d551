"""The Triton backend without a GPU: its tests in Triton's interpreter, run in the process that this needs, and what is
refused without the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest
import torch

import rnnkern
from rnnkern import dispatch

TESTS = Path(__file__).parent / "triton_interpreted"
MISSING = dispatch.unavailable("triton")
needs_triton = pytest.mark.skipif(MISSING is not None, reason=f"backend triton: {MISSING}")


@needs_triton
@pytest.mark.minutes
@pytest.mark.parametrize("name", sorted(path.stem for path in TESTS.glob("test_*.py")))
@pytest.mark.timeout(3600)
def test_in_the_interpreter(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / f"{name}.py")]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("RNNKERN_TRITON_CONFIG", "PYTEST_"))}
    env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=TESTS.parents[1], env=env, text=True, stdout=PIPE, stderr=STDOUT)
    closing = done.stdout.strip().rpartition("\n")[2]
    with capsys.disabled():
        print(f"\n{name} in Triton's interpreter: {closing}")
    assert done.returncode == 0, done.stdout
    assert " passed" in closing


@needs_triton
def test_cpu_tensors_are_refused_by_name() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process runs in the interpreter")
    model, x = rnnkern.LSTM(3, 4), torch.randn(5, 2, 3)
    with rnnkern.use_backend("triton"), pytest.raises(RuntimeError, match="'triton' was asked for.*device cpu"):
        model(x)


@needs_triton
def test_automatic_choice_on_the_cpu_imports_no_triton() -> None:
    program = """
import sys, torch, rnnkern
from rnnkern import dispatch, info
y = rnnkern.GRU(3, 4)(torch.randn(5, 2, 3))[0]
y.sum().backward()
assert "cpu" in dispatch.explain(info.plain_call("lstm"))["triton"][0]
print([name for name in sys.modules if name.startswith(("triton", "rnnkern.backends.triton"))])
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert found.stdout.strip() == "[]", found.stdout


def test_tf32_is_what_torchs_switch_says() -> None:
    switch = torch.backends.cudnn.rnn
    before = switch.fp32_precision
    try:
        for word, allowed in (("tf32", True), ("ieee", False)):
            switch.fp32_precision = word
            assert dispatch.allows_tf32() is allowed
    finally:
        switch.fp32_precision = before
