"""A scan as the drivers take it: sizes, constants of its kernels, and the tensors that they read and write."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from rnnkern.backends.base import ScanGrads, ScanInputs, ScanOutputs, accumulation_dtype
from rnnkern.backends.triton.cells import STEPS
from rnnkern.backends.triton.config import Target, precision
from rnnkern.backends.triton.exchange import MISSING
from rnnkern.backends.triton.launch import TYPES
from rnnkern.backends.triton.options import (
    NORM_H,
    NORMS,
    PROJ_CLIP,
    ZONES_H,
    arguments,
    has,
    norms_of_products,
    options_of,
    small_of,
    within_projection,
)
from rnnkern.backends.triton.slots import each
from rnnkern.cells import CELLS

LONGEST_PERIOD = 31  # of a pattern of directions: it travels as the bits of one int


def pattern(reverse: tuple[bool, ...]) -> tuple[int, int]:
    """(period, bits) of which groups walk from the end; groups are directions, repeated for every model."""
    period = next(p for p in range(1, len(reverse) + 1) if all(r == reverse[n % p] for n, r in enumerate(reverse)))
    return period, sum(1 << n for n, r in enumerate(reverse[:period]) if r)


def rows(x: Tensor) -> Tensor:
    """Rows of neighbouring elements, any strides between rows and groups."""
    return x if x.stride(2) == 1 else x.contiguous()


def even(x: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 elements from the first."""
    return x.stride(0) % 16 == 0 and x.stride(1) % 16 == 0


class Work:
    def __init__(self, inputs: ScanInputs, target: Target) -> None:
        spec, cell = inputs.spec, CELLS[inputs.spec.cell]
        self.inputs, self.spec, self.cell, self.target = inputs, spec, cell, target
        self.step = STEPS[spec.cell]
        self.dtype = inputs.gx.dtype
        self.acc = accumulation_dtype(self.dtype)
        self.S, self.N, width = inputs.gx.shape
        self.H, self.P = width // len(cell.gates), inputs.states[0].shape[2]
        self.project = "w_hr" in spec.params
        self.rest = len(cell.states) - 1
        self.options, self.small = options_of(spec), small_of(spec)
        self.norm_h, self.rows = has(self.options, NORM_H), has(self.options, NORMS)
        # Whether the entering h has a way into the new one past the product.
        self.mixes_h = cell.mixes_h or has(self.options, ZONES_H)
        self.padded = inputs.lengths is not None and inputs.offsets is None
        period, bits = pattern(spec.reverse)
        self.constants: dict[str, Any] = {
            "GATES": len(cell.gates),
            "SAVED": len(cell.planes),
            "REST": self.rest,  # states beyond h
            "HAS_C": self.rest > 0,  # for kernels that have room for one
            "MIXES_H": self.mixes_h,
            "SPLIT": bool(cell.split),
            "H": self.H,
            "P": self.P,
            "N": self.N,
            "PERIOD": period,
            "REVERSE": bits,
            "HAS_BIAS": "b_hh" in spec.params,
            "HAS_RESET": inputs.reset is not None,
            "HAS_RESTART": bool(inputs.reset_states),
            "HAS_LENGTHS": inputs.lengths is not None,
            "HAS_OFFSETS": inputs.offsets is not None,
            "PROJECT": self.project,
            "SAVE_STATES": spec.save != "none",
            "SAVE_PLANES": spec.save == "all",
            "STORAGE": TYPES[self.dtype],
            "ACC": TYPES[self.acc],
            "PRECISION": precision(spec.precision, self.dtype, target),
            "OPTIONS": self.options,
            "SMALLS": len(self.small),
            "PEEPS": sum(name not in cell.row for name in self.small),
            "NORM": cell.norm,
            "STARTS": tuple(sum(cell.norm[:k]) for k in range(len(cell.norm))),
            "DIAGONAL": not cell.dense,
        }
        # Not as bytes: Triton cuts the operands of a product to the width of the narrowest value that went into them,
        # which for fp64 it then cannot compile.
        reset = None if inputs.reset is None else inputs.reset.to(torch.int32)
        self.arguments: dict[str, Any] = {
            "T": inputs.T,
            "B": inputs.B,
            "w": self.weights("w_hh"),
            "bias": self.weights("b_hh"),
            "w_hr": self.weights("w_hr"),
            "gain_h": self.weights("ln_hh"),
            **_named(("h0", *each("c0")), tuple(s.contiguous() for s in inputs.states)),
            **_named(("restart_h", *each("restart_c")), tuple(s.contiguous() for s in inputs.reset_states)),
            "reset": reset,
            "reset_row": 0 if reset is None else reset.stride(0),
            "reset_group": 0 if reset is None else reset.stride(1),
            "lengths": None if inputs.lengths is None else inputs.lengths.contiguous(),
            "offsets": None if inputs.offsets is None else inputs.offsets.contiguous(),
            **arguments(inputs, self.options),
        }

    @property
    def nothing(self) -> bool:
        """Whether there is no step of any row."""
        return not (self.S and self.inputs.T and self.inputs.B)

    def weights(self, name: str) -> Tensor | None:
        """[N, ...]; one group's as they are, several in one copy, which is little beside T steps that read it."""
        if name not in self.spec.params:
            return None
        k = self.spec.params.index(name)
        found = [group[k] for group in self.inputs.params]
        return found[0].contiguous() if len(found) == 1 else torch.stack(found)

    def new(self, *shape: int, dtype: torch.dtype | None = None, wanted: bool = True) -> Tensor:
        """[S, N, ...]: rows past their lengths belong to nobody's step and are zero from the start."""
        size = (self.S, self.N, *shape) if wanted else (0,)
        make = torch.zeros if self.padded else torch.empty
        return make(size, dtype=dtype or self.dtype, device=self.inputs.gx.device)

    def to_be_awaited(self, x: Tensor) -> None:
        """Marks every element as not there yet; rows past their lengths nobody waits for, and they stay zero."""
        bits = x.view(torch.int16 if x.dtype.itemsize == 2 else torch.int32)
        bits.fill_(MISSING)
        if self.padded and self.inputs.lengths is not None:
            past = torch.arange(self.inputs.T, device=x.device)[:, None] >= self.inputs.lengths
            bits.masked_fill_(past.view(-1, 1, 1), 0)

    def outputs(self) -> ScanOutputs:
        """Room for the results; the final states begin as the initial ones, which rows of no steps keep."""
        saved, kept = self.spec.save != "none", self.spec.save == "all"
        out = ScanOutputs(
            self.new(self.P),
            tuple(s.clone(memory_format=torch.contiguous_format) for s in self.inputs.states),
            tuple(self.new(self.H, dtype=self.acc, wanted=saved) for _ in self.cell.states[1:]),
            self.new(len(self.cell.planes), self.H, wanted=kept),
            self.new(self.H, wanted=saved and self.project),
        )
        gx = rows(self.inputs.gx)
        self.constants["GX_ALIGNED"] = even(gx)
        self.arguments |= {
            "gx": gx,
            "gx_row": gx.stride(0),
            "gx_group": gx.stride(1),
            "y": out.y,
            **_named(("h_last", *each("c_last")), out.final),
            **_named(each("seq"), out.seq if saved else ()),
            "planes": out.planes if kept else None,
        }
        return out

    def gradients(
        self, outputs: ScanOutputs, dy: Tensor, dfinal: tuple[Tensor, ...], dseq: tuple[Tensor, ...]
    ) -> ScanGrads:
        """Room for the gradients, and what they are made from."""
        G = len(self.cell.gates)
        device = self.inputs.gx.device
        dgx = self.new(G * self.H)
        dgh = self.new(G * self.H, wanted=bool(self.cell.split))
        resets = self.inputs.reset_states
        found = ScanGrads(
            dgx,
            dgh,
            self.new(G * self.H, wanted=self.norm_h),
            self.new(self.P, wanted=self.project),
            tuple(d.clone(memory_format=torch.contiguous_format) for d in dfinal),
            tuple(torch.zeros(s.shape, dtype=s.dtype, device=device) for s in resets),
        )
        if self.norm_h:
            normed, scales = norms_of_products(self.inputs, outputs.y, self.inputs.spec)
            self.arguments |= {"normed": normed, "norm_scales": scales, "dprod": found.dprod}
        if self.small:
            size = (self.N, len(self.small), self.inputs.B, self.H)
            self.arguments["dsmall"] = torch.zeros(size, dtype=self.acc, device=device)
        if has(self.options, PROJ_CLIP):
            self.arguments["within"] = within_projection(self.inputs, outputs.hidden, self.arguments["w_hr"])
        dy = rows(dy)
        given = tuple(d.contiguous() if d.dim() > 1 else None for d in dseq)
        # Bit k: of the k-th state beyond h.
        has_dseq = sum(1 << k for k, d in enumerate(given) if d is not None)
        self.constants |= {"DY_ALIGNED": even(dy), "HAS_DSEQ": has_dseq}
        self.arguments |= {
            "y": outputs.y.contiguous(),
            **_named(each("seq"), tuple(s.contiguous() for s in outputs.seq)),
            "planes": outputs.planes.contiguous(),
            "dy": dy,
            "dy_row": dy.stride(0),
            "dy_group": dy.stride(1),
            **_named(each("dseq"), given),
            "dgx": dgx,
            "dgh": dgh if self.cell.split else dgx,
            "dh": found.dh if self.project else None,
            **_named(("dh0", *each("dc0")), found.dstates),
            **_named(("drestart_h", *each("drestart_c")), found.dreset_states),
        }
        return found

    def of_small(self) -> tuple[tuple[Tensor, ...], ...]:
        """The gradients of the elementwise parameters and of ln_hh, when all kernels have run."""
        found: dict[str, Tensor] = {}
        if self.small:  # kernels have summed over time, for every batch row
            sums = self.arguments["dsmall"].sum(2).to(self.dtype)
            found |= {name: sums[:, k] for k, name in enumerate(self.small)}
        if self.norm_h:
            products = self.arguments["dgh"].to(self.acc) * self.arguments["normed"]
            found["ln_hh"] = products.sum(0).to(self.dtype)
        order = [name for name in self.spec.params if name in found]
        return tuple(tuple(found[name][n] for name in order) for n in range(self.N))


def _named(names: tuple[str, ...], tensors: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
    """A tensor of each state; None for what the cell or the call does not have."""
    return dict(zip_longest(names, tensors))
