"""Which backend runs: a visible priority list, reasons for every refusal, and the caller's explicit choice.

Two levels. A *scan* backend runs the time loop of one layer and is picked by :func:`choose` from :data:`ORDER`. Torch's
own kernels take a whole stack of layers, so ``"torch"`` is a name at the *call* level only: :func:`wants_torch` decides
before any layer runs. An explicit choice never falls back; an automatic one can be explained by :func:`explain`.
"""

from __future__ import annotations

import importlib
import threading
from types import TracebackType
from typing import NamedTuple

import torch

from rnnkern import _cuda, _profile
from rnnkern._dynamo import constant
from rnnkern.backends.base import Backend, ScanInputs

ORDER = ("triton", "cpp", "numba", "reference")
NAMES = (*ORDER, "torch")
TORCHS = frozenset(("rnn_tanh", "rnn_relu", "lstm", "gru"))  # cells that torch has kernels of
DTYPES = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))  # those of the scan backends
FEW_STEPS = 2  # up to so many with a gradient to come, torch's operations cost less than a custom function


class _Slot:
    """Where a scan backend goes when it is first asked for, or the reason why it cannot be loaded."""

    backend: Backend | None = None
    reason: str = ""


_slots = {name: _Slot() for name in ORDER}


class _Choice(threading.local):
    requested: str | None = None
    last: str | None = None


_choice = _Choice()


@constant  # a trace must not enter imports
def _load(name: str) -> str:
    """Import a scan backend when first asked for; the reason why that fails, or nothing."""
    slot = _slots[name]
    if slot.backend is None and not slot.reason:
        try:
            slot.backend = importlib.import_module(f"rnnkern.backends.{name}").BACKEND
        except ImportError as error:
            slot.reason = str(error) or type(error).__name__
    return slot.reason


def unavailable(name: str) -> str | None:
    """Why the backend cannot be loaded on this machine at all, or None if it can."""
    if name == "torch":
        return None
    if name not in ORDER:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(NAMES)}")
    return _load(name) or None


def backend(name: str) -> Backend:
    """The scan backend of that name, imported when first asked for.

    Raises:
        ValueError: no such scan backend; the message lists those that exist.
        RuntimeError: it exists but cannot be loaded here; the message says why.
    """
    if name not in ORDER:
        hint = "; torch's kernels run whole calls, not scans" if name == "torch" else ""
        raise ValueError(f"unknown scan backend {name!r}: expected one of {', '.join(ORDER)}{hint}")
    reason = _load(name)
    found = _slots[name].backend
    if found is None:
        raise RuntimeError(f"backend {name!r} cannot be loaded: {reason}")
    if not torch.compiler.is_compiling() and _profile.active():
        return _profile.Recorded(found)
    return found


@constant  # a trace needs the answer, not the backend
def projects(name: str) -> bool:
    """Whether that scan backend can do the input projection as well, with its `layer_forward`."""
    return hasattr(backend(name), "layer_forward")


def backends() -> dict[str, str | None]:
    """Every backend that this version has, in order of preference, with the reason why it cannot be loaded or None."""
    return {name: unavailable(name) for name in NAMES}


def requested() -> str | None:
    """The backend that this thread asked for with :class:`use_backend`; None: automatic."""
    return _choice.requested


def last() -> str | None:
    """The backend that this thread's latest forward call took."""
    return _choice.last


def ran(name: str) -> None:
    """Note for :func:`last` what a call takes; a traced call leaves no note, for it runs later and elsewhere."""
    if not torch.compiler.is_compiling():
        _choice.last = name


class use_backend:  # noqa: N801  a function to its callers, as torch.no_grad is
    """Choose a backend by name for this thread, at once, and until the end of the block if used in ``with``.

    The choice is never swapped for another: a call that the backend cannot do raises with its reasons. It holds for
    first derivatives; higher ones run in plain torch operations, whatever the choice.

    Args:
        name: ``"triton"``, ``"cpp"``, ``"numba"``, ``"reference"``, ``"torch"`` (torch's own kernels), or None for
            automatic choice.

    Raises:
        ValueError: unknown name; the message lists those that exist.
        RuntimeError: the backend cannot be loaded here; the message says why.

    Example::

        >>> with rnnkern.use_backend("reference"):
        ...     output, hn = gru(input)
    """

    def __init__(self, name: str | None) -> None:
        if name is not None:
            reason = unavailable(name)
            if reason is not None:
                raise RuntimeError(f"backend {name!r} cannot be loaded: {reason}")
        self.name = name
        self.previous = _choice.requested
        _choice.requested = name

    def __enter__(self) -> use_backend:
        _choice.requested = self.name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        _choice.requested = self.previous


def choose(inputs: ScanInputs) -> str:
    """The scan backend for these inputs: the requested one, else the first in :data:`ORDER` that has no objection.

    Raises:
        RuntimeError: the requested backend cannot do it, or none can; the message has every reason.
    """
    name = _choice.requested
    if name is None:
        for candidate in ORDER:
            if not _objections(candidate, inputs):
                ran(candidate)
                return candidate
        raise RuntimeError(f"no backend can run {describe(inputs)}:\n{_listed(explain(inputs))}")
    if name == "torch":
        raise RuntimeError(f"backend 'torch' was asked for, but its kernels cannot run one scan: {describe(inputs)}")
    reasons = backend(name).unsupported(inputs)
    if reasons:
        raise RuntimeError(f"backend {name!r} was asked for and cannot run {describe(inputs)}: {'; '.join(reasons)}")
    ran(name)
    return name


class Sizes(NamedTuple):
    """What a choice on a GPU reads beyond what one on a CPU does."""

    I: int
    H: int
    layers: int = 1
    directions: int = 1
    projected: bool = False


def wants_torch(
    device: torch.device,
    dtype: torch.dtype,
    cell: str,
    batch: int,
    packed: bool,
    steps: int = 0,
    sizes: Sizes | None = None,
) -> bool:
    """Whether torch's own kernel should take this call: asked for, or better than the scan backends that are there.

    Automatic choice takes it on devices without a fast scan backend, for dtypes that no scan backend has, in
    torch.jit.trace and torch.onnx.export (whose graphs run where rnnkern is not), on a CUDA device unless Triton's
    kernels are faster (_cuda.py), on a CPU without the C++ extension where it is faster than what is left, and for one
    or two steps with a gradient to come: torch's handful of operations then costs less than one custom function (but
    for the LSTM module, which repacks its weights at every call; _fast.py takes one step of it by a cell's operations).
    """
    name = _choice.requested
    if cell.removesuffix("_cell") not in TORCHS:
        if goes_elsewhere():  # a trace would hold the sizes of its example, and not say so
            how = "torch.onnx.export" if to_onnx() else "torch.jit.trace"
            raise RuntimeError(f"{how} cannot follow {cell}, which torch does not have; torch.export can")
        may_torch(f"torch has no {cell}")
        return False
    if name is not None:
        return name == "torch"
    if dtype not in DTYPES or goes_elsewhere():
        return True
    if device.type != "cpu":
        if device.type != "cuda" or sizes is None:
            return True
        return not triton_is_faster(device, dtype, cell, batch, packed, steps, sizes)
    # Sizes last: a trace that looks at one is bound to what it saw.
    if cell != "lstm" and torch.is_grad_enabled() and not _watched() and 0 < steps <= FEW_STEPS:
        return True
    return unavailable("cpp") is not None and _torch_is_faster(dtype, cell, batch, packed)


def wants_operations(cell: str) -> bool:
    """Whether autograd follows the equations of a step of a cell that torch does not have: with a gradient to come, one
    custom function costs more than all of torch's operations in them.
    """
    if cell in TORCHS or _choice.requested is not None:
        return False
    return torch.is_grad_enabled() and not torch.compiler.is_exporting()


def goes_elsewhere() -> bool:
    """Whether a graph is being made that will run where rnnkern is not."""
    return torch._C._get_tracing_state() is not None or to_onnx()


@constant  # Dynamo does not follow ONNX's modules
def to_onnx() -> bool:
    """Whether torch.onnx.export is making a program for ONNX, which has nodes for torch's operations alone."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def _watched() -> bool:
    """Whether torch.compile, torch.func or forward mode is at work: the layers are made for them, torch's are not."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


@constant  # read at trace time: Dynamo does not follow the property into C++
def allows_tf32() -> bool:
    """Whether fp32 products on a GPU may be made in TF32: the switch that torch.nn's recurrent networks obey there.

    Of torch.backends.cudnn.allow_tf32 too, which sets this one.
    """
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]


def gpu_precision(dtype: torch.dtype) -> str:
    """:class:`ScanSpec`'s word for how products on a GPU are made."""
    return "tf32" if dtype == torch.float32 and allows_tf32() else "ieee"


def may_torch(refused: str) -> bool:
    """Whether it can, given what in the call it cannot do (empty: nothing).

    Raises:
        RuntimeError: torch's kernels were asked for by name, or are all that torch.onnx.export has, and cannot do it.
    """
    if refused and to_onnx():
        raise RuntimeError(f"torch.onnx.export has nodes for what torch.nn does, and that has no {refused}")
    if refused and _choice.requested == "torch":
        raise RuntimeError(f"backend 'torch' was asked for and cannot do this call: {refused}")
    return not refused


def triton_is_faster(
    device: torch.device, dtype: torch.dtype, cell: str, batch: int, packed: bool, steps: int, sizes: Sizes
) -> bool:
    """By measurement or estimate (_cuda.py), if Triton is there and its kernels have passed their trial here."""
    if _watched():
        return False
    gradient = torch.is_grad_enabled()
    call = _cuda.Call(cell, steps, batch, sizes.H, dtype, sizes.I, sizes.layers, sizes.directions, packed,
                      sizes.projected, gradient, allows_tf32())  # fmt: skip
    index = torch.cuda.current_device() if device.index is None else device.index
    if not steps or not batch or _cuda.verdict(call, _cuda.device_of(index)).take == "torch" or _load("triton"):
        return False
    from rnnkern.backends.triton.trial import trusted

    return trusted(torch.device("cuda", index), cell, dtype, gpu_precision(dtype))


def _torch_is_faster(dtype: torch.dtype, cell: str, batch: int, packed: bool) -> bool:
    if unavailable("numba") is not None:
        return True  # what is left is the reference, a Python loop
    onednn = cell == "lstm" and not packed and dtype in (torch.float32, torch.bfloat16)
    return onednn and batch > 1


def _objections(name: str, inputs: ScanInputs) -> list[str]:
    """Why automatic choice passes it over. Triton, whose import takes seconds, is not imported to be refused."""
    kind = inputs.gx.device.type
    if name == "triton" and kind != "cuda":
        return [f"device {kind}: only cuda (its interpreter runs on cpu where it is asked for by name)"]
    reason = _load(name)
    found = [reason] if reason else backend(name).unsupported(inputs)
    if name == "triton" and not found and not _watched():
        from rnnkern.backends.triton.options import options_of

        spec, device = inputs.spec, inputs.gx.device
        options = options_of(spec) != 0
        if options or spec.cell not in TORCHS:  # of the others, wants_torch has asked
            from rnnkern.backends.triton.trial import trusted

            if not trusted(device, spec.cell, inputs.gx.dtype, spec.precision, options):
                found = [f"its {spec.cell}{' with options' if options else ''} failed a trial on {device}, or could "
                         "have none"]  # fmt: skip
    return found


def explain(inputs: ScanInputs) -> dict[str, list[str]]:
    """Every scan backend's objections to these inputs, in order of preference; an empty list: it would run them."""
    return {name: _objections(name, inputs) for name in ORDER}


def describe(inputs: ScanInputs) -> str:
    """One line about a scan, for error messages."""
    rows, groups, width = inputs.gx.shape
    layout = "packed" if inputs.offsets is not None else "padded" if inputs.lengths is not None else "dense"
    extras = ["reset"] if inputs.reset is not None else []
    extras += [f"noise {word}" for word in inputs.spec.noise]
    return (
        f"{inputs.spec.cell} scan (T={inputs.T}, B={inputs.B}, {rows} rows {layout}, {groups} groups of {width} gate "
        f"columns, {inputs.gx.dtype} on {inputs.gx.device}, {', '.join([*inputs.spec.params, *extras])})"
    )


def _listed(reasons: dict[str, list[str]]) -> str:
    return "\n".join(f"  {name}: {'; '.join(why)}" for name, why in reasons.items())
