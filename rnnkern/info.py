"""What ``python -m rnnkern info`` prints: versions, processor, backends, and what a plain call takes and why."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable

import torch

import rnnkern
from rnnkern import _cuda, _products, dispatch
from rnnkern.backends.base import ScanInputs, ScanSpec
from rnnkern.cells import CELLS

# Every environment variable that rnnkern reads, with what it does; the README has the same table.
ENVIRONMENT = {
    "RNNKERN_CPU_ISA": "the instruction set of the C++ kernels, one of those listed above; unset: the best there is",
    "RNNKERN_TRITON_CONFIG": "driver and tiles of the Triton kernels, driver=per_step,block_b=16,...; unset: by size",
    "TRITON_INTERPRET": "Triton's own: 1 lets the Triton kernels run on CPU tensors, slowly, for tests",
}


def plain_call(
    cell: str, T: int = 100, B: int = 16, H: int = 256, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> ScanInputs:
    """The scan of a plain one-layer call, as far as a choice of backend looks at it: gx has no memory."""
    spec = CELLS[cell]
    gates = len(spec.gates)
    number = torch.empty((), dtype=dtype, device=device)
    gx = number.expand(T * B, 1, gates * H)
    states = tuple(number.new_empty(1, B, H) for _ in spec.states)
    params = ((number.new_empty(spec.recurrent_shape(H, H)), number.new_empty(gates * H)),)
    return ScanInputs(ScanSpec(cell, (False,), ("w_hh", "b_hh")), T, B, gx, states, params)


def chosen(inputs: ScanInputs) -> tuple[str, str]:
    """The backend that these inputs would take in this thread, and why."""
    asked = dispatch.requested()
    if asked is not None:
        return asked, "asked for with use_backend"
    if dispatch.wants_torch(inputs.gx.device, inputs.gx.dtype, inputs.spec.cell, inputs.B, packed=False):
        if inputs.gx.dtype not in dispatch.DTYPES:
            return "torch", f"no scan backend has {inputs.gx.dtype}"
        if inputs.gx.device.type == "cuda":
            return on_a_gpu(inputs, torch.is_grad_enabled(), _cuda.device_of(inputs.gx.get_device()))
        if inputs.gx.device.type != "cpu":
            return "torch", f"there is no fast scan backend for {inputs.gx.device.type}"
        return "torch", f"torch's own kernel is faster than what is left without cpp ({dispatch.unavailable('cpp')})"
    refusals: list[str] = []
    for name, reasons in dispatch.explain(inputs).items():
        if not reasons:
            return name, "; ".join(refusals) or "the first in the list, and it has no objection"
        verb = "refuses" if dispatch.unavailable(name) is None else "is not there"
        refusals.append(f"{name} {verb} ({', '.join(reasons)})")
    return "none", "; ".join(refusals)


def on_a_gpu(inputs: ScanInputs, gradient: bool, device: _cuda.Device) -> _cuda.Verdict:
    """What automatic choice takes there for the plain call of these inputs, and why."""
    if inputs.spec.cell not in dispatch.TORCHS:
        return _without_torch(inputs.spec.cell)
    H, tf32 = inputs.states[0].size(2), dispatch.allows_tf32()
    call = _cuda.Call(inputs.spec.cell, inputs.T, inputs.B, H, inputs.gx.dtype, gradient=gradient, tf32=tf32)
    return _cuda.verdict(call, device)


def _without_torch(cell: str) -> _cuda.Verdict:
    """The same of a cell that torch does not have."""
    if missing := dispatch.unavailable("triton"):
        return _cuda.Verdict("reference", f"torch has no {cell}, and triton is not there ({missing})")
    from rnnkern.backends.triton.cells import STEPS

    words = (
        ("triton", f"torch has no {cell}") if cell in STEPS else ("reference", f"neither torch nor triton has {cell}")
    )
    return _cuda.Verdict(*words)


DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What the choice on a GPU is explained for where there is none.
A_GPU = _cuda.Device("a GPU with 132 processors and compute capability 9.0", 132, (9, 0))


def explain(call: str) -> str:
    """What a plain one-layer call would take on each kind of device, and why.

    Args:
        call: ``CELL,T,B,H,DTYPE``, for instance ``LSTM,512,64,512,bf16``.

    Raises:
        ValueError: not of that form; the message says what is.
    """
    cells = {"rnn": "rnn_tanh", **{name: name for name in CELLS}}
    words = [word.strip().lower() for word in call.split(",")]
    form = f"CELL,T,B,H,DTYPE with a cell of {', '.join(cells)} and a dtype of {', '.join(DTYPES)}"
    if len(words) != 5 or words[0] not in cells or words[4] not in DTYPES:
        raise ValueError(f"got {call!r}, expected {form}")
    try:
        T, B, H = (int(word) for word in words[1:4])
    except ValueError:
        T = 0
    if T < 1 or B < 1 or H < 1:
        raise ValueError(f"got {call!r}, expected {form}; T, B and H are whole numbers from 1")
    cell, dtype = cells[words[0]], DTYPES[words[4]]
    lines = [f"{cell}, T={T}, B={B}, H={H}, {dtype}, one layer, one direction:"]
    plain = plain_call(cell, T, B, H, dtype)
    rows = [("cpu", ": ".join(chosen(plain)))]
    here = torch.cuda.is_available()
    device = _cuda.device_of(torch.cuda.current_device()) if here else A_GPU
    for mode, gradient in (("inference", False), ("training", True)):
        rows.append((f"cuda, {mode}", ": ".join(on_a_gpu(plain, gradient, device))))
    lines += table(rows, indent=2)
    lines.append(f"  (cuda: {device.name}{'' if here else '; there is none here'})")
    return "\n".join(lines)


def instruction_sets() -> str:
    """Those that the C++ kernels were built for, and the one that runs."""
    if dispatch.unavailable("cpp") is not None:
        return "none: there is no C++ backend"
    from rnnkern import _cpu
    from rnnkern.backends.cpp import BACKEND

    words = []
    for name in _cpu.isas():  # best first
        try:
            _cpu.chosen(name)
        except RuntimeError:  # this processor does not have it
            words.append(f"{name} (not here)")
        else:
            words.append(f"{name} (runs)" if name == BACKEND.isa else name)
    return ", ".join(words)


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the platform module knows less, but something
    return platform.processor() or platform.machine()


def table(rows: Iterable[tuple[str, str]], indent: int = 0) -> list[str]:
    rows = list(rows)
    wide = max(len(left) for left, _ in rows)
    return [f"{'':{indent}}{left:<{wide}}  {right}" for left, right in rows]


def text() -> str:
    versions = (
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    lines = table(
        [
            ("rnnkern", f"{rnnkern.__version__}, {versions}"),
            ("processor", f"{processor()}; torch sees {torch.backends.cpu.get_cpu_capability()}"),
            ("instruction sets", instruction_sets()),
            ("matrix products", f"{'the extension' if _products.isa() else 'torch'}'s, in a backward in float32"),
            ("threads", f"{torch.get_num_threads()} (torch.get_num_threads()), {os.cpu_count()} processors"),
            ("GPU", cuda),
        ]
    )
    found = dispatch.backends().items()
    lines += ["", "backends, in the order in which a call asks them (torch: its own kernels, for whole calls):"]
    lines += table(((key, "there" if missing is None else f"not there: {missing}") for key, missing in found), indent=2)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        lines += ["", f"what a plain call takes (T=100, B=16, H=256, float32 on {device}), and why:"]
        lines += table(((cell, ": ".join(chosen(plain_call(cell, device=device)))) for cell in CELLS), indent=2)
    lines += ["", "environment variables:"]
    lines += table(
        ((key, f"{os.environ.get(key) or 'not set'} ({meaning})") for key, meaning in ENVIRONMENT.items()), indent=2
    )
    return "\n".join(lines)
