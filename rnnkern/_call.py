"""The call level, above the layers: what the modules and the functions of functional.py share.

A call is a whole stack as torch.nn runs it. Here, and nowhere else: validation, autocast, batch_first, unbatched,
packed and padded input, reset masks, layers times directions and the dropout between layers. Below this are
:func:`rnnkern.autograd.layer`, one layer in all its directions, or torch's own kernels, which take the call as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from rnnkern import _checks, _fast, _graphs, _layouts, _ops, _packing, _regularised, dispatch
from rnnkern._fold import call_beneath_vmap
from rnnkern._layouts import States
from rnnkern._options import NO_PROJECTION, PLAIN, Options
from rnnkern._run import run_step
from rnnkern.autograd import Group, layer
from rnnkern.backends.base import accumulation_dtype
from rnnkern.cells import CELLS

TITLES = {
    "rnn_tanh": "RNN", "rnn_relu": "RNN", "lstm": "LSTM", "gru": "GRU",
    "mgu": "MGU", "indrnn_tanh": "IndRNN", "indrnn_relu": "IndRNN", "ligru": "LiGRU",
    "slstm": "SLSTM",
}  # fmt: skip

Lengths = Tensor | Sequence[int]
Projection = Callable[[int, Tensor, Sequence[Group], Tensor | None], tuple[Tensor, Sequence[Group]]]


def run(
    cell: str,
    input: Tensor,
    hx: States | None,
    params: Sequence[Tensor],
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None = None,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    reset_state: States | None = None,
    return_states: bool = False,
    memory: str = "save",
    options: Options = PLAIN,
    project: Projection | None = None,
    heads: int = 0,
) -> tuple[Tensor, States, tuple[States, ...]]:
    """(output, final states, states of every layer or nothing).

    With `heads`, that many are the first dimension of every parameter, and each is a group of the scan.
    """
    if torch.compiler.is_compiling() and batch_sizes is not None:
        return _graphs.outside(
            cell, input, hx, params, bias, num_layers, dropout, training, bidirectional, batch_first, batch_sizes,
            lengths, reset, reset_state, return_states, memory, options, project, heads,
        )  # fmt: skip
    if torch.compiler.is_dynamo_compiling() and project is None:
        return _graphs.call(
            cell, input, hx, params, bias, num_layers, dropout if training else 0.0, training, bidirectional,
            batch_first, batch_sizes, lengths, reset, reset_state, return_states, memory, options, heads,
        )  # fmt: skip
    packed = batch_sizes is not None
    torchs = options is PLAIN and project is None and not (packed or heads or (training and dropout and num_layers > 1))
    plain = torchs and lengths is None and reset is reset_state is None and not return_states and memory == "save"
    if plain:
        short = _plain(cell, input, hx, params, bias, num_layers, bidirectional, batch_first)
        if short is not None:
            return *short, ()
    elif torchs and not torch.is_grad_enabled() and memory in ("save", "recompute"):
        found = _fast.sequence(
            cell, input, hx, params, bias, num_layers, 1 + bidirectional, batch_first, lengths, reset, reset_state,
            return_states,
        )  # fmt: skip
        if found is not None:
            return found
    batched = True
    D = 2 if bidirectional else 1
    if packed:
        batch_first = False
    else:
        batched = _checks.rank(TITLES[cell], input)
        if hx is not None:
            _checks.state_rank(hx, batched)
        if not batched:
            batch_first = False
            input = input.unsqueeze(1)
            hx = hx and tuple(h.unsqueeze(1) for h in hx)
            reset = None if reset is None else reset.unsqueeze(-1)
            reset_state = reset_state and tuple(h.unsqueeze(1) for h in reset_state)
    spec = CELLS[cell]
    extra = options.extra(cell) if options is not PLAIN else ()
    I, H, P, per = _checks.weights(
        params, len(spec.gates), bias, num_layers, D, cell == "lstm", extra, spec.dense, heads
    )
    proj = per - len(extra) > 2 + 2 * bias
    _checks.input_like_weight(input, params[0], packed)
    if batch_sizes is not None:
        _checks.batch_sizes(batch_sizes, input.size(0))
        T, B = batch_sizes.size(0), int(batch_sizes[0])
    elif batch_first:
        B, T = input.shape[:2]
    else:
        T, B = input.shape[:2]
    _checks.steps(T)
    widths = (P, *[H] * (len(spec.states) - 1))
    sizes = tuple((num_layers * D, B, width) for width in widths)
    low = _layouts.autocast_dtype(input.device.type)
    if hx is not None:
        _checks.state_sizes(hx, sizes)
        _checks.alike(input, hx, "hidden", low is None)
    _checks.alike(input, params, "parameter", low is None)
    if lengths is not None:
        lengths = _checks.lengths(lengths, T, B, input.device, packed, batched)
    if reset is not None:
        _checks.reset(reset, input.shape[:-1], input.device)
        if reset_state is not None:
            _checks.reset_state(reset_state, sizes)
            _checks.alike(input, reset_state, "reset_state", low is None)
    elif reset_state is not None:
        raise ValueError("reset_state: only together with reset, the mask that says where it is used")
    _checks.memory(memory)
    scanned = ""
    if options is not PLAIN:
        scanned = options.scanned(training)
        if options.proj_clip and not proj:
            raise ValueError(NO_PROJECTION)
        if training and options.weight_dropout:
            params = _regularised.dropped(params, per, options.weight_dropout)

    backend = None
    stacked = dispatch.Sizes(I, H, num_layers, D, proj) if input.is_cuda else None
    if dispatch.wants_torch(input.device, low or input.dtype, cell, B, packed, T, stacked):
        from rnnkern.backends import torch as torch_kernels

        lacks = torch_kernels.cannot(lengths is not None, reset is not None, return_states, memory, scanned)
        fits = dispatch.may_torch(lacks)
        if torch_kernels.transformed() and not dispatch.to_onnx():
            backend = "reference" if dispatch.requested() == "torch" else None
        elif fits:
            dispatch.ran("torch")
            y, final = torch_kernels.call(
                cell, input, hx, params, bias, num_layers, dropout, training, bidirectional, batch_first, batch_sizes,
                sizes,
            )  # fmt: skip
            return (y, final, ()) if batched else (y.squeeze(1), tuple(h.squeeze(1) for h in final), ())

    graded = torch.is_grad_enabled() and not torch.compiler.is_exporting()
    if plain and backend is low is None and not graded and input.device.type == "cpu" and _traced():
        x = input.transpose(0, 1) if batch_first else input
        y, *last = _ops.inference(cell, x, hx or (), params, bias, num_layers, bidirectional)
        y = y.transpose(0, 1) if batch_first else y
        return (y, tuple(last), ()) if batched else (y.squeeze(1), tuple(h.squeeze(1) for h in last), ())

    dtypes = (input.dtype, input.dtype)
    if low is not None:
        # Packed sequences of one length are dense to torch.
        ragged = batch_sizes is not None and int(batch_sizes[-1]) < B
        dtypes = _layouts.autocast_dtypes(low, cell, input, hx, ragged, proj)
        input, hx, params, reset_state = _layouts.cast(dtypes[0], input, hx, params, reset_state)
    if reset is not None:
        reset = _layouts.boundaries(reset.t() if batch_first else reset, D, batch_sizes, lengths)
    offsets, packing, steps = None, None, T
    if batch_sizes is not None:
        offsets, lengths = _layouts.packed(batch_sizes, B, input.device)
    elif lengths is not None and not scanned and _packing.worth_packing(input, lengths):  # masks are of padded rows
        packing = _packing.Packing(lengths, T, batch_first)
        offsets, lengths, steps = packing.offsets, packing.lengths, packing.steps
        x, hx, reset, reset_state = packing.put(input, hx, reset, reset_state)
    if packing is None:
        x = (input.transpose(0, 1) if batch_first else input).reshape(-1, I)
    if heads:
        params, hx, reset, reset_state = _layouts.as_groups(heads, per, params, hx, reset, reset_state)
        sizes = tuple((groups * heads, batch, width // heads) for groups, batch, width in sizes)
    arguments = (
        cell, x, hx, params, per, bias, num_layers, dropout if training else 0.0, D * (heads or 1), steps, sizes,
        offsets, lengths, reset, reset_state, return_states, backend, memory, training, options, project, heads or 1,
    )  # fmt: skip
    if low is not None:
        with torch.autocast(input.device.type, enabled=False):
            y, final, states = stack(*arguments)
    else:
        y, final, states = stack(*arguments)
    if heads:
        final = _layouts.from_groups(heads, final)
    if packing is not None:
        y, final, states = packing.take(y, final, states)
    if len(final) > 1 and final[1].dtype != dtypes[1]:
        final = (final[0], *(s.to(dtypes[1]) for s in final[1:]))

    if batched and not packed and packing is None:
        y, states = _layouts.unflatten(y, states, T, B, batch_first)
    elif not batched:  # one batch row: the rows are the steps
        final = tuple(h.squeeze(1) for h in final)
    return y, final, states


def _plain(
    cell: str, input: Tensor, hx: States | None, params: Sequence[Tensor], bias: bool, num_layers: int,
    bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, States] | None:  # fmt: skip
    """The short ways through a call that has nothing beyond torch.nn's, and no dropout; None: none of them."""
    if torch._C._are_functorch_transforms_active():
        if torch.compiler.is_compiling():
            return None

        batch_first = batch_first and input.dim() == 3  # samples without a batch become one, behind the steps

        def below(input: Tensor, hx: States | None) -> tuple[Tensor, States, Any]:
            return run(cell, input, hx, params, bias, num_layers, 0.0, False, bidirectional, batch_first)

        groups, gates = num_layers * (1 + bidirectional), len(CELLS[cell].gates)
        return call_beneath_vmap(below, input, hx, params, groups, gates, batch_first)
    if torch.is_grad_enabled():
        return None
    found = _fast.sequence(cell, input, hx, params, bias, num_layers, 1 + bidirectional, batch_first)
    return found and found[:2]


def _traced() -> bool:
    """Whether a graph is being made of what runs now, and no transform of torch.func is at work within it."""
    return torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def stack(
    cell: str,
    x: Tensor,
    hx: States | None,
    params: Sequence[Tensor],
    per: int,
    bias: bool,
    num_layers: int,
    dropout: float,
    D: int,
    T: int,
    sizes: tuple[tuple[int, int, int], ...],
    offsets: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_state: States | None = None,
    return_states: bool = False,
    backend: str | None = None,
    memory: str = "save",
    training: bool = False,
    options: Options = PLAIN,
    project: Projection | None = None,
    heads: int = 1,
) -> tuple[Tensor, States, tuple[States, ...]]:
    """Layers over rows `x` [S, I], each of D groups, directions times heads; states but h are in the accumulation dtype
    in `final`, in x's in the states.

    `project` makes pre-activations [S, D, G*H] in its own way, from the number of the layer, its rows, its groups and
    which rows exist (None: all), and gives groups without a projection.
    """
    B = sizes[0][1]
    acc = accumulation_dtype(x.dtype)
    if hx is None:
        hx = tuple(x.new_zeros(size, dtype=acc if n else x.dtype) for n, size in enumerate(sizes))
    elif len(hx) > 1:
        hx = (hx[0], *(h.to(acc) for h in hx[1:]))
    restart: States = ()
    if reset_state is not None:
        restart = tuple(h.to(acc) if n else h for n, h in enumerate(reset_state))
        restart = tuple(h.expand(-1, B, -1) for h in restart)
    reverse = (False, True)[:D] if heads == 1 else (False,) * heads + (True,) * (D - heads)
    extra = options.extra(cell) if options is not PLAIN else ()
    proj = per - len(extra) > 2 + 2 * bias
    names = ("w_hh", "b_hh", "w_hr") if bias and proj else ("w_hh", "b_hh") if bias else ("w_hh", "w_hr")[: 1 + proj]
    scan: dict[str, Any] = {}
    exist, normed = None, False
    if project is not None and lengths is not None and offsets is None:
        exist = (torch.arange(T, device=x.device).unsqueeze(1) < lengths).flatten()
    if options is not PLAIN:
        normed = options.layer_norm and not (backend is None and _regularised.normed_in_scan(x, params))
        names += tuple(name for name in extra if not (normed and name == "ln_ih"))
        if normed and lengths is not None and offsets is None:
            x = _regularised.rows_that_exist(x, T, B, lengths)
    keep = return_states and len(sizes) > 1
    precision = dispatch.gpu_precision(x.dtype) if x.is_cuda else "ieee"
    finals, states = [], []
    for k in range(num_layers):
        groups: Sequence[Group] = ()
        for start in range(k * D * per, (k + 1) * D * per, per):
            w = params[start : start + per]
            groups = (*groups, Group(w[0], w[2], (w[1], *w[3:])) if bias else Group(w[0], None, tuple(w[1:])))
        entering, segment = hx, restart
        if num_layers > 1:
            entering = tuple(h[k * D : (k + 1) * D] for h in hx)
            segment = tuple(h[k * D : (k + 1) * D] for h in restart)
        rows = x.unsqueeze(1)
        if options is not PLAIN:
            scan = _regularised.scan_options(options, cell, training, x.shape[0], B, D, [s[2] for s in sizes], x)
            if normed:
                rows, groups = _regularised.normalised(cell, x, groups, len(names) - len(extra) + 1)
        if project is not None:
            rows, groups = project(k, x, groups, exist)
        y, final, seq = layer(
            cell, rows, entering, groups, reverse, T, B, param_names=names, offsets=offsets,
            lengths=lengths, reset=reset, reset_states=segment, keep_states=keep, backend=backend, memory=memory,
            precision=precision, **scan,
        )  # fmt: skip
        x = y.flatten(1)
        finals.append(final)
        if return_states:
            states.append((x, *(s.flatten(1).to(x.dtype) for s in seq)))
        if dropout and k < num_layers - 1:
            x = torch.dropout(x, dropout, True)
    final = finals[0] if num_layers == 1 else tuple(torch.cat(parts) for parts in zip(*finals, strict=True))
    return x, final, tuple(states)


def run_cell(
    cell: str, title: str, input: Tensor, hx: States | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, heads: int = 0, project: Projection | None = None,
) -> States:  # fmt: skip
    """One step of a cell module: its states after it. A scan with T=1 on the same backends, or torch's operations;
    `heads` and `project` are those of `run`.
    """
    if torch.compiler.is_dynamo_compiling() and project is None:
        return _graphs.step(cell, title, input, hx, w_ih, w_hh, b_ih, b_hh, heads)
    low = _layouts.autocast_dtype(input.device.type)
    batched = input.dim() == 2
    if not batched:
        input = input.unsqueeze(0)
        hx = hx and tuple(h.unsqueeze(0) for h in hx)
    weights: Sequence[Tensor] = (w_ih, w_hh)
    if b_ih is not None or b_hh is not None:  # as in torch, a bias set to None is zero
        b_ih = torch.zeros_like(b_hh) if b_ih is None and b_hh is not None else b_ih
        b_hh = torch.zeros_like(b_ih) if b_hh is None and b_ih is not None else b_hh
        weights = [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]
    spec = CELLS[cell]
    H = _checks.cell(title, input, hx, weights, len(spec.gates), low is not None, spec.dense, heads)
    _checks.alike(input, weights, "parameter", low is None)
    if hx is not None:
        _checks.alike(input, hx, "hidden", low is None)
    if dispatch.wants_torch(input.device, input.dtype, cell + "_cell", input.size(0), False, 1):
        from rnnkern.backends import torch as torch_kernels

        dispatch.ran("torch")
        final = torch_kernels.step(cell, input, hx, w_ih, w_hh, b_ih, b_hh)
        return final if batched else tuple(h.squeeze(0) for h in final)
    dtypes = (input.dtype, input.dtype)
    if low is not None:
        dtypes = _layouts.autocast_dtypes(low, cell, input, hx, False, False, True)
        input, hx, weights, _ = _layouts.cast(dtypes[0], input, hx, weights, None)
    with torch.autocast(input.device.type, enabled=False) if low is not None else nullcontext():
        run = _step_in_torch if dispatch.wants_operations(cell) else _step_as_scan
        states = run(cell, input, hx, weights, H, heads, project)
    states = (states[0], *(s.to(dtypes[1]) for s in states[1:]))
    return states if batched else tuple(h.squeeze(0) for h in states)


def _step_in_torch(
    cell: str, input: Tensor, hx: States | None, weights: Sequence[Tensor], H: int, heads: int,
    project: Projection | None,
) -> States:  # fmt: skip
    """Of `run_cell`, where autograd follows the equations."""
    dispatch.ran("reference")
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases or (None, None)
    if project is not None:
        gx = project(0, input, [Group(w_ih, b_ih, ())], None)[0].squeeze(1)
    elif heads:
        gx = linear(input, w_ih.flatten(0, 1), None if b_ih is None else b_ih.flatten())
    else:
        gx = linear(input, w_ih, b_ih)
    if hx is None:
        hx = (input.new_zeros(input.size(0), H),) * len(CELLS[cell].states)
    return run_step(cell, gx, hx, w_hh, b_hh, heads)


def _step_as_scan(
    cell: str, input: Tensor, hx: States | None, weights: Sequence[Tensor], H: int, heads: int,
    project: Projection | None,
) -> States:  # fmt: skip
    """Of `run_cell`, on a backend."""
    hx = hx and tuple(h.unsqueeze(0) for h in hx)
    groups, per = heads or 1, len(weights)
    if heads:
        weights, hx, _, _ = _layouts.as_groups(heads, per, weights, hx, None, None)
    sizes = ((groups, input.size(0), H // groups),) * len(CELLS[cell].states)
    arguments = (cell, input, hx, weights, per, per == 4, 1, 0.0, groups, 1, sizes)
    _, final, _ = stack(*arguments, project=project, heads=groups)
    if heads:
        final = _layouts.from_groups(heads, final)
    return tuple(s[0] for s in final)
