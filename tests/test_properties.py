"""Properties that hold for every network and every input, on examples that hypothesis looks for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stacks import KINDS, D, flat, gradients
from tolerance import check, check_grad
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkern

# The seeds of conftest are per test and the examples draw their own, so sharing its fixtures over examples is harmless.
few = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Net(NamedTuple):
    module: Any
    x: Tensor  # [T, B, I], asks for gradients
    hx: Any
    leaves: list[Tensor]

    @property
    def wrt(self) -> list[Tensor]:
        return [*self.leaves, *self.module.parameters()]


@st.composite
def nets(draw: st.DrawFn, bidirectional: bool | None = None, layers: int = 2) -> Net:
    kind = draw(st.sampled_from(list(KINDS)))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    both = draw(st.booleans()) if bidirectional is None else bidirectional
    H = draw(st.integers(3, 19) if kind == "LSTM proj" else st.integers(1, 19))
    module = getattr(rnnkern, kind.split()[0])(
        draw(st.integers(1, 6)),
        H,
        draw(st.integers(1, layers)),
        bias=draw(st.booleans()),
        bidirectional=both,
        dtype=D,
        **KINDS[kind],
    )
    T, B, N = draw(st.integers(1, 8)), draw(st.integers(1, 9)), module.num_layers * (1 + both)
    x = torch.randn(T, B, module.input_size, dtype=D, requires_grad=True)
    widths = [module.proj_size or H, H] if "LSTM" in kind else [H]
    states = [torch.randn(N, B, w, dtype=D, requires_grad=True) for w in widths]
    return Net(module, x, tuple(states) if len(states) == 2 else states[0], [x, *states])


def part(hx: Any, rows: Any) -> Any:
    return tuple(h[:, rows] for h in hx) if isinstance(hx, tuple) else hx[:, rows]


def same(ours: Any, expected: Any, wrt: list[Tensor], what: str) -> None:
    a, b = flat(ours), flat(expected)
    check(a, b, b, what)
    ga, gb = gradients(a, wrt), gradients(b, wrt)
    check_grad(ga, gb, gb, f"{what}, gradient")


@few
@given(net=nets(bidirectional=False), cut=st.integers(1, 7))
def test_chunks_are_the_whole(backend: str, net: Net, cut: int) -> None:
    """The state handed over by hand, gradients through it included."""
    with rnnkern.use_backend(backend):
        whole = net.module(net.x, net.hx)
        parts, hx = [], net.hx
        for chunk in net.x.split(cut):
            y, hx = net.module(chunk, hx)
            parts.append(y)
    same((torch.cat(parts), hx), whole, net.wrt, "chunks")


@few
@given(net=nets(), data=st.data())
def test_batch_rows_are_independent(backend: str, net: Net, data: st.DataObject) -> None:
    """Any rows in any order, repeated too, are the rows of the whole batch."""
    B = net.x.shape[1]
    rows = data.draw(st.lists(st.integers(0, B - 1), min_size=1, max_size=2 * B))
    with rnnkern.use_backend(backend):
        y, final = net.module(net.x, net.hx)
        found = net.module(net.x[:, rows], part(net.hx, rows))
    same(found, (y[:, rows], part(final, rows)), net.wrt, f"rows {rows}")


@few
@given(net=nets(), data=st.data())
def test_packed_padded_and_alone_are_the_same(backend: str, net: Net, data: st.DataObject) -> None:
    """A row of a packed batch, of a padded one with lengths=, and cut to its length and alone."""
    T, B, _ = net.x.shape
    lengths = data.draw(st.lists(st.integers(1, T), min_size=B, max_size=B))
    packed = pack_padded_sequence(net.x, torch.tensor(lengths), enforce_sorted=False)
    with rnnkern.use_backend(backend):
        padded = net.module(net.x, net.hx, lengths=lengths)
        y, final = net.module(packed, net.hx)
        rows = [net.module(net.x[:n, b : b + 1], part(net.hx, slice(b, b + 1))) for b, n in enumerate(lengths)]
    same((pad_packed_sequence(y, total_length=T)[0], final), padded, net.wrt, "packed")
    ends = [torch.cat(states, 1) for states in zip(*(flat(r[1]) for r in rows), strict=True)]
    whole = torch.cat([torch.nn.functional.pad(r[0], (0, 0, 0, 0, 0, T - r[0].shape[0])) for r in rows], 1)
    same(padded, (whole, ends), net.wrt, "alone")


@few
@given(net=nets(), data=st.data())
def test_zero_lengths_change_nothing_else(backend: str, net: Net, data: st.DataObject) -> None:
    """Rows of no steps, with NaN for padding: zero outputs, their own states back, finite gradients, others alone."""
    T, B, _ = net.x.shape
    lengths = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    there = torch.arange(T).unsqueeze(1) < torch.tensor(lengths)
    with torch.no_grad():
        net.x[~there] = float("nan")
    with rnnkern.use_backend(backend):
        y, final = net.module(net.x, net.hx, lengths=lengths)
        live = [b for b, n in enumerate(lengths) if n]
        others = net.module(net.x[:, live], part(net.hx, live), lengths=[lengths[b] for b in live]) if live else None
    assert not y[~there].any()
    empty = [b for b, n in enumerate(lengths) if not n]
    for f, h in zip(flat(final), flat(net.hx), strict=True):
        assert torch.equal(f[:, empty], h[:, empty])
    found = gradients([y, *flat(final)], net.wrt)
    assert all(g.isfinite().all() for g in found)
    assert not found[0][~there].any()
    if others:
        expected = flat(others)
        check(flat((y[:, live], part(final, live))), expected, expected, "the others")


@few
@given(net=nets(layers=1), data=st.data())
def test_a_reset_everywhere_forgets_the_past(backend: str, net: Net, data: st.DataObject) -> None:
    """With a mark at every step, each step is a sequence of its own that begins at reset_state."""
    T, B, _ = net.x.shape
    restart = [torch.randn_like(h[:, :1]).requires_grad_() for h in flat(net.hx)]
    given_state = tuple(restart) if isinstance(net.hx, tuple) else restart[0]
    with rnnkern.use_backend(backend):
        y, _ = net.module(net.x, net.hx, reset=torch.ones(T, B, dtype=torch.bool), reset_state=given_state)
        wide = [r.expand(-1, T * B, -1) for r in restart]
        if net.module.bidirectional:  # the reverse direction still enters the last step from hx
            wide = [
                torch.cat([w[:1], torch.cat([w[1:, :-B], h[1:]], 1)]) for w, h in zip(wide, flat(net.hx), strict=True)
            ]
        alone = net.module(net.x.reshape(1, T * B, -1), tuple(wide) if isinstance(net.hx, tuple) else wide[0])[0]
    same(y, alone.view(T, B, -1), [*net.wrt, *restart], "steps alone")


@few
@given(net=nets(bidirectional=True, layers=1))
def test_reversing_time_swaps_the_directions(backend: str, net: Net) -> None:
    """One layer's two directions on the reversed input with swapped weights are each other."""
    module = net.module
    swapped = {
        n: getattr(module, n.removesuffix("_reverse") if "_reverse" in n else f"{n}_reverse")
        for n, _ in module.named_parameters()
    }
    turn = tuple(h.flip(0) for h in flat(net.hx))
    with rnnkern.use_backend(backend):
        y, final = module(net.x, net.hx)
        back, other = torch.func.functional_call(
            module, swapped, (net.x.flip(0), turn if isinstance(net.hx, tuple) else turn[0])
        )
    both = back.flip(0).unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    same((both, [h.flip(0) for h in flat(other)]), (y, final), net.wrt, "reversed")
