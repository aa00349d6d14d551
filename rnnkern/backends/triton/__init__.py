"""The Triton backend: fused scans on GPUs, and on the CPU in Triton's interpreter, which is for tests.

Four drivers (config.py chooses): *batch_parallel*, a whole scan in one launch, for small H; *per_step*, one launch a
step, for every size and cell; *persistent*, a whole scan in one launch whose programs share the weights and wait for
each other; *gluon*, the same with the weights in registers.
Cells bring their equations (cells.py), the drivers everything else.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from rnnkern.backends.base import ScanGrads, ScanInputs, ScanOutputs
from rnnkern.backends.triton.cells import STEPS
from rnnkern.backends.triton.config import PASSES, choose, misfit, target_of
from rnnkern.backends.triton.drivers import Program, plan_backward, plan_forward, question
from rnnkern.backends.triton.graphs import Steps
from rnnkern.backends.triton.interpreter import INTERPRETED, has_bf16
from rnnkern.backends.triton.launch import TYPES
from rnnkern.backends.triton.lost import LOST
from rnnkern.backends.triton.options import refusals
from rnnkern.backends.triton.work import LONGEST_PERIOD, pattern
from rnnkern.cells import CELLS

_GROUPS = 65535  # programs along the third axis of a grid


class Triton:
    name = "triton"

    def __init__(self) -> None:
        self.steps = Steps()

    def unsupported(self, inputs: ScanInputs) -> list[str]:
        spec, gx = inputs.spec, inputs.gx
        reasons = _where(gx)
        if spec.cell not in STEPS:
            return [*reasons, f"cell {spec.cell}: only {', '.join(STEPS)}"]
        reasons += refusals(spec)
        if "w_hr" in spec.params and (CELLS[spec.cell].mixes_h or not CELLS[spec.cell].dense):
            reasons.append(f"a projected {spec.cell}: its step reads h at full width")
        if len(spec.reverse) > _GROUPS:
            reasons.append(f"{len(spec.reverse)} groups: at most {_GROUPS}")
        period, _ = pattern(spec.reverse)
        if period > LONGEST_PERIOD:
            reasons.append(f"directions that repeat after {period} groups: at most {LONGEST_PERIOD}")
        if not reasons:
            for direction in PASSES if spec.save == "all" else PASSES[:1]:
                asked = question(inputs, direction, target_of(gx.device))
                if why := misfit(asked, choose(asked)):
                    reasons.append(f"{why}, and the driver was asked for by name")
                    break
        return reasons

    def forward(self, inputs: ScanInputs, driver: str | None = None) -> ScanOutputs:
        with _on(inputs.gx.device):
            LOST.check(inputs.gx.device)
            out, program = plan_forward(inputs, target_of(inputs.gx.device), driver)
            self.run(program, inputs.gx.device)
        return out

    def backward(
        self,
        inputs: ScanInputs,
        outputs: ScanOutputs,
        dy: Tensor,
        dfinal: tuple[Tensor, ...],
        dseq: tuple[Tensor, ...],
        driver: str | None = None,
    ) -> ScanGrads:
        if inputs.spec.save != "all":
            raise ValueError(f"backward needs the planes of a forward with save='all', got save={inputs.spec.save!r}")
        with _on(inputs.gx.device):
            LOST.check(inputs.gx.device)
            grads, program = plan_backward(inputs, outputs, dy, dfinal, dseq, target_of(inputs.gx.device), driver)
            self.run(program, inputs.gx.device)
            if program.small is not None:
                grads.dsmall = program.small()
            grads.dreset_states = tuple(
                d.to(s.dtype) for d, s in zip(grads.dreset_states, inputs.reset_states, strict=True)
            )
        return grads

    def run(self, program: Program, device: torch.device) -> None:
        if program.words is None:
            for one in program.launches:
                one()
            if program.waits:
                LOST.watch(device)
        else:
            self.steps.run(program.launches, program.steps, program.words, device)


def _on(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, whatever device its tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _where(gx: Tensor) -> list[str]:
    """Objections to device and dtype."""
    kind, reasons = gx.device.type, []
    if INTERPRETED and kind != "cpu":
        reasons.append(f"device {kind}: only cpu while TRITON_INTERPRET=1 is set")
    elif not INTERPRETED and kind != "cuda":
        reasons.append(f"device {kind}: only cuda (and cpu in Triton's interpreter, with TRITON_INTERPRET=1)")
    if gx.dtype not in TYPES:
        reasons.append(f"dtype {gx.dtype}: only {', '.join(str(d) for d in TYPES)}")
    elif gx.dtype == torch.bfloat16 and not reasons:
        if INTERPRETED and not has_bf16():
            reasons.append("dtype torch.bfloat16: Triton's interpreter multiplies its bit patterns")
        target = target_of(gx.device)
        if target.kind == "cuda" and target.arch < 80:
            reasons.append(f"dtype torch.bfloat16: {target.name} has no products of it")
    return reasons


BACKEND = Triton()
