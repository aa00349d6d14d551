"""Tests of the Triton backend on the CPU, in Triton's interpreter and therefore in a process of their own.

The folder is not called tests/triton: with tests/ on the import path that would be a package of Triton's name, where
Triton is not installed.
"""

from __future__ import annotations

import bf16_repair
import pytest

from rnnkern.backends.triton.interpreter import INTERPRETED

if not INTERPRETED:
    raise RuntimeError("Triton was imported before its interpreter was asked for: run TRITON_INTERPRET=1 pytest ...")

bf16_repair.install()


def pytest_configure(config: pytest.Config) -> None:
    # NumPy warns where exp overflows to Inf, which is what the kernels are made for.
    for what in ("overflow", "invalid value", "divide by zero"):
        config.addinivalue_line("filterwarnings", f"ignore:{what} encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def _config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RNNKERN_TRITON_CONFIG", raising=False)
