"""What torch.nn has not: lengths, resets, all states; autocast; first and second derivatives by finite differences."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from stacks import CELLS, KINDS, D, Pair, call_backends, draw, example, flat, gradients, pair, torch_has_lstm
from tolerance import check, check_grad
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import rnnkern
from rnnkern import dispatch

kinds = pytest.mark.parametrize("kind", KINDS)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def same(ours: Any, expected: Any, wrt: tuple[list[Tensor], list[Tensor]], what: str) -> None:
    a, b = flat(ours), flat(expected)
    check(a, b, b, what)
    ga, gb = gradients(a, wrt[0]), gradients(b, wrt[1])
    check_grad(ga, gb, gb, f"{what}, gradient")


def as_tuple(hx: Any) -> tuple[Tensor, ...]:
    return hx if isinstance(hx, tuple) else (hx,)


@kinds
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_functions_are_the_modules(kind: str, batch_first: bool, backend: str) -> None:
    both = pair(kind, 3, 5, 2, bidirectional=True, batch_first=batch_first)
    function = getattr(rnnkern.functional, {"RNN": "rnn_tanh", "RNN relu": "rnn_relu", "GRU": "gru"}.get(kind, "lstm"))
    weights = list(both.theirs.parameters())
    options: dict[str, Any] = dict(num_layers=2, bidirectional=True, batch_first=batch_first)
    for layout in ("dense", "unbatched", "packed"):
        x, hx, leaves = example(both.theirs, layout)
        with rnnkern.use_backend(backend):
            if layout == "packed":
                ours = function(x.data, hx, weights, batch_sizes=x.batch_sizes, **options)
            else:
                ours = function(x, hx, weights, **options)
        same(ours, both.theirs(x, hx), ([*leaves, *weights],) * 2, layout)


@kinds
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_are_torch_s_packed_sequences(kind: str, batch_first: bool, backend: str) -> None:
    both = pair(kind, 3, 5, 2, bidirectional=True, batch_first=batch_first, backend=backend)
    x, hx, leaves = example(both.theirs, "dense", T=6, B=4)
    lengths = torch.tensor([2, 5, 1, 4])
    packed, final = both.theirs(pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False), hx)
    expected = pad_packed_sequence(packed, batch_first, total_length=6)[0], final
    wrt = [*leaves, *both.ours.parameters()], [*leaves, *both.theirs.parameters()]
    for given in (lengths.tolist(), *(lengths.to(kind) for kind in INTEGERS)):
        same(both.run_ours(x, hx, lengths=given), expected, wrt, str(given))


@kinds
def test_sequences_of_length_zero(kind: str, backend: str) -> None:
    """Their states go through untouched, gradients included; the others are as if they were alone."""
    both = pair(kind, 3, 5, 2, bidirectional=True, backend=backend)
    x, hx, leaves = example(both.theirs, "dense", T=4, B=3)
    y, final = both.run_ours(x, hx, lengths=[3, 0, 4])
    assert not y[:, 1].any() and not y[3:, 0].any()
    for f, h in zip(as_tuple(final), as_tuple(hx), strict=True):
        assert torch.equal(f[:, 1], h[:, 1])
    found = torch.autograd.grad([f[:, 1].sum() for f in as_tuple(final)], leaves, retain_graph=True)
    assert not found[0].any() and all((g[:, 1] == 1).all() and not g[:, [0, 2]].any() for g in found[1:])
    for b, n in ((0, 3), (2, 4)):
        own = [h[:, b : b + 1].contiguous() for h in as_tuple(hx)]
        alone = both.theirs(x[:n, b : b + 1], tuple(own) if len(own) == 2 else own[0])
        check([y[:n, b : b + 1]], [alone[0]], [alone[0]], f"row {b}")
    nobody = both.run_ours(x, hx, lengths=[0, 0, 0])
    assert not nobody[0].any()
    assert all(torch.equal(f, h) for f, h in zip(as_tuple(nobody[1]), as_tuple(hx), strict=True))


def segments(
    module: Any,
    x: Tensor,
    hx: tuple[Tensor, ...],
    restart: tuple[Tensor, ...],
    cuts: list[list[int]],
    ends: list[int],
) -> Any:
    """Every segment of every row run alone by torch.nn, joined. One layer; x [T, B, I]."""
    T, B, _ = x.shape
    two, D2 = len(hx) == 2, module.bidirectional
    rows, finals = [], []
    for b in range(B):
        marks = [c for c in cuts[b] if c < ends[b]]
        edges = sorted({0, ends[b], *marks})
        parts = []
        last: list[list[Tensor]] = [[h[0, b] for h in hx], [h[1, b] for h in hx] if D2 else []]
        for start, end in itertools.pairwise(edges):
            forward = restart if start in marks else hx
            states = []
            for h, r, f in zip(hx, restart, forward, strict=True):
                back = h if end == ends[b] else r
                states.append(torch.stack([f[0, b], back[1, b]] if D2 else [f[0, b]]).unsqueeze(1))
            y, s = module(x[start:end, b : b + 1], tuple(states) if two else states[0])
            parts.append(y)
            s = as_tuple(s)
            if end == ends[b]:
                last[0] = [v[0, 0] for v in s]
            if start == 0 and D2:
                last[1] = [v[1, 0] for v in s]
        width = (module.proj_size or module.hidden_size) * (1 + D2)
        rows.append(torch.cat([*parts, x.new_zeros(T - ends[b], 1, width)]))
        finals.append([torch.stack([last[d][n] for d in range(1 + D2)]) for n in range(len(hx))])
    return torch.cat(rows, 1), tuple(torch.stack([f[n] for f in finals], 1) for n in range(len(hx)))


@kinds
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layout", ["dense", "batch_first", "unbatched", "padded", "packed", "unsorted"])
def test_reset_is_segments_run_alone(kind: str, bidirectional: bool, layout: str, backend: str) -> None:
    """Outputs, final states and gradients, of a learned restart state too; nothing crosses in either direction."""
    both = pair(kind, 3, 5, bidirectional=bidirectional, batch_first=layout == "batch_first", backend=backend)
    both.theirs.batch_first = False
    T, B = 7, 1 if layout == "unbatched" else 3
    ends = [T] * B if layout in ("dense", "batch_first", "unbatched") else [4, 7, 5][:B]
    cuts = [[0, 3, 4], [5], [2, 6]][:B]  # with lengths, row 2's mark at 6 and row 0's at 4 lie in the padding
    order = [1, 2, 0] if layout == "packed" else [0, 1, 2][:B]
    ends, cuts = [ends[b] for b in order], [cuts[b] for b in order]
    x = draw(T, B, 3)
    _, hx, leaves = example(both.theirs, "dense", T=T, B=B)
    hx = as_tuple(hx)
    learned = [torch.randn_like(h[:, :1]).requires_grad_() for h in hx]
    reset = torch.zeros(T, B, dtype=torch.bool)
    for b, marks in enumerate(cuts):
        reset[marks, b] = True
    for restart in (learned, None):
        wide = tuple(r.expand_as(h) if restart else torch.zeros_like(h) for r, h in zip(learned, hx, strict=True))
        expected = segments(both.theirs, x, hx, wide, cuts, ends)

        def pack(v: Tensor) -> PackedSequence:
            return pack_padded_sequence(v, torch.tensor(ends), enforce_sorted=layout == "packed")

        def shape(v: Any, one: bool = restart is None) -> Any:
            return v[0] if len(v) == 1 else tuple(v)

        given = shape(restart) if restart else None
        if layout == "batch_first":
            ours = both.run_ours(x.transpose(0, 1), shape(hx), reset=reset.t(), reset_state=given)
            ours = (ours[0].transpose(0, 1), *ours[1:])
        elif layout == "unbatched":
            flat_given = shape([r[:, 0] for r in restart]) if restart else None
            y, s = both.run_ours(x[:, 0], shape([h[:, 0] for h in hx]), reset=reset[:, 0], reset_state=flat_given)
            ours = (y.unsqueeze(1), [v.unsqueeze(1) for v in as_tuple(s)])
        elif layout == "padded":
            ours = both.run_ours(x, shape(hx), lengths=ends, reset=reset, reset_state=given)
        elif layout == "dense":
            ours = both.run_ours(x, shape(hx), reset=reset, reset_state=given)
        else:
            y, s = both.run_ours(pack(x), shape(hx), reset=pack(reset), reset_state=given)
            ours = (pad_packed_sequence(y, total_length=T)[0], s)
        extra = learned if restart else []
        wrt = [x, *hx, *extra, *both.ours.parameters()], [x, *hx, *extra, *both.theirs.parameters()]
        same(ours, expected, wrt, f"restart={'learned' if restart else 'zero'}")


def test_reset_state_of_full_batch_follows_its_rows(backend: str) -> None:
    """Packed and unsorted: every row restarts from its own state."""
    both = pair("LSTM", 3, 5, 2, bidirectional=True, backend=backend)
    x, hx, _ = example(both.theirs, "dense", T=5, B=3)
    restart = tuple(torch.randn_like(h) for h in hx)
    reset = torch.rand(5, 3) < 0.4
    lengths = torch.tensor([2, 5, 4])
    padded = both.run_ours(x, hx, lengths=lengths, reset=reset, reset_state=restart)
    y, final = both.run_ours(
        *(pack_padded_sequence(x, lengths, enforce_sorted=False), hx),
        reset=pack_padded_sequence(reset, lengths, enforce_sorted=False),
        reset_state=restart,
    )
    check([pad_packed_sequence(y)[0], *final], flat(padded), flat(padded), "packed")


@pytest.mark.parametrize("shared", [0, 1])
def test_one_reset_state_for_all_beside_one_for_each(shared: int) -> None:
    """In another order than the rows', the one must follow them and the other must not."""
    both = pair("LSTM", 3, 5, 2, bidirectional=True)
    x, hx, _ = example(both.theirs, "dense", T=5, B=3)
    restart = [torch.randn_like(h[:, :1] if k == shared else h) for k, h in enumerate(hx)]
    reset, lengths = torch.rand(5, 3) < 0.4, torch.tensor([2, 5, 4])
    wide = both.run_ours(x, hx, lengths=lengths, reset=reset, reset_state=tuple(r.expand_as(hx[0]) for r in restart))
    padded = both.run_ours(x, hx, lengths=lengths, reset=reset, reset_state=tuple(restart))
    packed, marks = (pack_padded_sequence(v, lengths, enforce_sorted=False) for v in (x, reset))
    y, final = both.run_ours(packed, hx, reset=marks, reset_state=tuple(restart))
    check(flat(padded), flat(wide), flat(wide), "padded")
    check([pad_packed_sequence(y)[0], *final], flat(wide), flat(wide), "packed")


@kinds
@pytest.mark.parametrize("layout", ["dense", "batch_first", "unbatched", "padded", "unsorted"])
def test_return_states(kind: str, layout: str, backend: str) -> None:
    """Every state of every layer: layer by layer by torch.nn, and c by stopping at every step."""
    batch_first = layout == "batch_first"
    both = pair(kind, 3, 5, 3, bidirectional=False, batch_first=batch_first, dropout=0.5, backend=backend)
    both.ours.train(), both.theirs.eval()
    x, hx, leaves = example(both.ours, layout if layout in ("unbatched", "unsorted") else "dense", T=4, B=3)
    options = {"lengths": [4, 0, 2]} if layout == "padded" else {}
    both.ours.eval()
    y, final, states = both.run_ours(x, hx, return_states=True, **options)
    plain, plain_final = both.run_ours(x, hx, **options)
    check(flat((y, final)), flat((plain, plain_final)), flat((plain, plain_final)), "the same output")
    assert isinstance(states, tuple) and len(states) == 3
    top = states[-1][0] if "LSTM" in kind else states[-1]
    assert top is y
    if layout == "dense":
        for t in range(1, 5):
            _, stopped = both.theirs(x[:t], hx)
            for k in range(3):
                found = states[k] if "LSTM" in kind else (states[k],)
                expected = [s[k] for s in as_tuple(stopped)]
                check([s[t - 1] for s in found], expected, expected, f"layer {k} after {t} steps")
        wrt = [*leaves, *both.ours.parameters()]
        loss = sum((s**2).sum() for s in flat(states))
        assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(loss, wrt))
    first = y.data if isinstance(y, PackedSequence) else y
    for s in states:
        for v in s if "LSTM" in kind else [s]:
            assert isinstance(v, PackedSequence) == isinstance(y, PackedSequence)
            data = v.data if isinstance(v, PackedSequence) else v
            assert data.shape[:-1] == first.shape[:-1] and data.dtype == first.dtype


def test_states_are_before_dropout(backend: str) -> None:
    module = rnnkern.GRU(3, 50, 2, dropout=0.9)
    with rnnkern.use_backend(backend):
        states = module(torch.randn(4, 2, 3), return_states=True)[2]
    assert (states[0] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_torch_s_dtypes(dtype: torch.dtype, backend: str) -> None:
    """For every cell, container, weight, input and state dtype; an LSTM that torch refuses gives the same as others."""
    f32, low = torch.float32, dtype
    for kind, wd, xd, hd in itertools.product(KINDS, (f32, low), (f32, low), (None, f32, low)):
        both = pair(kind, 3, 5, 2, backend=backend, dtype=wd)
        x, hx, _ = example(both.ours, "dense")
        x = x.detach().to(xd)
        hx = None if hd is None else tuple(h.detach().to(hd) for h in as_tuple(hx))
        hx = hx[0] if hx and len(hx) == 1 else hx
        for lengths in (None, [4, 2, 1], [4, 4, 4]):
            input = x if lengths is None else pack_padded_sequence(x, lengths)
            with torch.autocast("cpu", dtype=dtype):
                found = [t.dtype for t in flat(both.run_ours(input, hx))]
                if kind == "LSTM" and lengths != [4, 2, 1] and not torch_has_lstm(dtype):
                    expected = [dtype] * 3
                else:
                    expected = [t.dtype for t in flat(both.theirs(input, hx))]
            assert found == expected, (kind, lengths, wd, xd, hd)
    for kind, wd, xd, hd in itertools.product(CELLS, (f32, low), (f32, low), (None, f32, low)):
        both = pair(kind, 3, 5, backend=backend, dtype=wd)
        h = None if hd is None else torch.randn(2, 5).to(hd)
        hx = (h, h) if h is not None and "LSTM" in kind else h
        with torch.autocast("cpu", dtype=dtype):
            ours, theirs = (flat(m(torch.randn(2, 3).to(xd), hx)) for m in (both.run_ours, both.theirs))
        assert [t.dtype for t in ours] == [t.dtype for t in theirs], (kind, wd, xd, hd)


@kinds
def test_autocast_results(kind: str, backend: str) -> None:
    """The numbers by the one rule, fp32 weights get fp32 gradients, and fp64 is left alone."""
    both = pair(kind, 9, 24, 2, backend=backend, dtype=torch.float32)
    x, _, leaves = example(both.ours, "dense")
    truth = pair(kind, 9, 24, 2)
    truth.theirs.load_state_dict(both.theirs.state_dict())
    has_lstm = torch_has_lstm(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = flat(both.run_ours(x))
        with torch.backends.mkldnn.flags(enabled=has_lstm):
            theirs = flat(both.theirs(x))
    check(ours, theirs, flat(truth.theirs(x.double())), "bf16", dtype=torch.bfloat16)
    found = torch.autograd.grad(sum(o.sum() for o in ours), list(both.ours.parameters()))
    assert all(g.dtype == torch.float32 for g in found)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = flat(truth.run_ours(x.double()))
    assert all(t.dtype == D for t in exact)


@pytest.mark.parametrize("backend", call_backends())
@kinds
def test_gradcheck(kind: str, backend: str) -> None:
    both = pair(kind, 2, 3, 2, bidirectional=True, backend=backend)
    x, hx, leaves = example(both.ours, "dense", T=3, B=2)
    names = [n for n, _ in both.ours.named_parameters()]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        states = tensors[1 : len(leaves)]
        weights = dict(zip(names, tensors[len(leaves) :], strict=True))
        given = states if isinstance(hx, tuple) else states[0]
        with rnnkern.use_backend(backend):
            return tuple(flat(torch.func.functional_call(both.ours, weights, (tensors[0], given))))

    assert torch.autograd.gradcheck(run, [*leaves, *both.ours.parameters()], nondet_tol=0.0)
    few = [*leaves[1:], *list(both.ours.parameters())[:2]]

    def part(*tensors: Tensor) -> tuple[Tensor, ...]:
        states, weights = tensors[: len(leaves) - 1], tensors[len(leaves) - 1 :]
        return run(x, *states, *weights, *list(both.ours.parameters())[2:])[:1]

    if kind != "RNN relu":  # its second derivative is a sum of deltas
        assert torch.autograd.gradgradcheck(part, few, fast_mode=True)


@pytest.mark.parametrize("backend", call_backends())
@pytest.mark.parametrize("kind", ["GRU", "LSTM proj"])
def test_second_derivatives_are_the_reference_s(kind: str, backend: str) -> None:
    """Through inputs that depend on each other and, with dropout, through the very masks of the forward."""
    both = pair(kind, 3, 5, 2, dropout=0.4)
    base = draw(4, 2, 3)

    def twice(name: str) -> list[Tensor]:
        torch.manual_seed(3)
        x = base + both.ours.weight_ih_l0[:4, :1].unsqueeze(1)  # the input is made of a weight
        with rnnkern.use_backend(name):
            y = both.ours(x)[0]
        wrt = [base, *both.ours.parameters()]
        first = torch.autograd.grad(y.square().sum(), wrt, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), wrt)]

    exact = twice("reference")
    check(twice(backend), exact, exact, backend)


@pytest.mark.parametrize("backend", call_backends())
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_transforms(kind: str, backend: str) -> None:
    """vmap over inputs and weights, per-sample gradients and jvp, against plain loops."""
    models = [pair(kind, 3, 5, 2, bidirectional=True).ours for _ in range(3)]
    first = models[0]
    params, _ = torch.func.stack_module_state(models)
    own = dict(first.named_parameters())
    x = torch.randn(4, 3, 3, dtype=D)

    def call(weights: dict[str, Tensor], v: Tensor) -> Tensor:
        return torch.func.functional_call(first, weights, (v,))[0]

    def loss(weights: dict[str, Tensor], v: Tensor) -> Tensor:
        return call(weights, v.unsqueeze(1)).square().sum()

    with rnnkern.use_backend(backend):
        ensemble = torch.vmap(call, in_dims=(0, None))(params, x)
        inputs = torch.vmap(call, in_dims=(None, 0))(own, torch.stack([x, 2 * x]))
        per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 1))(own, x)
        _, tangent = torch.func.jvp(lambda v: call(own, v), (x,), (torch.ones_like(x),))
    with rnnkern.use_backend("reference"):
        expected = torch.stack([m(x)[0] for m in models])
        check(ensemble, expected, expected, "vmap over weights")
        expected = torch.stack([first(x)[0], first(2 * x)[0]])
        check(inputs, expected, expected, "vmap over inputs")
        alone = [torch.autograd.grad(loss(own, x[:, b]), list(own.values())) for b in range(3)]
    stacked = [torch.stack(g) for g in zip(*alone, strict=True)]
    check(list(per_sample.values()), stacked, stacked, "per sample")
    step = 1e-6
    with rnnkern.use_backend("reference"), torch.no_grad():
        numeric = (first(x + step)[0] - first(x - step)[0]) / (2 * step)
    check(tangent, numeric.float().double(), numeric, "jvp", dtype=torch.float32)


@pytest.mark.parametrize("backend", call_backends())
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_batched_gradients(kind: str, backend: str) -> None:
    """is_grads_batched, and with it jacobian(vectorize=True): many backward passes of one graph at once."""
    both = pair(kind, 3, 5, 2, bidirectional=True, backend=backend)
    x, hx, leaves = example(both.ours, "dense")
    y = both.run_ours(x, hx)[0]
    wrt = [*leaves, *both.ours.parameters()]
    basis = torch.eye(y.numel(), dtype=D)[:3].view(3, *y.shape)
    batched = torch.autograd.grad(y, wrt, basis, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, wrt, b, retain_graph=True) for b in basis]
    expected = [torch.stack(g) for g in zip(*one_by_one, strict=True)]
    check(batched, expected, expected, "batched gradients")
    again = torch.autograd.grad(y, x, basis, is_grads_batched=True, create_graph=True)[0]
    alone = torch.stack([torch.autograd.grad(y, x, b, create_graph=True)[0] for b in basis])
    second = [torch.autograd.grad(g.square().sum(), wrt, retain_graph=True) for g in (again, alone)]
    check(second[0], second[1], second[1], "derivatives of batched gradients")


@pytest.mark.parametrize("kind", ["LSTM"])  # each takes seconds; test_ops.py compiles every cell's layer
def test_compiles_whole(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile(fullgraph=True) once Dynamo is told to accept modules derived from torch.nn's."""
    monkeypatch.undo()  # Dynamo knows torch.empty, not the one of the tests that fills it
    both = pair(kind, 3, 5, 2, bidirectional=True)
    x = draw(4, 3, 3)
    torch._dynamo.reset()
    options: list[dict[str, Any]] = [{}, {"lengths": torch.tensor([2, 4, 0])}, {"return_states": True}]
    with torch._dynamo.config.patch(allow_rnn=True), rnnkern.use_backend(backend):
        compiled = torch.compile(both.ours, backend="aot_eager", fullgraph=True)
        for given in options:
            found, expected = flat(compiled(x, **given)), flat(both.ours(x, **given))
            check(found, expected, expected, str(given))
            wrt = [x, *both.ours.parameters()]
            a, b = gradients(found, wrt), gradients(expected, wrt)
            check_grad(a, b, b, str(given))
    torch._dynamo.reset()


def test_torch_keeps_no_buffers_after_the_backward() -> None:
    """The kernel's own graph inside our Function goes when torch would free its own; twice raises as torch does."""
    both = Pair(*(pair("GRU", 3, 5).__dict__[n] for n in ("theirs", "ours")), backend="torch")
    x = draw(4, 2, 3)
    y = both.run_ours(x)[0].sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()
    assert dispatch.last() == "torch"
