"""The ops: schema, fakes, and what torch.compile makes of a layer built on them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layers import everything, gradients, random_call
from tolerance import check, check_grad
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import rnnkern
from rnnkern import _ops, dispatch
from rnnkern._call import TITLES
from rnnkern.backends.base import ScanSpec
from rnnkern.cells import CELLS

FAST = ("test_schema", "test_autograd_registration", "test_faketensor")
ALL = (*FAST, "test_aot_dispatch_dynamic")
PROJECTED = [(cell, None) for cell in CELLS] + [("lstm", 2)]


def forward_arguments(call, backend, save="all"):
    i = call.detached().inputs(save)
    params = [p for group in i.params for p in group]
    rest = (i.offsets, i.lengths, i.reset, list(i.reset_states), list(i.noise))
    return (i.spec.encode(), backend, i.T, i.B, i.gx, list(i.states), params, *rest)


def layer_arguments(call, backend, save="all"):
    spec, name, T, B, _, *scan = forward_arguments(call, backend, save)
    groups = call.detached().groups
    return (spec, name, T, B, call.x.detach(), [g.w_ih for g in groups], [g.b_ih for g in groups], *scan)


def backward_arguments(call, backend, dseq=True):
    spec, name, T, B, gx, states, params, *rest = forward_arguments(call, backend)
    y, *others = _ops.scan_forward(spec, name, T, B, gx, states, params, *rest)
    K = len(states)
    final, seq, (planes, hidden) = others[:K], others[K : 2 * K - 1], others[2 * K - 1 :]
    grads = [torch.randn_like(v) for v in (y, *final)]
    grads += [torch.randn_like(v) if dseq else v.new_empty(0) for v in seq]
    return (spec, name, T, B, grads, y, seq, planes, hidden, states, params, *rest)


def calls(cell, P):
    plain = random_call(cell, P=P)
    return {
        "plain": plain,
        "no bias": replace(
            plain,
            names=("w_hh", *plain.names[2:]),
            groups=tuple(g._replace(params=(g.params[0], *g.params[2:])) for g in plain.groups),
        ),
        "padded": replace(plain, lengths=torch.tensor([2, 0, 4])),
        "packed": replace(
            plain, x=plain.x[:8].detach(), lengths=torch.tensor([4, 3, 1]), offsets=torch.tensor([0, 3, 5, 7])
        ),
        "everything": everything(cell, P),
    }


@pytest.mark.parametrize("kind", ["plain", "no bias", "padded", "packed", "everything"])
@pytest.mark.parametrize("cell, P", PROJECTED)
def test_opcheck(cell, P, kind, backend):
    """Schema (nothing modified, nothing aliased), fakes, registration, and tracing with dynamic shapes."""
    call = calls(cell, P)[kind].skip_if_refused(backend)
    opcheck(_ops.scan_backward, backward_arguments(call, backend), test_utils=FAST if kind == "everything" else ALL)
    # Planes past a length are whatever was there, and two runs compared would differ in them.
    undefined = call.lengths is not None and call.offsets is None
    for op, arguments in ((_ops.scan_forward, forward_arguments), (_ops.layer_forward, layer_arguments)):
        for save in ("states", "none"):
            opcheck(op, arguments(call, backend, save), test_utils=FAST)
        opcheck(op, arguments(call, backend), test_utils=FAST if undefined else ALL)
    opcheck(_ops.scan_backward, backward_arguments(call, backend, dseq=False), test_utils="test_faketensor")


@pytest.mark.parametrize("layers, bidirectional", [(1, False), (2, True)])
@pytest.mark.parametrize("cell, P", PROJECTED)
def test_opcheck_of_inference(cell, P, layers, bidirectional, backend):
    if cell == "slstm":
        pytest.skip("calls with heads are no plain ones")
    module = getattr(rnnkern, TITLES[cell])
    kwargs = {"nonlinearity": cell.rpartition("_")[2]} if "_" in cell else {"proj_size": P} if P else {}
    kwargs |= {"batch_norm": False} if cell == "ligru" else {}  # that is no plain call
    params = list(module(3, 5, layers, bidirectional=bidirectional, dtype=torch.float64, **kwargs).parameters())
    params = [p.detach() for p in params]
    hx = [torch.randn(layers * (1 + bidirectional), 2, P or 5, dtype=torch.float64)]
    hx += [torch.randn(layers * (1 + bidirectional), 2, 5, dtype=torch.float64)] * (cell == "lstm")
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    with rnnkern.use_backend(backend):
        for states in ([], hx):
            for input in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
                opcheck(_ops.inference, (cell, input, states, params, True, layers, bidirectional), test_utils=FAST)


def test_spec_text_goes_there_and_back():
    spec = ScanSpec(
        "lstm",
        (False, True),
        ("w_hh", "b_hh", "ln_hh"),
        ("h", "zoneout_c"),
        "states",
        "tf32",
        (1 / 0.7, 1.0),
        (0.1, 0.2),
        1.5,
        0.3,
        1e-3,
        1e-6,
    )
    assert ScanSpec.decode(spec.encode()) == spec
    bare = ScanSpec("gru", (False,), ("w_hh",))
    assert ScanSpec.decode(bare.encode()) == bare


@pytest.mark.parametrize("save", ["none", "states", "all"])
@pytest.mark.parametrize("cell, P", PROJECTED)
def test_layer_op_is_projection_and_scan(cell, P, save, backend):
    call = random_call(cell, P=P).skip_if_refused(backend)
    ours = _ops.layer_forward(*layer_arguments(call, backend, save))
    truth = _ops.scan_forward(*forward_arguments(call, backend, save))
    assert [o.shape for o in ours] == [o.shape for o in truth]
    check(ours, truth, truth, f"{cell} {save}")
    bare = list(layer_arguments(call, backend, save))
    bare[6] = []  # no bias in the projection
    x, w_ih = bare[4:6]
    forward = list(forward_arguments(call, backend, save))
    forward[4] = torch.stack([x[:, 0] @ w.t() for w in w_ih], 1)
    truth = _ops.scan_forward(*forward)
    check(_ops.layer_forward(*bare), truth, truth, f"{cell} {save}, no bias")


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def _forward(backend):
    return _ops.layer_forward if dispatch.projects(backend) else _ops.scan_forward


def test_dispatch_modes_see_the_ops(backend):
    """A plain call goes to the backend without an op; whoever watches ops must see ours."""
    call = random_call("gru").skip_if_refused(backend)
    with Seen() as seen:
        outputs = call.run(backend)
        found = gradients(outputs, call.tensors)
    assert _forward(backend) in seen.ops and _ops.scan_backward in seen.ops
    direct = call.run(backend)
    check(list(outputs), list(direct), list(direct), "outputs")
    expected = gradients(direct, call.tensors)
    check_grad(found, expected, expected, "gradients")


def test_fake_and_meta_tensors(backend):
    call = random_call("lstm", P=2).skip_if_refused(backend)
    expected = [(o.shape, o.dtype) for o in call.run(backend)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert [(o.shape, o.dtype) for o in call.run(backend)] == expected
    meta = call.with_tensors(*(t.detach().to("meta") for t in call.tensors))
    outputs = meta.run(backend)
    assert [(o.shape, o.dtype) for o in outputs] == expected and all(o.is_meta for o in outputs)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("cell, P", PROJECTED)
def test_compile_without_graph_breaks(cell, P, compiler):
    """With automatic choice of the backend, gradients included."""
    torch._dynamo.reset()
    call = random_call(cell, P=P)
    compiled = torch.compile(lambda *v: call.with_tensors(*v).run(None), fullgraph=True, backend=compiler)
    ours, truth = compiled(*call.tensors), call.run(None)
    check(list(ours), list(truth), list(truth), cell)
    expected = gradients(truth, call.tensors)
    check_grad(gradients(tuple(ours), call.tensors), expected, expected, f"{cell}, gradients")
    with torch.no_grad():
        quiet = compiled(*call.tensors)
    check(list(quiet), list(truth), list(truth), f"{cell}, no gradient")


def test_compile_of_everything():
    torch._dynamo.reset()
    call = everything("lstm", 2)
    compiled = torch.compile(lambda *v: call.with_tensors(*v).run("reference"), fullgraph=True, backend="aot_eager")
    ours, truth = compiled(*call.tensors), call.run("reference")
    check(list(ours), list(truth), list(truth), "everything")
    expected = gradients(truth, call.tensors)
    check_grad(gradients(tuple(ours), call.tensors), expected, expected, "everything, gradients")


def test_compile_with_dynamic_lengths():
    """One graph serves every T and B. No two sizes are equal, or Dynamo would take them for one."""
    torch._dynamo.reset()
    call = random_call("gru", T=4, B=3)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph

    def run(x, h):
        rows = x.flatten(0, 1).unsqueeze(1)
        return replace(call, x=rows, states=(h,), T=x.shape[0], B=x.shape[1]).run("reference")[0]

    compiled = torch.compile(run, fullgraph=True, backend=counting, dynamic=True)
    for T, B in ((9, 7), (11, 3), (6, 13)):
        x, h = torch.randn(T, B, 2, dtype=torch.float64), torch.randn(2, B, 4, dtype=torch.float64)
        check(compiled(x, h), run(x, h), run(x, h), f"{T=} {B=}")
    assert len(graphs) == 1
