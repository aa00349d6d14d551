"""The Numba backend: what runs on a CPU where the C++ extension is not there. Needs no compiler on the machine.

This file brings tensors into the form that the compiled loops in _numba_driver.py take, and results back: bf16 and
fp16 are converted here, at the edge, and computed in fp32. Small products are part of the loop; large ones are left to
torch.mm, step by step, because its kernels and threads are better than anything compiled here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rnnkern.backends import _numba_driver as driver
from rnnkern.backends.base import ScanGrads, ScanInputs, ScanOutputs, accumulation_dtype
from rnnkern.cells import CELLS

_ROUNDING = {torch.bfloat16: driver.ROUND_BF16, torch.float16: driver.ROUND_FP16}
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LARGE = 3 << 20  # multiply-adds in a step from which torch.mm and its call overhead beat the loop


class _Rows(NamedTuple):
    """Where each step's rows lie; batch rows are taken in the order of descending length."""

    alive: np.ndarray  # [T] how many rows step t has
    offsets: np.ndarray  # [T]
    order: np.ndarray  # [B] batch row of each work row
    lengths: np.ndarray  # [B] of work rows
    permutation: Tensor | None  # order as a tensor; None: the identity
    complete: bool  # every row of the S is some step's

    def sort(self, state: Tensor) -> Tensor:
        return state if self.permutation is None else state.index_select(0, self.permutation)

    def unsort(self, state: Tensor, out: Tensor) -> None:
        """out = state in the caller's order of rows, cast to out's dtype."""
        if self.permutation is None:
            out.copy_(state)
        else:
            out[self.permutation] = state.to(out.dtype)


def _rows(inputs: ScanInputs) -> _Rows:
    T, B = inputs.T, inputs.B
    offsets = np.arange(T, dtype=np.int64) * B if inputs.offsets is None else _array(inputs.offsets)
    if inputs.lengths is None:
        alive, lengths = np.full(T, B, np.int64), np.full(B, T, np.int64)
        return _Rows(alive, offsets, np.arange(B), lengths, None, inputs.gx.shape[0] == T * B)
    given = np.minimum(_array(inputs.lengths), T)
    order = np.argsort(-given, kind="stable")
    lengths = given[order]
    alive = B - np.searchsorted(lengths[::-1], np.arange(T), side="right")
    identity = bool((order == np.arange(B)).all())
    complete = int(lengths.sum()) == inputs.gx.shape[0]
    return _Rows(alive, offsets, order, lengths, None if identity else torch.from_numpy(order), complete)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


class _Work(NamedTuple):
    """What forward and backward both bring into compute dtype."""

    cell: int
    rows: _Rows
    dtype: torch.dtype
    gates: int
    width: int  # H
    out: int  # P
    reset: np.ndarray  # [S, N], or [0, 0]

    def bring(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self.dtype).contiguous()

    def states(self, given: tuple[Tensor, ...], n: int) -> tuple[Tensor, Tensor]:
        """Group n's h [B, P] and the other states [B, K-1, H], in work order: copies, which the loops may change."""
        rest = given[0].new_empty((given[0].shape[1], len(given) - 1, self.width), dtype=self.dtype)
        for k, state in enumerate(given[1:]):
            rest[:, k] = self.rows.sort(state[n].detach())
        h = self.rows.sort(given[0][n].detach()).to(self.dtype)
        return h.clone(memory_format=torch.contiguous_format), rest

    def replacements(self, inputs: ScanInputs, n: int) -> tuple[Tensor, Tensor]:
        """Group n's states for resets; dummies of no rows where there are no resets."""
        if inputs.reset is not None and inputs.reset_states:
            return self.states(inputs.reset_states, n)
        rows = inputs.B if inputs.reset is not None else 0
        like = inputs.states[0]
        h = like.new_zeros((rows, self.out), dtype=self.dtype)
        return h, like.new_zeros((rows, len(inputs.states) - 1, self.width), dtype=self.dtype)


def _work(inputs: ScanInputs) -> _Work:
    cell = CELLS[inputs.spec.cell]
    gates, out = len(cell.gates), inputs.states[0].shape[-1]
    reset = np.empty((0, 0), np.bool_) if inputs.reset is None else _array(inputs.reset)
    dtype = accumulation_dtype(inputs.gx.dtype)
    number = driver.CELL_IDS[inputs.spec.cell]
    return _Work(number, _rows(inputs), dtype, gates, inputs.gx.shape[-1] // gates, out, reset)


class NumbaBackend:
    name = "numba"

    def unsupported(self, inputs: ScanInputs) -> list[str]:
        spec, gx = inputs.spec, inputs.gx
        if spec.cell not in driver.CELL_IDS:
            return [f"cell {spec.cell!r} has no Numba step; those that have: {', '.join(driver.CELL_IDS)}"]
        reasons = []
        if gx.device.type != "cpu":
            reasons.append(f"device {gx.device} (it runs on cpu)")
        if gx.dtype not in _DTYPES:
            reasons.append(f"dtype {gx.dtype} (it does {', '.join(str(d) for d in _DTYPES)})")
        if spec.noise:
            reasons.append(f"recurrent dropout or zoneout masks: {', '.join(spec.noise)}")
        if any(spec.zoneout):
            reasons.append("zoneout")
        reasons += [f"{word}" for word in ("cell_clip", "proj_clip", "grad_clip") if getattr(spec, word)]
        if "ln_hh" in spec.params:
            reasons.append("layer norm")
        small = [p for p in spec.params if p in CELLS[spec.cell].small]
        if small:
            reasons.append(f"parameters {', '.join(small)}")
        P, H = inputs.states[0].shape[-1], gx.shape[-1] // len(CELLS[spec.cell].gates)
        if P != H and spec.cell == "gru":
            reasons.append(f"gru, whose step mixes h into what is as wide as H, with P={P} and H={H}")
        return reasons

    def forward(self, inputs: ScanInputs) -> ScanOutputs:
        spec, work = inputs.spec, _work(inputs)
        S, N = inputs.gx.shape[:2]
        rows, H, P, others = work.rows, work.width, work.out, len(inputs.states) - 1
        storage, B = inputs.gx.dtype, inputs.B
        save_states, save_planes = spec.save != "none", spec.save == "all"
        project = "w_hr" in spec.params

        def rows_of(*shape: int, kept: bool = True) -> Tensor:
            make = torch.empty if rows.complete or not kept else torch.zeros
            return make((S if kept else 0, N, *shape), dtype=work.dtype)

        gx = work.bring(inputs.gx)
        y, seq = rows_of(P), rows_of(others, H, kept=save_states)
        planes = rows_of(len(CELLS[spec.cell].planes), H, kept=save_planes)
        hidden = rows_of(H, kept=project and save_states)
        final = tuple(torch.empty_like(s, memory_format=torch.contiguous_format) for s in inputs.states)
        gh, m = (torch.empty((B, width), dtype=work.dtype) for width in (work.gates * H, H))
        scratch = torch.empty(planes.shape[2:], dtype=work.dtype)
        outs = [t.numpy() for t in (y, seq, planes, hidden, scratch)]

        for n in range(N):
            params = dict(zip(spec.params, inputs.params[n], strict=True))
            w = work.bring(params["w_hh"])
            bias = work.bring(params["b_hh"]) if "b_hh" in params else None
            w_hr_t = work.bring(params["w_hr"].t()) if project else w.new_empty((0, 0))
            fused = not _by_torch(inputs, w)
            h, rest = work.states(inputs.states, n)
            replace = [t.numpy() for t in work.replacements(inputs, n)]
            where = (rows.alive, rows.offsets, rows.order, work.reset, *replace)
            # By torch.mm neither is read by the loop, and transposing W would cost more than it.
            w_t = w.t().contiguous() if fused else w.new_empty((0, 0))
            start = (w.new_zeros(w.shape[0]) if bias is None else bias) if fused else w.new_empty(0)
            arrays = [t.numpy() for t in (gx, w_t, start, w_hr_t, h, rest, gh, m)]
            how = (spec.reverse[n], fused, save_states, save_planes, _ROUNDING.get(storage, 0))
            if fused:
                driver.forward(work.cell, n, 0, inputs.T, *how, *where, *arrays, *outs)
            else:
                for k, t in _steps(inputs.T, spec.reverse[n]):
                    count = int(rows.alive[t])
                    if inputs.reset is not None:
                        driver.enter(t, n, *where, *arrays[4:6])
                    if bias is None:
                        torch.mm(h[:count], w.t(), out=gh[:count])
                    else:
                        torch.addmm(bias, h[:count], w.t(), out=gh[:count])
                    driver.forward(work.cell, n, k, k + 1, *how, *where, *arrays, *outs)
            rows.unsort(h, final[0][n])
            for k in range(others):
                rows.unsort(rest[:, k], final[k + 1][n])

        empty = y.new_empty(0, dtype=storage)
        seqs = tuple(seq[:, :, k] if save_states else y.new_empty(0) for k in range(others))
        return ScanOutputs(
            y.to(storage),
            final,
            seqs,
            planes.to(storage) if save_planes else empty,
            hidden.to(storage) if project and save_states else empty,
        )

    def backward(
        self,
        inputs: ScanInputs,
        outputs: ScanOutputs,
        dy: Tensor,
        dfinal: tuple[Tensor, ...],
        dseq: tuple[Tensor, ...],
    ) -> ScanGrads:
        spec, work = inputs.spec, _work(inputs)
        if spec.save != "all":
            raise ValueError(f"backward needs the planes of a forward with save='all', got save={spec.save!r}")
        S, N = outputs.y.shape[:2]
        rows, H, P = work.rows, work.width, work.out
        storage, B = outputs.y.dtype, inputs.B
        project, split = "w_hr" in spec.params, bool(CELLS[spec.cell].split)

        def rows_of(width: int, kept: bool = True) -> Tensor:
            make = torch.empty if rows.complete or not kept else torch.zeros
            return make((S if kept else 0, N, width), dtype=work.dtype)

        seq, dseqs = _stack(outputs.seq, S, N, H, work), _stack_gradients(dseq, S, N, H, work)
        read = [work.bring(t).numpy() for t in (outputs.y, seq, outputs.planes, dy, dseqs)]
        dgx = rows_of(work.gates * H)
        dgh = rows_of(work.gates * H, kept=split)
        dh_rows = rows_of(P, kept=project)
        dstates = tuple(torch.empty_like(s, memory_format=torch.contiguous_format) for s in inputs.states)
        dreset_states = tuple(s.new_empty((N, B, s.shape[-1])) for s in inputs.reset_states)
        dm, d = (torch.empty((B, width), dtype=work.dtype) for width in (H, work.gates * H))

        for n in range(N):
            params = dict(zip(spec.params, inputs.params[n], strict=True))
            w = work.bring(params["w_hh"])
            w_hr = work.bring(params["w_hr"]) if project else w.new_empty((0, 0))
            fused = not _by_torch(inputs, w)
            h0, rest0 = work.states(inputs.states, n)
            dh, drest = work.states(dfinal, n)
            replace = work.replacements(inputs, n)
            dreplace = [torch.zeros_like(t) for t in replace]
            where = [rows.alive, rows.offsets, rows.order]
            places = (*where, rows.lengths, work.reset, *(t.numpy() for t in replace))
            arrays = [t.numpy() for t in (w, w_hr, h0, rest0)]
            wrote = [t.numpy() for t in (dh, drest, dm, d, dgx, dgh, dh_rows, *dreplace)]
            how = (spec.reverse[n], fused, split)
            if fused:
                driver.backward(work.cell, n, 0, inputs.T, *how, *places, *arrays, *read, *wrote)
            else:
                for k, t in reversed(_steps(inputs.T, spec.reverse[n])):
                    count = int(rows.alive[t])
                    driver.backward(work.cell, n, k, k + 1, *how, *places, *arrays, *read, *wrote)
                    dh[:count].addmm_(d[:count], w)
                    if inputs.reset is not None:
                        driver.leave(t, n, *where, work.reset, *wrote[:2], *wrote[-2:])
            for given, (first, others_) in ((dstates, (dh, drest)), (dreset_states, dreplace)):
                for k, out in enumerate(given):
                    rows.unsort(others_[:, k - 1] if k else first, out[n])

        empty = dgx.new_empty(0, dtype=storage)
        return ScanGrads(
            dgx.to(storage),
            dgh.to(storage) if split else empty,
            empty,
            dh_rows.to(storage) if project else empty,
            dstates,
            dreset_states,
            tuple(() for _ in range(N)),
        )


def _by_torch(inputs: ScanInputs, w: Tensor) -> bool:
    """Whether a step's product goes to torch.mm: it is large, or there are too few to pay for transposing W."""
    return inputs.B * w.numel() >= _LARGE or inputs.T <= 2


def _steps(T: int, reverse: bool) -> list[tuple[int, int]]:
    """(k, t): the group's own count of steps, and where that is in time."""
    return [(k, T - 1 - k if reverse else k) for k in range(T)]


def _stack(seq: tuple[Tensor, ...], S: int, N: int, H: int, work: _Work) -> Tensor:
    """[S, N, K-1, H]; of one state, as in all cells so far, a view."""
    if not seq:
        return torch.empty((S, N, 0, H), dtype=work.dtype)
    return torch.stack(seq, 2) if len(seq) > 1 else seq[0].unsqueeze(2)


def _stack_gradients(dseq: tuple[Tensor, ...], S: int, N: int, H: int, work: _Work) -> Tensor:
    """As _stack, where a gradient of no elements is zero; no rows if all are."""
    if not any(d.numel() for d in dseq):
        return torch.empty((0, N, len(dseq), H), dtype=work.dtype)
    return _stack(tuple(d if d.numel() else d.new_zeros((S, N, H)) for d in dseq), S, N, H, work)


BACKEND = NumbaBackend()
