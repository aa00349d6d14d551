"""The persistent driver, in plain Triton and in Gluon, where it is meant to run: what the interpreter cannot show.

How a GPU orders memory accesses, programs that really run at once, streams beside each other, recorded graphs, and a
partner that does not come; of Gluon, whatever becomes of its layouts. A driver that passes on a device may be in the
table of measured configurations for it (rnnkern/backends/triton/table.json).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import pytest
import torch
from scans import Case, agree, assert_same_bits, gradients_of, inputs_of, references, run, tensors

from rnnkern import dispatch
from rnnkern.backends.base import ScanInputs
from rnnkern.cells import CELLS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.skipif(torch.version.hip is not None, reason="the persistent driver is for NVIDIA's GPUs"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HERE = torch.device("cuda")


@pytest.fixture(autouse=True, params=["persistent", "gluon"])
def _by_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RNNKERN_TRITON_CONFIG", f"driver={request.param}")
    yield
    torch.cuda.synchronize()


def moved(value):  # type: ignore[no-untyped-def]
    if isinstance(value, torch.Tensor):
        return value.to(HERE)
    return tuple(moved(v) for v in value) if isinstance(value, tuple) else value


def there(inputs: ScanInputs) -> ScanInputs:
    fields = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs) if f.name != "spec"}
    return ScanInputs(inputs.spec, **{name: moved(v) for name, v in fields.items()})


def scan():  # type: ignore[no-untyped-def]
    return dispatch.backend("triton")


def allowing_tf32(inputs: ScanInputs) -> ScanInputs:
    """With gluon, which has no other product of fp32."""
    if "gluon" not in os.environ["RNNKERN_TRITON_CONFIG"]:
        return inputs
    return dataclasses.replace(inputs, spec=dataclasses.replace(inputs.spec, precision="tf32"))


def long(cell: str = "lstm", dtype: torch.dtype = torch.bfloat16, **changes) -> Case:  # type: ignore[no-untyped-def]
    given = {"T": 200, "B": 16, "H": 512, "reverse": (False,)}
    return Case(cell, dtype, **(given | changes))


@pytest.mark.parametrize("layout", ["dense", "packed", "padded"])
@pytest.mark.parametrize("H", [200, 201, 256, 650])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_equals_the_reference(cell: str, dtype: torch.dtype, H: int, layout: str) -> None:
    case = Case(cell, dtype, T=17, B=9, H=H, layout=layout, reset="learned", reverse=(False,))
    inputs = allowing_tf32(inputs_of(case))
    grads = gradients_of(case, inputs)
    if reasons := scan().unsupported(there(inputs)):
        pytest.skip("; ".join(reasons))
    yardstick, truth, saved = references(inputs, grads)
    # Everything is compared on the CPU, where truth and yardstick are.
    agree(run(scan(), there(inputs), moved(grads), None if saved is None else on_gpu(saved)), yardstick, truth, inputs)


def on_gpu(result):  # type: ignore[no-untyped-def]
    return type(result)(**{f.name: moved(getattr(result, f.name)) for f in dataclasses.fields(result)})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_steps_many_times_the_same_bits(dtype: torch.dtype) -> None:
    """A value that is read before it is written, or half written, would differ from run to run."""
    case = long("gru", dtype, T=20_000, H=256)
    inputs = there(allowing_tf32(inputs_of(case)))
    assert scan().unsupported(inputs) == []
    grads = moved(gradients_of(case, inputs_of(case)))
    first = run(scan(), inputs, grads)
    assert all(t.isfinite().all() for one in first for _, t in tensors(one))
    for _ in range(20):
        assert_same_bits(first, run(scan(), inputs, grads), inputs)


def test_both_directions_in_one_launch() -> None:
    case = long(H=256, reverse=(False, True), layout="packed", reset="zero")
    inputs = inputs_of(case)
    grads = gradients_of(case, inputs)
    assert scan().unsupported(there(inputs)) == []
    yardstick, truth, _ = references(inputs, grads)
    agree(run(scan(), there(inputs), moved(grads)), yardstick, truth, inputs)


def test_two_streams_at_once() -> None:
    """Two launches that each want most processors must both end, and not wait for each other's programs."""
    cases = [long(seed=seed) for seed in (0, 1)]
    inputs = [there(inputs_of(case)) for case in cases]
    alone = [scan().forward(one) for one in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    found: list = [[], []]
    for _ in range(20):
        for k, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[k].append(scan().forward(inputs[k]))
    torch.cuda.synchronize()
    for k, one in enumerate(inputs):
        for outputs in found[k]:
            assert_same_bits([alone[k]], [outputs], one)
    scan().forward(inputs[0])  # and nothing was lost


def test_recorded_in_a_graph() -> None:
    case = long()
    inputs = there(inputs_of(case))
    alone = scan().forward(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = scan().forward(inputs)
    for _ in range(3):
        for _, t in tensors(outputs):
            t.fill_(0)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits([alone], [outputs], inputs)


@pytest.mark.parametrize("recorded", [False, True], ids=["called", "recorded"])
def test_a_lost_partner(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program of the grid is left out, which is what those that wait for it see of any partner that is lost."""
    from rnnkern.backends.triton import drivers
    from rnnkern.backends.triton.launch import Launch

    inputs = there(inputs_of(long(T=20)))
    honest = scan().forward(inputs)
    torch.cuda.synchronize()
    whole = Launch.__call__

    def without_the_last(self: Launch, **more: object) -> None:
        if self.options.get("launch_cooperative_grid"):
            x, y, z = self.grid
            self = dataclasses.replace(self, grid=(x - 1, y, z))
        whole(self, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Launch, "__call__", without_the_last)
        patch.setattr(drivers, "PATIENCE", 10_000)
        if recorded:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = scan().forward(inputs)
            graph.replay()
        else:
            outputs = scan().forward(inputs)
    torch.cuda.synchronize()
    assert all(final.isnan().flatten(1).any() for final in outputs.final)
    good = ~outputs.y.isnan()
    assert torch.equal(outputs.y[good], honest.y[good]) and not good.flatten(1)[-1].all()
    if recorded:  # a replay copies no flag: the call after it does, and the one after that finds it
        scan().forward(inputs)
        torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="gave up waiting"):
        scan().forward(inputs)
    assert_same_bits([honest], [scan().forward(inputs)], inputs)
