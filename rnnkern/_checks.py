"""Validation of calls: torch.nn's own exception types and messages where it has one, got and expected elsewhere.

Everything here looks at shapes, dtypes and devices; the two checks of values (lengths, batch sizes) read CPU tensors
only, so that a GPU is never waited for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Proxy

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def container(input: Tensor) -> None:
    """Refuse what looks like a tensor and has no rows in memory, with a way round."""
    if isinstance(input, Proxy):
        raise TypeError(
            "torch.fx.symbolic_trace cannot follow rnnkern's modules. Trace the model with torch.nn's, and accelerate "
            "what comes out: rnnkern.accelerate(torch.fx.symbolic_trace(rnnkern.restore(model)))"
        )
    if input.is_nested:
        raise TypeError(
            "nested tensors are not supported: pad, and say how long each sequence is, "
            "module(x.to_padded_tensor(0.0), lengths=...) with batch_first=True"
        )


def rank(title: str, input: Tensor) -> bool:
    """Whether `input` is batched; raises as torch.nn does if it is neither."""
    dims = input.dim()
    container(input)
    if dims == 3:
        return True
    if dims == 2:
        return False
    tensor = " tensor" if title == "RNN" else ""
    raise ValueError(f"{title}: Expected input to be 2D or 3D, got {dims}D{tensor} instead")


def step_rank(title: str, input: Tensor, hx: tuple[Tensor, ...] | None) -> None:
    """Of a cell's tensors, with or without a batch dimension; and how many states there are."""
    dims = input.dim()
    container(input)
    if dims not in (1, 2):
        raise ValueError(f"{title}: Expected input to be 1D or 2D, got {dims}D instead")
    states = hx or ()
    for index, h in enumerate(states):
        if h.dim() not in (1, 2):
            which = f"hx[{index}]" if len(states) > 1 else "hidden"
            raise ValueError(f"{title}: Expected {which} to be 1D or 2D, got {h.dim()}D instead")
    if title == "LSTMCell" and hx is not None and len(hx) != 2:
        raise RuntimeError("lstm_cell expects two hidden states")


def state_rank(hx: tuple[Tensor, ...], batched: bool) -> None:
    """One rank for every state: 3 with batched input, 2 without."""
    expected = 3 if batched else 2
    if all(h.dim() == expected for h in hx):
        return
    words = f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, "
    if len(hx) > 2:
        words += f"all states should also be {expected}-D but got ({', '.join(f'{h.dim()}-D' for h in hx)}) tensors"
    elif len(hx) == 2:
        words += f"hx and cx should also be {expected}-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
    else:
        words += f"hx should also be {expected}-D but got {hx[0].dim()}-D tensor"
    raise RuntimeError(words)


def input_like_weight(input: Tensor, weight: Tensor, packed: bool) -> None:
    """Dtype, rank and feature size of an input whose batch dimension is there."""
    if input.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(
            f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
        )
    expected = 2 if packed else 3
    if input.dim() != expected:
        raise RuntimeError(f"input must have {expected} dimensions, got {input.dim()}")
    if input.size(-1) != weight.size(-1):
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {weight.size(-1)}, got {input.size(-1)}"
        )


def state_sizes(hx: tuple[Tensor, ...], sizes: tuple[tuple[int, int, int], ...]) -> None:
    for index, (h, size) in enumerate(zip(hx, sizes, strict=True)):
        if h.shape != size:
            which = f"hidden[{index}]" if len(hx) > 1 else "hidden"
            raise RuntimeError(f"Expected {which} size {size}, got {list(h.shape)}")


def alike(input: Tensor, others: Sequence[Tensor], name: str, dtype: bool) -> None:
    """Same device as the input and, if asked for, the same dtype."""
    for other in others:
        if other.device != input.device:
            raise RuntimeError(
                f"Input and {name} tensors are not at the same device, found input tensor at {input.device} and "
                f"{name} tensor at {other.device}"
            )
        if dtype and other.dtype != input.dtype:
            raise RuntimeError(
                f"Input and {name} tensors are not the same dtype, found input tensor with {input.dtype} and "
                f"{name} tensor with {other.dtype}"
            )


def weights(
    params: Sequence[Tensor], gates: int, bias: bool, layers: int, directions: int, may_project: bool,
    extra: tuple[str, ...] = (), dense: bool = True, heads: int = 0,
) -> tuple[int, int, int, int]:  # fmt: skip
    """The flat list of weights against the sizes that its first layer states: (I, H, P, tensors per group).

    `extra` names what follows torch's weights in every group: ln_ih and ln_hh of the gates' width, others of H. A
    weight_hh that is not `dense` is a vector. With `heads`, that many are the first dimension of all, and each has its
    share of H and P.
    """
    per = 2 + 2 * bias + len(extra)
    groups = layers * directions
    proj = may_project and len(params) == (per + 1) * groups
    per += proj
    if len(params) != per * groups:
        raise RuntimeError(
            f"got an incorrect number of RNN parameters: expected {per}{' (one more with a projection)' * may_project} "
            f"for each of {layers} layers x {directions} directions, got {len(params)}"
        )
    first, second, lead = params[0].shape, params[1].shape, (heads,) if heads else ()
    if heads and (len(first) != 3 or len(second) != 3):
        raise RuntimeError(
            f"weight_ih_l0 and weight_hh_l0: expected (num_heads, {gates}*hidden_size/num_heads, features) tensors, "
            f"got {list(first)} and {list(second)}"
        )
    first, second = first[len(lead) :], second[len(lead) :]
    if len(first) != 2 or len(second) != 1 + dense or first[0] % gates or not first[0]:
        raise RuntimeError(
            f"weight_ih_l0 and weight_hh_l0: expected ({gates}*hidden_size, features) "
            f"{'matrices' if dense else 'and a vector'}, got {list(first)} and {list(second)}"
        )
    wide, columns = first
    hidden = wide // gates
    state = second[1] if proj else hidden
    shapes: list[tuple[int, ...]] = [(wide, columns), (wide, state) if dense else (wide,)]
    if bias:
        shapes += [(wide,), (wide,)]
    if proj:
        shapes += [(state, hidden)]
    shapes += [(wide,) if name in ("ln_ih", "ln_hh") else (hidden,) for name in extra]
    for start in range(0, len(params), per):
        if start == per * directions:
            shapes[0] = (wide, state * directions * (heads or 1))
        for offset, shape in enumerate(shapes):
            expected, found = (*lead, *shape), params[start + offset].shape
            if found != expected:
                name = weight_name(start // per, offset, directions, bias, proj, extra)
                raise RuntimeError(f"{name}: expected shape {list(expected)}, got {list(found)}")
    return columns, hidden * (heads or 1), state * (heads or 1), per


def weight_name(group: int, offset: int, directions: int, bias: bool, proj: bool, extra: tuple[str, ...]) -> str:
    biases, projection = ("bias_ih", "bias_hh") if bias else (), ("weight_hr",) if proj else ()
    kinds = ("weight_ih", "weight_hh", *biases, *projection, *extra)
    return f"{kinds[offset]}_l{group // directions}{'_reverse' if group % directions else ''}"


def steps(T: int) -> None:
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")


def batch_sizes(sizes: Tensor, rows: int) -> None:
    """What a PackedSequence promises; kernels trust it."""
    if sizes.dim() != 1 or sizes.dtype != torch.int64 or sizes.device.type != "cpu":
        raise ValueError(
            f"batch_sizes: expected a 1-D int64 tensor on the CPU, got {sizes.dim()}-D {sizes.dtype} on {sizes.device}"
        )
    steps(sizes.numel())
    listed = sizes.tolist()
    if sum(listed) != rows:
        raise ValueError(f"batch_sizes: expected a sum of {rows}, the rows of the packed input, got {sum(listed)}")
    if listed[-1] <= 0 or any(later > earlier for earlier, later in zip(listed, listed[1:], strict=False)):
        raise ValueError("batch_sizes: expected positive numbers that never grow, as pack_padded_sequence makes them")


def integers(given: Tensor | Sequence[int]) -> Tensor:
    """`lengths=` as a tensor."""
    if isinstance(given, Tensor):
        return given
    try:
        return torch.tensor(given, dtype=None if len(given) else torch.int64)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"lengths: expected integers, one per batch row, got {given!r}") from error


def lengths(given: Tensor | Sequence[int], T: int, B: int, device: torch.device, packed: bool, batched: bool) -> Tensor:
    """`lengths=` as int64 on the input's device; values are checked where that costs no wait for a device."""
    if packed:
        raise ValueError("lengths: not with a packed input, which has its own")
    if not batched:
        raise ValueError("lengths: not with an unbatched input; cut the input instead")
    found = integers(given)
    if found.dtype not in INTEGERS:
        raise ValueError(f"lengths: expected integers, got {found.dtype}")
    if found.shape != (B,):
        raise ValueError(f"lengths: expected one per batch row, shape ({B},), got {tuple(found.shape)}")
    if torch._C._functorch.peek_interpreter_stack() is None and not torch.compiler.is_compiling():
        if found.device.type == "cpu":
            if B and (int(found.min()) < 0 or int(found.max()) > T):
                raise ValueError(f"lengths: expected values from 0 to the {T} steps of the input, got {found.tolist()}")
        elif found.device.type == "cuda":
            torch._assert_async(((found >= 0) & (found <= T)).all(), f"lengths: expected values from 0 to {T}")
    return found.to(device=device, dtype=torch.int64)


def reset(given: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(given, Tensor):
        raise ValueError(f"reset: expected a bool mask, a tensor, got {type(given).__name__}")
    if given.dtype != torch.bool:
        raise ValueError(f"reset: expected a bool mask, got {given.dtype}")
    if given.shape != shape:
        wanted, got = tuple(shape), tuple(given.shape)
        raise ValueError(f"reset: expected one value per row of the input, shape {wanted}, got {got}")
    if given.device != device:
        raise ValueError(f"reset: expected on the input's device {device}, got {given.device}")


def reset_state(given: tuple[Tensor, ...], sizes: tuple[tuple[int, int, int], ...]) -> None:
    """Sizes as hx, or 1 for the batch."""
    for state, (groups, batch, width) in zip(given, sizes, strict=True):
        if state.shape not in ((groups, batch, width), (groups, 1, width)):
            raise ValueError(
                f"reset_state: expected shape ({groups}, {batch} or 1, {width}) as hx, got {tuple(state.shape)}"
            )


def cell(
    title: str, input: Tensor, hx: tuple[Tensor, ...] | None, weights: Sequence[Tensor], gates: int, autocast: bool,
    dense: bool = True, heads: int = 0,
) -> int:  # fmt: skip
    """Sizes, devices and dtypes of one step's tensors, batch dimension there; the hidden size. `weights` are w_ih, w_hh
    and biases, `dense` and `heads` as above.
    """
    w_ih, w_hh = weights[:2]
    lead = (heads,) if heads else ()
    own = w_hh.size(-1) if dense else w_hh.size(-1) // gates
    wide, hidden = gates * own, own * (heads or 1)
    shapes = ((wide, w_ih.size(-1)), (wide, own) if dense else (wide,), (wide,), (wide,))
    for name, w, shape in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights, shapes, strict=False):
        if w.shape != (*lead, *shape):
            raise RuntimeError(f"{name}: expected shape {[*lead, *shape]}, got {list(w.shape)}")
    if input.size(1) != w_ih.size(-1):
        raise RuntimeError(f"input has inconsistent input_size: got {input.size(1)} expected {w_ih.size(-1)}")
    for index, h in enumerate(hx or ()):
        if h.size(0) != input.size(0):
            raise RuntimeError(f"Input batch size {input.size(0)} doesn't match hidden{index} batch size {h.size(0)}")
        if h.dim() == 1 or h.size(1) != hidden:
            got = h.size(min(1, h.dim() - 1))
            raise RuntimeError(f"hidden{index} has inconsistent hidden_size: got {got}, expected {hidden}")
        if h.dim() != 2:
            raise RuntimeError(f"hidden{index}: expected shape {(input.size(0), hidden)}, got {tuple(h.shape)}")
    if not autocast and input.dtype != w_ih.dtype:
        raise RuntimeError(
            f"{title}: input and weights must have the same dtype, but got {input.dtype} and {w_ih.dtype}"
        )
    return hidden


def memory(word: str) -> None:
    if word not in ("save", "recompute"):
        raise ValueError(f"memory: expected 'save' or 'recompute', got {word!r}")
