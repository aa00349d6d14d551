"""The choice of a backend: explicit ones never fall back, automatic ones can be explained, importing loads nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from conftest import absent
from stacks import flat
from tolerance import check

import rnnkern
from rnnkern import dispatch
from rnnkern.backends.base import ScanInputs, ScanSpec
from rnnkern.cells import CELLS


def inputs(cell: str = "gru", dtype: torch.dtype = torch.float32, **spec: object) -> ScanInputs:
    H, G = 4, len(CELLS[cell].gates)
    states = tuple(torch.zeros(1, 2, H, dtype=dtype) for _ in CELLS[cell].states)
    weights = ((torch.zeros(G * H, H, dtype=dtype), torch.zeros(G * H, dtype=dtype)),)
    gx = torch.zeros((), dtype=dtype).expand(6, 1, G * H)
    return ScanInputs(ScanSpec(cell, (False,), ("w_hh", "b_hh"), **spec), 3, 2, gx, states, weights)  # type: ignore[arg-type]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Backends as if none had been asked for yet."""
    monkeypatch.setattr(dispatch, "_slots", {name: dispatch._Slot() for name in dispatch.ORDER})
    yield monkeypatch


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make backends impossible to import, as on a machine without a compiler or without Numba."""
    for name in names:
        monkeypatch.setitem(sys.modules, f"rnnkern.backends.{name}", None)


def test_names() -> None:
    assert list(rnnkern.backends()) == ["triton", "cpp", "numba", "reference", "torch"]
    assert rnnkern.backends()["reference"] is None and rnnkern.backends()["torch"] is None
    for name, reason in rnnkern.backends().items():
        assert dispatch.unavailable(name) == reason
        if name != "torch" and reason is None:
            assert dispatch.backend(name).name == name
    with pytest.raises(ValueError, match="unknown scan backend 'nobody': expected one of triton, cpp, numba, ref"):
        dispatch.backend("nobody")
    with pytest.raises(ValueError, match="torch's kernels run whole calls"):
        dispatch.backend("torch")
    with pytest.raises(ValueError, match="unknown backend 'nobody'"):
        dispatch.unavailable("nobody")


def test_automatic_choice_is_the_first_without_objection() -> None:
    for cell in CELLS:
        given = inputs(cell)
        able = [name for name, reasons in dispatch.explain(given).items() if not reasons]
        assert dispatch.choose(given) == able[0] == dispatch.last()


def test_a_missing_backend_is_passed_over_and_named(fresh: pytest.MonkeyPatch) -> None:
    hide(fresh, "cpp", "numba")
    assert dispatch.choose(inputs()) == "reference"
    reasons = dispatch.explain(inputs())
    assert "rnnkern.backends.cpp" in reasons["cpp"][0] and reasons["reference"] == []
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot be loaded: .*rnnkern.backends.cpp"):
        rnnkern.use_backend("cpp")
    with pytest.raises(RuntimeError, match="backend 'numba' cannot be loaded"):
        dispatch.backend("numba")
    assert dispatch.requested() is None


def test_an_error_of_a_backend_is_not_taken_for_its_absence(fresh: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError(f"{name} is broken")

    fresh.setattr(dispatch.importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="is broken"):
        dispatch.choose(inputs())


def test_where_all_refuse_the_error_has_inputs_and_reasons() -> None:
    given = inputs(dtype=torch.complex64)
    with pytest.raises(
        RuntimeError, match=r"no backend can run gru scan \(T=3, B=2, 6 rows dense, .*complex64"
    ) as error:
        dispatch.choose(given)
    for name in dispatch.ORDER:
        assert f"\n  {name}: " in str(error.value)


def test_an_explicit_choice_never_falls_back(fresh: pytest.MonkeyPatch) -> None:
    for name in dispatch.ORDER:
        if dispatch.unavailable(name) is None:
            fresh.setattr(dispatch.backend(name), "unsupported", lambda inputs: ["it is Monday", "and raining"])
            with rnnkern.use_backend(name), pytest.raises(RuntimeError, match=f"{name!r} was .*Monday; and raining"):
                dispatch.choose(inputs())
            with rnnkern.use_backend(name), pytest.raises(RuntimeError, match="it is Monday"):
                rnnkern.LSTM(2, 3)(torch.zeros(1, 1, 2))
    with rnnkern.use_backend("torch"), pytest.raises(RuntimeError, match="cannot run one scan"):
        dispatch.choose(inputs())


def test_setter_and_context_manager() -> None:
    assert dispatch.requested() is None
    choice = rnnkern.use_backend("reference")
    assert dispatch.requested() == "reference"
    with rnnkern.use_backend("torch"):
        assert dispatch.requested() == "torch"
        with rnnkern.use_backend(None):
            assert dispatch.requested() is None
        assert dispatch.requested() == "torch"
    assert dispatch.requested() == "reference"
    rnnkern.use_backend(None)
    with choice:
        assert dispatch.requested() == "reference"
    with pytest.raises(ZeroDivisionError), rnnkern.use_backend("torch"):
        raise ZeroDivisionError
    rnnkern.use_backend(None)
    assert dispatch.requested() is None


def test_the_choice_is_the_threads_own() -> None:
    seen: list[str | None] = []
    with rnnkern.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.requested()))
        thread.start()
        thread.join()
        assert dispatch.requested() == "reference"
    assert seen == [None]


def test_the_backward_stays_with_the_forwards_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is chosen by then, and in whatever thread it runs."""
    model, x = rnnkern.GRU(3, 4), torch.randn(5, 2, 3)
    calls: list[str] = []
    for name in dispatch.ORDER:
        if dispatch.unavailable(name) is None:
            run = dispatch.backend(name).backward
            monkeypatch.setattr(
                dispatch.backend(name), "backward", lambda *a, name=name, run=run: (calls.append(name), run(*a))[1]
            )
    with rnnkern.use_backend(backend):
        y = model(x)[0].sum()
    with rnnkern.use_backend("torch"):
        thread = threading.Thread(target=y.backward)
        thread.start()
        thread.join()
    assert calls == [backend] and model.weight_hh_l0.grad is not None


def test_torch_takes_calls_where_it_is_faster(fresh: pytest.MonkeyPatch) -> None:
    """Without the extension oneDNN's LSTM is faster than Numba; without Numba everything is; with it nothing."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    dense = (cpu, torch.float32, "lstm", 8, False)
    if dispatch.unavailable("cpp") is None:
        assert not dispatch.wants_torch(*dense)
    assert dispatch.wants_torch(cuda, torch.float32, "gru", 1, True)
    assert dispatch.wants_torch(cpu, torch.complex64, "gru", 1, True)
    fresh.setattr(dispatch, "_slots", {name: dispatch._Slot() for name in dispatch.ORDER})
    hide(fresh, "cpp")
    if dispatch.unavailable("numba") is None:
        assert dispatch.wants_torch(*dense)
        for other in (
            (cpu, torch.float64, "lstm", 8, False),
            (cpu, torch.float32, "lstm", 1, False),
            (cpu, torch.float32, "lstm", 8, True),
            (cpu, torch.float32, "gru", 8, False),
        ):
            assert not dispatch.wants_torch(*other)
    fresh.setattr(dispatch, "_slots", {name: dispatch._Slot() for name in dispatch.ORDER})
    hide(fresh, "numba")
    assert dispatch.wants_torch(cpu, torch.float32, "gru", 1, True)
    model, x = rnnkern.LSTM(3, 4, 2), torch.randn(5, 2, 3)
    theirs = torch.nn.LSTM(3, 4, 2)
    theirs.load_state_dict(model.state_dict())
    assert torch.equal(model(x)[0], theirs(x)[0]) and dispatch.last() == "torch"
    assert torch.equal(rnnkern.GRUCell(3, 4)(x[0]), rnnkern.GRUCell(3, 4)(x[0])) or dispatch.last() == "torch"
    model(x, lengths=[5, 2])
    assert dispatch.last() == "reference"  # torch's kernels have no lengths


def test_what_torch_chosen_by_itself_lacks_goes_to_a_scan(fresh: pytest.MonkeyPatch) -> None:
    """vmap over a call that automatic choice would give to torch's kernel."""
    hide(fresh, "cpp", "numba")
    model, x = rnnkern.GRU(3, 4).double(), torch.randn(2, 5, 2, 3, dtype=torch.float64)
    found = torch.vmap(lambda v: model(v)[0])(x)
    expected = torch.stack([model(v)[0] for v in x])
    check(flat(found), flat(expected), flat(expected), "vmap")


def test_other_devices_run_on_torch() -> None:
    """Shapes and dtypes without memory, as in torch.nn: the meta device has no scan backend."""
    model = rnnkern.LSTM(3, 4, 2, device="meta")
    y, (h, c) = model(torch.empty(5, 2, 3, device="meta"))
    assert (y.shape, h.shape, c.shape) == ((5, 2, 4), (2, 2, 4), (2, 2, 4)) and y.device.type == "meta"
    assert rnnkern.GRUCell(3, 4, device="meta")(torch.empty(2, 3, device="meta")).shape == (2, 4)


def test_importing_loads_no_kernels() -> None:
    """Neither Triton nor Numba nor native code, and no change of torch's settings; Dynamo stays out too."""
    program = """
import sys, torch

def settings():
    return (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32)

before, were = set(sys.modules), settings()
import rnnkern
assert were == settings()
tops = {name.split(".")[0] for name in set(sys.modules) - before}
tops &= {"numba", "llvmlite", "triton", "tqdm", "matplotlib"}
print(sorted(tops | {"rnnkern._cpu", "torch._dynamo"} & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert found.stdout.strip() == "[]", found.stdout


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_few_training_steps_take_torch(kind: str) -> None:
    """Automatic choice: one or two steps with a gradient to come cost less in torch's operations, but for two of LSTM,
    and one of more layers than one."""
    module = getattr(rnnkern, kind)(3, 5)
    cell = getattr(rnnkern, f"{kind}Cell")(3, 5)
    fast = next(name for name in dispatch.ORDER if absent(name) is None)
    if fast != "cpp":
        pytest.skip(f"without the C++ backend other rules hold: {dispatch.unavailable('cpp')}")
    for run, expected in (
        (lambda: module(torch.randn(1, 4, 3)), "torch"),
        (lambda: getattr(rnnkern, kind)(3, 5, 2)(torch.randn(1, 4, 3)), "cpp" if kind == "LSTM" else "torch"),
        (lambda: module(torch.randn(2, 4, 3)), "cpp" if kind == "LSTM" else "torch"),
        (lambda: module(torch.randn(3, 4, 3)), "cpp"),
        (lambda: module(torch.randn(1, 4, 3), lengths=[1, 0, 1, 1]), "cpp"),
        (lambda: cell(torch.randn(4, 3)), "torch"),
    ):
        run()
        assert dispatch.last() == expected
    with torch.no_grad():
        cell(torch.randn(4, 3))
    assert dispatch.last() == "cpp"
