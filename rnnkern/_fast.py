"""Short ways through a small call on the CPU.

A step of a small layer takes a few microseconds, and so does every tensor operation that the general way needs for
views, states and checks. Here all conditions are read off once. Dense layers with no gradient to come are one call of
the extension; one or two steps with a gradient to come are torch.nn's forward. Whatever does not
fit, and every error, goes the general way: these functions then return None and have done nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnnkern import _checks, _profile, dispatch
from rnnkern._dynamo import constant
from rnnkern._options import PLAIN

# Number in the extension, gates; those that its short way has.
_CODES = {"rnn_tanh": (0, 1), "rnn_relu": (1, 1), "lstm": (2, 4), "gru": (3, 3), "mgu": (4, 2), "ligru": (7, 2)}
_NARROW = (torch.bfloat16, torch.float16)  # c is kept in fp32 then, and given and taken in the module's dtype
_STEP, _LAYER, _BATCH_FIRST = range(3)
_PLAIN: tuple[Any, ...] = (None, None, None, None)  # mask of resets, reset states, lengths
_CELL_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_FORWARD: dict[str, Any] = {
    "rnn_tanh": torch.nn.RNN.forward,
    "rnn_relu": torch.nn.RNN.forward,
    "gru": torch.nn.GRU.forward,
    "rnn_tanh cell": torch.nn.RNNCell.forward,
    "rnn_relu cell": torch.nn.RNNCell.forward,
    "gru cell": torch.nn.GRUCell.forward,
    "lstm cell": torch.nn.LSTMCell.forward,
}
_grad = torch.is_grad_enabled
_compiling = torch.compiler.is_compiling
_autocast = torch.is_autocast_enabled
_transforms = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack
_functions = torch._C._len_torch_function_stack
_tracing = torch._C._get_tracing_state
_threads = torch.get_num_threads
_profiling = _profile.active
_choice = dispatch._choice

_kernel: Any = None  # rnnkern._cpu.stack once it is known to be there, False where it is not
_isa = ""


@constant  # a trace must not enter imports
def _load() -> Any:
    global _kernel, _isa
    _kernel = False
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is not None and dispatch.unavailable("cpp") is None:
        from rnnkern import _cpu
        from rnnkern.backends.cpp import BACKEND

        if _cpu.bind(exchange, Tensor, torch.nn.Parameter, torch.empty_like, torch.float32):
            _kernel, _isa = _cpu.stack, BACKEND.isa
    return _kernel


def available() -> bool:
    """Whether the extension is there and knows this torch's tensors."""
    return bool(_load() if _kernel is None else _kernel)


def _closed() -> bool:
    """Whether somebody watches tensors, or a backend was asked for: then every call goes the general way."""
    return (
        _compiling()
        or _choice.requested is not None
        or _autocast("cpu")
        or _transforms()
        or _modes() > 0
        or _functions() > 0
        or forward_ad._current_level >= 0
        or _tracing() is not None
    )


def _torchs(module: Any, what: str, input: Tensor, hx: Any) -> Any:
    """What torch.nn's forward gives, where automatic choice would take torch's operations (`dispatch.wants_torch`)."""
    if input.dtype not in dispatch.DTYPES:
        return None
    try:
        found = _FORWARD[what](module, input, hx)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None  # the general way finds it too, and says it more clearly
    _choice.last = "torch"
    return found


def layer(module: Any, cell: str, input: Any, hx: Any) -> tuple[Any, ...] | None:
    """A module of layers: (output, states in torch.nn's form), or None."""
    if _compiling() or type(input) is not Tensor or module.options is not PLAIN or module._project is not None:
        return None
    if _closed():
        return None
    if _grad():
        if cell not in _FORWARD or not input.is_cpu or input.dim() != 3:
            return None
        if input.size(1 if module.batch_first else 0) > dispatch.FEW_STEPS:
            return None
        # Torch reads the list, whose entries are stale where a parametrization has replaced the parameters.
        if not all(map(is_, module._flat_weights, module._parameters.values())):
            return None
        return _torchs(module, cell, input, hx)
    if module.training and module.dropout:
        return None
    if hx is not None and cell != "lstm":
        hx = (hx,)
    kind, directions = _BATCH_FIRST if module.batch_first else _LAYER, 1 + module.bidirectional
    # None where a parametrization has replaced a parameter: it fits nothing.
    weights = map(module._parameters.get, module._flat_weights_names)
    out = _run(
        module.bias, module.hidden_size, cell, kind, input, weights, module.proj_size, hx, module.num_layers, directions
    )
    if out is None:
        return None
    y, h, c, _ = out
    return (y, h) if c is None else (y, (h, c))


def step(module: Any, cell: str, input: Any, hx: Any) -> tuple[Any, ...] | None:
    """RNNCell, LSTMCell or GRUCell: (h,) or (h, c), or None."""
    if _compiling() or type(input) is not Tensor or _closed():
        return None
    if _grad():
        if input.dim() != 2 or not input.is_cpu:
            return None
        found = _torchs(module, f"{cell} cell", input, hx[0] if hx and cell != "lstm" else hx)
        return found if found is None or cell == "lstm" else (found,)
    names = _CELL_NAMES if module.bias else _CELL_NAMES[:2]
    out = _run(module.bias, module.hidden_size, cell, _STEP, input, map(module._parameters.get, names), 0, hx)
    return out and (out[0:1] if out[2] is None else (out[0], out[2]))


def sequence(
    cell: str, input: Tensor, hx: tuple[Tensor, ...] | None, params: Sequence[Tensor], bias: bool, layers: int,
    directions: int, batch_first: bool, lengths: Any = None, reset: Tensor | None = None,
    reset_state: tuple[Tensor, ...] | None = None, keep: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[tuple[Tensor, ...], ...]] | None:  # fmt: skip
    """Layers without dropout, with no gradient to come: output, final states and, to `keep`, all states; or None.

    `params` is torch's list of weights.
    """
    n = 4 if bias else 2
    projected = cell == "lstm" and len(params) == layers * directions * (n + 1)
    if type(input) is not Tensor or _closed() or len(params) < n or params[1].dim() != 2:
        return None
    width = params[1].shape[1]
    H, P = (params[n].shape[-1], width) if projected else (width, 0)
    kind = _BATCH_FIRST if batch_first else _LAYER
    extra = _PLAIN
    if lengths is not None or reset is not None or reset_state is not None:
        if type(lengths) is list or type(lengths) is tuple:
            lengths = _checks.integers(lengths)
        elif type(lengths) is Tensor and lengths.dtype is torch.int32:
            lengths = lengths.long()
        if reset_state is not None and any(s is None for s in reset_state):
            return None
        h, c = (None, None) if reset_state is None else (*reset_state, None)[:2]
        extra = (reset, h, c, lengths)
    out = _run(bias, H, cell, kind, input, params, P, hx, layers, directions, extra, keep)
    if out is None:
        return None
    y, h_n, c_n, states = out
    return y, (h_n,) if c_n is None else (h_n, c_n), states or ()  # type: ignore[return-value]


def _wide(c: Any, dtype: torch.dtype) -> Any:
    """A c of this 16-bit dtype as the extension takes it; False, which it refuses: something else."""
    return c if c is None else c.float() if type(c) is Tensor and c.dtype is dtype else False


def one_step(
    cell: str, input: Tensor, hx: tuple[Tensor, ...], weights: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...] | None:
    """torch's op of a cell, with no gradient to come: (h,) or (h, c), or None. `weights` are those of the op."""
    w_hh, bias = weights[1], weights[2] is not None
    if type(input) is not Tensor or _closed() or w_hh is None or w_hh.dim() != 2 or bias != (weights[3] is not None):
        return None
    out = _run(bias, w_hh.size(1), cell, _STEP, input, weights if bias else weights[:2], 0, hx)
    return out and (out[0:1] if out[2] is None else (out[0], out[2]))  # type: ignore[return-value]


def _run(
    bias: bool, H: int, cell: str, kind: int, input: Tensor, weights: Iterable[Any], P: int, hx: Any, layers: int = 1,
    directions: int = 1, extra: tuple[Any, ...] = _PLAIN, keep: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[tuple[Tensor, ...], ...] | None] | None:  # fmt: skip
    """(output, h_n, c_n, all states to `keep`, else None); a cell's h_n is its output, and None."""
    kernel = _load() if _kernel is None else _kernel
    if not kernel or cell not in _CODES:
        return None
    number, gates = _CODES[cell]
    h = c = None
    narrow = cell == "lstm" and input.dtype in _NARROW
    if hx is not None:
        if type(hx) is not tuple or len(hx) != (2 if cell == "lstm" else 1):
            return None
        h = hx[0]
        if cell == "lstm":
            c = hx[1]
            if h is None or c is None:  # the extension would take either for zeros
                return None
    if narrow:
        c = _wide(c, input.dtype)
        reset, reset_h, reset_c, lengths = extra
        extra = (reset, reset_h, _wide(reset_c, input.dtype), lengths)
    given = (_isa, number, gates, H, P, _threads(), kind, layers, directions, bias, keep, input, h, c, *extra, *weights)
    if _profiling():
        with torch.profiler.record_function(_profile.label("cpp", cell, "layer_forward")):
            out = kernel(*given)
    else:
        out = kernel(*given)
    if out is None:
        return None
    _choice.last = "cpp"
    if not narrow:
        return out
    y, h_n, c_n, states = out
    return y, h_n, c_n.to(input.dtype), states and tuple((h, c.to(input.dtype)) for h, c in states)
