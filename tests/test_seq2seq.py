"""rnnkern.seq2seq against the papers' equations spelt out with torch.nn's cells, row by row and step by step."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from stacks import D
from tolerance import check, check_grad
from torch import Tensor

import rnnkern
from rnnkern.seq2seq import Attention, Bridge, Decoder, Encoder, Seq2Seq

V, E, H, L, T, N = 7, 4, 6, 5, 4, 3
LENGTHS = [3, 5, 1]
ATTENTION: dict[str, dict[str, Any]] = {
    "none": {"attention": None},
    "dot": {"attention": "dot"},
    "multiplicative": {"attention": "multiplicative"},
    "additive": {"attention": "additive"},
    "dot, input feeding": {"attention": "dot", "input_feeding": True},
    "bahdanau": {"attention": "additive", "form": "bahdanau"},
    "bahdanau, dot": {"attention": "dot", "form": "bahdanau"},
}


def model(kind: str = "dot", cell: str = "LSTM", bidirectional: bool = True, layers: int = 1, **both: Any) -> Seq2Seq:
    options = {"dtype": D, **both}
    encoder = Encoder(V, E, H // 2 if bidirectional else H, layers, cell=cell, bidirectional=bidirectional, **options)
    given = dict(ATTENTION[kind])
    if given["attention"]:
        given["source_size"] = encoder.output_size
    return Seq2Seq(encoder, Decoder(V, E, H, layers, cell=cell, **given, **options))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randint(V, (L, N)), torch.randint(V, (T, N))


# The equations once more.


def cell_of(rnn: Any, layer: int, reverse: bool = False) -> Any:
    """torch.nn's cell with one layer's weights, which stay the module's own parameters."""
    name = type(rnn).__name__
    cell = getattr(torch.nn, f"{name}Cell")(1, rnn.hidden_size, dtype=D)
    for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(cell, part, getattr(rnn, f"{part}_l{layer}{'_reverse' if reverse else ''}"))
    return cell


def top(state: Any) -> Tensor:
    return state[0] if isinstance(state, tuple) else state


def read_source(encoder: Encoder, tokens: Tensor) -> tuple[Tensor, list[list[Any]]]:
    """One row without padding: outputs [length, S], and the last state of every layer and direction."""
    rows, finals = list(encoder.embedding(tokens)), []
    for layer in range(encoder.rnn.num_layers):
        sides, last = [], []
        for reverse in (False, True)[: 1 + encoder.rnn.bidirectional]:
            cell, state, found = cell_of(encoder.rnn, layer, reverse), None, []
            for x in reversed(rows) if reverse else rows:
                state = cell(x, state)
                found.append(top(state))
            sides.append(found[::-1] if reverse else found)
            last.append(state)
        rows = [torch.cat(parts) for parts in zip(*sides, strict=True)]
        finals.append(last)
    return torch.stack(rows), finals


def crossed(bridge: Bridge, finals: list[list[Any]]) -> list[Any]:
    """The decoder's first state of every layer."""
    if bridge.maps is None:
        return [last[0] for last in finals]
    out = []
    for last in finals:
        h = torch.tanh(bridge.maps[0](torch.cat([top(state) for state in last])))
        out.append((h, bridge.maps[1](torch.cat([state[1] for state in last]))) if len(bridge.maps) == 2 else h)
    return out


def attend(attention: Attention, query: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    scores = []
    for s in source:
        if attention.kind == "dot":
            scores.append(query @ s)
        elif attention.kind == "multiplicative":
            scores.append(query @ attention.key.weight @ s)
        else:
            mixed = torch.tanh(attention.query.weight @ query + attention.key.weight @ s)
            scores.append(attention.score.weight[0] @ mixed)
    weights = torch.stack(scores).exp()
    weights = weights / weights.sum()
    return sum(w * s for w, s in zip(weights, source, strict=True)), weights


def spelt(model: Seq2Seq, source: Tensor, target: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor | None]:
    """Logits [T, N, V] and attention weights [T, N, L]."""
    decoder, logits, weights = model.decoder, [], []
    cells = [cell_of(decoder.rnn, layer) for layer in range(decoder.rnn.num_layers)]
    for n, length in enumerate(lengths):
        outputs, finals = read_source(model.encoder, source[:length, n])
        states = crossed(model.bridge, finals)
        readout = torch.zeros(H, dtype=D)
        for token in target[:, n]:
            x = decoder.embedding(token)
            if decoder.form == "bahdanau":
                context, found = attend(decoder.attention, top(states[-1]), outputs)
                x = torch.cat([x, context])
            elif decoder.input_feeding:
                x = torch.cat([x, readout])
            for k, cell in enumerate(cells):
                states[k] = cell(x, states[k])
                x = top(states[k])
            if decoder.attention is not None:
                if decoder.form == "luong":
                    context, found = attend(decoder.attention, x, outputs)
                x = readout = torch.tanh(decoder.readout.weight @ torch.cat([context, x]))
                weights.append(torch.cat([found, found.new_zeros(len(source) - length)]))
            logits.append(decoder.head(x))
    shaped = torch.stack(logits).view(N, len(target), V).transpose(0, 1)
    return shaped, torch.stack(weights).view(N, len(target), -1).transpose(0, 1) if weights else None


def gradients(model: Seq2Seq, logits: Tensor) -> list[Tensor]:
    loss = (logits * torch.linspace(-1, 1, logits.numel(), dtype=D).view(logits.shape)).sum()
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one direction", "bidirectional"])
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_the_equations(kind: str, cell: str, bidirectional: bool) -> None:
    """Logits, attention weights and the gradients of all parameters; rows of several lengths."""
    ours, (source, target) = model(kind, cell, bidirectional, layers=2), batch()
    logits, state = ours(source, target, LENGTHS)
    truth, weights = spelt(ours, source, target, LENGTHS)
    check(logits, truth, truth, kind)
    expected = gradients(ours, truth)
    check_grad(gradients(ours, logits), expected, expected, kind)
    if weights is None:
        assert state.weights is None
    else:
        check(state.weights, weights, weights, kind)
        assert (ours.bridge.maps is None) is not bidirectional


@pytest.mark.parametrize("kind", ATTENTION)
def test_padding_is_never_attended(kind: str) -> None:
    """What stands in the padding, how much of it there is and what the other rows are changes no bit of a row."""
    ours, (source, target) = model(kind), batch()
    logits, state = ours(source, target, LENGTHS)
    other = source.clone()
    other[3:, 0], other[1:, 2] = (other[3:, 0] + 1) % V, (other[1:, 2] + 1) % V
    again, _ = ours(other, target, LENGTHS)
    assert torch.equal(logits, again)
    if state.weights is not None:
        assert not state.weights[:, 0, 3:].any() and not state.weights[:, 2, 1:].any()
        check(state.weights.sum(-1), (ones := torch.ones(T, N, dtype=D)), ones)
    for n, length in enumerate(LENGTHS):
        alone, _ = ours(source[:length, n : n + 1], target[:, n : n + 1])
        check(logits[:, n : n + 1], alone, alone, f"row {n}")


@pytest.mark.parametrize("lengths", [[6, 1, 1], [-1, 1, 1], [1, 1], [1.0, 1.0, 1.0]], ids=str)
def test_lengths_of_a_source_that_do_not_fit(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="lengths: expected"):
        Attention("dot", 4, 4).prepare(torch.randn(5, 3, 4), lengths)


@pytest.mark.parametrize("kind", ["dot", "multiplicative", "additive"])
def test_nan_in_padding_goes_nowhere(kind: str) -> None:
    attention = Attention(kind, 4, 4, dtype=D)
    query, source = torch.randn(T, N, 4, dtype=D), torch.randn(5, N, 4, dtype=D)
    source[3:, 0] = torch.nan
    lengths = torch.tensor([3, *[5] * (N - 1)])
    context, weights = attention(query, attention.prepare(source, lengths))
    source[3:, 0] = 7.0
    expected = attention(query, attention.prepare(source, lengths))
    assert torch.equal(context, expected[0]) and torch.equal(weights, expected[1]) and not context.isnan().any()


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_steps_are_the_whole(kind: str, cell: str) -> None:
    """`step` by step, and Luong's one scan, give the same logits, weights and gradients."""
    ours, (source, target) = model(kind, cell, layers=2), batch()
    logits, last = ours(source, target, LENGTHS)
    state, found, weights = ours.start(source, LENGTHS), [], []
    for token in target:
        row, state = ours.decoder.step(token, state)
        found.append(row)
        weights.append(state.weights)
    check(torch.stack(found), logits, logits)
    check(top(state.hx), top(last.hx), top(last.hx))
    if last.weights is not None:
        check(torch.stack(weights), last.weights, last.weights)
    expected = gradients(ours, logits)
    check_grad(gradients(ours, torch.stack(found)), expected, expected)


@pytest.mark.parametrize("kind", ["none", "dot", "dot, input feeding", "bahdanau"])
def test_a_target_in_two_parts(kind: str) -> None:
    ours, (source, target) = model(kind), batch()
    logits, _ = ours(source, target, LENGTHS)
    first, state = ours.decoder(target[:1], ours.start(source, LENGTHS))
    second, _ = ours.decoder(target[1:], state)
    check(torch.cat([first, second]), logits, logits)


@pytest.mark.parametrize("kind", ATTENTION)
def test_batch_first(kind: str) -> None:
    ours, turned, (source, target) = model(kind), model(kind, batch_first=True), batch()
    turned.load_state_dict(ours.state_dict())
    logits, state = ours(source, target, LENGTHS)
    again, other = turned(source.t(), target.t(), LENGTHS)
    check(again.transpose(0, 1), logits, logits)
    if state.weights is not None:
        check(other.weights.transpose(0, 1), state.weights, state.weights)


@pytest.mark.parametrize("kind", ["none", "dot", "dot, input feeding", "bahdanau"])
def test_rows_of_a_state(kind: str) -> None:
    """Beams are reordered between steps, and one may go on twice."""
    ours, (source, target) = model(kind), batch()
    _, state = ours.decoder.step(target[0], ours.start(source, LENGTHS))
    rows = torch.tensor([2, 0, 0])
    logits, _ = ours.decoder.step(target[1], state)
    picked, _ = ours.decoder.step(target[1][rows], state.index_select(rows))
    check(picked, logits[rows], logits[rows])


def test_scheduled_sampling() -> None:
    """0 is teacher forcing; at 1 only the first token of the target matters, and a seed draws the same tokens."""
    ours, (source, target) = model("dot"), batch()
    torch.manual_seed(1)
    one, _ = ours(source, target, LENGTHS, sampling=1.0)
    other = torch.cat([target[:1], (target[1:] + 1) % V])
    torch.manual_seed(1)
    two, _ = ours(source, other, LENGTHS, sampling=1.0)
    assert torch.equal(one, two)
    forced, _ = ours(source, target, LENGTHS)
    check(one[0], forced[0], forced[0])
    assert (one[1:] - forced[1:]).abs().max() > 1e-3
    torch.manual_seed(1)
    some, _ = ours(source, other, LENGTHS, sampling=1e-9)
    teacher, _ = ours(source, other, LENGTHS)
    check(some, teacher, teacher)


def test_scheduled_sampling_reads_what_the_model_is_sure_of() -> None:
    ours, (source, target) = model("dot"), batch()
    with torch.no_grad():
        ours.decoder.head.weight.zero_()
        ours.decoder.head.bias.copy_(torch.tensor([0.0] * (V - 1) + [1e4], dtype=D))
    _, free = ours(source, target, LENGTHS, sampling=1.0)
    fixed = torch.full_like(target, V - 1)
    fixed[0] = target[0]
    _, forced = ours(source, fixed, LENGTHS)
    check(free.weights, forced.weights, forced.weights)


def test_a_source_of_no_steps() -> None:
    """Its context is zero, and no gradient of the batch is lost to a NaN."""
    ours, (source, target) = model("additive"), batch()
    logits, state = ours(source, target, [0, 5, 2])
    assert logits.isfinite().all() and not state.weights[:, 0].any()
    assert all(g.isfinite().all() for g in gradients(ours, logits))


@pytest.mark.parametrize("ours, theirs", [("LSTM", "GRU"), ("GRU", "LSTM"), ("RNN", "LSTM")])
def test_bridge_between_cells(ours: str, theirs: str) -> None:
    encoder, decoder = Encoder(V, E, 3, 2, cell=ours, bidirectional=True), Decoder(V, E, 5, 2, cell=theirs)
    whole = Seq2Seq(encoder, decoder)
    logits, state = whole(*batch(), LENGTHS)
    assert logits.shape == (T, N, V)
    assert [h.shape for h in (state.hx if theirs == "LSTM" else [state.hx])] == [(2, N, 5)] * (1 + (theirs == "LSTM"))


def test_features_projections_and_options() -> None:
    encoder = Encoder(None, E, H, cell="LSTM", proj_size=2, zoneout=0.1, bidirectional=True)
    decoder = Decoder(V, E, H, proj_size=4, attention="dot", source_size=encoder.output_size, input_feeding=True)
    logits, _ = Seq2Seq(encoder, decoder)(torch.randn(L, N, E), batch()[1], LENGTHS)
    assert logits.shape == (T, N, V) and encoder.rnn.zoneout == 0.1
    bahdanau = Decoder(V, E, H, proj_size=4, attention="additive", source_size=3, form="bahdanau")
    assert bahdanau(batch()[1], bahdanau.start(source=torch.randn(L, N, 3)))[0].shape == (T, N, V)


def test_a_decoder_alone_is_a_language_model() -> None:
    decoder = Decoder(V, E, H, 2, cell="GRU")
    assert decoder(batch()[1], decoder.start(batch_size=N))[0].shape == (T, N, V)


def test_convert_state_dict_and_dtype() -> None:
    ours, (source, target) = model("additive"), batch()
    logits, _ = ours(source, target, LENGTHS)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(source, target, LENGTHS)[0], logits)
    low, _ = ours.float()(source, target, LENGTHS)
    assert low.dtype == torch.float32 and (low - logits).abs().max() < 1e-5
    rnnkern.restore(ours)
    assert type(ours.encoder.rnn) is torch.nn.LSTM
    assert (ours(source, target)[0] - rnnkern.accelerate(ours)(source, target)[0]).abs().max() < 1e-5


def dec(**options: Any) -> Decoder:
    return Decoder(V, E, H, **options)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "cell": (lambda: Encoder(V, E, H, cell="MGU"), ValueError, "RNN, LSTM, GRU, got 'MGU'"),
    "attention": (lambda: dec(attention="cosine", source_size=3), ValueError, "expected one of dot, additive"),
    "dot sizes": (lambda: dec(attention="dot", source_size=3), ValueError, "states, 6, got 3"),
    "no source size": (lambda: dec(attention="dot"), ValueError, "needs to know the features"),
    "size only": (lambda: dec(source_size=3), ValueError, "only with attention"),
    "form": (lambda: dec(attention="dot", source_size=H, form="graves"), ValueError, "got 'graves'"),
    "form alone": (lambda: dec(form="bahdanau"), ValueError, "only with attention"),
    "two feedings": (
        lambda: dec(attention="dot", source_size=H, form="bahdanau", input_feeding=True), ValueError, "feeds the"
    ),
    "bidirectional": (lambda: dec(bidirectional=True), ValueError, "no direction but"),
    "layers": (lambda: Seq2Seq(Encoder(V, E, H, 2), dec()), ValueError, "as in the encoder, 2, got 1"),
    "sizes": (
        lambda: Seq2Seq(Encoder(V, E, 5), dec(attention="dot", source_size=H)), ValueError, "of 6 features, it has 5"
    ),
    "layouts": (lambda: Seq2Seq(Encoder(V, E, H, batch_first=True), dec()), ValueError, "same for encoder and decoder"),
    "rank": (lambda: Encoder(V, E, H)(torch.zeros(4, dtype=torch.long)), ValueError, "got 1-D torch.int64"),
    "dtype": (lambda: Encoder(V, E, H)(torch.zeros(4, 2)), ValueError, "int64 or int32, got 2-D torch.float32"),
    "list": (lambda: Encoder(V, E, H)([[1]]), TypeError, "got list"),
    "feature rank": (lambda: Encoder(None, E, H)(torch.zeros(4, E)), ValueError, "3-D, got 2-D"),
    "token": (lambda: Encoder(V, E, H)(torch.full((2, 2), V)), IndexError, "out of range"),
    "lengths": (lambda: model()(*batch(), [3, 9, 1]), ValueError, "from 0 to the 5 steps"),
    "lengths alone": (lambda: dec().start(lengths=[1]), ValueError, "there is none"),
    "no source": (lambda: dec(attention="dot", source_size=H).start(), ValueError, "expected a source"),
    "a source": (lambda: dec().start(source=torch.zeros(2, 2, H)), ValueError, "does not read"),
    "source features": (
        lambda: dec(attention="dot", source_size=H).start(source=torch.zeros(2, 2, 3)), ValueError, "6 features, got 3"
    ),
    "source rank": (
        lambda: dec(attention="dot", source_size=H).start(source=torch.zeros(2, H)), ValueError, "3 dimensions, got 2"
    ),
    "no pair": (lambda: dec().start(torch.zeros(1, N, H)), ValueError, "LSTM takes a pair"),
    "a pair": (lambda: dec(cell="GRU").start((torch.zeros(1, N, H),) * 2), ValueError, "GRU takes one tensor"),
    "batches": (lambda: dec()(batch()[1], dec().start(batch_size=2)), ValueError, "of 2 rows, as the state has, got 3"),
    "two batches": (
        lambda: dec(attention="dot", source_size=H, cell="GRU").start(torch.zeros(1, 2, H), torch.zeros(4, 3, H)),
        ValueError, "batch size of 2, the source of 3",
    ),
    "sampling": (lambda: model()(*batch(), sampling=1.5), ValueError, "a probability, got 1.5"),
    "no steps": (
        lambda: model()(batch()[0], batch()[1][:0], sampling=0.5), ValueError, "one step or more"
    ),
    "step": (lambda: dec().step(batch()[1], dec().start(batch_size=N)), ValueError, "1-D tensor"),
    "option": (lambda: Encoder(V, E, H, zoneout=2.0), ValueError, "zoneout"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input(what: str) -> None:
    call, error, words = REFUSED[what]
    with pytest.raises(error, match=words):
        call()
