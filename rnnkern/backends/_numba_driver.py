"""The Numba time loops: one pair for all cells, which call the cells' step functions by name.

Closures, or steps as arguments, would never hit the disk cache, so the choice of a cell is a branch on its number.
One thread, no parallel regions: safe after fork and from several Python threads. Large products go to torch.mm instead,
which has all of torch's threads; numba.py then calls the loops step by step with ``fused=False``.

Arrays are C-contiguous; ``rows`` below are [S, N, ...] tensors, and the work arrays [B, ...] hold the batch rows sorted
by descending length: at time t the first ``alive[t]`` of them exist, and row i lies at ``offsets[t] + order[i]``.
``rest`` is all states but h, ``[B, K - 1, H]``; ``k`` counts steps in the group's own direction. ``o`` are the options
of _numba_options.py, or None.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from rnnkern.backends._numba_cache import cached
from rnnkern.backends._numba_options import (
    bound,
    carry,
    d_mix,
    d_pre_activation,
    drop,
    keep_candidate,
    mix,
    pre_activation,
)
from rnnkern.cells.gru.numba_step import step as gru_step
from rnnkern.cells.gru.numba_step import step_backward as gru_step_backward
from rnnkern.cells.ligru.numba_step import step as ligru_step
from rnnkern.cells.ligru.numba_step import step_backward as ligru_step_backward
from rnnkern.cells.lstm.numba_step import step as lstm_step
from rnnkern.cells.lstm.numba_step import step_backward as lstm_step_backward
from rnnkern.cells.mgu.numba_step import step as mgu_step
from rnnkern.cells.mgu.numba_step import step_backward as mgu_step_backward
from rnnkern.cells.numba_math import CALLED, EXACT, FAST, clip, d_clip
from rnnkern.cells.rnn.numba_step import relu_step, relu_step_backward, tanh_step, tanh_step_backward
from rnnkern.cells.slstm.numba_step import step as slstm_step
from rnnkern.cells.slstm.numba_step import step_backward as slstm_step_backward

CELL_IDS = {
    "rnn_tanh": 0, "rnn_relu": 1, "lstm": 2, "gru": 3, "mgu": 4, "indrnn_tanh": 5, "indrnn_relu": 6, "ligru": 7,
    "slstm": 8,
}  # fmt: skip
_DIAGONAL = (5, 6)
ROUND_BF16, ROUND_FP16 = 1, 2
_BLOCK = 512  # columns of a product done at a time: four rows of them stay in the first-level cache


@njit(**FAST)
def _step(cell, gx, gh, h, rest, m, planes, aux):  # type: ignore[no-untyped-def]
    if cell == 0 or cell == 5:
        tanh_step(gx, gh, h, rest, m, planes, aux)
    elif cell == 1 or cell == 6:
        relu_step(gx, gh, h, rest, m, planes, aux)
    elif cell == 2:
        lstm_step(gx, gh, h, rest, m, planes, aux)
    elif cell == 3:
        gru_step(gx, gh, h, rest, m, planes, aux)
    elif cell == 4:
        mgu_step(gx, gh, h, rest, m, planes, aux)
    elif cell == 7:
        ligru_step(gx, gh, h, rest, m, planes, aux)
    else:
        slstm_step(gx, gh, h, rest, m, planes, aux)


@njit(**FAST)
def _step_backward(cell, dm, drest, planes, h, rest, dgx, dgh, dh, aux):  # type: ignore[no-untyped-def]
    if cell == 0 or cell == 5:
        tanh_step_backward(dm, drest, planes, h, rest, dgx, dgh, dh, aux)
    elif cell == 1 or cell == 6:
        relu_step_backward(dm, drest, planes, h, rest, dgx, dgh, dh, aux)
    elif cell == 2:
        lstm_step_backward(dm, drest, planes, h, rest, dgx, dgh, dh, aux)
    elif cell == 3:
        gru_step_backward(dm, drest, planes, h, rest, dgx, dgh, dh, aux)
    elif cell == 4:
        mgu_step_backward(dm, drest, planes, h, rest, dgx, dgh, dh, aux)
    elif cell == 7:
        ligru_step_backward(dm, drest, planes, h, rest, dgx, dgh, dh, aux)
    else:
        slstm_step_backward(dm, drest, planes, h, rest, dgx, dgh, dh, aux)


@njit(**FAST)
def _add_recurrent(cell, a, w, out, count):  # type: ignore[no-untyped-def]
    """out[:count] += a[:count] @ w; a diagonal w is given as its one row."""
    if cell not in _DIAGONAL:
        _add_product(a, w, out, count)
    else:
        for i in range(count):
            left, row, to = a[i], w[0], out[i]
            for j in range(row.shape[0]):
                to[j] += left[j] * row[j]


@njit(**FAST)
def _add_product(a, w, out, count):  # type: ignore[no-untyped-def]
    """out[:count] += a[:count] @ w, by rows of w so that the inner loop runs along memory."""
    M = w.shape[1]
    for first in range(0, M, _BLOCK):
        last = min(first + _BLOCK, M)
        i = 0
        while i + 4 <= count:
            _add_four_rows(a[i], a[i + 1], a[i + 2], a[i + 3], w, out, i, first, last)
            i += 4
        while i < count:
            _add_row(a[i], w, out[i], first, last)
            i += 1


@njit(**FAST)
def _add_four_rows(a0, a1, a2, a3, w, out, i, first, last):  # type: ignore[no-untyped-def]
    K = w.shape[0]
    o0, o1, o2, o3 = out[i, first:last], out[i + 1, first:last], out[i + 2, first:last], out[i + 3, first:last]
    k = 0
    while k + 4 <= K:
        w0, w1, w2, w3 = w[k, first:last], w[k + 1, first:last], w[k + 2, first:last], w[k + 3, first:last]
        a00, a01, a02, a03 = a0[k], a0[k + 1], a0[k + 2], a0[k + 3]
        a10, a11, a12, a13 = a1[k], a1[k + 1], a1[k + 2], a1[k + 3]
        a20, a21, a22, a23 = a2[k], a2[k + 1], a2[k + 2], a2[k + 3]
        a30, a31, a32, a33 = a3[k], a3[k + 1], a3[k + 2], a3[k + 3]
        for q in range(last - first):
            v0, v1, v2, v3 = w0[q], w1[q], w2[q], w3[q]
            o0[q] += a00 * v0 + a01 * v1 + a02 * v2 + a03 * v3
            o1[q] += a10 * v0 + a11 * v1 + a12 * v2 + a13 * v3
            o2[q] += a20 * v0 + a21 * v1 + a22 * v2 + a23 * v3
            o3[q] += a30 * v0 + a31 * v1 + a32 * v2 + a33 * v3
        k += 4
    while k < K:
        w0 = w[k, first:last]
        a00, a10, a20, a30 = a0[k], a1[k], a2[k], a3[k]
        for q in range(last - first):
            o0[q] += a00 * w0[q]
            o1[q] += a10 * w0[q]
            o2[q] += a20 * w0[q]
            o3[q] += a30 * w0[q]
        k += 1


@njit(**FAST)
def _add_row(a, w, out, first, last):  # type: ignore[no-untyped-def]
    K = w.shape[0]
    o = out[first:last]
    k = 0
    while k + 8 <= K:
        w0, w1, w2, w3 = w[k, first:last], w[k + 1, first:last], w[k + 2, first:last], w[k + 3, first:last]
        w4, w5, w6, w7 = w[k + 4, first:last], w[k + 5, first:last], w[k + 6, first:last], w[k + 7, first:last]
        a0, a1, a2, a3, a4, a5, a6, a7 = a[k], a[k + 1], a[k + 2], a[k + 3], a[k + 4], a[k + 5], a[k + 6], a[k + 7]
        for q in range(last - first):
            near = a0 * w0[q] + a1 * w1[q] + a2 * w2[q] + a3 * w3[q]
            o[q] += near + a4 * w4[q] + a5 * w5[q] + a6 * w6[q] + a7 * w7[q]
        k += 8
    while k < K:
        w0, a0 = w[k, first:last], a[k]
        for q in range(last - first):
            o[q] += a0 * w0[q]
        k += 1


@njit(**EXACT)
def _store(source, target, rounding):  # type: ignore[no-untyped-def]
    """target = source as the storage dtype holds it (nearest, ties to even): what is fed back is what y says."""
    if rounding == 0:
        for j in range(source.shape[0]):
            target[j] = source[j]
    elif rounding == 1:
        for j in range(source.shape[0]):
            v = source[j]
            bits = np.float32(v).view(np.int32)
            bits = np.int32((bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) & np.int32(-0x10000))
            target[j] = np.int32(bits).view(np.float32) if v == v else v
    else:
        for j in range(source.shape[0]):
            v = source[j]
            bits = np.float32(v).view(np.int32)
            bits = np.int32((bits + np.int32(0xFFF) + ((bits >> np.int32(13)) & np.int32(1))) & np.int32(-0x2000))
            short = np.int32(bits).view(np.float32)
            size = abs(v)
            if size < np.float32(2.0**-14):  # subnormal there: steps of 2^-24, the last place of 1.0 below 2
                short = (size + np.float32(0.75)) - np.float32(0.75)
                short = -short if v < 0 else short
            elif size >= np.float32(65520.0):
                short = np.float32(np.inf) if v > 0 else np.float32(-np.inf)
            target[j] = short if v == v else v


# Loops, not slice assignments: those bring Numba's text formatting for their error messages into every compilation,
# which takes longer than all else together.
@njit(**FAST)
def _copy(source, target):  # type: ignore[no-untyped-def]
    for j in range(target.shape[0]):
        target[j] = source[j]


@njit(**FAST)
def _copy_all(source, target):  # type: ignore[no-untyped-def]
    for k in range(target.shape[0]):
        _copy(source[k], target[k])


@njit(**FAST)
def _add(source, target):  # type: ignore[no-untyped-def]
    for j in range(target.shape[0]):
        target[j] += source[j]


@njit(**FAST)
def _clear(target):  # type: ignore[no-untyped-def]
    for j in range(target.shape[0]):
        target[j] = 0


@njit(**CALLED)
def enter(t, n, alive, offsets, order, reset, reset_h, reset_rest, h, rest):  # type: ignore[no-untyped-def]
    """Step 1 of the contract: states that enter rows with a reset are replaced."""
    for i in range(alive[t]):
        if reset[offsets[t] + order[i], n]:
            _copy(reset_h[i], h[i])
            _copy_all(reset_rest[i], rest[i])


@njit(**CALLED)
def forward(  # type: ignore[no-untyped-def]
    cell, n, first, last, reverse, fused, save_states, save_planes, rounding,
    alive, offsets, order, reset, reset_h, reset_rest,
    gx, w_t, bias, w_hr_t, h, rest, gh, m,
    y, seq, planes, hidden, scratch, o,
):  # fmt: skip
    """Steps ``first`` to ``last`` of group n; h and rest hold the states.

    Not fused: resets are done and gh is given, with options the product of o.left alone.
    """
    T, aux = alive.shape[0], None if o is None else o.aux
    project = w_hr_t.shape[0] > 0
    for k in range(first, last):
        t = T - 1 - k if reverse else k
        count = alive[t]
        if fused:
            if reset.shape[0] > 0:
                enter(t, n, alive, offsets, order, reset, reset_h, reset_rest, h, rest)
            if o is None:
                for i in range(count):
                    _copy(bias, gh[i])
                _add_recurrent(cell, h, w_t, gh, count)
            else:
                drop(t, n, alive, offsets, order, h, o)
                for i in range(count):
                    _clear(gh[i])
                _add_recurrent(cell, o.left, w_t, gh, count)
        for i in range(count):
            r = offsets[t] + order[i]
            saved = planes[r, n] if save_planes else scratch
            if o is not None:
                pre_activation(gh[i], bias, o.edges, o.gain, o.aux.eps)
                keep_candidate(r, n, o.aux.keep, o.candidate, o.scale_candidate)
                if rest.shape[1] > 0:
                    _copy(rest[i, 0], o.entered)
            _step(cell, gx[r, n], gh[i], h[i], rest[i], m[i], saved, aux)
            if o is not None and rest.shape[1] > 0:
                mix(r, n, o.entered, rest[i, 0], o.zoneout_c, o.share_c)
            if save_states:
                _copy_all(rest[i], seq[r, n])
        if project:
            for i in range(count):
                _store(m[i], m[i], rounding)
                if save_states:
                    _copy(m[i], hidden[offsets[t] + order[i], n])
                if o is not None:
                    _copy(h[i], o.left[i])
                _clear(h[i])
            _add_product(m, w_hr_t, h, count)
            for i in range(count):
                if o is not None:
                    clip(h[i], o.proj_clip)
                    mix(offsets[t] + order[i], n, o.left[i], h[i], o.zoneout_h, o.share_h)
                _store(h[i], h[i], rounding)
        else:
            for i in range(count):
                if o is not None:
                    mix(offsets[t] + order[i], n, h[i], m[i], o.zoneout_h, o.share_h)
                _store(m[i], h[i], rounding)
        for i in range(count):
            _copy(h[i], y[offsets[t] + order[i], n])


@njit(**CALLED)
def leave(t, n, alive, offsets, order, reset, dh, drest, dreset_h, dreset_rest):  # type: ignore[no-untyped-def]
    """Step 1 backwards: the gradient at a replaced state goes to its replacement."""
    for i in range(alive[t]):
        if reset[offsets[t] + order[i], n]:
            _add(dh[i], dreset_h[i])
            _clear(dh[i])
            for k in range(drest.shape[1]):
                _add(drest[i, k], dreset_rest[i, k])
                _clear(drest[i, k])


@njit(**CALLED)
def backward(  # type: ignore[no-untyped-def]
    cell, n, first, last, reverse, fused, split,
    alive, offsets, order, lengths, reset, reset_h, reset_rest,
    w, w_hr, h0, rest0, y, seq, planes, dy, dseq,
    dh, drest, dm, d, dgx, dgh, dprojected, dreset_h, dreset_rest, o,
):  # fmt: skip
    """Steps ``last`` down to ``first`` of group n; dh and drest hold the gradients of the states, d those at products.

    Not fused: adding ``d @ w`` to dh, with options by way of o.left and `carry`, then `leave` and, with options,
    `bound` are left to the caller.
    """
    T, aux = alive.shape[0], None if o is None else o.aux
    project = w_hr.shape[0] > 0
    for k in range(last - 1, first - 1, -1):
        t = T - 1 - k if reverse else k
        count = alive[t]
        for i in range(count):
            r = offsets[t] + order[i]
            _add(dy[r, n], dh[i])
            if dseq.shape[0] > 0:
                for state in range(dseq.shape[2]):
                    _add(dseq[r, n, state], drest[i, state])
            if o is not None:
                d_mix(r, n, dh[i], o.past[i], o.zoneout_h, o.share_h)
            if project:
                if o is not None and o.proj_clip > 0:
                    d_clip(dh[i], o.projected[r], o.proj_clip)
                _copy(dh[i], dprojected[r, n])
                _clear(dm[i])
            else:
                _copy(dh[i], dm[i])
        if project:
            _add_product(dh, w_hr, dm, count)
        for i in range(count):
            r = offsets[t] + order[i]
            before = t + 1 if reverse else t - 1
            h, rest = h0[i], rest0[i]
            if reset.shape[0] > 0 and reset[r, n]:
                h, rest = reset_h[i], reset_rest[i]
            elif 0 <= before < lengths[i]:
                p = offsets[before] + order[i]
                h, rest = y[p, n], seq[p, n]
            _clear(dh[i])
            if o is not None:
                keep_candidate(r, n, o.aux.keep, o.candidate, o.scale_candidate)
                if rest.shape[0] > 0:
                    d_mix(r, n, drest[i, 0], o.entered, o.zoneout_c, o.share_c)
            if split:
                _step_backward(cell, dm[i], drest[i], planes[r, n], h, rest, dgx[r, n], d[i], dh[i], aux)
                _copy(d[i], dgh[r, n])
            else:
                _step_backward(cell, dm[i], drest[i], planes[r, n], h, rest, d[i], d[i], dh[i], aux)
                _copy(d[i], dgx[r, n])
            if o is not None:
                if o.dprod.shape[0] > 0:
                    d_pre_activation(d[i], o.product[r], o.edges, o.gain, o.dgain, o.aux.eps)
                    _copy(d[i], o.dprod[r, n])
                if rest.shape[0] > 0:
                    _add(o.entered, drest[i, 0])
        if fused:
            if o is None:
                _add_recurrent(cell, d, w, dh, count)
            else:
                for i in range(count):
                    _clear(o.left[i])
                _add_recurrent(cell, d, w, o.left, count)
                carry(t, n, alive, offsets, order, dh, o)
            if reset.shape[0] > 0:
                leave(t, n, alive, offsets, order, reset, dh, drest, dreset_h, dreset_rest)
            if o is not None:
                bound(t, alive, dh, drest, o.grad_clip)


cached(enter, forward, leave, backward, drop, carry, bound)
