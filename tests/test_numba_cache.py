"""Compiled Numba code is kept on disk, and an edited equation is never served from what was kept.

Each test runs processes of their own on a copy of the package, whose files it may edit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rnnkern import dispatch

SOURCE = Path(dispatch.__file__).parent
MISSING = dispatch.unavailable("numba")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"numba: {MISSING}")

FINGERPRINT = """
import json
from rnnkern.backends import _numba_driver as driver
from rnnkern.backends._numba_cache import fingerprint
print(json.dumps([fingerprint(driver.__name__), driver.forward.stats.cache_path]))
"""

RUN = """
import json, torch
from rnnkern.backends import _numba_driver as driver
from rnnkern.backends.base import ScanInputs, ScanSpec
from rnnkern.backends.numba import BACKEND
ones = torch.ones(4, 1, 2)
inputs = ScanInputs(ScanSpec("rnn_tanh", (False,), ("w_hh",), save="none"), 4, 1, ones, (ones[:1],), ((ones[:2, 0],),))
y = BACKEND.forward(inputs).y
stats = driver.forward.stats
print(json.dumps([y[-1, 0, 0].item(), sum(stats.cache_hits.values()), sum(stats.cache_misses.values())]))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    shutil.copytree(SOURCE, tmp_path / "rnnkern", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def python(package: Path, program: str, **variables: str) -> list:
    """What the program prints, run on the copy with a cache folder of its own."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "XDG_", "PYTHON"))}
    environment = keep | {"PYTHONPATH": str(package), "HOME": str(package / "home"), "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{file.name} has {old!r} {text.count(old)} times"
    file.write_text(text.replace(old, new))


@pytest.mark.slow
def test_a_second_process_compiles_nothing_and_an_edited_step_is_compiled(package: Path) -> None:
    first, hits, misses = python(package, RUN)
    assert (hits, misses) == (0, 1)
    again, hits, misses = python(package, RUN)
    assert (again, hits, misses) == (first, 1, 0)
    edit(package / "rnnkern/cells/rnn/numba_step.py", "v = tanh(gx[j] + gh[j])", "v = tanh(gx[j] - gh[j])")
    edited, hits, misses = python(package, RUN)
    assert edited != first
    assert (hits, misses) == (0, 1)


def test_whatever_the_driver_reaches_is_part_of_the_key(package: Path) -> None:
    seen = [python(package, FINGERPRINT)[0]]
    assert python(package, FINGERPRINT)[0] == seen[0]
    math = package / "rnnkern/cells/numba_math.py"
    with (package / "rnnkern/cells/gru/numba_step.py").open("a") as step:
        step.write("# a comment changes no code\n")
    assert python(package, FINGERPRINT)[0] == seen[0]
    for file, old, new in (
        (package / "rnnkern/cells/lstm/numba_step.py", "u = tanh(f * c[j] + i * g)", "u = tanh(f * c[j] - i * g)"),
        (math, "np.float32(1 / 5040)", "np.float32(1 / 5041)"),  # a constant in a function that a step calls
        (math, "if x == types.float32:", "if x == types.float64:"),  # in an overload's choice
        (math, '"arcp", "nsz"}', '"arcp"}'),  # a compiler flag
        (package / "rnnkern/backends/_numba_driver.py", "_BLOCK = 512", "_BLOCK = 256"),  # a global constant
        (package / "rnnkern/backends/_numba_options.py", "    gain: np", "    gains: np"),  # a named tuple's field
    ):
        edit(file, old, new)
        now = python(package, FINGERPRINT)[0]
        assert now not in seen, f"the edit of {old!r} in {file.name} went unseen"
        seen.append(now)


def test_a_read_only_package_is_cached_for_the_user_or_not_at_all(package: Path) -> None:
    # A file where the folder should be: refuses even an administrator.
    (package / "rnnkern/backends/__pycache__").write_text("")
    _, folder = python(package, FINGERPRINT)
    assert folder.startswith(str(package / "home"))
    _, folder = python(package, FINGERPRINT, HOME=str(package / "rnnkern/__init__.py"))
    assert folder is None
