"""The instruction sets of the extension as parameters of tests."""

from __future__ import annotations

from typing import Any

import pytest

from rnnkern import dispatch

NATIVE = dispatch.unavailable("cpp") is None


def instruction_sets() -> list[Any]:
    """Those that this machine lacks are skipped, with the reason; none without the extension."""
    if not NATIVE:
        return []
    from rnnkern import _cpu

    found = []
    for isa in _cpu.isas():
        try:
            _cpu.chosen(isa)
            found.append(pytest.param(isa, id=isa))
        except RuntimeError as error:
            found.append(pytest.param(isa, id=isa, marks=pytest.mark.skip(reason=str(error))))
    return found
