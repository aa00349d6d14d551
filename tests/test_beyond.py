"""The modules that torch.nn does not have, against loops in plain torch, and as modules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from stacks import D, draw, flat, gradients
from states import natural
from tolerance import check, check_grad
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from written_out import KINDS, loop

import rnnkern

LAYOUTS = ("dense", "batch_first", "unbatched", "packed", "lengths", "reset")
T, B, I, H = 5, 4, 3, 6
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, *sizes: int, **kwargs: Any) -> Any:
    name, given, _ = KINDS[kind]
    return getattr(rnnkern, name)(*(sizes or (I, H)), **({"dtype": D} | given | kwargs))


def function(module: Any) -> Any:
    return getattr(rnnkern.functional, module._cell)


def states_of(module: Any, *batch: int, dtype: torch.dtype = D) -> tuple[Tensor, ...]:
    groups = module.num_layers * (1 + module.bidirectional)
    cell = rnnkern.cells.CELLS[module._cell]
    return natural(cell, [draw(groups, *batch, module.hidden_size, dtype=dtype) for _ in cell.states])


def bare(states: tuple[Tensor, ...]) -> Any:
    """As modules take them."""
    return states if len(states) > 1 else states[0]


@each_kind
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_the_loop_that_spells_its_equations(kind: str, layout: str, backend: str) -> None:
    module = make(kind, I, H, 2, bidirectional=True, batch_first=layout == "batch_first", bias=layout != "dense")
    x, hx = draw(T, B, I), states_of(module, B)
    lengths = torch.tensor([3, 5, 1, 4])
    with rnnkern.use_backend(backend):
        if layout == "batch_first":
            y, final, kept = module(x.transpose(0, 1), bare(hx), return_states=True)
            y, truth = y.transpose(0, 1), loop(kind, module, x, hx)
            last = kept[-1] if len(hx) == 1 else kept[-1][0]
            assert torch.equal(last.transpose(0, 1), y)
        elif layout == "unbatched":
            y, final = module(x[:, 0], bare(tuple(h[:, 0] for h in hx)))
            truth = loop(kind, module, x[:, :1], tuple(h[:, :1] for h in hx))
            truth = truth[0][:, 0], tuple(h[:, 0] for h in truth[1])
        elif layout == "packed":
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            y, final = module(packed, bare(hx))
            assert isinstance(y, PackedSequence)
            y, truth = pad_packed_sequence(y)[0], loop(kind, module, x, hx, lengths)
        elif layout == "lengths":
            y, final = module(x, bare(hx), lengths=lengths)
            truth = loop(kind, module, x, hx, lengths)
        elif layout == "reset":
            reset = torch.rand(T, B) < 0.4
            y, final = module(x, bare(hx), reset=reset)
            truth = loop(kind, module, x, hx, reset=reset)
        else:
            y, final = module(x, bare(hx))
            truth = loop(kind, module, x, hx)
    ours, theirs = flat((y, final)), flat(truth)
    check(ours, theirs, theirs, kind)
    wrt = [x, *hx, *module.parameters()]
    exact = gradients(theirs, wrt)
    check_grad(gradients(ours, wrt), exact, exact, kind)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_as_near_as_the_loop(kind: str, dtype: torch.dtype, backend: str) -> None:
    module = make(kind, 16, 42, dtype=dtype)
    exact = copy.deepcopy(module).double()
    x, hx = draw(7, B, 16, dtype=dtype), states_of(module, B, dtype=dtype)
    with rnnkern.use_backend(backend):
        ours = flat(module(x, bare(hx)))
    yardstick, truth = (
        flat(loop(kind, m, x.to(wide), tuple(h.to(wide) for h in hx))) for m, wide in ((module, dtype), (exact, D))
    )
    assert all(v.dtype == dtype for v in ours)
    check(ours, yardstick, truth, kind)


@each_kind
def test_functions_take_what_modules_hold(kind: str) -> None:
    module = make(kind, I, H, 2)
    x, hx = draw(T, B, I), states_of(module, B)
    theirs = flat(module(x, bare(hx), return_states=True))
    if module._project is not None:
        pytest.skip(f"functions have no running estimates, which {kind} has")
    ours = flat(function(module)(x, bare(hx), module._weights(), num_layers=2, return_states=True))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        function(module)(x, None, list(module.parameters()), colour=1)


@each_kind
def test_derivatives_of_any_order(kind: str) -> None:
    module = make(kind, 2, 3, bidirectional=True)
    x, hx = draw(3, 2, 2), states_of(module, 2)
    names, weights = zip(*module.named_parameters(), strict=True)

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        states, params = rest[: len(hx)], dict(zip(names, rest[len(hx) :], strict=True))
        return tuple(flat(torch.func.functional_call(module, params, (x, bare(states)))))

    assert torch.autograd.gradcheck(run, (x, *hx, *weights), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, (x, *hx, *weights))


@each_kind
def test_per_sample_gradients(kind: str) -> None:
    module, x = make(kind).eval(), torch.randn(T, B, I, dtype=D)
    params = dict(module.named_parameters())

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, params, (x.unsqueeze(1),))[0].square().sum()

    ours = torch.func.vmap(torch.func.grad(loss), (None, 1))(params, x)
    for b in range(B):
        truth = torch.autograd.grad(loop_loss(kind, module, x[:, b : b + 1]), list(params.values()))
        check_grad([ours[name][b] for name in params], truth, truth, kind)


def loop_loss(kind: str, module: Any, x: Tensor) -> Tensor:
    zeros = tuple(torch.zeros_like(h) for h in states_of(module, x.shape[1]))
    return loop(kind, module, x, zeros)[0].square().sum()


@each_kind
def test_is_part_of_a_graph(kind: str) -> None:
    module, x = make(kind, I, H, 2), draw(T, B, I)
    ours = flat(torch.compile(module, backend="aot_eager", fullgraph=True)(x))
    theirs = flat(module(x))
    check(ours, theirs, theirs, kind)
    wrt = [x, *module.parameters()]
    check_grad(gradients(ours, wrt), gradients(theirs, wrt), gradients(theirs, wrt), kind)


@each_kind
def test_options_and_less_memory_change_nothing_from_backend_to_backend(kind: str, backend: str) -> None:
    given = {"recurrent_dropout": 0.3, "zoneout": 0.2, "weight_dropout": 0.1, "grad_clip": 0.5, "dropout": 0.1}
    if KINDS[kind][0] == "SLSTM":
        given |= {"zoneout": 0.0, "recurrent_dropout_mode": "candidate"}
    module, x = make(kind, I, H, 2, **given), draw(T, B, I)
    found = []
    for name in ("reference", None if backend == "triton" else backend):
        module.memory = "save" if name == "reference" else "recompute"
        torch.manual_seed(4)
        with rnnkern.use_backend(name):
            found.append(flat(module(x)))
    check(found[1], found[0], found[0], kind)
    ours, theirs = (gradients(out, [x, *module.parameters()]) for out in found)
    check_grad(ours, theirs, theirs, kind)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("zoneout", [0.0, 0.1])  # with masks, padding is not cut out
def test_batch_norm_over_few_rows(zoneout: float, grad: bool) -> None:
    """Over none the running estimates stay, and one has no variance, whichever way the padding is left out."""
    rnn, x = rnnkern.LiGRU(I, H, zoneout=zoneout), torch.randn(4, 2, I)
    before = {name: value.clone() for name, value in rnn.named_buffers()}
    with torch.set_grad_enabled(grad):
        assert not rnn(x, lengths=[0, 0])[0].any()
        with pytest.raises(ValueError, match="more than 1 value per channel when training"):
            rnn(x, lengths=[0, 1])
    assert all(torch.equal(value, before[name]) for name, value in rnn.named_buffers())


def test_running_estimates_are_batch_norms() -> None:
    ours, theirs = rnnkern.LiGRU(I, H, dtype=D), torch.nn.BatchNorm1d(2 * H, dtype=D)
    x, lengths = torch.randn(T, B, I, dtype=D), torch.tensor([3, 5, 1, 4])
    exist = torch.arange(T).unsqueeze(1) < lengths
    for graded in (True, False):  # packed on its way, and padded
        with torch.set_grad_enabled(graded):
            ours(x, lengths=lengths)
        theirs((x @ ours.weight_ih_l0.T)[exist])
        found, truth = [ours.bn_mean_l0, ours.bn_var_l0], [theirs.running_mean, theirs.running_var]
        check(found, truth, truth)
    with pytest.raises(ValueError, match="batch_norm=False"):
        rnnkern.LiGRU(I, H, layer_norm=True)
    ours.reset_parameters()
    assert ours.bn_mean_l0.eq(0).all() and ours.bn_ih_l0.eq(1).all()


@each_kind
def test_has_torchs_form(kind: str) -> None:
    form = (I, H, 2), {"bidirectional": True, "dropout": 0.5, "batch_first": True}
    ours, theirs = make(kind, *form[0], **form[1]), torch.nn.GRU(*form[0], **form[1])
    assert [name for name in ours.state_dict() if not name.startswith("bn_")] == list(theirs.state_dict())
    assert repr(ours).partition("(")[2].startswith(repr(theirs).partition("(")[2].removesuffix(")"))
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert repr(copied) == repr(ours) and type(copied) is type(ours)
        x = torch.randn(B, T, I, dtype=D)
        assert torch.equal(copied.eval()(x)[0], ours.eval()(x)[0])
    ours.flatten_parameters()
    again = make(kind, *form[0], **form[1])
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again.eval()(x)[0], ours(x)[0])
    assert not isinstance(ours, torch.nn.RNNBase)  # nothing gives it to torch's kernels


@each_kind
@pytest.mark.parametrize(
    "args, kwargs", [((3, 0), {}), ((3, 4, 0), {}), ((3, 4), {"dropout": 2}), ((3, 4.0), {}), ((3, 4), {"bias": 2})]
)
def test_bad_arguments_are_refused_as_torch_refuses_them(kind: str, args: Any, kwargs: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as theirs:
        torch.nn.GRU(*args, **kwargs)
    with pytest.raises(theirs.type) as ours:
        make(kind, *args, **kwargs)
    assert str(ours.value) == str(theirs.value)


@each_kind
def test_bad_input(kind: str) -> None:
    module, title = make(kind), KINDS[kind][0]
    for bad, error, words in (
        (torch.randn(2, 2, 2, 2, dtype=D), ValueError, f"{title}: Expected input to be 2D or 3D, got 4D instead"),
        (torch.randn(T, B, I), ValueError, "does not match weight dtype"),
        (torch.randn(T, B, I + 1, dtype=D), RuntimeError, "input.size\\(-1\\) must be equal to input_size"),
        (torch.randn(0, B, I, dtype=D), RuntimeError, "sequence length to be larger than 0"),
    ):
        with pytest.raises(error, match=words):
            module(bad)
    with pytest.raises(RuntimeError, match="Expected hidden"):
        module(torch.randn(T, B, I, dtype=D), bare(states_of(module, B + 1)))
    with pytest.raises(ValueError, match="no peepholes"):
        make(kind, peephole=True)


@each_kind
def test_who_expects_torchs_modules_says_so(kind: str) -> None:
    module, x = make(kind).eval(), torch.randn(T, B, I, dtype=D)
    with rnnkern.use_backend("torch"), pytest.raises(RuntimeError, match=f"torch has no {module._cell}"):
        module(x)
    with pytest.raises(ValueError, match=f"torch.nn has no {type(module).__name__}"):
        rnnkern.restore(torch.nn.Sequential(module))
    assert rnnkern.accelerate(torch.nn.Sequential(module))[0] is module
    whole = module(x)[0]
    check(torch.cat([y for y, _ in rnnkern.tbptt(module, x, 2)]), whole, whole, kind)
    with pytest.raises(RuntimeError, match="torch.jit.script cannot compile .* torch.export can"):
        torch.jit.script(module)
    with pytest.raises(RuntimeError, match=f"torch.jit.trace cannot follow {module._cell}.* torch.export can"):
        torch.jit.trace(module, (x,))
    exported = torch.export.export(module, (x,)).module()
    check(exported(x)[0], whole, whole, kind)
    with torch.autocast("cpu"):
        assert make(kind, dtype=torch.float32)(x.float())[0].dtype == torch.float32  # as GRU
