"""The scan in plain torch operations: truth for every test, and the path of derivatives that nothing faster takes.

One loop for every cell and every option of the contract, in the order of steps that base.py gives. Nothing is written
in place, so forward and backward can both be differentiated, in both directions, to any order, and mapped by vmap.
Everything is computed in the accumulation dtype and rounded to the storage dtype where a kernel would store it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from rnnkern.backends.base import ScanGrads, ScanInputs, ScanOutputs, accumulation_dtype
from rnnkern.cells import CELLS, Aux
from rnnkern.cells.functions import clip, d_clip, d_normalise, normalise
from rnnkern.cells.spec import Row

Pieces = list[tuple[Tensor | slice, Tensor]]  # rows of S, and what was computed for them


class Step(NamedTuple):
    rows: Tensor | slice  # rows of S that exist at this time
    alive: Tensor | slice  # and their batch rows


class Group:
    """One group of a scan: its walk over time, its parameters and its masks. The methods are the steps of base.py."""

    def __init__(self, inputs: ScanInputs, n: int) -> None:
        self.inputs, self.n, self.spec = inputs, n, inputs.spec
        self.cell = CELLS[inputs.spec.cell]
        self.storage = inputs.states[0].dtype
        self.dtype = accumulation_dtype(self.storage)
        values = (value.to(self.dtype) for value in inputs.params[n])
        self.p = dict(zip(inputs.spec.params, values, strict=True))
        self.small = {name: value for name, value in self.p.items() if name in self.cell.small}

    def walk(self) -> list[Step]:
        """The steps in the order in which this group takes them; those that no row has are left out."""
        T, B, inputs = self.inputs.T, self.inputs.B, self.inputs
        order = range(T - 1, -1, -1) if self.spec.reverse[self.n] else range(T)
        if inputs.lengths is None and inputs.offsets is None:
            return [Step(slice(t * B, t * B + B), slice(None)) for t in order]
        lengths = [T] * B if inputs.lengths is None else inputs.lengths.tolist()
        first = [t * B for t in range(T)] if inputs.offsets is None else inputs.offsets.tolist()
        steps = []
        for t in order:
            alive = torch.tensor([b for b in range(B) if lengths[b] > t], device=inputs.gx.device, dtype=torch.int64)
            if alive.numel():
                steps.append(Step(alive + first[t], alive))
        return steps

    def gates(self, v: Tensor) -> Row:
        return v.chunk(len(self.cell.gates), -1)

    def mask(self, name: str, step: Step) -> Tensor | None:
        if name not in self.spec.noise:
            return None
        k = self.spec.noise.index(name)
        noise = self.inputs.noise[k]
        rows = noise[self.n][step.alive] if name == "h" else noise[step.rows, self.n]
        return rows.to(self.dtype) * self.spec.scales[k]

    def enter(self, states: Iterable[Tensor], step: Step) -> tuple[Row, Tensor | None]:
        """Step 1: the states that enter, resets applied, and the rows that were reset."""
        previous = [state[step.alive].to(self.dtype) for state in states]
        if self.inputs.reset is None:
            return tuple(previous), None
        reset = self.inputs.reset[step.rows, self.n].unsqueeze(-1)
        if not self.inputs.reset_states:
            return tuple(torch.where(reset, 0, state) for state in previous), reset
        restart = [state[self.n][step.alive].to(self.dtype) for state in self.inputs.reset_states]
        return tuple(torch.where(reset, r, state) for r, state in zip(restart, previous, strict=True)), reset

    def keep(self, step: Step) -> Tensor | None:
        """What h is multiplied by before it meets w_hh."""
        sequence, single = self.mask("h", step), self.mask("h_step", step)
        return single if sequence is None else sequence if single is None else sequence * single

    def product(self, h: Tensor, keep: Tensor | None) -> Tensor:
        """Step 2."""
        left = h if keep is None else h * keep
        return left @ self.p["w_hh"].T if self.cell.dense else left.repeat(1, len(self.cell.gates)) * self.p["w_hh"]

    def d_product(self, dprod: Tensor, keep: Tensor | None) -> Tensor:
        dh = dprod @ self.p["w_hh"] if self.cell.dense else torch.stack(self.gates(dprod * self.p["w_hh"])).sum(0)
        return dh if keep is None else dh * keep

    def pre_activation(self, prod: Tensor) -> Tensor:
        """Step 3."""
        gh = self.normalised(prod)[0] * self.p["ln_hh"] if "ln_hh" in self.p else prod
        return gh + self.p["b_hh"] if "b_hh" in self.p else gh

    def normalised(self, prod: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        sizes = [count * prod.shape[-1] // len(self.cell.gates) for count in self.cell.norm]
        parts = [normalise(part, self.spec.eps) for part in prod.split(sizes, -1)]
        return torch.cat([normed for normed, _ in parts], -1), parts

    def d_pre_activation(self, dgh: Tensor, prod: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the product and of ln_hh."""
        normed, parts = self.normalised(prod)
        pieces = (dgh * self.p["ln_hh"]).split([part.shape[-1] for part, _ in parts], -1)
        dprod = [d_normalise(d, part, scale) for d, (part, scale) in zip(pieces, parts, strict=True)]
        return torch.cat(dprod, -1), (dgh * normed).sum(0)

    def aux(self, step: Step) -> Aux:
        keep = self.mask("candidate", step)
        return Aux(self.small, {} if keep is None else {"candidate": keep}, self.spec.cell_clip, self.spec.eps)

    def project(self, hidden: Tensor) -> Tensor:
        """Step 5."""
        return clip(hidden @ self.p["w_hr"].T, self.spec.proj_clip)

    def d_project(self, dh: Tensor, hidden: Tensor) -> Tensor:
        """The gradient at the raw product of step 5."""
        return d_clip(dh, hidden @ self.p["w_hr"].T, self.spec.proj_clip) if self.spec.proj_clip else dh

    def zoneout(self, k: int, step: Step) -> Tensor | float:
        """Step 6: the share of state k's entering value that stays; only h and c have one."""
        if k > 1:
            return 0.0
        mask = self.mask(("zoneout_h", "zoneout_c")[k], step)
        return self.spec.zoneout[k] if mask is None else mask

    def stored(self, k: int, v: Tensor) -> Tensor:
        """State k as it is stored between steps."""
        return v.to(self.inputs.states[k].dtype)


def _mixes(share: Tensor | float) -> bool:
    return isinstance(share, Tensor) or share != 0.0


def _merge(old: Tensor, alive: Tensor | slice, new: Tensor) -> Tensor:
    """`old` with the rows `alive` replaced."""
    return new if isinstance(alive, slice) else old.index_copy(0, alive, new)


def _lay(pieces: Pieces, like: Tensor, *size: int, reverse: bool) -> Tensor:
    """Rows computed step by step as one tensor in the order of S; those that no step computed are zero."""
    if not pieces:
        return like.new_zeros(size)
    if isinstance(pieces[0][0], slice):
        return torch.cat([value for _, value in (reversed(pieces) if reverse else pieces)]).to(like.dtype)
    rows = torch.cat([rows for rows, _ in pieces if isinstance(rows, Tensor)])
    return like.new_zeros(size).index_copy(0, rows, torch.cat([value for _, value in pieces]).to(like.dtype))


class Reference:
    """The reference scan. Any device, any floating dtype, every word of ScanSpec."""

    name = "reference"

    def unsupported(self, inputs: ScanInputs) -> list[str]:
        spec = inputs.spec
        cell = CELLS.get(spec.cell)
        if cell is None:
            return [f"no cell {spec.cell!r}: expected one of {', '.join(CELLS)}"]
        reasons = []
        if not inputs.gx.is_floating_point():
            reasons.append(f"dtype {inputs.gx.dtype} is not a floating-point one")
        known = {"w_hh", "b_hh", "w_hr", "ln_hh", *cell.small}
        reasons += [f"{cell.name} has no parameter {name}" for name in spec.params if name not in known]
        known = {"h", "h_step", "zoneout_h", *(("zoneout_c",) if cell.has_c else ()), *cell.masks}
        reasons += [f"{cell.name} has no mask {name}" for name in spec.noise if name not in known]
        if not cell.has_c and (spec.cell_clip or spec.zoneout[1]):
            reasons.append(f"{cell.name} has no state c to clip or zone out")
        return reasons

    def forward(self, inputs: ScanInputs) -> ScanOutputs:
        spec, cell = inputs.spec, CELLS[inputs.spec.cell]
        S, N, width = inputs.gx.shape
        H, Q, K = width // len(cell.gates), len(cell.planes), len(cell.states)
        h0 = inputs.states[0]
        ys, planes, hiddens = [], [], []
        finals: list[list[Tensor]] = [[] for _ in range(K)]
        seqs: list[list[Tensor]] = [[] for _ in range(K - 1)]
        for n in range(N):
            group = Group(inputs, n)
            states = [state[n] for state in inputs.states]
            written: list[Pieces] = [[] for _ in range(K)]
            saved: Pieces = []
            wide: Pieces = []
            for step in group.walk():
                entering, _ = group.enter(states, step)
                gh = group.pre_activation(group.product(entering[0], group.keep(step)))
                gx = inputs.gx[step.rows, n].to(group.dtype)
                new, activations = cell.step(group.gates(gx), group.gates(gh), entering, group.aux(step))
                leaving = list(new)
                if "w_hr" in group.p:
                    hidden = leaving[0].to(group.storage)
                    wide.append((step.rows, hidden))
                    leaving[0] = group.project(hidden.to(group.dtype))
                for k in range(K):
                    stay = group.zoneout(k, step)
                    if _mixes(stay):
                        leaving[k] = stay * entering[k] + (1 - stay) * leaving[k]
                    leaving[k] = group.stored(k, leaving[k])
                    written[k].append((step.rows, leaving[k]))
                saved.append((step.rows, torch.stack(activations, 1)))
                states = [_merge(old, step.alive, v) for old, v in zip(states, leaving, strict=True)]
            back = spec.reverse[n]
            ys.append(_lay(written[0], h0, S, h0.shape[-1], reverse=back))
            planes.append(_lay(saved, h0, S, Q, H, reverse=back) if spec.save == "all" else h0.new_empty(0))
            hiddens.append(_lay(wide, h0, S, H, reverse=back))
            for k in range(K):
                finals[k].append(states[k])
            for k in range(1, K):
                seqs[k - 1].append(_lay(written[k], inputs.states[k], S, H, reverse=back))
        absent = h0.new_empty(0)
        return ScanOutputs(
            torch.stack(ys, 1),
            tuple(torch.stack(final) for final in finals),
            tuple(torch.stack(seq, 1) if spec.save != "none" else seq[0].new_empty(0) for seq in seqs),
            torch.stack(planes, 1) if spec.save == "all" else absent,
            torch.stack(hiddens, 1) if "w_hr" in spec.params and spec.save != "none" else absent.clone(),
        )

    def backward(
        self,
        inputs: ScanInputs,
        outputs: ScanOutputs,
        dy: Tensor,
        dfinal: tuple[Tensor, ...],
        dseq: tuple[Tensor, ...],
    ) -> ScanGrads:
        spec, cell = inputs.spec, CELLS[inputs.spec.cell]
        if spec.save != "all":
            raise ValueError(f"backward needs the planes of a forward with save='all', got save={spec.save!r}")
        S, N, P = outputs.y.shape
        width, K = inputs.params[0][0].shape[0], len(cell.states)
        like = outputs.y
        columns: dict[str, list[Tensor]] = {"dgx": [], "dgh": [], "dprod": [], "dh": []}
        dstates: list[list[Tensor]] = [[] for _ in range(K)]
        drestarts: list[list[Tensor]] = [[] for _ in inputs.reset_states]
        dsmall = []
        for n in range(N):
            group = Group(inputs, n)
            pieces: dict[str, Pieces] = {name: [] for name in columns}
            carry = [d[n].to(group.dtype) for d in dfinal]
            drestart = [torch.zeros_like(state[n], dtype=group.dtype) for state in inputs.reset_states]
            small = {k: torch.zeros_like(v) for k, v in group.p.items() if k in group.small or k == "ln_hh"}
            walk = group.walk()
            for step, before in zip(reversed(walk), reversed(self._before(inputs, outputs, n, walk)), strict=True):
                entering, reset = group.enter(before, step)
                keep = group.keep(step)
                d = [v[step.alive] for v in carry]
                d[0] = d[0] + dy[step.rows, n].to(group.dtype)
                for k in range(1, K):
                    if dseq[k - 1].dim() > 1:  # else absent: zero
                        d[k] = d[k] + dseq[k - 1][step.rows, n].to(group.dtype)
                past: list[Tensor | float] = [0.0] * K
                for k in range(K):
                    stay = group.zoneout(k, step)
                    if _mixes(stay):
                        past[k], d[k] = stay * d[k], (1 - stay) * d[k]
                if "w_hr" in group.p:
                    d[0] = group.d_project(d[0], outputs.hidden[step.rows, n].to(group.dtype))
                    pieces["dh"].append((step.rows, d[0]))
                    d[0] = d[0] @ group.p["w_hr"]
                planes = outputs.planes[step.rows, n].to(group.dtype).unbind(1)
                gates_x, gates_h, dentering, dparams = cell.step_backward(tuple(d), planes, entering, group.aux(step))
                dgx, dgh = torch.cat(gates_x, -1), torch.cat(gates_h, -1)
                for name, value in zip((k for k in cell.small if k in group.small), dparams, strict=True):
                    small[name] = small[name] + value.sum(0)
                dprod = dgh
                if "ln_hh" in group.p:
                    dprod, dgain = group.d_pre_activation(dgh, group.product(entering[0], keep))
                    small["ln_hh"] = small["ln_hh"] + dgain
                d = [v + more for v, more in zip(dentering, past, strict=True)]
                d[0] = d[0] + group.d_product(dprod, keep)
                if reset is not None:
                    d, drestart = self._d_enter(d, drestart, reset, step)
                if spec.grad_clip:
                    d = [clip(v, spec.grad_clip) for v in d]
                carry = [_merge(old, step.alive, v) for old, v in zip(carry, d, strict=True)]
                for name, value in (("dgx", dgx), ("dgh", dgh), ("dprod", dprod)):
                    pieces[name].append((step.rows, value))
            back = not spec.reverse[n]  # the walk was taken from its end
            for name, column in columns.items():
                column.append(_lay(pieces[name], like, S, P if name == "dh" else width, reverse=back))
            for k in range(K):
                dstates[k].append(group.stored(k, carry[k]))
            for k, total in enumerate(drestart):
                drestarts[k].append(total.to(inputs.reset_states[k].dtype))
            dsmall.append(
                tuple(small[k].to(v.dtype) for k, v in zip(spec.params, inputs.params[n], strict=True) if k in small)
            )
        present = {"dgx": True, "dgh": bool(cell.split), "dprod": "ln_hh" in spec.params, "dh": "w_hr" in spec.params}
        stacked = {k: torch.stack(v, 1) if present[k] else like.new_empty(0) for k, v in columns.items()}
        return ScanGrads(
            **stacked,
            dstates=tuple(torch.stack(d) for d in dstates),
            dreset_states=tuple(torch.stack(d) for d in drestarts),
            dsmall=tuple(dsmall),
        )

    @staticmethod
    def _d_enter(
        d: list[Tensor], drestart: list[Tensor], reset: Tensor, step: Step
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Backward of step 1: what entered through a reset goes to the restart state and nowhere else."""
        if drestart:
            through = [torch.where(reset, v, 0) for v in d]
            if isinstance(step.alive, slice):
                drestart = [total + v for total, v in zip(drestart, through, strict=True)]
            else:
                drestart = [t.index_add(0, step.alive, v) for t, v in zip(drestart, through, strict=True)]
        return [torch.where(reset, 0, v) for v in d], drestart

    @staticmethod
    def _before(inputs: ScanInputs, outputs: ScanOutputs, n: int, walk: list[Step]) -> list[list[Tensor]]:
        """The states before each step of the walk, for all B rows, from what the forward wrote."""
        states, found = [state[n] for state in inputs.states], []
        for step in walk:
            found.append(states)
            written = (outputs.y, *outputs.seq)
            states = [_merge(old, step.alive, v[step.rows, n]) for old, v in zip(states, written, strict=True)]
        return found


BACKEND = Reference()
