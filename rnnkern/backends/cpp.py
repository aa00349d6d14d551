"""C++ scans on the CPU: rnnkern._cpu, which knows nothing of torch and is given addresses, sizes and strides."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from rnnkern._weights import Entering
from rnnkern.backends.base import ScanGrads, ScanInputs, ScanOutputs, ScanSpec, accumulation_dtype
from rnnkern.cells import CELLS

try:
    from rnnkern import _cpu
except ImportError as error:
    raise ImportError(f"the C++ extension was not built ({error}); pip install -v shows why") from error

_CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru", "mgu", "indrnn_tanh", "indrnn_relu", "ligru", "slstm")
CELL_NUMBERS = {name: number for number, name in enumerate(_CELLS)}  # as csrc/api.h has them
DTYPE_NUMBERS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_PARAMS = ("w_hh", "b_hh", "w_hr")
_SMALL = ("ln_hh", "peephole_i", "peephole_f", "peephole_o", "ln_c", "ln_c_bias", "ln_ih")
_MASKS = ("h", "h_step", "candidate", "zoneout_h", "zoneout_c")


class Cpp:
    """One scan driver for every cell; ``isa`` names an instruction set, empty for the best that the machine has."""

    name = "cpp"

    def __init__(self, isa: str | None = None) -> None:
        self.isa = _cpu.chosen(os.environ.get("RNNKERN_CPU_ISA", "") if isa is None else isa)

    def unsupported(self, inputs: ScanInputs) -> list[str]:
        spec, reasons = inputs.spec, []
        if inputs.gx.device.type != "cpu":
            reasons.append(f"device {inputs.gx.device.type}: only cpu")
        if inputs.gx.dtype not in DTYPE_NUMBERS:
            reasons.append(f"dtype {inputs.gx.dtype}: only {', '.join(str(d) for d in DTYPE_NUMBERS)}")
        if spec.cell not in CELL_NUMBERS:
            return [*reasons, f"cell {spec.cell}: only {', '.join(CELL_NUMBERS)}"]
        known = {*_PARAMS, "ln_hh", "ln_ih", *CELLS[spec.cell].small}
        reasons += [f"parameter {p}" for p in spec.params if p not in known]
        masks = {"h", "h_step", "zoneout_h", *CELLS[spec.cell].masks, *(("zoneout_c",) if _has_c(spec) else ())}
        reasons += [f"mask {m}" for m in spec.noise if m not in masks]
        if CELLS[spec.cell].mixes_h and "w_hr" in spec.params:
            reasons.append(f"a projected {spec.cell}: its step reads h at full width")
        if not CELLS[spec.cell].dense and "w_hr" in spec.params:
            reasons.append(f"a projected {spec.cell}: its recurrence has no products")
        if not _has_c(spec) and (spec.cell_clip or spec.zoneout[1]):
            reasons.append(f"{spec.cell} has no state c to clip or zone out")
        return reasons

    def forward(self, inputs: ScanInputs) -> ScanOutputs:
        assert "ln_ih" not in inputs.spec.params, "gx is normalised already"
        gx = _rows(inputs.gx)
        source = (gx.data_ptr(), gx.stride(0), gx.stride(1), 0, 0, 0)
        return self._forward(
            inputs, source, 0, 1, (None,) * gx.shape[1], (None,) * gx.shape[1], inputs.spec.save == "all"
        )

    def layer_forward(
        self, inputs: ScanInputs, x: Tensor, w_ih: tuple[Tensor, ...], b_ih: tuple[Tensor | None, ...]
    ) -> ScanOutputs:
        """Input projection and scan in one: gx is made a few steps ahead of the scan and never lies in memory.

        With "ln_ih" among the params, where no backward will come, gx is normalised, times that gain, before the bias.
        A plane that is the output is not saved twice: it is empty then, and `backward` reads the output.
        """
        x = _rows(x)
        source = (0, 0, 0, x.data_ptr(), x.stride(0), x.stride(1))
        with_planes = inputs.spec.save == "all" and not _plane_is_output(inputs.spec)
        return self._forward(inputs, source, x.shape[2], x.shape[1], w_ih, b_ih, with_planes)

    def _forward(
        self,
        inputs: ScanInputs,
        source: tuple[int, ...],
        width: int,
        models: int,
        w_ih: tuple[Tensor | None, ...],
        b_ih: tuple[Tensor | None, ...],
        with_planes: bool,
    ) -> ScanOutputs:
        spec = inputs.spec
        cell = CELLS[spec.cell]
        S, N, columns = inputs.gx.shape
        H, P = columns // len(cell.gates), inputs.states[0].shape[2]
        dtype = inputs.gx.dtype
        # Rows past a length belong to nobody's step: they are zero from the start.
        new = torch.zeros if inputs.lengths is not None and inputs.offsets is None else torch.empty
        saved = spec.save != "none"
        y = new((S, N, P), dtype=dtype)
        seq = tuple(new((S, N, H) if saved else (0,), dtype=accumulation_dtype(dtype)) for _ in cell.states[1:])
        count = len(cell.planes) + (len(cell.gates) if _keeps_products(spec, dtype) else 0)
        planes = torch.empty((S, N, count, H) if with_planes else (0,), dtype=dtype)
        hidden = new((S, N, H) if saved and "w_hr" in spec.params else (0,), dtype=dtype)
        states = tuple(s.contiguous() for s in inputs.states)
        final = tuple(torch.empty_like(s) for s in states)
        keep, groups = _groups(spec, inputs.params, w_ih, b_ih)
        keep_layout, layout, resets = _layout(inputs)
        keep_masks, options = _options(inputs, 0.0)
        _cpu.forward(
            self.isa,
            CELL_NUMBERS[spec.cell],
            DTYPE_NUMBERS[dtype],
            (inputs.T, inputs.B, S, N, width, H, P, models, torch.get_num_threads(), count * H, count * H),
            layout,
            resets,
            options,
            groups,
            tuple(s.data_ptr() for s in states),
            source,
            (
                y.data_ptr(),
                planes.data_ptr() if with_planes else 0,
                planes[:, :, len(cell.planes) :].data_ptr() if with_planes and count > len(cell.planes) else 0,
                hidden.data_ptr() if hidden.numel() else 0,
                *(f.data_ptr() for f in final),
                *(s.data_ptr() if saved else 0 for s in seq),
            ),
        )
        del keep, keep_layout, keep_masks  # addresses of these were in use until here
        return ScanOutputs(y, final, seq, planes, hidden)

    def backward(
        self,
        inputs: ScanInputs,
        outputs: ScanOutputs,
        dy: Tensor,
        dfinal: tuple[Tensor, ...],
        dseq: tuple[Tensor, ...],
    ) -> ScanGrads:
        spec = inputs.spec
        cell = CELLS[spec.cell]
        y = outputs.y.contiguous()
        S, N, P = y.shape
        planes = outputs.planes.contiguous()
        if not planes.numel() and _plane_is_output(spec):
            planes = y.unsqueeze(2)
        H, G = planes.shape[3], len(cell.gates)
        dtype = y.dtype
        padded = inputs.lengths is not None and inputs.offsets is None
        new = torch.zeros if padded else torch.empty
        projected = "w_hr" in spec.params
        dgx = new((S, N, G * H), dtype=dtype)
        dgh = new((S, N, G * H) if cell.split else (0,), dtype=dtype)
        dh = new((S, N, P) if projected else (0,), dtype=dtype)
        states = tuple(s.contiguous() for s in inputs.states)
        seq = tuple(s.contiguous() for s in outputs.seq)
        dy = _rows(dy)
        dfinal = tuple(d.contiguous() for d in dfinal)
        dseq = tuple(d.contiguous() for d in dseq)
        dstates = tuple(torch.empty_like(s) for s in states)
        dresets = tuple(torch.empty_like(s) for s in states) if inputs.reset_states else ()
        keep, groups = _groups(spec, inputs.params, (None,) * N, (None,) * N)
        keep_layout, layout, resets = _layout(inputs)
        keep_masks, options = _options(inputs, spec.grad_clip)
        normed = "ln_hh" in spec.params
        if planes.shape[2] > len(cell.planes):
            product = planes[:, :, len(cell.planes) :]
        else:
            product = _products(inputs, y).view(S, N, G, H) if normed else y.new_empty(0, 0, 0, 0)
        projected_raw = _projected(inputs, outputs.hidden) if spec.proj_clip and projected else y.new_empty(0)
        dprod = new((S, N, G * H) if normed else (0,), dtype=dtype)
        dsmall = [
            tuple(torch.zeros_like(p, dtype=accumulation_dtype(dtype)) for p in _small(spec, group))
            for group in inputs.params
        ]
        _cpu.backward(
            self.isa,
            CELL_NUMBERS[spec.cell],
            DTYPE_NUMBERS[dtype],
            (inputs.T, inputs.B, S, N, 0, H, P, 1, torch.get_num_threads(), planes.shape[2] * H, product.stride(1)),
            layout,
            resets,
            options,
            groups,
            tuple(s.data_ptr() for s in states),
            (
                y.data_ptr(),
                planes.data_ptr(),
                *(t.data_ptr() if t.numel() else 0 for t in (product, projected_raw)),
                *(s.data_ptr() for s in seq),
            ),
            (
                dy.data_ptr(),
                dy.stride(0),
                dy.stride(1),
                *(d.data_ptr() for d in dfinal),
                *(d.data_ptr() if d.numel() else 0 for d in dseq),
            ),
            (
                dgx.data_ptr(),
                dgh.data_ptr() if cell.split else 0,
                dprod.data_ptr() if normed else 0,
                dh.data_ptr() if projected else 0,
                *(d.data_ptr() for d in dstates),
                *(d.data_ptr() for d in dresets or (y.new_empty(0),) * len(dstates)),
                *(address for group in dsmall for address in _small_addresses(spec, group)),
            ),
        )
        del keep, keep_layout, keep_masks
        return ScanGrads(
            dgx, dgh, dprod, dh, dstates, dresets, tuple(tuple(d.to(dtype) for d in group) for group in dsmall)
        )


def _plane_is_output(spec: ScanSpec) -> bool:
    """Whether what the cell saves is the h that it gives out."""
    zoned = "zoneout_h" in spec.noise or spec.zoneout[0]
    return CELLS[spec.cell].planes == ("a",) and "w_hr" not in spec.params and not zoned


def _keeps_products(spec: ScanSpec, dtype: torch.dtype) -> bool:
    """Whether what layer norm is taken of lies behind the planes: only as it is, not rounded to fewer bits."""
    return "ln_hh" in spec.params and dtype == accumulation_dtype(dtype)


def _has_c(spec: ScanSpec) -> bool:
    return CELLS[spec.cell].has_c


def _options(inputs: ScanInputs, grad_clip: float) -> tuple[list[Tensor], tuple[int | float, ...]]:
    """What the scan does beyond the plain one; empty: nothing. A forward has no gradients to clip."""
    spec = inputs.spec
    small = [[p.contiguous() for p in _small(spec, group)] for group in inputs.params]
    clips = (spec.cell_clip, spec.proj_clip, grad_clip)
    if not spec.noise and not any((*spec.zoneout, *clips)) and not any(small):
        return [], ()
    masks = {name: mask.contiguous() for name, mask in zip(spec.noise, inputs.noise, strict=True)}
    scales = dict(zip(spec.noise, spec.scales, strict=True))
    address = {name: masks[name].data_ptr() if name in masks else 0 for name in _MASKS}
    dropped = (v for name in _MASKS[:3] for v in (address[name], scales.get(name, 1.0)))
    zoned = (address["zoneout_h"], address["zoneout_c"], *spec.zoneout)
    keep = [*masks.values(), *(p for group in small for p in group)]
    addresses = (a for group in small for a in _small_addresses(spec, group))
    return keep, (*dropped, *zoned, *clips, spec.eps, *addresses)


def _small(spec: ScanSpec, group: tuple[Tensor, ...]) -> list[Tensor]:
    """Of a group's parameters those that the scan itself gives gradients of, in the order of spec.params."""
    return [p for name, p in zip(spec.params, group, strict=True) if name in _SMALL]


def _small_addresses(spec: ScanSpec, tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """In the extension's order, 0 for absent ones; empty where all are."""
    names = [name for name in spec.params if name in _SMALL]
    found = {name: t.data_ptr() for name, t in zip(names, tensors, strict=True)}
    return tuple(found.get(name, 0) for name in _SMALL) if found else ()


def _products(inputs: ScanInputs, y: Tensor) -> Tensor:
    """[S, N, G*H]: h, as it meets w_hh, times it, which layer norm's backward reads, where it was not kept."""
    wide = accumulation_dtype(y.dtype)
    entering = Entering(inputs, y.to(wide), True)
    at, dense = inputs.spec.params.index("w_hh"), CELLS[inputs.spec.cell].dense
    weights = (group[at].to(wide) for group in inputs.params)
    return torch.stack([entering(n) @ w.T if dense else entering(n) * w for n, w in enumerate(weights)], 1)


def _projected(inputs: ScanInputs, hidden: Tensor) -> Tensor:
    """[S, N, P]: h before the clip of its projection."""
    at, wide = inputs.spec.params.index("w_hr"), accumulation_dtype(hidden.dtype)
    groups = enumerate(inputs.params)
    return torch.stack([hidden[:, n].to(wide) @ group[at].to(wide).T for n, group in groups], 1)


def _rows(x: Tensor) -> Tensor:
    """Rows of neighbouring elements, any strides between rows and groups."""
    return x if x.stride(2) == 1 else x.contiguous()


def _groups(
    spec: ScanSpec,
    params: tuple[tuple[Tensor, ...], ...],
    w_ih: tuple[Tensor | None, ...],
    b_ih: tuple[Tensor | None, ...],
) -> tuple[list[Tensor], tuple[int, ...]]:
    """Addresses of each group's weights, and the tensors that must live as long as the addresses are used."""
    keep: list[Tensor] = []
    flat: list[int] = []

    def address(p: Tensor | None) -> int:
        if p is None:
            return 0
        if not p.is_contiguous():
            p = p.contiguous()
            keep.append(p)
        return p.data_ptr()

    where = [spec.params.index(name) if name in spec.params else None for name in _PARAMS]
    for group, w, b, reverse in zip(params, w_ih, b_ih, spec.reverse, strict=True):
        flat += [0 if k is None else address(group[k]) for k in where]
        flat += (address(w), address(b), int(reverse))
    return keep, tuple(flat)


def _layout(inputs: ScanInputs) -> tuple[list[Tensor], tuple[int, ...], tuple[int, ...]]:
    keep: list[Tensor] = []

    def address(t: Tensor | None) -> int:
        if t is None:
            return 0
        t = t.contiguous()
        keep.append(t)
        return t.data_ptr()

    reset = inputs.reset
    layout = (
        address(inputs.offsets),
        address(inputs.lengths),
        *((0, 0, 0) if reset is None else (reset.data_ptr(), reset.stride(0), reset.stride(1))),
    )
    resets: list[int] = []
    for s in inputs.reset_states:
        s = _rows(s)
        keep.append(s)
        resets += (s.data_ptr(), s.stride(0), s.stride(1))
    return keep, layout, tuple(resets)


BACKEND = Cpp()
