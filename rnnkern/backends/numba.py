"""The Numba backend: what runs on a CPU where the C++ extension is not there. Needs no compiler on the machine.

This file brings tensors into the form that the compiled loops in _numba_driver.py take, and results back: bf16 and
fp16 are converted here, at the edge, and computed in fp32. Small products are part of the loop; large ones are left to
torch.mm, step by step, because its kernels and threads are better than anything compiled here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rnnkern._weights import Entering
from rnnkern.backends import _numba_driver as driver
from rnnkern.backends._numba_options import Aux, Options
from rnnkern.backends.base import ScanGrads, ScanInputs, ScanOutputs, accumulation_dtype
from rnnkern.cells import CELLS

_ROUNDING = {torch.bfloat16: driver.ROUND_BF16, torch.float16: driver.ROUND_FP16}
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LARGE = 3 << 20  # multiply-adds in a step from which torch.mm and its call overhead beat the loop
_PLAIN = frozenset(("w_hh", "b_hh", "w_hr"))
_SMALL = ("peephole_i", "peephole_f", "peephole_o", "ln_c", "ln_c_bias")
_NO_RESET = np.empty((0, 0), np.bool_)


class _Rows(NamedTuple):
    """Where each step's rows lie; the loops take batch rows in the order of descending length."""

    alive: np.ndarray  # [T] how many rows step t has
    offsets: np.ndarray  # [T]
    order: np.ndarray  # [B] batch row of each work row
    lengths: np.ndarray  # [B] of work rows
    existing: int  # rows in all: S, or the others are to be zero


@lru_cache(maxsize=16)
def _dense(T: int, B: int) -> _Rows:
    return _Rows(np.full(T, B), np.arange(T) * B, np.arange(B), np.full(B, T), T * B)


def _rows(inputs: ScanInputs) -> _Rows:
    rows = _dense(inputs.T, inputs.B)
    if inputs.offsets is not None:
        rows = rows._replace(offsets=_array(inputs.offsets, torch.int64))
    if inputs.lengths is None:
        return rows
    given = np.minimum(_array(inputs.lengths, torch.int64), inputs.T)
    order = np.argsort(-given, kind="stable")
    lengths = given[order]
    alive = inputs.B - np.searchsorted(lengths[::-1], np.arange(inputs.T), side="right")
    return _Rows(alive, rows.offsets, order, lengths, int(lengths.sum()))


def _array(tensor: Tensor, dtype: torch.dtype) -> np.ndarray:
    return tensor.detach().to(dtype).contiguous().numpy()


class _Work:
    """What forward and backward both bring into the loops' form; arrays are of the compute dtype."""

    def __init__(self, inputs: ScanInputs) -> None:
        cell = CELLS[inputs.spec.cell]
        self.inputs, self.rows, self.dense = inputs, _rows(inputs), cell.dense
        self.cell = driver.CELL_IDS[inputs.spec.cell]
        self.dtype = accumulation_dtype(inputs.gx.dtype)
        self.storage = inputs.gx.dtype
        self.S, self.N, self.width = inputs.gx.shape
        self.H, self.P = self.width // len(cell.gates), inputs.states[0].shape[-1]
        self.states = self.bring(inputs.states)
        self.reset = _NO_RESET if inputs.reset is None else _array(inputs.reset, torch.bool)
        self.reset_states = self.bring(inputs.reset_states)
        self.project = "w_hr" in inputs.spec.params

    def array(self, tensor: Tensor) -> np.ndarray:
        return _array(tensor, self.dtype)

    def bring(self, states: tuple[Tensor, ...]) -> list[np.ndarray]:
        return [self.array(state) for state in states]

    def output(self, *shape: int, kept: bool = True) -> Tensor:
        """[S, N, ...], zero where the loops write no rows; of no rows if it is not kept."""
        if not kept:
            return torch.empty((0, self.N, *shape), dtype=self.dtype)
        make = torch.empty if self.rows.existing == self.S else torch.zeros
        return make((self.S, self.N, *shape), dtype=self.dtype)

    def buffer(self, *shape: int) -> np.ndarray:
        return np.empty((self.inputs.B, *shape), self.states[0].dtype)

    def sorted(self, states: list[np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
        """Group n's h [B, P] and the other states [B, K-1, H] by length: copies, which the loops may change."""
        rest = self.buffer(len(states) - 1, self.H)
        for k, state in enumerate(states[1:]):
            rest[:, k] = state[n, self.rows.order]
        return states[0][n, self.rows.order], rest

    def replacements(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Group n's states for resets; of no rows where there are no resets."""
        if self.reset_states:
            return self.sorted(self.reset_states, n)
        rows = 0 if self.inputs.reset is None else self.inputs.B
        kind = self.states[0].dtype
        return np.zeros((rows, self.P), kind), np.zeros((rows, len(self.states) - 1, self.H), kind)

    def place(self, h: np.ndarray, rest: np.ndarray, n: int, outs: list[np.ndarray]) -> None:
        """Group n of states [N, B, ...] in the caller's order of rows."""
        for k, out in enumerate(outs):
            out[n, self.rows.order] = rest[:, k - 1] if k else h

    def by_torch(self) -> bool:
        """Whether products go to torch.mm: they are large, or too few to pay for transposing W."""
        large = self.inputs.B * self.width * self.P >= _LARGE
        return self.dense and (large or self.inputs.T <= 2)

    def recurrent(self, params: dict[str, Tensor]) -> Tensor:
        """W_hh; a diagonal one as a matrix of one row."""
        return params["w_hh"] if self.dense else params["w_hh"].unsqueeze(0)


class _Beyond:
    """The options of a scan in the loops' form."""

    def __init__(self, inputs: ScanInputs, work: _Work) -> None:
        self.inputs, self.work, spec = inputs, work, inputs.spec
        self.masks = {
            name: _array(mask, torch.bool).view(np.uint8) for name, mask in zip(spec.noise, inputs.noise, strict=True)
        }
        self.scales = dict(zip(spec.noise, spec.scales, strict=True))
        self.normed = "ln_hh" in spec.params
        parts = (0, *(count * work.H for count in CELLS[spec.cell].norm)) if self.normed else ()
        self.edges = np.cumsum(np.array(parts, np.int64))

    @staticmethod
    def of(inputs: ScanInputs, work: _Work) -> _Beyond | None:
        spec = inputs.spec
        mixes = spec.noise or any(spec.zoneout)
        clips = spec.cell_clip or spec.proj_clip or spec.grad_clip
        return _Beyond(inputs, work) if mixes or clips or not _PLAIN.issuperset(spec.params) else None

    def mask(self, name: str, width: int) -> np.ndarray:
        return self.masks[name] if name in self.masks else np.empty((0, self.work.N, width), np.uint8)

    def nothing(self, *shape: int) -> np.ndarray:
        return np.empty((0, *shape), self.work.states[0].dtype)

    def aux(self, params: dict[str, Tensor]) -> Aux:
        work, spec, kind = self.work, self.inputs.spec, self.work.states[0].dtype
        small = np.zeros((len(_SMALL), work.H), kind)
        for k, name in enumerate(_SMALL):
            if name in params:
                small[k] = params[name].numpy()
        return Aux(
            keep=np.ones(work.H, kind),
            cell_clip=kind.type(spec.cell_clip),
            eps=kind.type(spec.eps),
            peeps="peephole_i" in params,
            norms="ln_c" in params,
            small=small,
            dsmall=np.zeros_like(small),
            work=np.empty((3, work.H), kind),
        )

    def group(self, n: int, params: dict[str, Tensor], **back: np.ndarray) -> Options:
        """Those of group n; `back` has what a backward needs besides."""
        work, spec, order = self.work, self.inputs.spec, self.work.rows.order
        H, P, N, width, number = work.H, work.P, work.N, work.width, work.states[0].dtype.type
        return Options(
            aux=self.aux(params),
            keep_h=self.masks["h"][n, order] if "h" in self.masks else np.empty((0, P), np.uint8),
            keep_step=self.mask("h_step", P),
            candidate=self.mask("candidate", H),
            zoneout_h=self.mask("zoneout_h", P),
            zoneout_c=self.mask("zoneout_c", H),
            scale_h=number(self.scales.get("h", 1.0)),
            scale_step=number(self.scales.get("h_step", 1.0)),
            scale_candidate=number(self.scales.get("candidate", 1.0)),
            share_h=number(spec.zoneout[0]),
            share_c=number(spec.zoneout[1]),
            proj_clip=number(spec.proj_clip),
            grad_clip=number(spec.grad_clip),
            edges=self.edges,
            gain=params["ln_hh"].contiguous().numpy() if self.normed else self.nothing(),
            left=work.buffer(P),
            entered=np.empty(H, work.states[0].dtype),
            product=back.get("product", self.nothing(width)),
            projected=back.get("projected", self.nothing(P)),
            past=back.get("past", self.nothing(P)),
            dprod=back.get("dprod", self.nothing(N, width)),
            dgain=back.get("dgain", self.nothing()),
        )

    def read(self, outputs: ScanOutputs) -> None:
        """Makes this of a backward, by what the forward saved."""
        self.entering, self.hidden = Entering(self.inputs, outputs.y.to(self.work.dtype), True), outputs.hidden
        self.dprod = self.work.output(self.work.width, kept=self.normed)

    def group_back(self, n: int, params: dict[str, Tensor]) -> Options:
        """As `group`, with what the forward did not save."""
        back = {"past": self.work.buffer(self.work.P), "dprod": self.dprod.numpy()}
        if self.normed:
            h, w = self.entering(n), params["w_hh"]
            back["product"] = (h @ w.t() if self.work.dense else h * w).contiguous().numpy()
            back["dgain"] = np.zeros(self.work.width, self.work.states[0].dtype)
        if self.work.project and self.inputs.spec.proj_clip:
            back["projected"] = (self.hidden[:, n].to(self.work.dtype) @ params["w_hr"].t()).numpy()
        return self.group(n, params, **back)

    def sums(self, o: Options) -> tuple[Tensor, ...]:
        """Gradients of the parameters that the loops sum themselves, in the order of spec.params."""
        rows = dict(zip(_SMALL, o.aux.dsmall, strict=True)) | {"ln_hh": o.dgain}
        return tuple(
            torch.from_numpy(rows[name]).to(value.dtype)
            for name, value in zip(self.inputs.spec.params, self.inputs.params[0], strict=True)
            if name in rows
        )


def _steps(T: int, reverse: bool) -> list[tuple[int, int]]:
    """(k, t): the group's own count of steps, and where that is in time."""
    return [(k, T - 1 - k if reverse else k) for k in range(T)]


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
        known = {*_PLAIN, "ln_hh", *(name for name in CELLS[spec.cell].small if name in _SMALL)}
        reasons += [f"parameter {p}" for p in spec.params if p not in known]
        two = CELLS[spec.cell].has_c
        known = {"h", "h_step", "zoneout_h", *CELLS[spec.cell].masks, *(("zoneout_c",) if two else ())}
        reasons += [f"mask {name}" for name in spec.noise if name not in known]
        if not two and (spec.cell_clip or spec.zoneout[1]):
            reasons.append(f"{spec.cell} has no state c to clip or zone out")
        if not CELLS[spec.cell].dense and "w_hr" in spec.params:
            reasons.append(f"a projected {spec.cell}: its recurrence has no products")
        P, H = inputs.states[0].shape[-1], gx.shape[-1] // len(CELLS[spec.cell].gates)
        if P != H and CELLS[spec.cell].mixes_h:
            reasons.append(f"{spec.cell}, whose step mixes h into what is as wide as H, with P={P} and H={H}")
        return reasons

    def forward(self, inputs: ScanInputs) -> ScanOutputs:
        spec, work = inputs.spec, _Work(inputs)
        rows, others, project, storage = work.rows, len(inputs.states) - 1, work.project, work.storage
        save_states, save_planes = spec.save != "none", spec.save == "all"
        planes_shape = (len(CELLS[spec.cell].planes), work.H)

        y, seq = work.output(work.P), work.output(others, work.H, kept=save_states)
        planes, hidden = work.output(*planes_shape, kept=save_planes), work.output(work.H, kept=project and save_states)
        final = [np.empty_like(state) for state in work.states]
        gx, gh, m = work.array(inputs.gx), work.buffer(work.width), work.buffer(work.H)
        written = (*(t.numpy() for t in (y, seq, planes, hidden)), np.empty(planes_shape, gx.dtype))
        fused, beyond = not work.by_torch(), _Beyond.of(inputs, work)

        for n in range(work.N):
            params = {k: v.detach().to(work.dtype) for k, v in zip(spec.params, inputs.params[n], strict=True)}
            o = None if beyond is None else beyond.group(n, params)
            w, bias = work.recurrent(params), params.get("b_hh")
            h, rest = work.sorted(work.states, n)
            nothing = h[:0]
            # By torch.mm the loop reads neither, and transposing W would cost more than the product.
            w_t = (w.t() if work.dense else w).contiguous().numpy() if fused else nothing
            start = bias.contiguous().numpy() if bias is not None else np.zeros(work.width, gx.dtype)
            w_hr_t = params["w_hr"].t().contiguous().numpy() if project else nothing
            where = (rows.alive, rows.offsets, rows.order, work.reset, *work.replacements(n))
            how = (spec.reverse[n], fused, save_states, save_planes, _ROUNDING.get(storage, 0))
            rest_of = (*where, gx, w_t, start, w_hr_t, h, rest, gh, m, *written, o)
            if fused:
                driver.forward(work.cell, n, 0, inputs.T, *how, *rest_of)
            else:
                left, right, product = torch.from_numpy(h if o is None else o.left), w.t(), torch.from_numpy(gh)
                for k, t in _steps(inputs.T, spec.reverse[n]):
                    count = int(rows.alive[t])
                    if inputs.reset is not None:
                        driver.enter(t, n, *where, h, rest)
                    if o is not None:
                        driver.drop(t, n, *where[:3], h, o)
                    if bias is None or o is not None:
                        torch.mm(left[:count], right, out=product[:count])
                    else:
                        torch.addmm(bias, left[:count], right, out=product[:count])
                    driver.forward(work.cell, n, k, k + 1, *how, *rest_of)
            work.place(h, rest, n, final)

        empty = torch.empty(0, dtype=storage)
        return ScanOutputs(
            y.to(storage),
            tuple(torch.from_numpy(v).to(s.dtype) for v, s in zip(final, inputs.states, strict=True)),
            # Of several, no two may be views of one tensor.
            tuple(seq[:, :, k].contiguous() if save_states else seq.new_empty(0) for k in range(others)),
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
        spec, work = inputs.spec, _Work(inputs)
        if spec.save != "all":
            raise ValueError(f"backward needs the planes of a forward with save='all', got save={spec.save!r}")
        rows, project, split = work.rows, work.project, bool(CELLS[spec.cell].split)

        read = [work.array(t) for t in (outputs.y, _stack(outputs.seq, work), outputs.planes, dy, _stack(dseq, work))]
        dgx, dgh = work.output(work.width), work.output(work.width, kept=split)
        dprojected = work.output(work.P, kept=project)
        dstates = [np.empty_like(state) for state in work.states]
        dreset_states = [np.empty_like(state) for state in work.reset_states]
        dends, dm, d = work.bring(dfinal), work.buffer(work.H), work.buffer(work.width)
        written = [t.numpy() for t in (dgx, dgh, dprojected)]
        fused, beyond = not work.by_torch(), _Beyond.of(inputs, work)
        dsmall: list[tuple[Tensor, ...]] = []
        if beyond is not None:
            beyond.read(outputs)

        for n in range(work.N):
            params = {k: v.detach().to(work.dtype) for k, v in zip(spec.params, inputs.params[n], strict=True)}
            o = None if beyond is None else beyond.group_back(n, params)
            w = work.recurrent(params).contiguous()
            h0, rest0 = work.sorted(work.states, n)
            dh, drest = work.sorted(dends, n)
            w_hr = params["w_hr"].contiguous().numpy() if project else h0[:0]
            replace = work.replacements(n)
            dreplace = [np.zeros_like(v) for v in replace]
            where = (rows.alive, rows.offsets, rows.order)
            places = (*where, rows.lengths, work.reset, *replace)
            changed = (dh, drest, dm, d, *written, *dreplace, o)
            rest_of = (spec.reverse[n], fused, split, *places, w.numpy(), w_hr, h0, rest0, *read, *changed)
            if fused:
                driver.backward(work.cell, n, 0, inputs.T, *rest_of)
            else:
                left, total = torch.from_numpy(d), torch.from_numpy(dh if o is None else o.left)
                for k, t in reversed(_steps(inputs.T, spec.reverse[n])):
                    count = int(rows.alive[t])
                    driver.backward(work.cell, n, k, k + 1, *rest_of)
                    if o is None:
                        total[:count].addmm_(left[:count], w)
                    else:
                        torch.mm(left[:count], w, out=total[:count])
                        driver.carry(t, n, *where, dh, o)
                    if inputs.reset is not None:
                        driver.leave(t, n, *where, work.reset, dh, drest, *dreplace)
                    if o is not None:
                        driver.bound(t, rows.alive, dh, drest, o.grad_clip)
            work.place(dh, drest, n, dstates)
            work.place(dreplace[0], dreplace[1], n, dreset_states)
            dsmall.append(() if beyond is None or o is None else beyond.sums(o))

        storage, empty = work.storage, torch.empty(0, dtype=work.storage)
        return ScanGrads(
            dgx.to(storage),
            dgh.to(storage) if split else empty,
            beyond.dprod.to(storage) if beyond is not None and beyond.normed else empty,
            dprojected.to(storage) if project else empty,
            tuple(torch.from_numpy(v).to(s.dtype) for v, s in zip(dstates, inputs.states, strict=True)),
            tuple(torch.from_numpy(v).to(s.dtype) for v, s in zip(dreset_states, inputs.reset_states, strict=True)),
            tuple(dsmall),
        )


def _stack(rows: tuple[Tensor, ...], work: _Work) -> Tensor:
    """[S, N, K-1, H]; of one other state a view. Gradients of no elements are zero; if all are, S
    is 0."""
    if not any(v.numel() for v in rows):
        return torch.empty((0, work.N, len(rows), work.H), dtype=work.dtype)
    if len(rows) == 1:
        return rows[0].unsqueeze(2)
    return torch.stack([v if v.numel() else v.new_zeros((work.S, work.N, work.H)) for v in rows], 2)


BACKEND = NumbaBackend()
