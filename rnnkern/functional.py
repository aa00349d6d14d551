"""Recurrent networks as functions: what the modules do, with weights in a flat list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from torch import Tensor

from rnnkern._call import TITLES, Lengths, run
from rnnkern._options import PLAIN, Keywords
from rnnkern._options import options as checked_options


def rnn_tanh(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    reset_state: Tensor | None = None,
    return_states: bool = False,
    memory: str = "save",
    **options: Unpack[Keywords],
) -> tuple[Any, ...]:
    r"""Elman network with tanh, :math:`h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})`.

    Arguments, results and errors are those of :func:`lstm`, with one state: `hx`, `reset_state` and the second result
    are tensors, and the third result holds one tensor per layer.
    """
    return _one_state("rnn_tanh", **locals())


def rnn_relu(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    reset_state: Tensor | None = None,
    return_states: bool = False,
    memory: str = "save",
    **options: Unpack[Keywords],
) -> tuple[Any, ...]:
    r"""Elman network with ReLU, :math:`h_t = \max(0, W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})`.

    Arguments, results and errors are those of :func:`lstm`, with one state: `hx`, `reset_state` and the second result
    are tensors, and the third result holds one tensor per layer.
    """
    return _one_state("rnn_relu", **locals())


def gru(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    reset_state: Tensor | None = None,
    return_states: bool = False,
    memory: str = "save",
    **options: Unpack[Keywords],
) -> tuple[Any, ...]:
    r"""Gated recurrent unit, in the form of torch.nn and cuDNN (reset gate after the product).

    Equations: :class:`rnnkern.GRU`. Arguments, results and errors are those of :func:`lstm`, with one state: `hx`,
    `reset_state` and the second result are tensors, and the third result holds one tensor per layer.
    """
    return _one_state("gru", **locals())


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    *,
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
    return_states: bool = False,
    memory: str = "save",
    **options: Unpack[Keywords],
) -> tuple[Any, ...]:
    r"""Long short-term memory; equations: :class:`rnnkern.LSTM`.

    Args:
        input: the sequence; the rows of a :class:`~torch.nn.utils.rnn.PackedSequence` if `batch_sizes` is given.
        hx: initial states ``(h_0, c_0)``; None: zeros.
        params: the weights as torch.nn lists them: for every layer, and in it every direction, ``w_ih, w_hh``, with
            `bias` ``b_ih, b_hh``, and with a projection ``w_hr`` (seen by the number of tensors). Then, with
            `layer_norm`, ``ln_ih, ln_hh``; with `peephole`, ``peephole_i, peephole_f, peephole_o``; with `layer_norm`
            and LSTM, ``ln_c, ln_c_bias``.
        bias: whether `params` has biases.
        num_layers: number of layers.
        dropout: probability of the dropout between layers, drawn by the same calls in the same order as torch's.
        training: whether that dropout takes place, and those of the options; zoneout mixes otherwise.
        bidirectional: whether every layer has a reverse direction.
        batch_first: whether `input`, `reset` and the outputs are `(N, L, ...)`.
        batch_sizes: batch size at each step of a packed input, on the CPU.
        lengths: steps of every sequence of a padded input, integers on any device, zero allowed, in any order.
            Padding is not computed: outputs there are 0, and final states are those at each sequence's own end.
        reset: bool mask, one per row of the input. True at t: a segment begins at t, and no state and no gradient
            crosses between t-1 and t, in either direction; at the first step it replaces `hx` for the forward one.
        reset_state: states with which segments begin, sized as `hx` or with batch size 1; None: zeros.
        return_states: also return all states of all layers.
        memory: ``"recompute"`` keeps less for the backward, as in :class:`rnnkern.LSTM`.
        options: `recurrent_dropout`, `recurrent_dropout_mode`, `zoneout`, `weight_dropout`, `cell_clip`, `proj_clip`,
            `grad_clip`, `layer_norm` and `peephole`, as in :class:`rnnkern.LSTM`.

    Shape:
        - input: `(L, N, I)`, `(N, L, I)` with `batch_first`, `(L, I)` unbatched, `(sum of lengths, I)` packed.
        - h_0, h_n: `(D * num_layers, N, P)`, c_0, c_n: `(D * num_layers, N, H)`; unbatched without `N`.
        - output: as `input`, with `D * P` features.
        - reset: as `input` without features. lengths: `(N)`.
        - third result, in the container and layout of `input`: per layer ``(h, c)`` with `D * P` and `D * H` features,
          before dropout.

    dtype: float64, float32, bfloat16 or float16, one for all tensors; sums and c in float32 (float64 for float64).
    Under autocast, results have the dtypes that torch's own networks give.

    Returns:
        ``output, (h_n, c_n)``, and with `return_states` a tuple over layers as the third.

    Raises:
        ValueError: input of the wrong rank or dtype, lengths, reset or reset_state that do not fit the input, or
            options out of range or not of this cell.
        RuntimeError: sizes, dtypes or devices that do not fit each other, no time steps, or a backend asked for by
            name that cannot do it.

    Example::

        >>> m = torch.nn.LSTM(10, 20)
        >>> y, (hn, cn) = rnnkern.functional.lstm(torch.randn(5, 3, 10), None, list(m.parameters()))
    """
    y, final, states = run(
        "lstm", input, two_states("lstm", hx), params, bias, num_layers, dropout, training,
        bidirectional, batch_first, batch_sizes, lengths, reset,
        two_states("lstm: reset_state", reset_state), return_states, memory,
        checked_options("LSTM", "lstm", True, options) if options else PLAIN,
    )  # fmt: skip
    return (y, final, states) if return_states else (y, final)


class Arguments(Keywords, total=False):
    """What every function here takes beside `input`, `hx` and `params`."""

    bias: bool
    num_layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool
    batch_sizes: Tensor | None
    lengths: Lengths | None
    reset: Tensor | None
    reset_state: Any
    return_states: bool
    memory: str


def mgu(input: Tensor, hx: Tensor | None, params: Sequence[Tensor], **arguments: Unpack[Arguments]) -> tuple[Any, ...]:
    r"""Minimal gated unit, its gate after the product; equations: :class:`rnnkern.MGU`.

    Arguments, results and errors are those of :func:`lstm`, with one state: `hx`, `reset_state` and the second result
    are tensors, and the third result holds one tensor per layer.
    """
    return _one_state("mgu", input=input, params=params, **_all(hx, arguments))


def indrnn_relu(
    input: Tensor, hx: Tensor | None, params: Sequence[Tensor], **arguments: Unpack[Arguments]
) -> tuple[Any, ...]:
    r"""Independently recurrent network, :math:`h_t = \max(0, W_{ih} x_t + b_{ih} + u \odot h_{t-1} + b_{hh})`.

    Arguments, results and errors are those of :func:`mgu`; in the place of ``w_hh``, `params` has u, a vector.
    """
    return _one_state("indrnn_relu", input=input, params=params, **_all(hx, arguments))


def indrnn_tanh(
    input: Tensor, hx: Tensor | None, params: Sequence[Tensor], **arguments: Unpack[Arguments]
) -> tuple[Any, ...]:
    r"""Independently recurrent network, :math:`h_t = \tanh(W_{ih} x_t + b_{ih} + u \odot h_{t-1} + b_{hh})`.

    Arguments, results and errors are those of :func:`mgu`; in the place of ``w_hh``, `params` has u, a vector.
    """
    return _one_state("indrnn_tanh", input=input, params=params, **_all(hx, arguments))


def ligru(
    input: Tensor, hx: Tensor | None, params: Sequence[Tensor], **arguments: Unpack[Arguments]
) -> tuple[Any, ...]:
    r"""Light gated recurrent unit without batch normalisation; equations: :class:`rnnkern.LiGRU`.

    Arguments, results and errors are those of :func:`mgu`.
    """
    return _one_state("ligru", input=input, params=params, **_all(hx, arguments))


def slstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    params: Sequence[Tensor],
    **arguments: Unpack[Arguments],
) -> tuple[Any, ...]:
    r"""sLSTM; equations: :class:`rnnkern.SLSTM`.

    Arguments, results and errors are those of :func:`lstm`, with four states ``(h, c, n, m)`` of one size in `hx`,
    `reset_state` and the results. Parameters in `params` have the heads as their first dimension, as the module's have.
    """
    given = _all(hx, arguments)
    options: Keywords = given.pop("options")
    given["options"] = checked_options("SLSTM", "slstm", False, options) if options else PLAIN
    for name in ("hx", "reset_state"):
        given[name] = four_states(name, given[name])
    found = run("slstm", input, params=params, heads=params[0].shape[0] if len(params) else 0, **given)
    return found if given["return_states"] else found[:2]


def two_states(name: str, given: Any) -> tuple[Tensor, Tensor] | None:
    """Those of an LSTM.

    Raises:
        RuntimeError: more of them, in torch's words.
    """
    if given is None:
        return None
    h, c = given[0], given[1]
    if len(given) > 2:
        raise RuntimeError(f"{name} expects two hidden states")
    return h, c


def four_states(name: str, given: Any) -> tuple[Tensor, ...] | None:
    """Those of sLSTM.

    Raises:
        ValueError: another number of them.
    """
    if given is None:
        return None
    if not isinstance(given, (tuple, list)) or len(given) != 4:
        got = f"a {type(given).__name__}" + (f" of {len(given)}" if isinstance(given, (tuple, list)) else "")
        raise ValueError(f"{name}: expected the four states (h, c, n, m), got {got}")
    return tuple(given)


def _all(hx: Any, given: Arguments) -> dict[str, Any]:
    """With the defaults of what is not given; what is no argument is an option."""
    defaults = dict(bias=True, num_layers=1, dropout=0.0, training=False, bidirectional=False, batch_first=False)
    beyond = dict(batch_sizes=None, lengths=None, reset=None, reset_state=None, return_states=False, memory="save")
    arguments = {"hx": hx} | defaults | beyond
    options = {name: value for name, value in given.items() if name not in arguments}
    return arguments | {name: value for name, value in given.items() if name in arguments} | {"options": options}


def _one_state(
    cell: str, hx: Tensor | None, reset_state: Tensor | None, options: Keywords, **arguments: Any
) -> tuple[Any, ...]:
    y, (final,), states = run(
        cell,
        hx=None if hx is None else (hx,),
        reset_state=None if reset_state is None else (reset_state,),
        options=checked_options(TITLES[cell], cell, False, options) if options else PLAIN,
        **arguments,
    )
    return (y, final, tuple(h for (h,) in states)) if arguments["return_states"] else (y, final)
