"""The short way through a call that is one layer in one direction, dense, on the CPU, with no gradient to come.

A step of a small layer takes a few microseconds, and so does every tensor operation that the general way needs for
views, states and checks. Here all conditions are read off once and the C++ scan is called. Whatever does not fit, and
every error, goes the general way: these functions then return None and have done nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnnkern import dispatch

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_ACC = (torch.float64, torch.float32, torch.float32, torch.float32)
_CODES = {"rnn_tanh": (0, 1), "rnn_relu": (1, 1), "lstm": (2, 4), "gru": (3, 3)}  # number in the extension, gates
_Parameter = torch.nn.Parameter
_grad = torch.is_grad_enabled
_compiling = torch.compiler.is_compiling
_autocast = torch.is_autocast_enabled
_transforms = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack
_functions = torch._C._len_torch_function_stack
_tracing = torch._C._get_tracing_state
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_threads = torch.get_num_threads
_empty_like = torch.empty_like
_choice = dispatch._choice

_kernel: Any = None  # rnnkern._cpu.layer once it is known to be there, False where it is not
_isa = ""


def _load() -> Any:
    global _kernel, _isa
    _kernel = False
    if dispatch.unavailable("cpp") is None:
        from rnnkern import _cpu
        from rnnkern.backends.cpp import BACKEND

        _kernel, _isa = _cpu.layer, BACKEND.isa
    return _kernel


_load._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a trace must not enter imports


def _closed() -> bool:
    """Whether somebody watches tensors, or a backend was asked for: then every call goes the general way."""
    return (
        _grad()
        or _compiling()
        or _choice.requested is not None
        or _autocast("cpu")
        or _transforms()
        or _modes() > 0
        or _functions() > 0
        or forward_ad._current_level >= 0
        or _tracing() is not None
    )


def _other(p: Any, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether `p` is anything else than a plain contiguous CPU tensor of this shape and dtype."""
    if type(p) is not _Parameter and (type(p) is not Tensor or _veiled(p)):
        return True
    return not (p.shape == shape and p.dtype is dtype and p.is_cpu and p.is_contiguous())


def _veiled(t: Tensor) -> bool:
    """Whether the numbers are not what lies in memory: left over from a transform, or negated when read."""
    return _wrapped(t) or t.is_neg()


def layer(module: Any, cell: str, input: Any, hx: Any) -> tuple[Any, ...] | None:
    """RNN, LSTM or GRU: (output, states in torch.nn's form), or None."""
    if type(input) is not Tensor or _closed() or _veiled(input) or module.num_layers != 1 or module.bidirectional:
        return None
    shape = input.shape
    if len(shape) != 3 or not input.is_contiguous():
        return None
    T, B, I = shape
    if module.batch_first:
        T, B = B, T
        if T != 1 and B != 1:
            return None
    H = module.hidden_size
    P = module.proj_size or H
    p = module._parameters
    w_hr = None
    if P != H:
        w_hr = p.get("weight_hr_l0")
        if w_hr is None:
            return None
    parts = p.get("weight_ih_l0"), p.get("weight_hh_l0"), p.get("bias_ih_l0"), p.get("bias_hh_l0")
    if hx is not None:
        if cell != "lstm":
            hx = (hx,)
        elif type(hx) is not tuple:
            return None
    out = _run(cell, input, T, B, I, H, P, parts, module.bias, w_hr, hx, (1, B))
    if out is None:
        return None
    y, h, c = out
    if module.batch_first:
        y = y.view(B, T, P)
    return (y, h) if c is None else (y, (h, c))


def step(module: Any, cell: str, input: Any, hx: Any) -> tuple[Any, ...] | None:
    """RNNCell, LSTMCell or GRUCell: (h,) or (h, c), or None."""
    if type(input) is not Tensor or _closed() or _veiled(input):
        return None
    shape = input.shape
    if len(shape) != 2 or not input.is_contiguous():
        return None
    B, I = shape
    H = module.hidden_size
    p = module._parameters
    if hx is not None and type(hx) is not tuple:
        return None
    parts = p.get("weight_ih"), p.get("weight_hh"), p.get("bias_ih"), p.get("bias_hh")
    out = _run(cell, input, 1, B, I, H, H, parts, module.bias, None, hx, (B,))
    return out and (out[0:1] if out[2] is None else (out[0], out[2]))


def _run(
    cell: str, input: Tensor, T: int, B: int, I: int, H: int, P: int, parts: tuple[Any, ...], bias: bool, w_hr: Any,
    hx: Any, lead: tuple[int, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None] | None:  # fmt: skip
    """(output, h_n, c_n); `lead` is the shape of a state without its width: (1, B), or (B,) for a cell, whose h_n is
    its output."""
    kernel = _load() if _kernel is None else _kernel
    dtype = input.dtype
    code = _DTYPES.get(dtype)
    if not kernel or code is None or not input.is_cpu or T < 1 or B < 1:
        return None
    number, gates = _CODES[cell]
    w_ih, w_hh, b_ih, b_hh = parts
    rows = gates * H
    if _other(w_ih, (rows, I), dtype) or _other(w_hh, (rows, P), dtype):
        return None
    if bias and (_other(b_ih, (rows,), dtype) or _other(b_hh, (rows,), dtype)):
        return None
    if w_hr is not None and _other(w_hr, (P, H), dtype):
        return None
    two = cell == "lstm"
    narrow = code > 1  # c is kept in fp32 then, and given and taken in the module's dtype
    h = c = None
    if hx is not None:
        h = hx[0]
        if _other(h, (*lead, P), dtype):
            return None
        if two:
            c = hx[1]
            if len(hx) != 2 or _other(c, (*lead, H), dtype):
                return None
            c = c.float() if narrow else c
    layered = len(lead) == 2
    # empty_like costs half of what empty does
    y = _empty_like(input) if I == P else input.new_empty((T, B, P) if layered else (B, P))
    h_n = c_n = None
    if layered:
        h_n = _empty_like(y) if T == 1 else y.new_empty((1, B, P))
    if two:
        c_n = (
            _empty_like(y if h_n is None else h_n)
            if P == H and not narrow
            else y.new_empty((*lead, H), dtype=_ACC[code])
        )
    kernel(
        _isa, number, code, T, B, I, H, P, _threads(), input.data_ptr(), w_ih.data_ptr(),
        b_ih.data_ptr() if bias else 0, w_hh.data_ptr(), b_hh.data_ptr() if bias else 0,
        0 if w_hr is None else w_hr.data_ptr(), 0 if h is None else h.data_ptr(), 0 if c is None else c.data_ptr(),
        y.data_ptr(), 0 if h_n is None else h_n.data_ptr(), 0 if c_n is None else c_n.data_ptr(),
    )  # fmt: skip
    _choice.last = "cpp"
    return y, h_n, c_n.to(dtype) if narrow and c_n is not None else c_n
