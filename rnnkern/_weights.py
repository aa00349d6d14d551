"""What a layer's backward does after the scan's: GEMMs over stacked gate gradients, for x and for the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rnnkern import dispatch
from rnnkern._ops import has_own_gradient
from rnnkern._plan import Plan
from rnnkern._products import mm
from rnnkern.backends.base import ScanGrads, ScanInputs, accumulation_dtype
from rnnkern.cells import CELLS


def layer_gradients(
    plan: Plan,
    inputs: ScanInputs,
    x: Tensor,
    w_ih: Sequence[Tensor],
    y: Tensor,
    hidden: Tensor,
    d: ScanGrads,
    wanted: Sequence[bool],
    in_place: bool,
) -> list[Tensor | None]:
    """Gradients of x and of everything that follows it in the call's flat order; None where none is wanted or exists.

    `in_place` lets sums be accumulated in tensors made here, which functorch's transforms do not allow.
    """
    spec, N = plan.spec, len(plan.spec.reverse)
    directions = N // plan.models
    dgh = d.dgh if plan.cell.split else d.dgx
    dprod = d.dprod if "ln_hh" in spec.params else dgh
    grads: list[Tensor | None] = [None] * len(wanted)
    if wanted[0]:
        grads[0] = _d_input(d.dgx, w_ih, plan.models, in_place) if plan.projects else d.dgx
    at = 1 + plan.first_state
    for value in (*d.dstates, *d.dreset_states):
        grads[at] = value if wanted[at] else None
        at += 1
    at = 1 + plan.first_weight
    entering = Entering(inputs, y, in_place)
    own = [name for name in spec.params if has_own_gradient(spec, name)]
    read = None
    for n in range(N):
        dgx_n = d.dgx[:, n]
        if plan.projects:
            if wanted[at]:
                if read is None:
                    read = _rows_that_exist(inputs, x)
                grads[at] = _outer(dgx_n, read[:, n // directions], plan.samples, in_place)
            at += 1
        bias = None
        if plan.bias:
            if wanted[at]:
                grads[at] = bias = _total(dgx_n, plan.samples)
            at += 1
        for name in spec.params:
            if not wanted[at]:
                pass
            elif name == "w_hh":
                grads[at] = _d_recurrent(dprod[:, n], entering, n, plan.samples)
            elif name == "b_hh":
                # Two parameters must not share one gradient's memory: a caller may scale either in place.
                shared = bias is not None and not plan.cell.split
                grads[at] = bias.clone() if shared and bias is not None else _total(dgh[:, n], plan.samples)
            elif name == "w_hr":
                grads[at] = _outer(d.dh[:, n], hidden[:, n], plan.samples, in_place)
            else:
                grads[at] = d.dsmall[n][own.index(name)]
            at += 1
    return grads


class Entering:
    """h as it goes into the product with w_hh: the left side of dW_hh. Derived from y, never saved."""

    def __init__(self, inputs: ScanInputs, y: Tensor, in_place: bool) -> None:
        self.inputs, self.y, self.in_place = inputs, y, in_place
        self.dense = inputs.lengths is None and inputs.offsets is None
        self.bare = self.dense and inputs.reset is None and not {"h", "h_step"} & set(inputs.spec.noise)
        self._where: dict[bool, tuple[Tensor, Tensor, Tensor]] = {}

    def shifted(self, n: int) -> Tensor:
        """[S, P]: h after the step before this one, in the group's own direction, or the initial state."""
        inputs, y, h0, B = self.inputs, self.y[:, n], self._first(n), self.inputs.B
        reverse = inputs.spec.reverse[n]
        if not y.shape[0]:
            return y
        if self.dense:
            return torch.cat((y[B:], h0) if reverse else (h0, y[: y.shape[0] - B]))
        before, first, _ = self.where(reverse)
        h = y.index_select(0, before)
        h = h.index_copy_(0, first, h0) if self.in_place else h.index_copy(0, first, h0)
        return h[:-1]

    def _first(self, n: int) -> Tensor:
        return self.inputs.states[0][n].to(self.y.dtype)

    def _copied(self, n: int) -> Tensor | None:
        """`shifted`, zero where a sequence restarts, by the extension, which needs no indices; None where it cannot."""
        inputs, y, packed = self.inputs, self.y[:, n], self.inputs.offsets is not None
        if not (self.in_place and y.is_cpu and y.stride(1) == 1 and dispatch.unavailable("cpp") is None):
            return None
        if not (packed or self.dense) or inputs.reset_states:
            return None
        from rnnkern import _cpu

        h0, out, size = self._first(n).contiguous(), torch.empty(y.shape, dtype=y.dtype), y.element_size()
        kept = [None if v is None else v.contiguous() for v in (inputs.offsets, inputs.lengths)]
        reset = (0, 0) if inputs.reset is None else (inputs.reset[:, n].data_ptr(), inputs.reset.stride(0))
        _cpu.entering(
            (out.data_ptr(), y.data_ptr(), y.stride(0) * size, h0.data_ptr(), h0.stride(0) * size),
            (inputs.T, inputs.B, y.shape[0], *(0 if v is None else v.data_ptr() for v in kept), *reset),
            y.shape[1] * size,
            inputs.spec.reverse[n],
        )
        return out

    def __call__(self, n: int) -> Tensor:
        """`shifted` with resets and recurrent dropout applied."""
        inputs, spec = self.inputs, self.inputs.spec
        h = self._copied(n)
        if h is None:
            h = self._restarted(self.shifted(n), n)
        for name, scale, mask in zip(spec.noise, spec.scales, inputs.noise, strict=True):
            if name == "h":
                h = h * self.per_row(mask[n], n).to(h.dtype) * scale
            elif name == "h_step":
                h = h * mask[:, n].to(h.dtype) * scale
        return h

    def _restarted(self, h: Tensor, n: int) -> Tensor:
        inputs = self.inputs
        if inputs.reset is None:
            return h
        if inputs.reset_states:
            return torch.where(inputs.reset[:, n].unsqueeze(-1), self.per_row(inputs.reset_states[0][n], n), h)
        if self.in_place and h.is_cpu:  # a copy of y, of which few rows are meant
            return h.index_fill_(0, inputs.reset[:, n].nonzero().flatten(), 0)
        return h.masked_fill(inputs.reset[:, n].unsqueeze(-1), 0)

    def per_row(self, v: Tensor, n: int) -> Tensor:
        """[B, W] -> [S, W]: each row's batch row of `v`."""
        if self.dense:
            return v.expand(self.inputs.T, *v.shape).reshape(self.y.shape[0], v.shape[-1])
        return v.index_select(0, self.where(self.inputs.spec.reverse[n])[2])

    def where(self, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The row before each of S rows (S + 1 of them, see `shifted`), each first row or S, and each batch row."""
        if reverse not in self._where:
            self._where[reverse] = self._locate(reverse)
        return self._where[reverse]

    def _locate(self, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        inputs, S, T, B = self.inputs, self.y.shape[0], self.inputs.T, self.inputs.B
        t, b = row_times(inputs, S)
        batch = torch.arange(B, device=b.device)
        lengths = torch.full_like(batch, T) if inputs.lengths is None else inputs.lengths
        steps = torch.arange(0, T * B, max(B, 1), device=b.device) if inputs.offsets is None else inputs.offsets
        rows = torch.arange(S, device=b.device)
        length = lengths.index_select(0, b)
        exists = (t + 1 < length) if reverse else (t > 0) & (t < length)
        neighbour = (t + 1).clamp_max(T - 1) if reverse else (t - 1).clamp_min(0)
        # A row with nothing before it takes itself: as a first row it is overwritten, past a length it is zero.
        before = torch.where(exists, steps.index_select(0, neighbour) + b, rows)
        start = steps.index_select(0, (lengths - 1).clamp_min(0)) if reverse else steps[:1]
        first = torch.where(lengths > 0, start + batch, S)
        return torch.cat((before, before.new_zeros(1))), first, b


def row_times(inputs: ScanInputs, S: int) -> tuple[Tensor, Tensor]:
    """Time and batch row of each of the S rows."""
    rows = torch.arange(S, device=inputs.states[0].device)
    if inputs.offsets is None:
        t = rows // max(inputs.B, 1)
        return t, rows - t * inputs.B
    t = torch.searchsorted(inputs.offsets, rows, right=True) - 1
    return t, rows - inputs.offsets.index_select(0, t)


def _rows_that_exist(inputs: ScanInputs, x: Tensor) -> Tensor:
    """x with its padding zeroed: nothing is known of what lies there, and NaN times a zero gradient is NaN."""
    if inputs.lengths is None or inputs.offsets is not None:
        return x
    t, b = row_times(inputs, x.shape[0])
    padding = t >= inputs.lengths.index_select(0, b)
    return x.masked_fill(padding.view(-1, 1, 1), 0)


def _d_input(dgx: Tensor, w_ih: Sequence[Tensor], models: int, in_place: bool) -> Tensor:
    directions = len(w_ih) // models
    columns = []
    for m in range(models):
        total = _product(dgx[:, m * directions], w_ih[m * directions], in_place)
        for n in range(m * directions + 1, (m + 1) * directions):
            total = _product(dgx[:, n], w_ih[n], in_place, total)
        columns.append(total)
    return columns[0].unsqueeze(1) if models == 1 else torch.stack(columns, 1)


def _d_recurrent(dprod: Tensor, entering: Entering, n: int, samples: int) -> Tensor:
    if not CELLS[entering.inputs.spec.cell].dense:  # what each unit saw of h: its own
        h = entering(n)
        wide = accumulation_dtype(h.dtype)
        return _total(dprod.to(wide) * h.to(wide).repeat(1, dprod.shape[-1] // h.shape[-1]), samples).to(h.dtype)
    in_place = entering.in_place
    if samples or not entering.bare:
        return _outer(dprod, entering(n), samples, in_place)
    # Dense and unmasked: the rows of y, shifted, are h_entering; joining them to h0 would copy all of y.
    y, h0, B = entering.y[:, n], entering.inputs.states[0][n], entering.inputs.B
    reach = dprod.shape[0] - B
    if reach <= 0:
        return _product(dprod.t(), h0, in_place)
    if entering.inputs.spec.reverse[n]:
        return _product(dprod[reach:].t(), h0, in_place, _product(dprod[:reach].t(), y[B:], in_place))
    return _product(dprod[:B].t(), h0, in_place, _product(dprod[B:].t(), y[:reach], in_place))


def _product(a: Tensor, b: Tensor, in_place: bool, total: Tensor | None = None) -> Tensor:
    """a b, or that and `total`, whose memory may be taken."""
    if in_place:
        return mm(a, b, total)
    return torch.mm(a, b) if total is None else total + torch.mm(a, b)


def _outer(a: Tensor, b: Tensor, samples: int, in_place: bool) -> Tensor:
    """Sum over rows of a^T b, kept apart per sample where rows hold several."""
    if not samples:
        return _product(a.t(), b, in_place)
    a, b = (v.reshape(v.shape[0] // samples, samples, v.shape[-1]) for v in (a, b))
    return a.permute(1, 2, 0) @ b.transpose(0, 1)


def _total(a: Tensor, samples: int) -> Tensor:
    return a.reshape(a.shape[0] // samples, samples, a.shape[-1]).sum(0) if samples else a.sum(0)
