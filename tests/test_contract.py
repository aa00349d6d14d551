"""The scan contract through the layer, in fp64, on every scan backend: outputs, final states, every gradient.

Truth is torch.nn where torch has the thing, else a loop written out here, else the reference's forward under torch's
own autograd (`Call.written_out`). What a backend refuses is skipped with its reasons.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layers import MODULES, D, everything, gradients, module_calls, module_groups, own_direction, random_call
from tolerance import check, check_grad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnnkern.cells import CELLS


def compare(ours, truth, wrt, what):
    check(list(ours), list(truth), list(truth), what)
    expected = gradients(tuple(truth), wrt)
    check_grad(gradients(tuple(ours), wrt), expected, expected, f"{what}, gradients")


def make(name, **kw):
    kind, more, cell = MODULES[name]
    return kind(3, 6, **more, **kw, dtype=D), cell


def initial(m, B, layers=1):
    directions = layers * (1 + m.bidirectional)
    widths = (m.proj_size or m.hidden_size, *((m.hidden_size,) if m.mode == "LSTM" else ()))
    return tuple(torch.randn(directions, B, w, dtype=D, requires_grad=True) for w in widths)


def call_torch(m, x, hx):
    y, final = m(x, hx if len(hx) > 1 else hx[0])
    return y, final if len(hx) > 1 else (final,)


@pytest.mark.parametrize("layout", ["dense", "packed", "packed unsorted", "padded"])
@pytest.mark.parametrize("name", MODULES)
def test_torch_nn(name, layout, backend):
    T, B = 5, 4
    for bidirectional, layers, bias in ((False, 1, True), (True, 1, False), (True, 2, True), (False, 2, False)):
        m, cell = make(name, bidirectional=bidirectional, num_layers=layers, bias=bias)
        x = torch.randn(T, B, 3, dtype=D, requires_grad=True)
        hx = initial(m, B, layers)
        wrt = [x, *hx, *m.parameters()]
        if layout == "dense":
            y, final = module_calls(m, cell, x.reshape(T * B, 3), hx, T, B, backend=backend)
            ty, tf = call_torch(m, x, hx)
            ty = ty.reshape(T * B, -1)
        else:
            lengths = torch.tensor([5, 4, 4, 1] if layout == "packed" else [2, 5, 1, 4])
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            ty, tf = call_torch(m, packed, hx)
            if layout == "padded":
                y, final = module_calls(m, cell, x.reshape(T * B, 3), hx, T, B, lengths=lengths, backend=backend)
                ty = pad_packed_sequence(ty)[0].reshape(T * B, -1)
            else:
                offsets = torch.cat((torch.zeros(1, dtype=torch.int64), packed.batch_sizes.cumsum(0)[:-1]))
                order = packed.sorted_indices
                inner = tuple(h.index_select(1, order) for h in hx)
                y, final = module_calls(
                    m, cell, packed.data, inner, T, B, offsets=offsets, lengths=lengths[order], backend=backend
                )
                final = tuple(h.index_select(1, packed.unsorted_indices) for h in final)
                ty = ty.data
        compare((y, *final), (ty, *tf), wrt, f"{name} {layout} {bidirectional=} {layers=} {bias=}")


@pytest.mark.parametrize("name", MODULES)
def test_lengths_of_zero(name, backend):
    T, B = 6, 3
    m, cell = make(name, bidirectional=True)
    x, hx = torch.randn(T, B, 3, dtype=D, requires_grad=True), initial(m, B)
    lengths = torch.tensor([4, 0, 6])
    y, final = module_calls(m, cell, x.reshape(T * B, 3), hx, T, B, lengths=lengths, backend=backend)
    for f, h in zip(final, hx, strict=True):
        assert torch.equal(f[:, 1], h[:, 1])
    y = y.view(T, B, -1)
    assert not y[:, 1].any() and not y[4:, 0].any()
    rows, ends = [], []
    for b, n in enumerate(lengths.tolist()):
        if n:
            ty, tf = call_torch(m, x[:n, b : b + 1], tuple(h[:, b : b + 1].contiguous() for h in hx))
        else:
            ty, tf = x.new_zeros(0, 1, y.shape[-1]), tuple(h[:, b : b + 1] for h in hx)
        rows.append(torch.nn.functional.pad(ty, (0, 0, 0, 0, 0, T - n)))
        ends.append(tf)
    truth = (torch.cat(rows, 1), *(torch.cat(parts, 1) for parts in zip(*ends, strict=True)))
    compare((y, *final), truth, [x, *hx, *m.parameters()], name)


@pytest.mark.parametrize("layout", ["dense", "padded"])
@pytest.mark.parametrize("name", MODULES)
def test_empty_batch(name, layout, backend):
    m, cell = make(name, bidirectional=True)
    x, hx = torch.randn(0, 3, dtype=D, requires_grad=True), initial(m, 0)
    lengths = torch.zeros(0, dtype=torch.int64) if layout == "padded" else None
    y, final = module_calls(m, cell, x, hx, 6, 0, lengths=lengths, backend=backend)
    assert y.shape == (0, 2 * (m.proj_size or 6)) and [f.shape for f in final] == [h.shape for h in hx]
    found = gradients((y, *final), [x, *hx, *m.parameters()])
    assert all(not d.any() for d in found)


@pytest.mark.parametrize("layout", ["dense", "padded"])
@pytest.mark.parametrize("name", MODULES)
def test_padding_is_never_read(name, layout, backend):
    """NaN in the padding of x, in dy there and in the states of empty rows reaches nothing."""
    T, B = 4, 3
    m, cell = make(name, bidirectional=True)
    lengths = torch.tensor([4, 2, 3]) if layout == "padded" else None
    x, hx = torch.randn(T, B, 3, dtype=D), initial(m, B)
    past = torch.arange(T)[:, None] >= (torch.full((B,), T) if lengths is None else lengths)
    dirty = x.masked_fill(past[..., None], float("nan")).requires_grad_()
    clean = x.masked_fill(past[..., None], 0.0).requires_grad_()
    found = []
    for given, bad in ((dirty, float("nan")), (clean, 0.0)):
        y, final = module_calls(m, cell, given.reshape(T * B, 3), hx, T, B, lengths=lengths, backend=backend)
        dy = torch.ones_like(y).masked_fill(past.reshape(-1, 1), bad)
        grads = torch.autograd.grad((y, *final), [given, *hx, *m.parameters()], (dy, *map(torch.ones_like, final)))
        found.append([y, *final, *grads])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_reset(name, learned, backend):
    """Segments joined into one row with a mask are the segments run one by one, in both directions."""
    T, B = 7, 2
    m, cell = make(name, bidirectional=True)
    x, hx = torch.randn(T, B, 3, dtype=D, requires_grad=True), initial(m, B)
    restart = tuple(torch.randn(2, 1, h.shape[-1], dtype=D, requires_grad=True) for h in hx)
    if not learned:
        restart = tuple(torch.zeros_like(r) for r in restart)
    cuts = ([0, 3, 4], [5])
    reset = torch.zeros(T, B, dtype=torch.bool)
    for b, starts in enumerate(cuts):
        reset[starts, b] = True
    groups, names = module_groups(m, 0)
    call = replace(
        random_call(cell, T=T, B=B),
        x=x.reshape(T * B, 1, 3),
        states=hx,
        groups=groups,
        names=names,
        reset=own_direction(reset),
        reset_states=restart if learned else (),
    ).skip_if_refused(backend)
    y, *rest = call.run(backend)
    rows, ends = [], []
    for b, starts in enumerate(cuts):
        edges = sorted({0, T, *starts})
        parts, last = [], [None, None]
        for first, end in zip(edges, edges[1:], strict=False):
            forward = restart if first in starts else tuple(h[:, b : b + 1] for h in hx)
            backward = restart if end != T else tuple(h[:, b : b + 1] for h in hx)
            entering = tuple(torch.stack((f[0], r[1])) for f, r in zip(forward, backward, strict=True))
            o, s = call_torch(m, x[first:end, b : b + 1], entering)
            parts.append(o)
            if end == T:
                last[0] = [v[0] for v in s]
            if first == 0:
                last[1] = [v[1] for v in s]
        rows.append(torch.cat(parts))
        ends.append([torch.stack(pair) for pair in zip(*last, strict=True)])
    truth = (torch.cat(rows, 1).reshape(T * B, -1), *(torch.cat(parts, 1) for parts in zip(*ends, strict=True)))
    wrt = [x, *hx, *(restart if learned else ()), *m.parameters()]
    compare((y.flatten(1), *rest[: len(hx)]), truth, wrt, name)


@pytest.mark.parametrize("name", ["rnn_tanh", "gru", "lstm"])
def test_recurrent_dropout(name, backend):
    """One mask per sequence on h before w_hh (Gal and Ghahramani 2016), against a loop written out."""
    T, B, H, scale = 6, 3, 6, 1 / 0.6
    m, cell = make(name, bidirectional=True)
    x, hx, keep = torch.randn(T, B, 3, dtype=D, requires_grad=True), initial(m, B), torch.rand(2, B, H) > 0.4
    groups, names = module_groups(m, 0)
    call = replace(
        random_call(cell, T=T, B=B),
        x=x.reshape(T * B, 1, 3),
        states=hx,
        groups=groups,
        names=names,
        noise={"h": (keep, scale)},
    ).skip_if_refused(backend)
    outputs, ends = [], []
    for d, g in enumerate(groups):
        h, c, rows = hx[0][d], hx[-1][d], {}
        for t in range(T) if d == 0 else reversed(range(T)):
            a = x[t] @ g.w_ih.T + g.b_ih
            r = (h * keep[d] * scale) @ g.params[0].T + g.params[1]
            if name == "rnn_tanh":
                h = (a + r).tanh()
            elif name == "lstm":
                i, f, u, o = (a + r).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * u.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                (ar, az, an), (rr, rz, rn) = a.chunk(3, 1), r.chunk(3, 1)
                z = (az + rz).sigmoid()
                h = (1 - z) * (an + (ar + rr).sigmoid() * rn).tanh() + z * h
            rows[t] = h
        outputs.append(torch.stack([rows[t] for t in range(T)]))
        ends.append((h, c)[: len(hx)])
    truth = (torch.stack(outputs, 2).reshape(T * B, 2, H), *(torch.stack(parts) for parts in zip(*ends, strict=True)))
    compare(call.run(backend)[: 1 + len(hx)], truth, [x, *hx, *m.parameters()], name)


@pytest.mark.parametrize("P", [None, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_everything_at_once(cell, P, backend):
    """The hand-written backward of the whole contract against autograd of its forward."""
    if P and len(CELLS[cell].states) == 1:
        pytest.skip(f"torch has no projection for {cell}")
    call = everything(cell, P).skip_if_refused(backend)
    compare(call.run(backend), call.written_out(), call.tensors, cell)


@pytest.mark.parametrize("zoneout", [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
@pytest.mark.parametrize("cell", CELLS)
def test_fixed_zoneout(cell, zoneout, backend):
    if zoneout[1] and len(CELLS[cell].states) == 1:
        pytest.skip(f"{cell} has no c")
    call = replace(random_call(cell), options={"zoneout": zoneout}).skip_if_refused(backend)
    compare(call.run(backend), call.written_out(), call.tensors, cell)


@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell, backend):
    """Finite differences: the one judge that shares no code with us."""
    call = random_call(cell, T=3, B=2, I=2, H=3).skip_if_refused(backend)
    call = replace(call, lengths=torch.tensor([2, 3])).skip_if_refused(backend)
    assert torch.autograd.gradcheck(lambda *v: call.with_tensors(*v).run(backend), tuple(call.tensors))


@pytest.mark.parametrize("cell, P", [("rnn_tanh", None), ("gru", None), ("lstm", None), ("lstm", 2)])
def test_gradcheck_of_everything(cell, P):
    call = everything(cell, P, T=3, B=3, H=3)
    assert torch.autograd.gradcheck(lambda *v: call.with_tensors(*v).run(), tuple(call.tensors))


@pytest.mark.parametrize("cell", CELLS)
def test_grad_clip_bounds_what_leaves_a_step(cell, backend):
    bound = 1e-3
    call = replace(random_call(cell), options={"grad_clip": bound}).skip_if_refused(backend)
    free = gradients(replace(call, options={}).run(backend), call.tensors)
    found = gradients(call.run(backend), call.tensors)
    K = len(call.states)
    assert all(d.abs().max() <= bound for d in found[1 : 1 + K])
    assert any(d.abs().max() > bound for d in free[1 : 1 + K])
    # Clipping touches the recurrence alone: the last step of each direction has the gradient that it had.
    last = (call.T - 1) * call.B
    one = replace(call, groups=call.groups[:1], reverse=(False,), states=tuple(s[:1] for s in call.states))
    clipped, kept = (gradients(c.run(backend), [one.x])[0] for c in (one, replace(one, options={})))
    torch.testing.assert_close(clipped[last:], kept[last:], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(clipped[:last], kept[:last])


@pytest.mark.parametrize("name", MODULES)
def test_chunks_chained_are_the_whole(name, backend):
    T, B = 9, 2
    m, cell = make(name)
    x, hx = torch.randn(T * B, 3, dtype=D, requires_grad=True), initial(m, B)
    whole = module_calls(m, cell, x, hx, T, B, backend=backend)
    parts, state = [], hx
    for first in range(0, T, 4):
        end = min(first + 4, T)
        y, state = module_calls(m, cell, x[first * B : end * B], state, end - first, B, backend=backend)
        parts.append(y)
    compare((torch.cat(parts), *state), (whole[0], *whole[1]), [x, *hx, *m.parameters()], name)


@pytest.mark.parametrize("cell", CELLS)
def test_models_are_independent(cell, backend):
    """M models with inputs of their own, D directions each: one call is M calls."""
    M, T, B = 3, 4, 2
    calls = [random_call(cell, T=T, B=B) for _ in range(M)]
    together = replace(
        calls[0],
        x=torch.cat([c.x for c in calls], 1),
        states=tuple(torch.cat(parts) for parts in zip(*(c.states for c in calls), strict=True)),
        groups=tuple(g for c in calls for g in c.groups),
        reverse=calls[0].reverse * M,
    ).skip_if_refused(backend)
    alone = [c.run(backend) for c in calls]
    axis = [1, *[0] * len(together.states), *[1] * (len(together.states) - 1)]
    truth = [torch.cat(parts, d) for parts, d in zip(zip(*alone, strict=True), axis, strict=True)]
    wrt = [t for c in calls for t in c.tensors]
    compare(together.run(backend), truth, wrt, cell)


@pytest.mark.parametrize("cell", CELLS)
def test_every_gradient_alone(cell, backend):
    """Each tensor as the only one that asks for a gradient: nothing else is computed, and it is the same gradient."""
    call = random_call(cell)
    expected = gradients(call.run(backend), call.tensors)
    fixed = call.detached()
    for k, d in enumerate(expected):
        tensors = fixed.tensors
        tensors[k] = tensors[k].clone().requires_grad_()
        found = torch.autograd.grad(fixed.with_tensors(*tensors).run(backend)[0].sum(), tensors[k])
        assert found[0].shape == d.shape
        whole = torch.autograd.grad(call.run(backend)[0].sum(), call.tensors[k])
        check_grad(found, whole, whole, f"{cell} {k}")


@pytest.mark.parametrize("part", [0, 1, -1])
@pytest.mark.parametrize("cell", CELLS)
def test_each_output_alone(cell, part, backend):
    """Outputs that a loss does not use have no gradient at all, not zeros: y, a final state, or c after every step."""
    call = random_call(cell)
    ours, truth = call.run(backend)[part], call.written_out()[part]
    compare((ours,), (truth,), call.tensors, cell)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_share_no_memory(cell, backend):
    """A caller may scale one gradient in place: no other may change with it."""
    call = random_call(cell)
    found = torch.autograd.grad(sum(o.sum() for o in call.run(backend)), call.tensors)
    kept = [d.clone() for d in found]
    for k, d in enumerate(found):
        d.zero_()
        assert all(torch.equal(a, b) for a, b in zip(found[k + 1 :], kept[k + 1 :], strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_of_the_callers_changes(cell, backend):
    call = everything(cell) if backend == "reference" else random_call(cell)
    before = [t.detach().clone() for t in call.tensors]
    masks = [mask.clone() for mask, _ in call.noise.values()]
    gradients(call.run(backend), call.tensors)
    call.detached().run(backend)
    assert all(torch.equal(a, b) for a, b in zip(before, call.tensors, strict=True))
    assert all(torch.equal(a, b) for a, (b, _) in zip(masks, call.noise.values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", CELLS)
def test_low_precision(cell, dtype, backend):
    """c stays in fp32 between segments, whatever the storage; errors against fp64 are those of the reference."""
    exact = random_call(cell, T=6, B=5, I=8, H=17)
    wide = torch.float32

    def cast(call):
        tensors = [t.detach().to(dtype) for t in call.tensors]
        tensors[2 : 1 + len(call.states)] = [t.to(wide) for t in tensors[2 : 1 + len(call.states)]]
        return call.with_tensors(*(t.requires_grad_() for t in tensors))

    call = cast(exact).skip_if_refused(backend)
    truth = call.with_tensors(*(t.detach().double().requires_grad_() for t in call.tensors))
    ours, yardstick, exactly = (c.run(b) for c, b in ((call, backend), (call, "reference"), (truth, "reference")))
    assert [o.dtype for o in ours] == [dtype, dtype, *[wide] * (len(ours) - 2)]
    check(ours, yardstick, exactly, cell, dtype)
    check_grad(
        gradients(ours, call.tensors),
        gradients(yardstick, call.tensors),
        gradients(exactly, truth.tensors),
        f"{cell}, gradients",
        dtype,
    )


@pytest.mark.parametrize("cell", CELLS)
def test_backward_within_autocast(cell, backend):
    """Autocast is the call level's business: where backward() is written does not round a layer's gradients."""
    call = random_call(cell, dtype=torch.float32).skip_if_refused(backend)
    outputs = call.run(backend)
    expected = gradients(outputs, call.tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(outputs, call.tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_without_gradients(cell, backend):
    """The shortest path, to the backend itself, gives the same bits as the Function."""
    call = random_call(cell).skip_if_refused(backend)
    expected = call.run(backend)
    assert all(o.requires_grad for o in expected)
    fixed = call.detached()
    plain = fixed.run(backend)
    with torch.no_grad():
        quiet = call.run(backend)
    with torch.inference_mode():
        inference = call.run(backend)
    for found in (plain, quiet, inference):
        assert not any(o.requires_grad for o in found)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_two_runs_give_the_same_bits(cell, backend):
    call = random_call(cell, T=7, B=5, I=9, H=11).skip_if_refused(backend)
    first, second = (
        ([o.detach() for o in outs], gradients(outs, call.tensors)) for outs in (call.run(backend), call.run(backend))
    )
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)
