"""generate over a Decoder with attention: native code against the loop in Python, which is held to Decoder.step."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from isas import NATIVE, instruction_sets
from tolerance import check
from torch import Tensor, nn

import rnnkern
from rnnkern import generate
from rnnkern.seq2seq import Attention, Decoder, DecoderState

pytestmark = pytest.mark.skipif(not NATIVE, reason="no extension")

KINDS = ("dot", "multiplicative", "additive")
FORMS: dict[str, dict[str, Any]] = {"luong": {}, "feeding": {"input_feeding": True}, "bahdanau": {"form": "bahdanau"}}
CELLS: dict[str, dict[str, Any]] = {
    "rnn_tanh": {"cell": "RNN"},
    "rnn_relu": {"cell": "RNN", "nonlinearity": "relu"},
    "lstm": {"cell": "LSTM"},
    "lstm_projected": {"cell": "LSTM", "proj_size": 7},
    "gru": {"cell": "GRU"},
}
forms = pytest.mark.parametrize("form", FORMS)
kinds = pytest.mark.parametrize("kind", KINDS)
BEGIN = 8


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Native code of this instruction set, and nothing else, generates while this holds."""
    from rnnkern.backends import cpp

    monkeypatch.setattr(cpp.BACKEND, "isa", request.param)
    with rnnkern.use_backend("cpp"):
        yield request.param


class Case(NamedTuple):
    decoder: Decoder
    state: DecoderState
    prompt: Tensor


def case(
    kind: str, form: str, cell: str = "lstm", V: int = 11, H: int = 17, S: int = 6, L: int = 7, layers: int = 1,
    N: int = 4, lengths: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float64, gain: float = 3.0,
) -> Case:  # fmt: skip
    """With weights large enough that what is written depends on what was, and on the source."""
    torch.manual_seed(sum(map(ord, kind + form + cell)))
    P = CELLS[cell].get("proj_size", H)
    S = P if kind == "dot" else S
    decoder = Decoder(V, 5, H, layers, attention=kind, source_size=S, **FORMS[form], **CELLS[cell]).to(dtype)
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(gain)
    h = torch.randn(layers, N, P).tanh().to(dtype)
    hx = (h, torch.randn(layers, N, H).to(dtype)) if "lstm" in cell else h
    with torch.no_grad():
        state = decoder.start(hx, 2 * torch.randn(L, N, S).to(dtype), lengths)
    return Case(decoder, state, torch.randint(V, (N, 3)))


def wide(made: Case) -> Case:
    """In float64."""

    def cast(part: Any) -> Any:
        return tuple(map(cast, part)) if isinstance(part, tuple) else None if part is None else part.double()

    state, (values, keys, padding) = made.state, made.state.source
    source = type(state.source)(values.double(), keys.double(), padding)
    state = DecoderState(cast(state.hx), cast(state.readout), source)
    return Case(copy.deepcopy(made.decoder).double(), state, made.prompt)


def run(made: Case, most: int, backend: str, **options: Any) -> Any:
    with rnnkern.use_backend(backend):
        out = generate(made.decoder, made.prompt, most, state=made.state, **options)
    assert out.backend == ("cpp" if backend == "cpp" else "python")
    return out


def written(out: Any) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(out.tokens, out.lengths, strict=True)]


SEARCHES: tuple[dict[str, Any], ...] = (
    {},
    {"eos_token_id": [3, 0], "lengths": [3, 1, 2, 3]},
    {"eos_token_id": 3, "num_beams": 3, "length_penalty": 0.5, "lengths": [1, 3, 2, 3]},
)


@functools.cache
def in_python(named: frozenset[tuple[str, Any]], search: int) -> tuple[Any, Any]:
    """As it is and in float64: made once for all instruction sets."""
    made = case(**dict(named))
    return run(made, 12, "torch", **SEARCHES[search]), run(wide(made), 12, "torch", **SEARCHES[search])


def compare(**made: Any) -> None:
    for search, options in enumerate(SEARCHES):
        (wanted, truth), found = in_python(frozenset(made.items()), search), run(case(**made), 12, "cpp", **options)
        assert written(found) == written(wanted), options
        assert all(torch.equal(a, b) for a, b in zip(found[:2], wanted[:2], strict=True))
        if "num_beams" in options:
            check(found.scores, wanted.scores, truth.scores, dtype=made.get("dtype"))


@kinds
@forms
@pytest.mark.parametrize("cell", CELLS)
def test_native_code_writes_what_python_writes(kind: str, form: str, cell: str, isa: str) -> None:
    """A source of several lengths, one of them none; greedy and by beams; rows that end, prompts of several lengths."""
    compare(kind=kind, form=form, cell=cell, lengths=(7, 3, 0, 1))


@kinds
@forms
def test_sizes(kind: str, form: str, isa: str) -> None:
    """Several panels of everything, several layers, and tokens that are embedded step by step."""
    compare(kind=kind, form=form, cell="gru", H=70, S=90, L=83, layers=2, lengths=(83, 65, 64, 17), gain=1.5)
    compare(kind=kind, form=form, cell="lstm", V=700, S=1, L=1, gain=2.0)


@kinds
@forms
def test_float32(kind: str, form: str, isa: str) -> None:
    for cell in ("gru", "lstm_projected"):
        compare(
            kind=kind, form=form, cell=cell, H=33, S=19, L=21, lengths=(21, 3, 16, 0), dtype=torch.float32, gain=2.0
        )


@kinds
@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(kind: str, form: str, dtype: torch.dtype, isa: str) -> None:
    """Every token is the best, or next to it, of what was written, by the same decoder in float64."""
    for V, cell in ((11, "lstm"), (700, "gru")):
        made = case(kind, form, cell, V=V, S=9, L=5, lengths=(5, 3, 0, 4), dtype=dtype, gain=2.0)
        out = run(made, 10, "cpp")
        decoder, state, _ = wide(made)
        with torch.no_grad(), rnnkern.use_backend("torch"):
            for token in made.prompt.t()[:-1]:
                state = decoder.step(token, state)[1]
            token = made.prompt[:, -1]
            for new in out.tokens.t():
                logits, state = decoder.step(token, state)
                odds, token = logits.log_softmax(-1), new
                missed = odds.amax(-1) - odds.gather(1, new[:, None]).squeeze(1)
                assert missed.max() < 0.05 * (odds.amax() - odds.amin())


@kinds
@forms
def test_native_code_draws_what_python_draws(kind: str, form: str, isa: str) -> None:
    made = case(kind, form, V=40, gain=2.0)
    for chosen in ({}, {"top_k": 9, "top_p": 0.6, "temperature": 2.0}):
        drawn = [
            run(made, 20, b, do_sample=True, generator=torch.Generator().manual_seed(1), eos_token_id=5, **chosen)
            for b in ("cpp", "torch", "cpp")
        ]
        assert written(drawn[0]) == written(drawn[1]) == written(drawn[2])


@kinds
@forms
def test_goes_on_from_a_step(kind: str, form: str, isa: str) -> None:
    """With what was fed back then; and nothing of the caller's changes."""
    made = case(kind, form, lengths=(7, 2, 5, 1))
    with torch.no_grad(), rnnkern.use_backend("torch"):
        state = made.decoder.step(torch.tensor([1, 2, 3, 4]), made.state)[1]
    kept = copy.deepcopy(state)
    later = made._replace(state=state)
    for options in ({}, {"num_beams": 2}):
        assert written(run(later, 9, "cpp", **options)) == written(run(later, 9, "torch", **options))
    for name in ("readout", "weights"):
        before, after = getattr(kept, name), getattr(state, name)
        assert before is after is None or torch.equal(before, after)
    assert torch.equal(kept.hx[0], state.hx[0]) and torch.equal(kept.source.values, state.source.values)


@kinds
@forms
def test_rows_and_padding_do_not_meet(kind: str, form: str, isa: str) -> None:
    """A row alone gives what it gives beside others, whatever stands behind its source's end."""
    made = case(kind, form)
    source, lengths = 2 * torch.randn(7, 4, made.decoder.attention.source_size).double(), [2, 7, 0, 5]
    for n, length in enumerate(lengths):
        source[length:, n] = float("nan")
    state = made.decoder.start(made.state.hx, source, lengths)
    for options in ({}, {"num_beams": 3}):
        out = run(made._replace(state=state), 9, "cpp", **options)
        for n in range(4):
            alone = Case(made.decoder, state.index_select(torch.tensor([n])), made.prompt[n : n + 1])
            assert written(run(alone, 9, "cpp", **options))[0] == written(out)[n]


@forms
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_a_source_with_nan(form: str, options: dict[str, Any], isa: str) -> None:
    for kind, value in itertools.product(KINDS, (float("nan"), float("inf"))):
        made = case(kind, form)
        source = torch.randn(7, 4, made.decoder.attention.source_size).double()
        source[5, 2] = value
        made = made._replace(state=made.decoder.start(made.state.hx, source, [7, 7, 6, 7]))
        with pytest.raises(RuntimeError, match="logits of row 2 have NaN at step 0"):
            run(made, 5, "cpp", **options)


class Sharper(Decoder):
    def step(self, token: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        logits, state = super().step(token, state)
        return 2 * logits, state


def refusals() -> list[tuple[str, Any]]:
    def hooked(part: str) -> Any:
        def change(made: Case) -> Case:
            getattr(made.decoder, part).register_forward_hook(lambda *_: None)
            return made

        return change

    def own(made: Case) -> Case:
        made.decoder.__class__ = Sharper
        return made

    def patched(made: Case) -> Case:
        made.decoder._read = lambda context, y: y
        return made

    def holes(made: Case) -> Case:
        padding = torch.zeros(4, 7, dtype=torch.bool)
        padding[1, 3] = True
        source = made.state.source._replace(padding=padding)
        return made._replace(state=DecoderState(made.state.hx, None, source))

    def nothing(made: Case) -> Case:
        empty = torch.zeros(0, 4, 6).double()
        return made._replace(state=made.decoder.start(made.state.hx, empty))

    def kept(made: Case) -> Case:
        made.decoder.rnn = rnnkern.LSTM(5, 17, zoneout=0.1).double()
        return made

    return [
        ("Attention has hooks", hooked("attention")),
        ("Linear has hooks", hooked("readout")),
        ("Linear has hooks", hooked("head")),
        ("Embedding has hooks", hooked("embedding")),
        ("has forward hooks", hooked("rnn")),
        ("the Sharper has a step of its own", own),
        ("the Decoder has a step of its own", patched),
        ("the source's padding is not behind its rows", holes),
        ("the source has no steps", nothing),
        ("zoneout", kept),
    ]


@pytest.mark.parametrize("reason,change", refusals(), ids=lambda p: p if isinstance(p, str) else "")
def test_what_native_code_leaves_to_python(reason: str, change: Any) -> None:
    made = change(case("additive", "luong"))
    with pytest.raises(RuntimeError, match=reason):
        run(made, 2, "cpp")
    assert run(made, 2, "reference").tokens.shape == (4, 2)


def test_what_does_not_fit_is_said_by_the_decoder() -> None:
    """The errors of Decoder.step, native code asked for or not."""
    made = case("dot", "feeding")
    other = case("multiplicative", "feeding", S=5)
    broken = [
        (made._replace(prompt=torch.randint(11, (3, 2))), "expected tokens of 4 rows, as the state has, got 3"),
        (made._replace(state=DecoderState(made.state.hx, made.state.readout, None)), "NoneType"),
        (made._replace(state=DecoderState(made.state.hx, None, made.state.source)), "NoneType"),
        (made._replace(state=other.state), "shapes cannot be multiplied"),
        (made._replace(prompt=torch.full((4, 1), 11)), r"the prompt's tokens must lie in \[0, 10\]"),
    ]
    for case_, message in broken:
        for backend in ("cpp", "torch"):
            with pytest.raises((ValueError, RuntimeError, TypeError, AttributeError, IndexError), match=message):
                run(case_, 3, backend)


def test_the_loop_in_python_is_the_decoders_steps() -> None:
    for kind, form in itertools.product(KINDS, FORMS):
        made = case(kind, form, lengths=(7, 2, 5, 1))
        out, state, rows = run(made, 8, "torch"), made.state, []
        with torch.no_grad(), rnnkern.use_backend("torch"):
            for token in made.prompt.t():
                logits, state = made.decoder.step(token, state)
            for _ in range(8):
                rows.append(logits.argmax(-1))
                logits, state = made.decoder.step(rows[-1], state)
        assert torch.equal(torch.stack(rows, 1), out.tokens)


def test_attention_of_ones_own() -> None:
    class Own(Attention):
        pass

    made = case("dot", "luong")
    made.decoder.attention = Own("dot", 17, 17)
    with pytest.raises(RuntimeError, match="Own is not Attention"):
        run(made, 2, "cpp")
    made = case("multiplicative", "luong")
    made.decoder.readout = nn.Linear(23, 17).double()
    with pytest.raises(RuntimeError, match="has a bias"):
        run(made, 2, "cpp")
