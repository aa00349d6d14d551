"""A scan moved along a direction: the tangents of its outputs and of its gradients, in plain torch without a graph.

Both halves are linear in the tangents, and elementwise but for the products with weights. A loop over time therefore
holds what passes from step to step alone: products with recurrent weights and with the cell's Jacobian. All that
depends on known values is made for all steps at once. Loops are the same for all cells; equations are in
cells/*/reference.py.

Inside, tensors are [N, T, B, ...] in the order of each group's walk: every batch row begins at step 0, whatever its
length and direction, and steps past its length hold zeros, which pass nothing on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rnnkern.backends.base import ScanGrads, ScanInputs, ScanOutputs, ScanSpec, accumulation_dtype
from rnnkern.cells import CELLS
from rnnkern.cells.spec import Row

Optionals = Sequence[Tensor | None]
Steps = Sequence[Tensor]


def covers(spec: ScanSpec) -> bool:
    """Whether tangents of this scan can be had here; else the reference is differentiated."""
    plain = not spec.noise and spec.zoneout == (0.0, 0.0) and spec.cell_clip == spec.proj_clip == spec.grad_clip == 0.0
    return CELLS[spec.cell].jacobian is not None and plain and {"w_hh", "b_hh", "w_hr"}.issuperset(spec.params)


@dataclass
class Direction:
    """Tangents of what a scan reads, each as its primal; None: it stays."""

    gx: Tensor | None
    states: Optionals
    params: Sequence[Optionals]
    reset_states: Optionals


@dataclass
class Gradients:
    """Of a scan's outputs, or their tangents; None: zero."""

    y: Tensor | None
    final: Optionals
    seq: Optionals  # a tensor with one dimension is zero too


@dataclass
class Moved:
    """Tangents of what a forward gives, in the accumulation dtype, and as a backward needs them."""

    outputs: ScanOutputs  # planes is empty
    entering: Row  # [N, T, B, ...]
    planes: Row


@dataclass
class Carried:
    """What a backward gives, and the tangents of it: [N, T, B, ...] and [N, B, ...]."""

    totals: Row  # of every state after each step, before projection
    gx: Tensor
    gh: Tensor
    h: Tensor | None  # of the projected h
    states: list[Tensor]
    reset_states: list[Tensor]


@dataclass
class Own:
    """What moves a backward by itself: every step adds it to the results. [N, T, B, ...]"""

    gx: Tensor
    gh: Tensor
    entering: Row
    wide: Tensor | None  # to the gradient of h before projection


class Walk:
    """The order in which the groups of a scan take its rows."""

    def __init__(self, inputs: ScanInputs, S: int) -> None:
        self.T, self.B, self.S, reverse = inputs.T, inputs.B, S, inputs.spec.reverse
        self.rows: Tensor | None = None
        self.lengths: Tensor | None = None  # None: all T
        device = inputs.states[0].device
        if inputs.lengths is None and not any(reverse):
            return
        step, batch = torch.arange(self.T, device=device).unsqueeze(1), torch.arange(self.B, device=device)
        lengths = torch.full_like(batch, self.T) if inputs.lengths is None else inputs.lengths
        first = torch.arange(self.T, device=device) * self.B if inputs.offsets is None else inputs.offsets
        ahead, back = (first[t.clamp_min(0)] + batch for t in (step.expand(-1, self.B), lengths - 1 - step))
        self.alive = step < lengths
        self.rows = torch.where(self.alive, torch.stack([back if r else ahead for r in reverse]), 0)
        self.groups, self.batch = torch.arange(len(reverse), device=device), batch
        if inputs.lengths is not None:
            self.lengths, self.last = lengths, (lengths - 1).clamp_min(0)
            self.empty = (lengths == 0).unsqueeze(-1)

    def enter(self, v: Tensor) -> Tensor:
        """[S, N, ...] -> [N, T, B, ...]"""
        if self.rows is None:
            return v.unflatten(0, (self.T, self.B)).movedim(2, 0)
        return self.masked(v[self.rows, self.groups[:, None, None]])

    def masked(self, v: Tensor) -> Tensor:
        """Zero past the lengths, where [N, T, B, ...] may hold anything."""
        if self.lengths is None:
            return v
        return v.masked_fill(~self.alive.view(self.T, self.B, *(1,) * (v.dim() - 3)), 0)

    def leave(self, v: Tensor) -> Tensor:
        """[N, T, B, W] -> [S, N, W]"""
        if self.rows is None:
            return v.movedim(0, 2).flatten(0, 1)
        out = v.new_zeros(self.S, v.shape[0], v.shape[-1])
        out[self.rows[:, self.alive], self.groups[:, None]] = v[:, self.alive]
        return out

    def final(self, start: Tensor, v: Tensor) -> Tensor:
        """The last of v that each row has; `start` [N, B, W] where it has none."""
        if self.lengths is None:
            return v[:, -1]
        return torch.where(self.empty, start, v[:, self.last, self.batch])

    def add_final(self, v: Tensor, d: Tensor) -> None:
        if self.lengths is None:
            v[:, -1] += d
        else:
            v[:, self.last, self.batch] += torch.where(self.empty, 0, d)

    def unmoved(self, start: Tensor, d: Tensor) -> Tensor:
        """Gradients of initial states: rows of no steps hand on those of the final ones."""
        return start if self.lengths is None else torch.where(self.empty, d, start)


def over_gates(v: Tensor) -> Tensor:
    """[..., G, H] summed over G; one gate is no sum."""
    return v.sum(-2) if v.shape[-2] > 1 else v.squeeze(-2)


class TangentScan:
    """One scan with what its forward saved.

    Args:
        inputs: of gx, the shape alone.
        outputs: of the forward with save="all", without `final`.
    """

    def __init__(self, inputs: ScanInputs, outputs: ScanOutputs) -> None:
        self.inputs, self.spec, self.cell = inputs, inputs.spec, CELLS[inputs.spec.cell]
        y = outputs.y
        self.storage, self.dtype = y.dtype, accumulation_dtype(y.dtype)
        self.walk = Walk(inputs, y.shape[0])
        self.w_hh = self.stacked("w_hh")
        self.projected = "w_hr" in self.spec.params
        self.w_hr = self.stacked("w_hr") if self.projected else None
        self.hidden = self.enter(outputs.hidden) if self.projected else None
        planes = outputs.planes if outputs.planes.numel() else y.unsqueeze(2)  # a plane that is y is not saved twice
        self.planes = self.enter(planes).movedim(3, 0).contiguous().unbind(0)  # each is read several times
        self.reset = None if inputs.reset is None else self.walk.enter(inputs.reset.unsqueeze(-1)).unbind(1)
        starts = [s.to(self.dtype) for s in inputs.states]
        written = [self.enter(v) for v in (y, *outputs.seq)]
        restart = [s.to(self.dtype) for s in inputs.reset_states] or [torch.zeros_like(s) for s in starts]
        self.entering = tuple(map(self.entered, starts, written, restart))
        assert self.cell.jacobian is not None
        self.jacobian = self.cell.jacobian(self.planes, self.entering)
        self.gh = [j.unbind(1) for j in self.jacobian.gh]
        self.through = [[None if j is None else j.unbind(1) for j in row] for row in self.jacobian.states]

    # ---- the pieces of a scan ----------------------------------------------------------------------------------------

    def stacked(self, name: str) -> Tensor:
        at = self.spec.params.index(name)
        return torch.stack([group[at] for group in self.inputs.params]).to(self.dtype)

    def moving(self, name: str, direction: Direction) -> Tensor | None:
        """A parameter's tangents in all groups, or None where it stays in all."""
        if name not in self.spec.params:
            return None
        at = self.spec.params.index(name)
        found = [group[at] for group in direction.params]
        if all(t is None for t in found):
            return None
        like = self.inputs.params[0][at]
        return torch.stack([torch.zeros_like(like) if t is None else t for t in found]).to(self.dtype)

    def enter(self, v: Tensor) -> Tensor:
        return self.walk.enter(v).to(self.dtype)

    def entered(self, start: Tensor, written: Tensor, restart: Tensor) -> Tensor:
        """A state as it enters every step, from how each step left it."""
        before = torch.cat((start.unsqueeze(1), written[:, :-1]), 1)
        if self.reset is not None:
            before = torch.where(torch.stack(self.reset, 1), restart.unsqueeze(1), before)
        return self.walk.masked(before)

    def by_gate(self, v: Tensor) -> Tensor:
        """[..., G*H] -> [..., G, H]"""
        return v.unflatten(-1, (len(self.cell.gates), -1))

    def product(self, v: Tensor, w: Tensor) -> Tensor:
        """[N, T, B, k] times [N, k, m]."""
        return torch.bmm(v.flatten(1, 2), w).unflatten(1, v.shape[1:3])

    def recurrent(self, h: Tensor, w: Tensor) -> Tensor:
        """h W_hh^T of every step."""
        return self.product(h, w.mT) if self.cell.dense else self.by_unit(h, w[:, None, None])

    def d_recurrent(self, d: Tensor, w: Tensor) -> Tensor:
        return self.product(d, w) if self.cell.dense else over_gates(self.by_gate(d * w[:, None, None]))

    def by_unit(self, h: Tensor, w: Tensor) -> Tensor:
        """A diagonal recurrence: [..., H] times [..., G*H]."""
        return h.repeat(*(1,) * (h.dim() - 1), len(self.cell.gates)) * w

    def filled(self, tangents: Optionals, likes: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(tangents, likes, strict=True)
        return [torch.zeros_like(v, dtype=self.dtype) if t is None else t.to(self.dtype) for t, v in pairs]

    # ---- forward -----------------------------------------------------------------------------------------------------

    def forward(self, direction: Direction) -> Moved:
        states = start = self.filled(direction.states, self.inputs.states)
        restart = self.filled(direction.reset_states, self.inputs.reset_states) or [torch.zeros_like(s) for s in start]
        base, offset = self.pre_activations(direction)
        tw_hr = self.moving("w_hr", direction)
        wide = None if tw_hr is None or self.hidden is None else self.product(self.hidden, tw_hr.mT).unbind(1)
        dense, w_hr = self.cell.dense, None if self.w_hr is None else self.w_hr.mT
        w_hh = self.w_hh.mT.contiguous() if dense else self.w_hh.unsqueeze(1)
        K, shape = len(states), (*start[0].shape[:2], len(self.cell.gates), -1)
        entered, written, products, hidden = [], [], [], []
        for t in range(self.inputs.T):
            if self.reset is not None:
                states = [torch.where(self.reset[t], r, s) for r, s in zip(restart, states, strict=True)]
            entered.append(states)
            gh = torch.baddbmm(base[t], states[0], w_hh) if dense else base[t] + self.by_unit(states[0], w_hh)
            products.append(gh)
            gates, new = gh.view(shape), []
            for k in range(K):
                v = over_gates(self.gh[k][t] * gates)
                if offset is not None:
                    v += offset[k][t]
                for j, coefficient in enumerate(self.through[k]):
                    if coefficient is not None:
                        v.addcmul_(coefficient[t], states[j])
                new.append(v)
            if w_hr is not None:
                hidden.append(new[0])
                new[0] = torch.bmm(new[0], w_hr) if wide is None else torch.baddbmm(wide[t], new[0], w_hr)
            states = new
            written.append(states)
        left = [torch.stack(v, 1) for v in zip(*written, strict=True)]
        finals = tuple(self.walk.final(s, v) for s, v in zip(start, left, strict=True))
        y, *seq = (self.walk.leave(v) for v in left)
        m = self.walk.leave(torch.stack(hidden, 1)) if hidden else y.new_empty(0)
        entering = tuple(self.walk.masked(torch.stack(v, 1)) for v in zip(*entered, strict=True))
        planes = self.planes_along(direction, torch.stack(products, 1), entering)
        return Moved(ScanOutputs(y, finals, tuple(seq), y.new_empty(0), m), entering, planes)

    def pre_activations(self, direction: Direction) -> tuple[Steps, Sequence[Steps] | None]:
        """What is added to every product h W_hh^T, and to every new state: the part that no loop is needed for.

        Only a cell with `split` gates has the second; elsewhere gx adds to the product.
        """
        N, T, width = self.w_hh.shape[0], self.inputs.T, self.w_hh.shape[1]
        base, offset = self.w_hh.new_zeros(1, 1, 1, 1).expand(N, T, 1, width), None
        w, b = self.moving("w_hh", direction), self.moving("b_hh", direction)
        if w is not None:
            base = self.recurrent(self.entering[0], w)
        if b is not None:
            base = base + b[:, None, None]
        if direction.gx is not None:
            gx = self.enter(direction.gx)
            if self.cell.split:
                offset = [over_gates(j * self.by_gate(gx)).unbind(1) for j in self.jacobian.gx]
            else:
                base = base + gx
        return base.unbind(1), offset

    def planes_along(self, direction: Direction, gh: Tensor, entering: Row) -> Row:
        """Tangents of the planes; gh has those of gx in it where gates are not split."""
        assert self.cell.planes_jvp is not None
        gx = gh.new_zeros(1).expand(gh.shape)
        if self.cell.split and direction.gx is not None:
            gx = self.enter(direction.gx)
        gates = self.by_gate(gx).unbind(-2), self.by_gate(gh).unbind(-2)
        found = self.cell.planes_jvp(*gates, self.planes, entering)
        return tuple(self.walk.masked(v) for v in found)

    # ---- backward ----------------------------------------------------------------------------------------------------

    def backward(self, d: Gradients) -> Carried:
        return self.back(d, None)

    def backward_jvp(self, carried: Carried, d: Gradients, moved: Moved, direction: Direction) -> Carried:
        """How `carried`, the backward of other gradients, moves; `d` are the tangents of those."""
        assert self.cell.step_backward_jvp is not None
        gx, gh, (first, *rest) = self.cell.step_backward_jvp(
            carried.totals, self.planes, moved.planes, self.entering, moved.entering
        )
        w, w_hr = self.moving("w_hh", direction), self.moving("w_hr", direction)
        if w is not None:
            first = first + self.d_recurrent(carried.gh, w)
        wide = None if w_hr is None or carried.h is None else self.product(carried.h, w_hr)
        own = torch.stack(gh, -2)
        return self.back(d, Own(torch.stack(gx, -2) if self.cell.split else own, own, (first, *rest), wide))

    def back(self, d: Gradients, own: Own | None) -> Carried:
        """The loop of either: linear in `d` and in `own`."""
        sources, K = self.sources(d), len(self.inputs.states)
        carry = [torch.zeros_like(s, dtype=self.dtype) for s in self.inputs.states]
        restart = [torch.zeros_like(v) for v in carry] if self.inputs.reset_states else []
        added: list[Steps] = [[self.w_hh.new_zeros(1, 1, 1)] * self.inputs.T] * K
        own_gh = own_wide = None
        if own is not None:
            own_gh, added = own.gh.unbind(1), [v.unbind(1) for v in own.entering]
            own_wide = None if own.wide is None else own.wide.unbind(1)
        totals, products, projected = [], [], []
        for t in range(self.inputs.T - 1, -1, -1):
            total = [v if source is None else v + source[t] for v, source in zip(carry, sources, strict=True)]
            if self.w_hr is not None:
                projected.append(total[0])
                total[0] = torch.bmm(total[0], self.w_hr)
                if own_wide is not None:
                    total[0] += own_wide[t]
            totals.append(total)
            gh = self.gh[0][t] * total[0].unsqueeze(-2)
            for k in range(1, K):
                gh.addcmul_(self.gh[k][t], total[k].unsqueeze(-2))
            if own_gh is not None:
                gh += own_gh[t]
            gh = gh.flatten(-2)
            products.append(gh)
            if self.cell.dense:
                to_h = torch.baddbmm(added[0][t], gh, self.w_hh)
            else:
                to_h = added[0][t] + over_gates(self.by_gate(gh * self.w_hh.unsqueeze(1)))
            carry = [to_h, *(v[t] for v in added[1:])]
            for k, row in enumerate(self.through):
                for j, coefficient in enumerate(row):
                    if coefficient is not None:
                        carry[j] = torch.addcmul(carry[j], coefficient[t], total[k])
            if self.reset is not None:
                restart = [r + torch.where(self.reset[t], v, 0) for r, v in zip(restart, carry, strict=False)]
                carry = [torch.where(self.reset[t], 0, v) for v in carry]
        every = tuple(torch.stack(v[::-1], 1) for v in zip(*totals, strict=True))
        of_gh = of_gx = torch.stack(products[::-1], 1)
        if self.cell.split:
            of_gx = self.jacobian.gx[0].new_zeros(()) if own is None else own.gx
            for to_gates, total_of in zip(self.jacobian.gx, every, strict=True):
                of_gx = torch.addcmul(of_gx, to_gates, total_of.unsqueeze(-2))
            of_gx = of_gx.flatten(-2)
        return Carried(
            every,
            of_gx,
            of_gh,
            torch.stack(projected[::-1], 1) if projected else None,
            [v if end is None else self.walk.unmoved(v, end) for v, end in zip(carry, d.final, strict=True)],
            restart,
        )

    def sources(self, d: Gradients) -> list[tuple[Tensor, ...] | None]:
        """Per state, what comes into its gradient at every step."""
        found: list[tuple[Tensor, ...] | None] = []
        for k, (every, final) in enumerate(zip((d.y, *d.seq), d.final, strict=True)):
            every = None if every is None or every.dim() == 1 else self.enter(every)
            if final is not None:
                state = self.inputs.states[k]
                shape = (state.shape[0], self.inputs.T, *state.shape[1:])
                every = final.new_zeros(shape, dtype=self.dtype) if every is None else every.clone()
                self.walk.add_final(every, final)
            found.append(None if every is None else every.unbind(1))
        return found

    def gradients(self, carried: Carried) -> ScanGrads:
        """As a backend gives them."""
        gx, absent = self.walk.leave(carried.gx).to(self.storage), carried.gx.new_empty(0, dtype=self.storage)
        gh = self.walk.leave(carried.gh).to(self.storage) if self.cell.split else absent
        h = absent if carried.h is None else self.walk.leave(carried.h).to(self.storage)
        states, restart = (
            tuple(v.to(s.dtype) for v, s in zip(given, self.inputs.states, strict=False))
            for given in (carried.states, carried.reset_states)
        )
        return ScanGrads(gx, gh, absent, h, states, restart)
