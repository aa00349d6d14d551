"""The scan contract: what a backend is given and what it gives back.

T steps, B batch rows, S rows of (time, batch): T*B dense or padded, sum(lengths) packed. M models (ensembles, vmap over
weights), D directions, N = M*D groups; G gates, H hidden units, P width of h (proj_size or H), Q saved planes.
Rows are time-major: step t of batch row b is row ``offsets[t] + b`` and exists while ``t < lengths[b]``. Dense (neither
given), packed (offsets, lengths descending) and padded (lengths in any order, zeros allowed) are therefore one loop.

One step, in the order that every driver keeps:

1. entering: ``h, c = where(reset, reset_state or 0, previous)``
2. ``prod = (h * keep_h) W_hh^T``
3. ``gh = (layer_norm(prod) * ln_hh | prod) + b_hh``
4. ``(m, c'), planes = step(gx, gh, (h, c), aux)``
5. ``h' = clip(m W_hr^T, proj_clip)``, or m
6. zoneout mixes (h', c') with the entering (h, c)
7. rows write y and seq; states of rows past their length stay.

Backward runs 7 to 1, ``grad_clip`` last.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScanSpec:
    """Everything static about a scan. Hashable, a constexpr for kernels, and one string inside the ops."""

    cell: str
    reverse: tuple[bool, ...]  # [N] which way each group walks
    # per group, in order: "w_hh", then "b_hh", "w_hr", "ln_hh" and small ones as present; and "ln_ih" where a backend's
    # layer_forward is to normalise the input's products
    params: tuple[str, ...]
    noise: tuple[str, ...] = ()  # masks: h [N,B,P] a sequence; h_step, zoneout_h [S,N,P]; candidate, zoneout_c [S,N,H]
    save: str = "all"  # "none" (y and final only) | "states" (and seq, hidden) | "all" (and planes)
    precision: str = "ieee"  # "ieee" | "tf32": what the caller's switches allow for fp32 products on a GPU
    scales: tuple[float, ...] = ()  # one per mask: kept values are multiplied by it (1/(1-p); zoneout 1)
    zoneout: tuple[float, float] = (0.0, 0.0)  # h, c: evaluation mode's fixed mixture
    cell_clip: float = 0.0  # 0: off, as for the two clips below
    proj_clip: float = 0.0
    grad_clip: float = 0.0  # clamps dh and dc as they leave a step
    eps: float = 1e-5  # layer norm

    def encode(self) -> str:
        """The spec as text for the ops; plain joins, because Dynamo traces them."""
        fields = (
            self.cell,
            "".join("1" if r else "0" for r in self.reverse),
            ",".join(self.params),
            ",".join(self.noise),
            self.save,
            self.precision,
            ",".join(str(v) for v in self.scales),
            ",".join(str(v) for v in self.zoneout),
            str(self.cell_clip),
            str(self.proj_clip),
            str(self.grad_clip),
            str(self.eps),
        )
        return "|".join(fields)

    @staticmethod
    @cache
    def decode(text: str) -> ScanSpec:
        cell, reverse, params, noise, save, precision, scales, zoneout, *numbers = text.split("|")

        def words(joined: str) -> tuple[str, ...]:
            return tuple(joined.split(",")) if joined else ()

        zone_h, zone_c = (float(v) for v in words(zoneout))
        cell_clip, proj_clip, grad_clip, eps = (float(v) for v in numbers)
        return ScanSpec(
            cell,
            tuple(r == "1" for r in reverse),
            words(params),
            words(noise),
            save,
            precision,
            tuple(float(v) for v in words(scales)),
            (zone_h, zone_c),
            cell_clip,
            proj_clip,
            grad_clip,
            eps,
        )


@dataclass
class ScanInputs:
    spec: ScanSpec
    T: int  # cannot be derived when S or B is 0
    B: int
    gx: Tensor  # [S, N, G*H] input pre-activations, b_ih included, last stride 1; backward must not read it
    states: tuple[Tensor, ...]  # [N, B, P], [N, B, H]...: before the first step of each group's own direction
    # [N][K] w_hh [G*H, P] (a diagonal one: [G*H]), b_hh [G*H], w_hr [P, H], ln_hh [G*H], small [H]
    params: tuple[tuple[Tensor, ...], ...]
    offsets: Tensor | None = None  # int64 [T] on gx's device; None: t*B
    lengths: Tensor | None = None  # int64 [B] on gx's device; None: all T
    reset: Tensor | None = None  # bool [S, N]: the state entering this row, in its group's OWN direction, is replaced
    reset_states: tuple[Tensor, ...] = ()  # as states, stride 0 over B allowed; empty: zero
    noise: tuple[Tensor, ...] = ()  # bool, in the order of spec.noise; True keeps (zoneout: keeps the entering state)


@dataclass
class ScanOutputs:
    y: Tensor  # [S, N, P] h after every step; rows past a length are 0
    final: tuple[Tensor, ...]  # as states; a row of length 0 keeps its initial state
    seq: tuple[Tensor, ...]  # per state but h: [S, N, H] after every step, its own dtype; numel 0 when save is "none"
    # [S, N, Q, H] storage dtype; numel 0 unless save is "all"; undefined in rows past a length. What lies behind the
    # cell's planes is the backend's own.
    planes: Tensor
    hidden: Tensor  # [S, N, H] h before projection; numel 0 without w_hr or when save is "none"


@dataclass
class ScanGrads:
    dgx: Tensor  # [S, N, G*H]; rows past a length are 0
    dgh: Tensor  # [S, N, G*H] at gh = product + b_hh; numel 0: equals dgx (cells without `split`)
    dprod: Tensor  # [S, N, G*H] at the raw product h W_hh^T; numel 0: equals dgh (differs under ln_hh only)
    dh: Tensor  # [S, N, P] total gradient at the projected h: dW_hr = dh^T hidden; numel 0 without w_hr
    dstates: tuple[Tensor, ...]  # as states
    dreset_states: tuple[Tensor, ...]  # as reset_states, batch dimension B
    dsmall: tuple[tuple[Tensor, ...], ...] = ()  # [N][...] of the small parameters and ln_hh, in params' order


@runtime_checkable
class Backend(Protocol):
    """One scan driver. `unsupported` looks at shapes, dtypes, device and spec only; an empty list means yes.

    What `backward` is given:

    * `inputs` as in the forward, but of gx only the shape, dtype and device mean anything (a stride-0 tensor);
    * `outputs` without `final`, which is the empty tuple; `y`, `seq`, `planes` and `hidden` are those of the forward;
    * `dy` [S, N, P] and `dfinal` (as `outputs.final`) with any strides, 0 among them; rows of dy past a length are
      whatever the caller's loss made them and do not count;
    * `dseq`, one per state but h: [S, N, H], or a tensor with one dimension and numel 0, which means zero.

    An optional method `layer_forward(inputs, x, w_ih, b_ih) -> ScanOutputs` does the input projection as well: x
    [S, M, I], `w_ih` and `b_ih` one per group (None without bias), and then `inputs.gx` is a stride-0 tensor here too.
    """

    name: str

    def unsupported(self, inputs: ScanInputs) -> list[str]: ...

    def forward(self, inputs: ScanInputs) -> ScanOutputs: ...

    def backward(
        self,
        inputs: ScanInputs,
        outputs: ScanOutputs,
        dy: Tensor,
        dfinal: tuple[Tensor, ...],
        dseq: tuple[Tensor, ...],
    ) -> ScanGrads: ...


def accumulation_dtype(storage: torch.dtype) -> torch.dtype:
    """The dtype of c and of every sum: fp32 for fp32, bf16 and fp16, fp64 for fp64."""
    return torch.float64 if storage == torch.float64 else torch.float32
