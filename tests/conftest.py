"""What every test runs under: fixed seeds, uninitialised memory that is NaN, and the backends to iterate over."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if any("triton_interpreted" in argument for argument in sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which Dynamo does

import torch
from torch._dynamo import trace_rules
from torch.utils._device import _device_constructors

from rnnkern import dispatch

INTERPRETED = Path(__file__).parent / "triton_interpreted"

# Dynamo, and torch.device as a mode, know torch's functions by identity, and keep what they find at first: that must be
# those that _nan_in_new_memory replaces.
trace_rules.get_torch_obj_rule_map()
_device_constructors()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Triton's interpreter needs a process of its own (test_triton.py starts one), so its tests must be named."""
    if collection_path != INTERPRETED:
        return None
    named = (Path(config.invocation_params.dir, str(arg).partition("::")[0]).resolve() for arg in config.args)
    return None if any(path.is_relative_to(INTERPRETED) for path in named) else True


def pytest_configure() -> None:
    """Processes of pytest-xdist share the cores: threads that wait for each other there would mostly wait."""
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes minutes begins first, so that no process is left with it at the end. Sets of instructions that matter
    to bf16 alone leave all else to AVX-512's kernels, which have these tests too."""
    others = [item for item in items if _of_other_kernels(item)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if not _of_other_kernels(item)]
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)


def _of_other_kernels(item: pytest.Item) -> bool:
    given = item.callspec.params if hasattr(item, "callspec") else {}
    dtype = given.get("dtype", getattr(given.get("case"), "dtype", torch.bfloat16))
    return str(given.get("isa", "")).endswith("_bf16") and dtype != torch.bfloat16


def absent(name: str) -> str | None:
    """Why no test with tensors on the CPU can run on this scan backend here, or None if they can."""
    if name == "triton":
        return "it takes tensors on a GPU; tests/test_triton.py has its tests"
    return dispatch.unavailable(name)


def scan_backends() -> list[Any]:
    """Every scan backend for pytest.mark.parametrize; one that cannot be loaded is skipped with its reason."""
    found = []
    for name in dispatch.ORDER:
        reason = absent(name)
        marks = [pytest.mark.skip(reason=f"backend {name}: {reason}")] if reason is not None else []
        found.append(pytest.param(name, marks=marks, id=name))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `backend` and does not say which runs on all of them."""
    named = {name for mark in metafunc.definition.iter_markers("parametrize") for name in _names(mark.args[0])}
    if "backend" in metafunc.fixturenames and "backend" not in named:
        metafunc.parametrize("backend", scan_backends())


def _names(argument: Any) -> list[str]:
    return [name.strip() for name in argument.split(",")] if isinstance(argument, str) else list(argument)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nan_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is allocated without a value holds NaN, so that a row nobody wrote is seen.

    By the names through which Python allocates, because all of this library's memory comes from there.
    torch.utils.deterministic.fill_uninitialized_memory would do it only together with the deterministic algorithms,
    which are not the ones that users run.
    """
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _filling(getattr(owner, name)))
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(np, name, _filling_array(getattr(np, name)))


def _filling(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or tensor.is_meta:
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.fill_(float("nan"))
            return tensor.fill_(True) if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

    return filled


def _filling_array(allocate: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def filled(*args: Any, **kwargs: Any) -> np.ndarray:
        array = allocate(*args, **kwargs)
        if array.dtype.kind == "f":
            array.fill(np.nan)
        return array

    return filled
