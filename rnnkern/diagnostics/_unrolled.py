"""A network's graph unrolled over time, as text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rnnkern.diagnostics._recorder import NETWORKS

WIDTH = 14  # of a step's column
SHOWN = 3  # steps before those that are left out


def unrolled(module: nn.RNNBase, x: Tensor) -> str:
    """The graph of a recurrent network unrolled over the steps of `x`, with the shapes of all that flows in it.

    Args:
        module: an RNN, LSTM or GRU of torch.nn or rnnkern.
        x: an input of it, `(L, N, H_in)`, `(N, L, H_in)` with `batch_first`, or `(L, H_in)`.

    Returns:
        the text: time goes to the right, layers upwards. Steps between the third and the last are left out.

    Raises:
        TypeError: not such a module, or an `x` that is no tensor.
        ValueError, RuntimeError: an input that the module does not take.

    Example::

        >>> print(rnnkern.diagnostics.unrolled(rnnkern.GRU(3, 8), torch.randn(2, 4, 3)))
        GRU, 2 steps
        output                  [4, 8]        [4, 8]
                                  ^             ^
        layer 0          0 ----> GRU --------> GRU -----> h [4, 8]
                                  ^             ^
        x                       [4, 3]        [4, 3]
        t                         1             2
    """
    if not isinstance(module, NETWORKS):
        raise TypeError(f"unrolled: expected an RNN, LSTM or GRU, got {type(module).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"unrolled: expected x to be a tensor, got {type(x).__name__}")
    with torch.no_grad():
        module(x)  # refuses what does not fit
    batched = x.dim() == 3
    time = 1 if module.batch_first and batched else 0
    T, N = x.shape[time], (x.shape[1 - time],) if batched else ()
    steps: list[int | None] = list(range(1, T + 1)) if T <= SHOWN + 1 else [*range(1, SHOWN + 1), None, T]
    kind, two, D = type(module).__name__, module.mode == "LSTM", 1 + module.bidirectional
    h, c = module.proj_size or module.hidden_size, module.hidden_size
    states = f"h {shape(N, h)}, c {shape(N, c)}" if two else f"h {shape(N, h)}"

    def line(name: str, cell: str, left: str = "", right: str = "", rest: str = "...") -> str:
        cells = (rest.center(WIDTH) if step is None else cell.format(step).center(WIDTH) for step in steps)
        return f"{name:16}{left:>4}{''.join(cells)}{right}".rstrip()

    arrows = line("", "^", rest="")
    lines = [f"{kind}, {T} step{'s'[: T != 1]}", line("output", shape(N, D * h)), arrows]
    pad = WIDTH - len(kind)
    for layer in reversed(range(module.num_layers)):
        if D == 2:
            cell = f"{'-' * (pad // 2 - 1)} {kind} <{'-' * (pad - pad // 2 - 2)}"
            lines.append(line(f"layer {layer} reverse", cell, "<-", f"- 0; leaves {states}", "." * 6))
        cell = f"{'-' * (pad // 2 - 2)}> {kind} {'-' * (pad - pad // 2 - 1)}"
        lines += [line(f"layer {layer}", cell, "0 -", f"> {states}", "." * 6), arrows]
        if layer:
            lines += [line(f"h of layer {layer - 1}", shape(N, D * h)), arrows]
    return "\n".join([*lines, line("x", shape(N, x.shape[-1])), line("t", "{}")])


def shape(N: tuple[int, ...], features: int) -> str:
    return str([*N, features])
