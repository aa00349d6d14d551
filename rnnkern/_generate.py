"""generate: tokens one after the other, each from what a recurrent model makes of those before it."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rnnkern import _generate_native, _generate_python, dispatch
from rnnkern._generate_model import Options, steps_of

Model = tuple[Any, nn.Module, Any] | nn.Module | Callable[[Tensor, Any], tuple[Tensor, Any]]
_said: set[str] = set()


class Generated(NamedTuple):
    """What :func:`generate` returns.

    Attributes:
        tokens: the new tokens, `(N, T)` with T the most that a row got, or `(T)`; behind a row's end `pad_token_id`.
        lengths: how many of them each row got, the stop token included, `(N)` or `()`.
        scores: of beam search, the log-probability of each row's tokens divided by the length penalty, float64; else
            None.
        backend: ``"cpp"``, or ``"python"`` where it was a loop in Python.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor | None
    backend: str


@torch.no_grad()
def generate(
    model: Model,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    state: Any = None,
    lengths: Sequence[int] | Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Generated:
    r"""Writes on behind a prompt: every new token is chosen from the model's logits and fed back to it.

    Greedy by default; drawn at random with `do_sample`; by beam search with `num_beams`. On a CPU the whole loop runs
    in native code where the model is one of embedding, recurrent network and linear head, or a decoder with or without
    attention. Anything else goes through a loop in Python, which gives the same; a warning then says why, once for each
    reason. Inside
    ``rnnkern.use_backend("cpp")`` that is an error instead, and inside :class:`rnnkern.use_backend` with another name
    the loop in Python runs on that backend, without a warning.

    Args:
        model: one of

            * ``(embedding, rnn, head)``. The embedding is a :class:`torch.nn.Embedding`, a :class:`torch.nn.Linear`
              that reads one-hot vectors, None for a network that reads them itself, all three in native code, or
              anything that makes `(N, H_in)` of tokens `(N)`. The network is an RNN, LSTM or GRU of torch.nn or
              rnnkern, or an MGU, IndRNN, LiGRU or SLSTM, in one direction. The head is a :class:`torch.nn.Linear`,
              or anything that makes logits `(N, V)` of `(N, H_out)`.
            * a :class:`rnnkern.seq2seq.Decoder`, with `state`. The source that its attention reads comes with that;
              the beams of a row share it.
            * a function of tokens `(N)` and a state that returns logits `(N, V)` and the next state. For beam search
              its state has a method ``index_select(rows)``, or consists of tensors with the batch in dimension 1, as
              torch.nn's have, in tuples, lists and dicts.
        prompt: tokens that each row begins with, at least one, `(N, L)`, or `(L)` for one row; int64 or int32.
        max_new_tokens: most tokens that a row gets.
        state: the state before the prompt: `hx` of the network, None for zeros; that of a decoder's ``start``; what the
            function takes. Default: ``None``
        lengths: how many tokens of every row's prompt exist; each row is written on from its own end. Default: all
        do_sample: whether tokens are drawn from the distribution, by inversion in float64. Default: ``False``
        temperature: divides the logits. Default: 1
        top_k: draws from the `k` most probable tokens only (Fan et al. 2018). Default: ``None``
        top_p: draws from the smallest set of the most probable tokens that together have this probability, of what
            `temperature` and `top_k` left (nucleus sampling, Holtzman et al. 2020). Default: 1
        num_beams: width of the beam search. Default: 1
        length_penalty: exponent :math:`\alpha` of the number of new tokens, by which beam search divides their
            log-probability: :math:`\log P(Y) / |Y|^\alpha`, as is usual in libraries; Wu et al. 2016 have
            :math:`((5 + |Y|) / 6)^\alpha`. From -10 to 10. Default: 1
        eos_token_id: token, or tokens, with which a row ends. Default: ``None``
        pad_token_id: what stands behind the end of a row. Default: the first of `eos_token_id`, or 0
        generator: for `do_sample`. What is drawn depends on its state, the rows and `max_new_tokens` alone, not on
            which code runs. Default: torch's own of the CPU

    Returns:
        A named tuple :class:`Generated` of `tokens`, `lengths`, `scores` and `backend`. Tokens of equal logits go by
        their number, the smaller first.

    The network runs as it is: in training mode with dropout it drops, in Python. There is no derivative. Native code
    packs the weights; up to 64 MiB of them are kept with the network, and packed again only when a number among them
    has changed, however that came about. It runs on the thread that calls it, and other Python threads go on meanwhile.

    Beam search keeps, per row, the `num_beams` best continuations by log-probability. One that ends with a stop token
    among the `num_beams` best of its step is a candidate, as are those alive at the end; the one of the highest score
    is returned. A row is over as soon as nothing alive can still exceed its best candidate.

    Raises:
        TypeError, ValueError: arguments that do not fit or exclude each other; logits of another shape.
        IndexError: a token of the prompt outside of the vocabulary.
        RuntimeError: logits with NaN or positive infinity, or of negative infinities only; it names row and step.

    Example::

        >>> embedding, lstm, head = torch.nn.Embedding(100, 32), torch.nn.LSTM(32, 64), torch.nn.Linear(64, 100)
        >>> prompt = torch.tensor([[1, 2, 3], [1, 5, 7]])
        >>> out = rnnkern.generate((embedding, lstm, head), prompt, 20, do_sample=True, top_p=0.9, eos_token_id=0)
        >>> [row[:length].tolist() for row, length in zip(out.tokens, out.lengths)]
    """
    single, prompt, lengths = _prompt(prompt, lengths)
    options = _options(
        max_new_tokens, do_sample, temperature, top_k, top_p, num_beams, length_penalty, eos_token_id, pad_token_id
    )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generate: expected generator to be a torch.Generator, got {type(generator).__name__}")
    if generator is not None and not do_sample:
        raise ValueError("generate: generator is for do_sample=True")
    steps, state = steps_of(model, state)
    steps.check(prompt, state, options)
    native = _generate_native.Plan.of(steps, prompt, state, options)
    if isinstance(native, str):
        _say(native)
    uniform = None
    if do_sample:
        device = "cpu" if generator is None else generator.device
        size = (len(prompt), max_new_tokens)
        uniform = torch.rand(size, dtype=torch.float64, generator=generator, device=device).to(prompt.device)
    if isinstance(native, _generate_native.Plan):
        tokens, counts, scores = native.run(prompt, lengths, uniform)
    else:
        loop = _generate_python.beams if num_beams > 1 else _generate_python.rows
        tokens, counts, scores = loop(steps, prompt, lengths, state, options, uniform)
    backend = "cpp" if isinstance(native, _generate_native.Plan) else "python"
    tokens = tokens[:, : int(counts.max()) if len(prompt) else 0]
    if single:
        return Generated(tokens[0], counts[0], None if scores is None else scores[0], backend)
    return Generated(tokens, counts, scores, backend)


def _say(reason: str) -> None:
    """That the loop is one in Python: an error where native code was asked for, silence where something else was."""
    if dispatch.requested() == "cpp":
        raise RuntimeError(f"generate: backend 'cpp' was asked for, and it cannot: {reason}")
    if dispatch.requested() is None and reason not in _said:
        _said.add(reason)
        warnings.warn(f"generate: a loop in Python, several times slower than native code: {reason}", stacklevel=4)


def _prompt(prompt: Any, lengths: Any) -> tuple[bool, Tensor, Tensor]:
    """Whether it is one row, the prompt `(N, L)` and the lengths `(N)` on its device, all of them int64."""
    if not isinstance(prompt, Tensor):
        raise TypeError(f"generate: expected prompt to be a tensor of token numbers, got {type(prompt).__name__}")
    if prompt.dim() not in (1, 2) or prompt.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"generate: prompt: expected a 1-D or 2-D tensor of int64 or int32, got {prompt.dim()}-D {prompt.dtype}"
        )
    single = prompt.dim() == 1
    prompt = prompt.detach().long()
    prompt = prompt[None] if single else prompt
    N, L = prompt.shape
    if L == 0:
        raise ValueError("generate: expected a prompt of at least one token (one that begins a text, if nothing else)")
    if lengths is None:
        return single, prompt, torch.full((N,), L, device=prompt.device)
    given = torch.as_tensor(lengths)
    if given.shape != (N,) or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise ValueError(f"generate: lengths: expected {N} integers, got {list(given.shape)} of {given.dtype}")
    given = given.to(prompt.device, torch.int64)
    if N and not (1 <= int(given.min()) and int(given.max()) <= L):
        raise ValueError(f"generate: lengths must lie in [1, {L}], got {given.tolist()}")
    return single, prompt, given


def _integer(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise ValueError(f"generate: {name} must be an integer of {least} or more, got {value!r}")
    if number >= 1 << 63:
        raise ValueError(f"generate: {name} must be an integer of 64 bits, got {value!r}")
    return number


def _number(name: str, value: Any, fits: Callable[[float], bool], wanted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
        raise ValueError(f"generate: {name} must be {wanted}, got {value!r}")
    return float(value)


def _options(
    most: Any, do_sample: Any, temperature: Any, top_k: Any, top_p: Any, beams: Any, penalty: Any, eos: Any, pad: Any
) -> Options:
    if not isinstance(do_sample, bool):
        raise TypeError(f"generate: expected do_sample to be a bool, got {do_sample!r}")
    beams = _integer("num_beams", beams, 1)
    temperature = _number("temperature", temperature, lambda t: 0 < t < math.inf, "a finite number above 0")
    top_p = _number("top_p", top_p, lambda p: 0 < p <= 1, "in (0, 1]")
    top_k = None if top_k is None else _integer("top_k", top_k, 1)
    penalty = _number("length_penalty", penalty, lambda a: -10 <= a <= 10, "a number from -10 to 10")
    if do_sample and beams > 1:
        raise ValueError("generate: do_sample and num_beams exclude each other: beam search does not draw")
    if not do_sample and (temperature != 1 or top_k is not None or top_p != 1):
        raise ValueError("generate: temperature, top_k and top_p are for do_sample=True")
    if beams == 1 and penalty != 1:
        raise ValueError("generate: length_penalty is for beam search, num_beams above 1")
    given = () if eos is None else (eos,) if not isinstance(eos, Sequence) else eos
    stops = tuple(dict.fromkeys(_integer("eos_token_id", token, 0) for token in given))
    if pad is not None:
        pad = _integer("pad_token_id", pad, -(1 << 63))
    return Options(
        _integer("max_new_tokens", most, 1),
        do_sample, temperature, top_k, top_p, beams, penalty, stops,
        pad if pad is not None else stops[0] if stops else 0,
    )  # fmt: skip
