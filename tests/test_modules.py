"""Modules against torch.nn: every option, outputs, final states and every gradient, on every backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from stacks import CELLS, KINDS, LAYOUTS, D, Pair, call_backends, draw, example, flat, gradients, pair, precise
from tolerance import check, check_grad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkern
from rnnkern import dispatch

on_all = pytest.mark.parametrize("backend", call_backends())
kinds = pytest.mark.parametrize("kind", KINDS)


@on_all
@kinds
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_torch(kind: str, layers: int, layout: str, backend: str) -> None:
    """fp64, directions x bias x batch_first x hx."""
    for bidirectional, bias, batch_first, given in itertools.product((False, True), repeat=4):
        both = pair(
            kind, 3, 5, layers, bidirectional=bidirectional, bias=bias, batch_first=batch_first, backend=backend
        )
        x, hx, leaves = example(both.theirs, layout)
        what = f"bidirectional={bidirectional} bias={bias} batch_first={batch_first} hx={given}"
        both.compare(x, hx if given else None, leaves, what)
        assert dispatch.last() == backend


@on_all
@kinds
@pytest.mark.parametrize("H", [1, 3, 17])
def test_odd_sizes(kind: str, H: int, backend: str) -> None:
    if kind == "LSTM proj" and H < 3:
        pytest.skip("a projection to 2 features needs more than 2 hidden units")
    for B, layout in itertools.product((1, 7, 33), ("dense", "unsorted")):
        both = pair(kind, 2, H, bidirectional=True, backend=backend)
        both.compare(*example(both.theirs, layout, T=3, B=B), f"B={B} {layout}")


@on_all
@kinds
@pytest.mark.parametrize("H, B", [(200, 7), (650, 1)])
def test_large_sizes(kind: str, H: int, B: int, backend: str) -> None:
    both = pair(kind, 11, H, backend=backend)
    both.compare(*example(both.theirs, "dense", T=2, B=B), "large")


@on_all
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(kind: str, dtype: torch.dtype, backend: str) -> None:
    """By the one rule: no worse than a few times torch's own kernel at that dtype."""
    for layout in ("dense", "unsorted"):
        both = pair(kind, 9, 24, 2, bidirectional=True, backend=backend)
        x, hx, _ = example(both.theirs, layout, T=6, B=5)
        theirs, ours = both.theirs.to(dtype), both.ours.to(dtype)
        truth = precise(theirs)  # of the rounded weights

        def run(module: torch.nn.Module, like: torch.dtype, x=x, hx=hx):  # type: ignore[no-untyped-def]
            leaves = [t.detach().to(dtype).to(like).requires_grad_() for t in flat((x, hx))]
            inside = x._replace(data=leaves[0]) if hasattr(x, "batch_sizes") else leaves[0]
            with rnnkern.use_backend(backend):
                out = flat(module(inside, tuple(leaves[1:]) if isinstance(hx, tuple) else leaves[1]))
            return out, gradients(out, [*leaves, *module.parameters()])

        (y, g), (ty, tg), (exact, exact_g) = run(ours, dtype), run(theirs, dtype), run(truth, D)
        assert all(a.dtype == dtype for a in (*y, *g))
        check(y, ty, exact, f"{layout} outputs")
        check_grad(g, tg, exact_g, f"{layout} gradients")


@on_all
@kinds
def test_strides(kind: str, backend: str) -> None:
    """Slices, transposes, expanded batches and states: every stride that a caller may have."""
    both = pair(kind, 3, 5, backend=backend)
    base = draw(4, 6, 6)
    single = draw(4, 1, 3)
    for name, x in {
        "columns": base[..., ::2],
        "transposed": draw(3, 6, 4).permute(2, 1, 0),
        "every second step": draw(8, 6, 3)[::2],
        "expanded": single.expand(4, 6, 3),
        "flipped": draw(4, 6, 3).flip(0),
        "offset": draw(25, 3)[1:].view(4, 6, 3),
    }.items():
        _, hx, leaves = example(both.theirs, "dense", T=4, B=6)
        both.compare(x, hx, leaves[1:], name)
        first, *_ = hx if isinstance(hx, tuple) else (hx,)
        wide = [h[:, :1].expand(-1, 6, -1) for h in (hx if isinstance(hx, tuple) else (hx,))]
        both.compare(x, tuple(wide) if isinstance(hx, tuple) else wide[0], leaves[1:], f"{name}, expanded states")


@on_all
@kinds
def test_gradient_of_strided_input(kind: str, backend: str) -> None:
    both = pair(kind, 3, 5, backend=backend)
    leaf = draw(4, 1, 6)
    both.compare(leaf[..., ::2].expand(4, 6, 3), None, [leaf], "through a slice and an expansion")
    out = flat(both.run_ours(leaf[..., :3], None))
    for g in torch.autograd.grad(out[0].sum(), [leaf, *both.ours.parameters()]):
        assert g.isfinite().all()  # the gradient of a sum is expanded: stride 0


@on_all
@kinds
def test_requires_grad_subsets(kind: str, backend: str) -> None:
    """Every subset of input, states and weights; none of the others gets a gradient."""
    both = pair(kind, 2, 3, bidirectional=True, backend=backend)
    names = ["x", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    for chosen in itertools.product((False, True), repeat=len(names)):
        wanted = {n for n, c in zip(names, chosen, strict=True) if c}
        x, hx, leaves = example(both.theirs, "dense", T=2, B=2)
        for module in (both.theirs, both.ours):
            for name, p in module.named_parameters():
                p.requires_grad_(name.split("_l0")[0].replace("weight_hr", "weight_hh") in wanted)
        leaves[0].requires_grad_("x" in wanted)
        for h in leaves[1:]:
            h.requires_grad_("hx" in wanted)
        out, theirs = flat(both.run_ours(x, hx)), flat(both.theirs(x, hx))
        assert all(o.requires_grad == bool(wanted) for o in out)
        check(out, theirs, theirs, str(wanted))
        wrt = [[t for t in (*leaves, *m.parameters()) if t.requires_grad] for m in (both.ours, both.theirs)]
        if wanted:
            check_grad(gradients(out, wrt[0]), (t := gradients(theirs, wrt[1])), t, str(wanted))


@on_all
@kinds
@pytest.mark.parametrize("layout", ["dense", "batch_first", "packed", "unsorted", "unbatched"])
@pytest.mark.parametrize("dropout", [0.4, 1.0])
def test_dropout_draws_torch_numbers(kind: str, layout: str, dropout: float, backend: str) -> None:
    for bidirectional in (False, True):
        batch_first = layout == "batch_first"
        both = pair(
            kind, 3, 5, 3, dropout=dropout, bidirectional=bidirectional, batch_first=batch_first, backend=backend
        )
        x, hx, leaves = example(both.theirs, "dense" if batch_first else layout)
        both.compare(x, hx, leaves, layout)
        both.theirs.eval(), both.ours.eval()
        both.compare(x, hx, leaves, f"{layout}, eval")


@on_all
@kinds
def test_eval_mode_has_a_backward(kind: str, backend: str) -> None:
    both = pair(kind, 3, 5, 2, dropout=0.5, backend=backend)
    both.theirs.eval(), both.ours.eval()
    both.compare(*example(both.theirs, "dense"), "eval")


@on_all
@kinds
def test_empty_batch(kind: str, backend: str) -> None:
    both = pair(kind, 3, 5, 2, bidirectional=True, backend=backend)
    x, hx, leaves = example(both.theirs, "dense", B=1)
    x = x[:, :0]
    out, theirs = flat(both.run_ours(x)), flat(both.theirs(x))
    assert [o.shape for o in out] == [t.shape for t in theirs]
    for g, p in zip(gradients(out, list(both.ours.parameters())), both.ours.parameters(), strict=True):
        assert g.shape == p.shape and not g.any()


@on_all
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_long_sequence(kind: str, backend: str) -> None:
    """More steps than a 16-bit counter holds; the end of it is what a fresh start near the end gives."""
    if backend == "reference":
        T = 66_000 if kind == "RNN" else 2_000  # a Python loop: one cell is enough for the counter
    else:
        T = 70_000
    both = pair(kind, 2, 3, backend=backend, dtype=torch.float32)
    x = torch.randn(T, 1, 2)
    with torch.no_grad():
        whole, tail = flat(both.run_ours(x)), flat(both.run_ours(x[-500:]))
    assert whole[0].shape == (T, 1, 3)
    check([whole[0][-1], *whole[1:]], [tail[0][-1], *tail[1:]], [tail[0][-1], *tail[1:]], "end")


@on_all
@kinds
def test_same_bits_twice(kind: str, backend: str) -> None:
    both = pair(kind, 20, 33, 2, dropout=0.3, bidirectional=True, backend=backend, dtype=torch.float32)
    x, hx, leaves = example(both.ours, "dense", T=7, B=9)

    def run() -> list[torch.Tensor]:
        torch.manual_seed(7)
        out = flat(both.run_ours(x, hx))
        return [*out, *gradients(out, [*leaves, *both.ours.parameters()])]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


@on_all
@kinds
def test_nothing_of_the_callers_changes(kind: str, backend: str) -> None:
    both = pair(kind, 3, 5, 2, bidirectional=True, dropout=0.2, backend=backend)
    for layout in LAYOUTS:
        x, hx, leaves = example(both.ours, layout)
        mine = [*leaves, *both.ours.parameters(), *flat(x)]
        before = [(t.detach().clone(), t._version) for t in mine]
        out = flat(both.run_ours(x, hx))
        gradients(out, [*leaves, *both.ours.parameters()])
        for t, (value, version) in zip(mine, before, strict=True):
            assert torch.equal(t, value) and t._version == version


@on_all
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_nan_and_inf_go_through(kind: str, backend: str) -> None:
    both = pair(kind, 3, 5, backend=backend, dtype=torch.float32)
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(4, 2, 3)
        x[2, 0, 1] = value
        with torch.no_grad():
            ours, theirs = flat(both.run_ours(x)), flat(both.theirs(x))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.isnan(), b.isnan()), value
        check([ours[0][:, 1]], [theirs[0][:, 1]], [theirs[0][:, 1]], "the other row")


@on_all
def test_padding_is_not_read(backend: str) -> None:
    """What a PackedSequence's container shows after pad_packed_sequence equals torch's, batch_first too."""
    both = pair("LSTM", 3, 5, batch_first=True, bidirectional=True, backend=backend)
    x = pack_padded_sequence(torch.randn(3, 4, 3, dtype=D), torch.tensor([2, 4, 1]), True, enforce_sorted=False)
    out, states = both.run_ours(x)
    theirs, their_states = both.theirs(x)
    assert torch.equal(out.batch_sizes, theirs.batch_sizes)
    padded = [pad_packed_sequence(o, True)[0] for o in (out, theirs)]
    check([padded[0], *states], [padded[1], *their_states], [padded[1], *their_states], "padded")


@on_all
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_cells(kind: str, bias: bool, backend: str) -> None:
    for batch, given, H in itertools.product((None, 1, 7, 0), (False, True), (1, 17)):
        both = pair(kind, 3, H, bias=bias, backend=backend)
        rows = () if batch is None else (batch,)
        leaves = [draw(*rows, 3), *(draw(*rows, H) for _ in range(2 if "LSTM" in kind else 1))]
        hx = None if not given else tuple(leaves[1:]) if "LSTM" in kind else leaves[1]
        both.compare(leaves[0], hx, leaves, f"B={batch} hx={given}")
        assert dispatch.last() == backend


@on_all
@pytest.mark.parametrize("kind", CELLS)
def test_cells_in_low_precision(kind: str, backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        both = pair(kind, 9, 24, backend=backend)
        theirs, ours = both.theirs.to(dtype), both.ours.to(dtype)
        x = torch.randn(5, 9, dtype=D).to(dtype)
        with torch.no_grad():
            found, truth = flat(Pair(theirs, ours, backend).run_ours(x)), flat(precise(theirs)(x.double()))
            check(found, flat(theirs(x)), truth, str(dtype))


@on_all
def test_a_cell_loop_is_a_sequence(backend: str) -> None:
    """Unrolled over time, a cell's gradients through many calls are the sequence's."""
    cell, whole = pair("LSTMCell", 3, 5, backend=backend), pair("LSTM", 3, 5, backend=backend)
    whole.ours.load_state_dict({f"{k}_l0": v for k, v in cell.ours.state_dict().items()})
    x, state, outputs = draw(6, 2, 3), None, []
    with rnnkern.use_backend(backend):
        for step in x:
            state = cell.ours(step, state)
            outputs.append(state[0])
    y, (h, c) = whole.run_ours(x)
    loop, seq = [torch.stack(outputs), *state], [y, h[0], c[0]]
    check(loop, seq, seq, "loop")
    ga, gb = (gradients(o, [x, *m.parameters()]) for o, m in ((loop, cell.ours), (seq, whole.ours)))
    check_grad(ga, gb, gb, "loop gradients")
