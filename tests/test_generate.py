"""generate: against plain loops over torch.nn, brute force and known distributions, in native code and in Python."""

from __future__ import annotations

import copy
import itertools
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from isas import NATIVE, instruction_sets
from torch import Tensor, nn

import rnnkern
from rnnkern import generate
from rnnkern.seq2seq import Decoder, Encoder, Seq2Seq

CELLS: dict[str, Any] = {
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
    "lstm": nn.LSTM,
    "lstm_projected": lambda *a, **k: nn.LSTM(*a, proj_size=7, **k),
    "gru": rnnkern.GRU,
}
cells = pytest.mark.parametrize("cell", CELLS)


@pytest.fixture(params=[pytest.param("python", id="python"), *instruction_sets()])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What generates while this holds."""
    if request.param == "python":
        with rnnkern.use_backend("torch"):
            yield request.param
        return
    from rnnkern.backends import cpp

    monkeypatch.setattr(cpp.BACKEND, "isa", request.param)
    with rnnkern.use_backend("cpp"):
        yield request.param


def model(
    cell: str, V: int = 11, I: int = 6, H: int = 17, layers: int = 1, *, embedding: str = "embedding",
    bias: bool = True, batch_first: bool = False, dtype: torch.dtype = torch.float64, gain: float = 3.0,
) -> tuple[Any, Any, nn.Linear]:  # fmt: skip
    """With weights large enough that what is written depends on what was."""
    first = {"embedding": nn.Embedding(V, I), "linear": nn.Linear(V, I), "bare": nn.Linear(V, I, bias=False)}
    rnn = CELLS[cell](V if embedding == "one-hot" else I, H, layers, bias=bias, batch_first=batch_first)
    made = (first.get(embedding), rnn, nn.Linear(rnn.proj_size or H, V, bias=bias))
    for part in made:
        if part is not None:
            part.to(dtype)
            with torch.no_grad():
                for p in part.parameters():
                    p.mul_(gain)
    return made


@torch.no_grad()
def plain(model: Any, prompt: list[int], most: int, stops: tuple[int, ...] = (), state: Any = None) -> list[int]:
    """One row as anybody would write it."""
    embedding, rnn, head = model
    rnn, written = copy.deepcopy(rnn), list(prompt)
    rnn.batch_first = False
    read = torch.tensor(prompt)
    with rnnkern.use_backend("torch"):
        while len(written) - len(prompt) < most and not (len(written) > len(prompt) and written[-1] in stops):
            if isinstance(embedding, nn.Embedding):
                x = embedding(read)
            else:
                x = nn.functional.one_hot(read, head.out_features).to(head.weight.dtype)
                x = x if embedding is None else embedding(x)
            y, state = rnn(x[:, None], state)
            written.append(int(head(y[-1, 0]).argmax()))
            read = torch.tensor(written[-1:])
    return written[len(prompt) :]


def written(out: Any) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(out.tokens, out.lengths, strict=True)]


def odds_after(model: Any, prompt: Tensor) -> Tensor:
    """Log-probabilities of the token after every row, `(N, V)`."""
    embedding, rnn, head = model
    with torch.no_grad(), rnnkern.use_backend("torch"):
        return head(rnn(embedding(prompt.t()))[0][-1]).log_softmax(-1)


# ---- greedy ----------------------------------------------------------------------------------------------------------


@cells
@pytest.mark.parametrize("embedding", ["embedding", "linear", "bare", "one-hot"])
def test_greedy_is_the_plain_loop(cell: str, embedding: str, engine: str) -> None:
    for layers, B, bias in ((1, 1, True), (2, 7, False), (3, 2, True)):
        made = model(cell, layers=layers, embedding=embedding, bias=bias, batch_first=layers == 2)
        prompt = torch.randint(11, (B, 4))
        for most, stops in ((1, ()), (25, ()), (25, (3,)), (25, (3, 8, 0))):
            out = generate(made, prompt, most, eos_token_id=list(stops) or None)
            assert out.backend == ("python" if engine == "python" else "cpp") and out.scores is None
            assert written(out) == [plain(made, row.tolist(), most, stops) for row in prompt]
            pad = stops[0] if stops else 0
            assert all((row[length:] == pad).all() for row, length in zip(out.tokens, out.lengths, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype, engine: str) -> None:
    """Float32 as torch's loop; of the narrow ones that every token is the best, or next to it, of what was written."""
    for cell, V in itertools.product(CELLS, (11, 130)):
        made = model(cell, V=V, dtype=dtype, gain=2.0)
        prompt = torch.randint(V, (3, 2))
        out = generate(made, prompt, 12)
        if dtype == torch.float32:
            assert written(out) == [plain(made, row.tolist(), 12) for row in prompt]
            continue
        truth = [copy.deepcopy(part).double() for part in made]
        for k in range(12):
            odds = odds_after(truth, torch.cat([prompt, out.tokens[:, :k]], 1))
            missed = odds.amax(-1) - odds.gather(1, out.tokens[:, k : k + 1]).squeeze(1)
            assert missed.max() < 0.05 * (odds.amax() - odds.amin())


def test_rows_of_several_lengths(engine: str) -> None:
    made = model("lstm", layers=2)
    prompt, lengths = torch.randint(11, (4, 5)), [3, 5, 1, 4]
    for most in (1, 3, 12):
        out = generate(made, prompt, most, lengths=lengths, eos_token_id=2, pad_token_id=-1)
        assert written(out) == [
            plain(made, row[:n].tolist(), most, (2,)) for row, n in zip(prompt, lengths, strict=True)
        ]
        assert all((row[length:] == -1).all() for row, length in zip(out.tokens, out.lengths, strict=True))
        wide = generate(made, prompt, most, lengths=torch.tensor(lengths), eos_token_id=2, num_beams=3)
        for n, length in enumerate(lengths):
            alone = generate(made, prompt[n, :length], most, eos_token_id=2, num_beams=3)
            assert alone.tokens.tolist() == wide.tokens[n, : wide.lengths[n]].tolist()
            assert alone.tokens.dim() == 1 and alone.lengths.dim() == 0
            torch.testing.assert_close(alone.scores, wide.scores[n])


@cells
def test_goes_on_from_a_state(cell: str, engine: str) -> None:
    made = model(cell, layers=2)
    prompt = torch.randint(11, (3, 2))
    with torch.no_grad():
        state = made[1](torch.randn(5, 3, 6).double())[1]
    kept = copy.deepcopy(state)
    rows = [
        tuple(s[:, n : n + 1] for s in state) if isinstance(state, tuple) else state[:, n : n + 1] for n in range(3)
    ]
    out = generate(made, prompt, 9, state=state)
    assert written(out) == [plain(made, row.tolist(), 9, state=s) for row, s in zip(prompt, rows, strict=True)]
    wide = generate(made, prompt, 9, state=state, num_beams=2)
    for n in range(3):
        assert generate(made, prompt[n], 9, state=rows[n], num_beams=2).tokens.tolist() == wide.tokens[n].tolist()
    torch.testing.assert_close(state, kept, rtol=0, atol=0)


def test_empty_and_unbatched(engine: str) -> None:
    made = model("gru")
    if engine == "python":
        out = generate(made, torch.empty(0, 3, dtype=torch.int64), 4)
        assert out.tokens.shape == (0, 0) and out.lengths.shape == (0,)
    out = generate(made, torch.tensor([1, 2], dtype=torch.int32), 4)
    assert out.tokens.tolist() == plain(made, [1, 2], 4) and int(out.lengths) == 4


def test_nothing_of_the_callers_changes(engine: str) -> None:
    made = model("lstm", layers=2)
    made[1].train()
    before, random = [copy.deepcopy(part.state_dict()) for part in made], torch.get_rng_state()
    prompt = torch.randint(11, (3, 4))
    torch.set_rng_state(random)
    kept = prompt.clone()
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "generator": torch.Generator()}):
        generate(made, prompt, 8, lengths=[4, 2, 1], **options)
    assert torch.equal(prompt, kept) and made[1].training and torch.equal(torch.get_rng_state(), random)
    for part, state in zip(made, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part.state_dict().values(), state.values(), strict=True))
        assert all(p.requires_grad and p.grad is None for p in part.parameters())


# ---- drawn -----------------------------------------------------------------------------------------------------------


def critical(freedom: int) -> float:
    """What chi-square exceeds once in a million times (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * max(freedom, 1))
    return max(freedom, 1) * (1 - spread + 4.7534 * spread**0.5) ** 3


def expected(odds: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """By the definitions, one token after the other."""
    p = (odds / temperature).softmax(-1)
    ranked = sorted(range(len(p)), key=lambda j: (-float(odds[j]), j))[:top_k]
    total, kept = sum(float(p[j]) for j in ranked), []
    for j in ranked:
        if sum(float(p[i]) for i in kept) >= top_p * total:
            break
        kept.append(j)
    out = torch.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, 1.0), (0.6, None, 1.0), (2.5, None, 1.0), (1.0, 5, 1.0), (1.0, 1, 1.0), (1.0, None, 0.7)]
    + [(1.5, 12, 0.8), (1.0, None, 1e-9), (1.0, 99, 1.0), (1e-300, None, 1.0), (1e300, None, 1.0)]
    + [(1e308, None, 0.5), (1e-300, 3, 0.5), (1.0, None, 1 - 1e-16)],
)
def test_drawn_as_the_distribution_says(temperature: float, top_k: int | None, top_p: float, engine: str) -> None:
    """100,000 draws after one prompt; chi-square at a level of 1e-6."""
    made = model("gru", V=23, gain=2.0)
    prompt, draws = torch.tensor([4, 7]), 100_000
    out = generate(
        made, prompt.expand(draws, 2), 1, do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    seen = torch.bincount(out.tokens[:, 0], minlength=23).double()
    wanted = expected(odds_after(made, prompt[None])[0], temperature, top_k, top_p) * draws
    assert not seen[wanted == 0].any()
    some = wanted > 0
    statistic = float(((seen - wanted)[some].square() / wanted[some]).sum())
    assert statistic <= critical(int(some.sum()) - 1)


def test_drawn_over_steps() -> None:
    """Pairs of tokens are drawn with the product of their odds."""
    made = model("lstm", V=4, gain=2.0)
    prompt, draws = torch.tensor([[1]]), 100_000
    out = generate(made, prompt.expand(draws, 1), 2, do_sample=True, generator=torch.Generator().manual_seed(5))
    first = odds_after(made, prompt)[0].exp()
    second = odds_after(made, torch.tensor([[1, j] for j in range(4)])).exp()
    wanted = (first[:, None] * second).flatten() * draws
    seen = torch.bincount(out.tokens[:, 0] * 4 + out.tokens[:, 1], minlength=16).double()
    assert float(((seen - wanted).square() / wanted).sum()) <= critical(15)


@pytest.mark.skipif(not NATIVE, reason="no extension")
@cells
def test_native_draws_what_python_draws(cell: str) -> None:
    made, prompt = model(cell, V=40, layers=2), torch.randint(40, (6, 3))
    options: list[dict[str, Any]] = [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.6, "temperature": 2.0}]
    for chosen in options:
        found = []
        for backend in ("cpp", "torch"):
            with rnnkern.use_backend(backend):
                seeded = torch.Generator().manual_seed(1)
                found.append(generate(made, prompt, 30, do_sample=True, generator=seeded, eos_token_id=5, **chosen))
        assert written(found[0]) == written(found[1]), chosen


def test_a_seed_repeats_it(engine: str) -> None:
    made, prompt = model("gru"), torch.randint(11, (4, 3))

    def drawn(seed: int) -> list[list[int]]:
        return written(generate(made, prompt, 20, do_sample=True, generator=torch.Generator().manual_seed(seed)))

    assert drawn(1) == drawn(1) != drawn(2)
    torch.manual_seed(7)
    first = generate(made, prompt, 20, do_sample=True)
    second = generate(made, prompt, 20, do_sample=True)
    torch.manual_seed(7)
    assert written(generate(made, prompt, 20, do_sample=True)) == written(first) != written(second)


def test_masked_tokens_are_never_drawn(engine: str) -> None:
    made = model("lstm", V=9)
    with torch.no_grad():
        made[2].bias[[0, 3, 8]] = -torch.inf
    for options in ({}, {"top_k": 8}, {"top_p": 0.999}, {"temperature": 1e30}, {"temperature": 1e308, "top_p": 0.9}):
        out = generate(made, torch.zeros(50, 1, dtype=torch.int64), 20, do_sample=True, **options)
        assert not torch.isin(out.tokens, torch.tensor([0, 3, 8])).any()
    out = generate(made, torch.zeros(2, 1, dtype=torch.int64), 3, num_beams=400)
    assert not torch.isin(out.tokens, torch.tensor([0, 3, 8])).any()


# ---- beams -----------------------------------------------------------------------------------------------------------


def brute_force(
    model: Any, prompt: Tensor, most: int, stops: tuple[int, ...], penalty: float
) -> tuple[float, list[int]]:
    """The best of all sequences that end with a stop token or are as long as may be."""
    V, found, alive = model[2].out_features, [], [(0.0, [])]
    for length in range(1, most + 1):
        odds = odds_after(model, torch.stack([torch.cat([prompt, torch.tensor(s).long()]) for _, s in alive]))
        longer = [(t + float(o[j]), [*s, j]) for (t, s), o in zip(alive, odds, strict=True) for j in range(V)]
        ended = [one for one in longer if one[1][-1] in stops or length == most]
        found += [(total / length**penalty, tokens) for total, tokens in ended]
        alive = [one for one in longer if one[1][-1] not in stops]
        if not alive:
            break
    return max(found, key=lambda one: one[0])


@cells
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.5, -1.0])
def test_exhaustive_beams_are_brute_force(cell: str, penalty: float, engine: str) -> None:
    for V, most, stops in ((3, 5, (1,)), (4, 4, ()), (4, 4, (0, 2)), (3, 4, (0, 1, 2))):
        made = model(cell, V=V, layers=2, gain=1.5)
        prompt = torch.randint(V, (2, 2))
        out = generate(made, prompt, most, num_beams=V**most, length_penalty=penalty, eos_token_id=list(stops) or None)
        for n in range(2):
            score, tokens = brute_force(made, prompt[n], most, stops, penalty)
            assert out.tokens[n, : out.lengths[n]].tolist() == tokens
            assert float(out.scores[n]) == pytest.approx(score, rel=1e-9)


@pytest.mark.skipif(not NATIVE, reason="no extension")
@cells
def test_native_beams_are_those_of_python(cell: str) -> None:
    made, prompt = model(cell, V=40, layers=2, embedding="one-hot"), torch.randint(40, (5, 3))
    for width, penalty, stops in ((2, 1.0, [3]), (5, 0.5, [3, 9]), (7, -0.5, None), (50, 1.0, [3])):
        found = []
        for backend in ("cpp", "torch"):
            with rnnkern.use_backend(backend):
                options = {"num_beams": width, "length_penalty": penalty, "eos_token_id": stops}
                found.append(generate(made, prompt, 15, lengths=[3, 1, 2, 3, 2], **options))
        assert written(found[0]) == written(found[1])
        torch.testing.assert_close(found[0].scores, found[1].scores)


OTHERS: dict[str, tuple[str, int, dict[str, Any]]] = {  # class, hidden size, further arguments
    "mgu": ("MGU", 17, {}),
    "indrnn": ("IndRNN", 17, {}),
    "ligru": ("LiGRU", 17, {}),
    "slstm": ("SLSTM", 17, {}),
    "slstm_heads": ("SLSTM", 57, {"num_heads": 3}),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("embedding", ["embedding", "one-hot", "many"])
def test_cells_that_torch_does_not_have(kind: str, embedding: str, engine: str) -> None:
    """With what all others are tested with: written, drawn and searched as the network's own steps do it."""
    module, H, options = OTHERS[kind]
    V, I = 300 if embedding == "many" else 40, 40 if embedding == "one-hot" else 6
    rnn = getattr(rnnkern, module)(I, H, 2, **options).double()
    for name, value in rnn.state_dict().items():
        value.uniform_(0.5, 0.9) if name.startswith("bn_var") else value.normal_(std=0.5)
    made = (None if embedding == "one-hot" else nn.Embedding(V, I).double(), rnn.eval(), nn.Linear(H, V).double())
    prompt = torch.randint(V, (4, 3))
    with torch.no_grad(), rnnkern.use_backend("reference"):
        state = rnn(torch.randn(5, 4, I).double())[1]
    for chosen in ({}, {"do_sample": True, "top_k": 9}, {"num_beams": 3, "eos_token_id": 7}):
        for begin in (None, state):
            found = []
            for backend in ("reference", "cpp" if engine != "python" else "numba"):
                with rnnkern.use_backend(backend):
                    torch.manual_seed(3)
                    found.append(written(generate(made, prompt, 15, state=begin, **chosen)))
            assert found[0] == found[1], chosen


# ---- other models ----------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """Tied weights, which is no Linear."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.embedding.weight.t()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 4}], ids=str)
def test_functions_and_modules_of_ones_own(options: dict[str, Any]) -> None:
    """The same in Python as what they stand for, with a warning once."""
    embedding, rnn, head = made = model("lstm", I=17)
    head.weight, head.bias = nn.Parameter(embedding.weight.detach().clone()), None

    def step(token: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, hx = rnn(embedding(token)[None], None if state is None else (state["h"], state["c"]))
        return head(y[0]), {"h": hx[0], "c": hx[1]}

    prompt = torch.randint(11, (3, 4))
    rnnkern._generate._said.clear()
    with rnnkern.use_backend("torch"):
        torch.manual_seed(1)
        wanted = generate(made, prompt, 9, **options)
    others: list[Any] = [step, (embedding, rnn, Own(embedding)), (lambda token: embedding(token), rnn, head)]
    for other in others:
        torch.manual_seed(1)
        with pytest.warns(UserWarning, match="a loop in Python") as said:
            out = generate(other, prompt, 9, **options)
        assert out.backend == "python" and written(out) == written(wanted) and said[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(other, prompt, 2, **options)
        with rnnkern.use_backend("cpp"), pytest.raises(RuntimeError, match="'cpp' was asked for, and it cannot"):
            generate(other, prompt, 2, **options)


@pytest.mark.parametrize("attention", [None, "additive"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_decoders(attention: str | None, options: dict[str, Any]) -> None:
    decoder = Decoder(9, 5, 8, 2, cell="GRU", attention=attention, source_size=6 if attention else None).double()
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(3)
    hx, source = torch.randn(2, 4, 8).double(), torch.randn(7, 4, 6).double()
    lengths = [7, 3, 5, 1]
    state = decoder.start(hx, source, lengths) if attention else decoder.start(hx)
    with rnnkern.use_backend("torch"):
        out = generate(decoder, torch.full((4, 1), 8), 10, state=state, eos_token_id=0, **options)
        for n in range(4):
            part = torch.tensor([n])
            alone = generate(decoder, torch.tensor([8]), 10, state=state.index_select(part), eos_token_id=0, **options)
            assert alone.tokens.tolist() == out.tokens[n, : out.lengths[n]].tolist()
        if not options:
            token, at, rows = torch.full((4,), 8), state, []
            for _ in range(10):
                logits, at = decoder.step(token, at)
                rows.append(token := logits.argmax(-1))
            for n in range(4):
                assert torch.stack(rows)[: out.lengths[n], n].tolist() == out.tokens[n, : out.lengths[n]].tolist()
    if NATIVE:
        with rnnkern.use_backend("cpp"):
            assert written(generate(decoder, torch.full((4, 1), 8), 10, state=state, eos_token_id=0, **options)) == (
                written(out)
            )


def refusals() -> list[tuple[str, Any]]:
    def hooked(part: Any) -> Any:
        part.register_forward_hook(lambda *_: None)
        return part

    e, r, h = nn.Embedding(11, 6), nn.GRU(6, 17), nn.Linear(17, 11)
    return [
        ("max_norm", (nn.Embedding(11, 6, max_norm=1.0), r, h)),
        ("Linear has hooks", (e, r, hooked(nn.Linear(17, 11)))),
        ("Embedding has hooks", (hooked(nn.Embedding(11, 6)), r, h)),
        ("has forward hooks", (e, hooked(nn.GRU(6, 17)), h)),
        ("Sequential is not Linear", (e, r, nn.Sequential(h))),
        ("zoneout", (e, rnnkern.GRU(6, 17, zoneout=0.1), h)),
        ("training mode, with batch norm", (e, rnnkern.LiGRU(6, 17), h)),
        ("training mode, with dropout", (e, nn.GRU(6, 17, 2, dropout=0.5), h)),
        ("training mode, with dropout", (e, rnnkern.GRU(6, 17, weight_dropout=0.5), h)),
        ("training mode, with dropout", (e, rnnkern.GRU(6, 17, recurrent_dropout=0.5), h)),
        ("of one dtype", (e, r, nn.Linear(17, 11).double())),
    ]


@pytest.mark.skipif(not NATIVE, reason="no extension")
@pytest.mark.parametrize("reason,made", refusals(), ids=lambda p: p if isinstance(p, str) else "")
def test_what_native_code_leaves_to_python(reason: str, made: Any) -> None:
    with rnnkern.use_backend("cpp"), pytest.raises(RuntimeError, match=reason):
        generate(made, torch.tensor([1]), 2)


# ---- errors ----------------------------------------------------------------------------------------------------------

FINE = {"prompt": torch.tensor([[1, 2]]), "max_new_tokens": 3}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be an integer of 1 or more, got 0"),
        ({"max_new_tokens": 2.5}, ValueError, "max_new_tokens must be an integer of 1 or more, got 2.5"),
        ({"temperature": 0.0, "do_sample": True}, ValueError, "temperature must be a finite number above 0, got 0.0"),
        ({"temperature": float("nan"), "do_sample": True}, ValueError, "temperature must be a finite number above 0"),
        ({"top_p": 0.0, "do_sample": True}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.01, "do_sample": True}, ValueError, r"top_p must be in \(0, 1\], got 1.01"),
        ({"top_k": 0, "do_sample": True}, ValueError, "top_k must be an integer of 1 or more, got 0"),
        ({"temperature": 0.5}, ValueError, "are for do_sample=True"),
        ({"top_k": 5, "num_beams": 2}, ValueError, "are for do_sample=True"),
        ({"do_sample": 1}, TypeError, "expected do_sample to be a bool, got 1"),
        ({"generator": torch.Generator()}, ValueError, "generator is for do_sample=True"),
        ({"generator": 7, "do_sample": True}, TypeError, "expected generator to be a torch.Generator, got int"),
        ({"num_beams": 0}, ValueError, "num_beams must be an integer of 1 or more, got 0"),
        ({"num_beams": 2, "do_sample": True}, ValueError, "exclude each other"),
        ({"length_penalty": 0.5}, ValueError, "length_penalty is for beam search"),
        (
            {"length_penalty": float("inf"), "num_beams": 2},
            ValueError,
            "must be a number from -10 to 10",
        ),
        ({"eos_token_id": 11}, ValueError, r"eos_token_id must lie in \[0, 10\], got \[11\]"),
        ({"eos_token_id": [1, -1]}, ValueError, "eos_token_id must be an integer of 0 or more, got -1"),
        ({"pad_token_id": 0.5}, ValueError, "pad_token_id must be an integer"),
        ({"pad_token_id": 2**70}, ValueError, "pad_token_id must be an integer of 64 bits, got 1180591620717411303424"),
        ({"prompt": [1, 2]}, TypeError, "expected prompt to be a tensor of token numbers, got list"),
        ({"prompt": torch.zeros(1, 2)}, ValueError, "expected a 1-D or 2-D tensor of int64 or int32, got 2-D"),
        ({"prompt": torch.zeros(1, 1, 2).long()}, ValueError, "got 3-D torch.int64"),
        ({"prompt": torch.zeros(2, 0).long()}, ValueError, "a prompt of at least one token"),
        ({"prompt": torch.tensor([[1, 11]])}, IndexError, r"the prompt's tokens must lie in \[0, 10\]"),
        ({"prompt": torch.tensor([[1, -1]])}, IndexError, r"the prompt's tokens must lie in \[0, 10\]"),
        ({"lengths": [3]}, ValueError, r"lengths must lie in \[1, 2\], got \[3\]"),
        ({"lengths": [0]}, ValueError, r"lengths must lie in \[1, 2\], got \[0\]"),
        ({"lengths": [1, 1]}, ValueError, "lengths: expected 1 integers"),
        ({"lengths": [1.5]}, ValueError, "lengths: expected 1 integers"),
        ({"state": torch.zeros(1, 2, 17)}, RuntimeError, "Expected hidden size"),
        ({"state": torch.zeros(1, 1, 17).double()}, (RuntimeError, ValueError), "dtype"),
        ({"state": 7}, (AttributeError, TypeError), "int"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type, message: str, engine: str) -> None:
    with pytest.raises(error, match=message):
        generate(model("gru", dtype=torch.float32), **(FINE | options))


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        ((nn.Embedding(5, 6), nn.GRU(6, 17)), ValueError, r"expected \(embedding, rnn, head\), got a tuple of 2"),
        ((nn.Embedding(5, 6), nn.GRUCell(6, 17), nn.Linear(17, 5)), TypeError, "between the two, got GRUCell"),
        ((nn.Embedding(5, 7), nn.GRU(6, 17), nn.Linear(17, 5)), ValueError, "gives 7 features, the network reads 6"),
        ((nn.Embedding(5, 6), nn.GRU(6, 17), nn.Linear(16, 5)), ValueError, "reads 16 features, the network gives 17"),
        ((nn.Embedding(5, 6), nn.GRU(6, 17), nn.Linear(17, 6)), ValueError, "gives 6 tokens, the embedding reads 5"),
        ((nn.Embedding(5, 6), nn.GRU(6, 17), None), TypeError, "expected a head, got NoneType"),
        ((5, nn.GRU(6, 17), nn.Linear(17, 5)), TypeError, "expected an embedding or None, got int"),
        ((nn.Embedding(5, 6), nn.GRU(6, 8, bidirectional=True), nn.Linear(16, 5)), ValueError, "is bidirectional"),
        (7, TypeError, "got int"),
        (Decoder(9, 5, 8), TypeError, "a Decoder needs state="),
        (Seq2Seq(Encoder(9, 5, 8), Decoder(9, 5, 8)), TypeError, "give model.decoder, and state=model.start"),
        (lambda token, state: token, TypeError, "to return logits and a state, got Tensor"),
        (lambda token, state: (token, state), ValueError, r"expected logits of shape \[1, V\], got \[1\]"),
        (lambda token, state: (token[:, None], state), ValueError, "logits in floating point, got torch.int64"),
        (lambda token, state: (torch.empty(1, 0), state), ValueError, "the vocabulary is empty"),
    ],
)
def test_models_that_do_not_fit(made: Any, error: type, message: str) -> None:
    with rnnkern.use_backend("torch"), pytest.raises(error, match=message):
        generate(made, **FINE)


def test_an_empty_vocabulary() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        head = nn.Linear(17, 0)
    with pytest.raises(ValueError, match="the vocabulary is empty"):
        generate((nn.Embedding(5, 6), nn.GRU(6, 17), head), **FINE)


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"do_sample": True, "top_p": 0.5}, {"num_beams": 3}], ids=str
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_without_a_choice(options: dict[str, Any], value: float, engine: str) -> None:
    """What the third new token is written from has no number: said with its row and step."""
    what = "have NaN" if value != value else "have infinity"
    for V in (11, 40):
        made = model("gru", V=V)
        prompt = torch.tensor([[1, 2], [2, 3]])
        with torch.no_grad():
            made[2].bias[V - 1] = value
        with pytest.raises(RuntimeError, match=f"logits of row 0 {what} at step 0"):
            generate(made, prompt, 5, **options)
        made = model("gru", V=V)
        second = plain(made, [2, 3], 2)[1]
        with torch.no_grad():
            made[0].weight[second] = float("nan")
        if not options and second not in (1, 2, 3, *plain(made, [1, 2], 2)):
            with pytest.raises(RuntimeError, match="logits of row 1 have NaN at step 2"):
                generate(made, prompt, 5)
    with torch.no_grad():
        made[2].bias[:] = -torch.inf
        made[0].weight[:] = 0
    with pytest.raises(RuntimeError, match="logits of row 0 are all negative infinity at step 0"):
        generate(made, prompt, 5, **options)


@pytest.mark.skipif(not NATIVE, reason="no extension")
def test_other_threads_run_meanwhile() -> None:
    made, going, seen = model("lstm", H=64, dtype=torch.float32), threading.Event(), []

    def count() -> None:
        while not going.is_set():
            seen.append(1)
            going.wait(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    with rnnkern.use_backend("cpp"):
        first = len(seen)
        generate(made, torch.randint(11, (16, 1)), 3000)
        last = len(seen)
    going.set()
    thread.join()
    assert last > first


@pytest.mark.skipif(not NATIVE, reason="no extension")
def test_a_signal_ends_it() -> None:
    """As ctrl-C does: long before the last of so many tokens."""

    def ring(*_: Any) -> None:
        raise InterruptedError("rang")

    before = signal.signal(signal.SIGALRM, ring)
    try:
        with rnnkern.use_backend("cpp"), pytest.raises(InterruptedError, match="rang"):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            generate(model("lstm", H=64), torch.randint(11, (16, 1)), 1_000_000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
