"""Short ways through a small call on the CPU.

A step of a small layer takes a few microseconds, and so does every tensor operation that the general way needs for
views, states and checks. Here all conditions are read off once. Dense layers with no gradient to come are one call of
the extension; one or two steps with a gradient to come are torch's operations. Whatever does not fit, and every error,
goes the general way: these functions then return None and have done nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnnkern import _checks, _profile, dispatch
from rnnkern._dynamo import constant
from rnnkern._options import PLAIN
from rnnkern.cells import CELLS

_NARROW = (torch.bfloat16, torch.float16)  # states but h are in fp32 then, and given and taken in the module's dtype
_STEP, _LAYER, _BATCH_FIRST = range(3)
_CELL_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _step_of_lstm(module: Any, input: Tensor, hx: Any) -> Any:
    """torch.nn.LSTM's forward for one step of one layer, by the operations of a cell: its own packs the weights anew at
    every call. None: something else.
    """
    from rnnkern.backends import torch as torch_kernels  # loaded when first asked for

    axis, weights = int(module.batch_first), module._flat_weights
    if input.size(axis) != 1 or len(weights) != (4 if module.bias else 2):  # more layers, directions, a projection
        return None
    x = input.select(axis, 0)
    if hx is not None:
        h, c = hx
        if not h.shape == c.shape == (1, x.size(0), module.hidden_size) or not h.dtype == c.dtype == x.dtype:
            return None
        hx = (h[0], c[0])
    h, c = torch_kernels.step("lstm", x, hx, *weights, *(None,) * (4 - len(weights)))
    return h.unsqueeze(axis), (h.unsqueeze(0), c.unsqueeze(0))


_FORWARD: dict[str, Any] = {
    "lstm": _step_of_lstm,
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
_codes: dict[str, tuple[int, int, bool]] = {}  # the cells of the extension: number, gates, whether h is not all states


@constant  # a trace must not enter imports
def _load() -> Any:
    global _kernel, _isa
    _kernel = False
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is not None and dispatch.unavailable("cpp") is None:
        from rnnkern import _cpu
        from rnnkern.backends.cpp import BACKEND, CELL_NUMBERS

        if _cpu.bind(exchange, Tensor, torch.nn.Parameter, torch.empty_like, torch.float32):
            for name, number in CELL_NUMBERS.items():
                _codes[name] = (number, len(CELLS[name].gates), len(CELLS[name].states) > 1)
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
    """What torch.nn's forward gives, where automatic choice takes torch's operations (`dispatch.wants_torch`)."""
    if input.dtype not in dispatch.DTYPES:
        return None
    try:
        found = _FORWARD[what](module, input, hx)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None  # the general way finds it too, and says it more clearly
    if found is None:
        return None
    _choice.last = "torch"
    return found


def layer(module: Any, cell: str, input: Any, hx: Any) -> tuple[Any, ...] | None:
    """A module of layers: (output, states in torch.nn's form), or None."""
    if _compiling() or type(input) is not Tensor or module.options is not PLAIN or module._project is not None:
        return None
    if _closed():
        return None
    if _grad():
        if cell not in _FORWARD or not input.is_cpu or input.is_nested or input.dim() != 3:
            return None
        if input.size(1 if module.batch_first else 0) > dispatch.FEW_STEPS:
            return None
        # Torch reads the list, whose entries are stale where a parametrization has replaced the parameters.
        if not all(map(is_, module._flat_weights, module._parameters.values())):
            return None
        return _torchs(module, cell, input, hx)
    if module.training and module.dropout:
        return None
    if hx is not None and len(CELLS[cell].states) == 1:
        hx = (hx,)
    kind, directions = _BATCH_FIRST if module.batch_first else _LAYER, 1 + module.bidirectional
    # None where a parametrization has replaced a parameter: it fits nothing.
    weights = map(module._parameters.get, module._flat_weights_names)
    out = _run(
        cell, kind, module.hidden_size, module.proj_size, module.num_layers, directions, module._heads, module.bias,
        input, hx, weights,
    )  # fmt: skip
    if out is None:
        return None
    y, final, _ = out
    return (y, final) if len(final) > 1 else (y, final[0])


def step(
    module: Any, cell: str, input: Any, hx: Any, heads: int = 0, gates: Callable[[Tensor], Tensor | None] | None = None
) -> tuple[Any, ...] | None:
    """A module of one step: its states after it, or None. `gates` makes pre-activations of the input, or None."""
    if _compiling() or type(input) is not Tensor or _closed():
        return None
    if _grad():
        what = cell + " cell"
        if what not in _FORWARD or not input.is_cpu or input.is_nested or input.dim() != 2:
            return None
        found = _torchs(module, what, input, hx[0] if hx and cell != "lstm" else hx)
        return found if found is None or cell == "lstm" else (found,)
    names = _CELL_NAMES if module.bias else _CELL_NAMES[:2]
    weights: Iterable[Any] = map(module._parameters.get, names)
    if gates is not None:
        made = gates(input)
        if made is None:
            return None
        input, weights = made, (w if name.endswith("hh") else None for name, w in zip(names, weights, strict=True))
    out = _run(cell, _STEP, module.hidden_size, 0, 1, 1, heads, module.bias, input, hx, weights)
    return out and out[1]


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
    if type(input) is not Tensor or _closed() or len(params) < n or params[1].dim() != 1 + CELLS[cell].dense:
        return None
    width = params[1].shape[-1]
    H, P = (params[n].shape[-1], width) if projected else (width, 0)
    kind = _BATCH_FIRST if batch_first else _LAYER
    if type(lengths) is list or type(lengths) is tuple:
        lengths = _checks.integers(lengths)
    elif type(lengths) is Tensor and lengths.dtype is torch.int32:
        lengths = lengths.long()
    out = _run(
        cell, kind, H, P, layers, directions, 0, bias, input, hx, params, reset, reset_state, lengths, keep
    )  # fmt: skip
    if out is None:
        return None
    y, final, states = out
    return y, final, states or ()


def one_step(
    cell: str, input: Tensor, hx: tuple[Tensor, ...], weights: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...] | None:
    """torch's op of a cell, with no gradient to come: (h,) or (h, c), or None. `weights` are those of the op."""
    w_hh, bias = weights[1], weights[2] is not None
    if type(input) is not Tensor or _closed() or w_hh is None or w_hh.dim() != 2 or bias != (weights[3] is not None):
        return None
    out = _run(cell, _STEP, w_hh.size(1), 0, 1, 1, 0, bias, input, hx, weights if bias else weights[:2])
    return out and out[1]


def _run(
    cell: str, kind: int, H: int, P: int, layers: int, directions: int, heads: int, bias: bool, input: Tensor, hx: Any,
    weights: Iterable[Any], reset: Any = None, reset_state: Any = None, lengths: Any = None, keep: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[tuple[Tensor, ...], ...] | None] | None:  # fmt: skip
    """(output, final states, all states to `keep`, else None)."""
    kernel = _load() if _kernel is None else _kernel
    if not kernel or cell not in _codes:
        return None
    number, gates, more = _codes[cell]
    narrow = more and input.dtype in _NARROW
    if narrow:
        hx, reset_state = _wide(hx, input.dtype), _wide(reset_state, input.dtype)
    given = (_isa, number, gates, H, P, _threads(), kind, layers, directions, heads, bias, keep, input, hx, reset,
             reset_state, lengths, *weights)  # fmt: skip
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
    y, final, states = out
    return y, _narrowed(final, input.dtype), states and tuple(_narrowed(kept, input.dtype) for kept in states)


def _wide(states: Any, dtype: torch.dtype) -> Any:
    """States of this 16-bit dtype as the extension takes them. It refuses False, which stands for something else."""
    if type(states) is not tuple:
        return states
    rest = (s.float() if type(s) is Tensor and s.dtype is dtype else False for s in states[1:])
    return (*states[:1], *rest)


def _narrowed(states: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (states[0], *(s.to(dtype) for s in states[1:]))
