"""The programs under examples/ do what they say: pip install '.[clients,demo]'."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from stacks import D, draw, flat, gradients
from tolerance import check, check_grad

import rnnkern

FOLDER = Path(__file__).resolve().parents[1] / "examples"
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def example(name: str) -> ModuleType:
    """By its path: other distributions install packages that are called "examples"."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ppo() -> ModuleType:
    pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
    return example("recurrent_ppo")


@pytest.mark.parametrize("starts", ["none", "some", "first"])
def test_one_call_is_the_loop(ppo: ModuleType, starts: str) -> None:
    sequences, steps = 3, 7
    lstm = torch.nn.LSTM(4, 6, dtype=D)
    features, states = draw(sequences * steps, 4), (draw(1, sequences, 6), draw(1, sequences, 6))
    begins = torch.zeros(sequences, steps, dtype=D)
    if starts == "some":
        begins[0, 3] = begins[2, 0] = begins[2, 6] = 1
    elif starts == "first":
        begins[:, 0] = 1
    wrt: list[Any] = [features, *states, *lstm.parameters()]
    theirs = flat(ppo.RecurrentActorCriticPolicy._process_sequence(features, states, begins.flatten(), lstm))
    expected = gradients(theirs, wrt)
    rnnkern.accelerate(lstm)
    ours = flat(ppo.OneCallPolicy._process_sequence(features, states, begins.flatten(), lstm))
    check(ours, theirs, theirs, starts)
    check_grad(gradients(ours, wrt), expected, expected, starts)


def test_same_losses(ppo: ModuleType) -> None:
    theirs, ours = ppo.race(2, progress=False, hidden=16, n_steps=32, n_epochs=2)
    assert isinstance(ours.model.policy.lstm_actor, rnnkern.LSTM)
    assert type(theirs.model.policy.lstm_actor) is torch.nn.LSTM
    assert theirs.rewards == ours.rewards
    for a, b in zip(theirs.losses, ours.losses, strict=True):
        # Adam divides small gradients by themselves, and with them their rounding.
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5) and len(a) == 4
    assert theirs.losses[0] != theirs.losses[1]


def test_one_command(ppo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    threads, picture = torch.get_num_threads(), tmp_path / "new" / "curves.png"
    try:
        curves = ppo.main(["--small", "--out", str(picture)])
    finally:
        torch.set_num_threads(threads)
    assert [len(curve.rewards) for curve in curves] == [2, 2]
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "times as fast" in said and str(picture) in said


# The sequence models: each runs small, says its numbers and draws; what it is made of is held to what it says.

SEQUENCES = {
    "capitals": ("statsmodels", {"counting", "one direction", "both directions"}),
    "chorales": ("music21", {"lstm", "counting"}),
    "dates": ("babel", {"exact", "dateutil"}),
    "digits": ("sklearn", {"lstm", "logistic regression"}),
    "language": ("django", {"network", "naive Bayes", "rank order"}),
    "language_model": (None, {"lstm", "counting", "xz"}),
    "memory": (None, {"adding", "copying"}),
    "names": ("snownlp", {"network", "by heart", "unseen"}),
    "sunspots": ("statsmodels", {"gru", "AR(9)", "seasonal naive"}),
    "translation": ("django", {"network", "source", "translation memory", "word by word"}),
    "voice": ("sklearn", {"gru", "loudness", "microseconds"}),
    "write_digits": ("sklearn", {"bits", "histogram", "legible"}),
}


@pytest.fixture
def sequence(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An example by its name; they import their helpers as scripts do."""

    def load(name: str) -> ModuleType:
        needed = SEQUENCES[name][0]
        if needed is not None and importlib.util.find_spec(needed) is None:  # to import music21 takes seconds
            pytest.skip(f"{needed} is not installed")
        monkeypatch.syspath_prepend(str(FOLDER))
        return example(name)

    threads = torch.get_num_threads()
    yield load
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", SEQUENCES)
def test_small(name: str, sequence: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    module, picture = sequence(name), tmp_path / "new" / "picture.png"
    if name == "language":
        module.LANGUAGES, module.EACH, module.HIDDEN = ["sw", "uz"], 4, 8
    if name == "language_model":
        module.ORDERS, module.HIDDEN = 2, 48
    if name == "capitals":
        module.PACKAGES = module.PACKAGES[-1:]  # a third of the text
    if name == "chorales":
        module.FILES, module.ORDERS, module.HIDDEN = "bwv2[67]*.mxl", 2, 16
    if name == "names":
        whole = module.corpus
        module.corpus, module.HIDDEN = lambda: whole()[:300], 8
    if name == "translation":
        module.LONGEST, module.HIDDEN = 12, 16
    found = module.main(["--steps", "3", "--out", str(picture)])
    assert set(found) == SEQUENCES[name][1]
    assert all(v == v for value in found.values() for v in (value.values() if isinstance(value, dict) else [value]))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().out
    with pytest.raises(SystemExit):
        module.main(["--steps", "0"])


def test_dates_of_the_test_are_not_trained_on(sequence: Any) -> None:
    dates = sequence("dates")
    train, test = ({iso for _, iso in dates.draw(500, 0, test)} for test in (False, True))
    assert not train & test
    assert dates.written(0, "en_US", "full") == ("Monday, January 1, 1900", "1900-01-01")
    assert dates.by_rules("January 1, 1900") == "1900-01-01" and not dates.by_rules("1. Januar")


def test_chorales_read_and_written(sequence: Any) -> None:
    """A score in G major, in C; tokens and back; no melody of the test is trained on."""
    module = sequence("chorales")
    module.FILES = "bwv2[67]*.mxl"
    found = {chorale.name: chorale for chorale in module.chorales()}
    known = found["bwv269"]  # begins with a chord of G: G4, D4, B3, G2
    assert [line[0] for line in known.voices] == [(72, True), (67, True), (64, True), (48, True)]
    assert sorted(known.bars)[:3] == [0, 2, 8]  # a quarter note before the first full bar, of three quarters
    tokens = module.tokens_of(known)
    assert tokens[0] == module.BEGIN and tokens[-1] == module.END and max(tokens[1:-1]) == module.BAR
    assert module.chorale_of(tokens, "bwv269") == known
    train, test = module.split(list(found.values()))
    melodies = [module.phrases(chorale) for chorale in train]
    assert test and train and not {c.name for c in train} & {c.name for c in test}
    assert all(len(module.phrases(c) & other) < len(other) / 2 for c in test for other in melodies)


def test_chorales_as_midi(sequence: Any) -> None:
    module = sequence("chorales")
    line = [(60, True), (60, False), (62, True), (module.REST, True)]
    assert module.sounding(line) == [(0, 2, 60), (2, 1, 62)]
    file = module.midi(module.Chorale("", [line, [(module.REST, False)] * 4], frozenset()))
    first = bytes.fromhex("00 903c50 8360 803c50 00 903e50 8170 803e50 00 ff2f00")
    assert file == (
        b"MThd" + bytes.fromhex("00000006 0001 0002 01e0") + b"MTrk" + len(first).to_bytes(4, "big") + first
        + b"MTrk" + bytes.fromhex("00000004 00ff2f00")
    )  # fmt: skip


def test_counting_of_chorales_knows_the_voice(sequence: Any) -> None:
    """Of four voices that hold one note each, the voice alone tells which."""
    module = sequence("chorales")
    tokens = [[module.BEGIN, *([10, 20, 30, 40] * 100), module.END]]
    unknowing, once = (bits / 401 for bits in module.counted(tokens, tokens, 2))
    assert once < unknowing < 0.1
    draw = torch.Generator().manual_seed(0)
    noise = [[module.BEGIN, *torch.randint(8, (4000,), generator=draw).tolist()] for _ in range(2)]
    assert module.counted(noise[:1], noise[1:], 1)[0] / 4000 == pytest.approx(3, abs=0.05)


def test_texts_to_translate(sequence: Any) -> None:
    module = sequence("translation")
    german, names = module.messages("de"), module.names("de")
    assert german[None, "yes,no,maybe"] == "Ja,Nein,Vielleicht"
    assert [german[None, f"%(num)d month{s}"] for s in ("", "s")] == ["%(num)d Monat", "%(num)d Monate"]
    assert names["territories", "FR"] == "Frankreich" and names[1, "CHF"] == "Schweizer Franken"


def test_translation_is_tested_on_texts_like_no_other(sequence: Any) -> None:
    module = sequence("translation")
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("абвгдеиклмнопрст"), 6)) for _ in range(60)]
    texts = [f"{a} {b}" for a, b in draw.choice(words, (200, 2))]
    texts += [text + "ы" for text in texts[:100]]
    train, test = module.split([(text, text[::-1]) for text in texts])
    runs = sys.modules["catalogues"].runs
    known = [runs(text) for text, _ in train]
    assert train and test and len(train) + len(test) < len(texts)  # some are too much like others of training
    for text, _ in test:
        own = runs(text)
        assert all(2 * len(own & other) < len(own | other) for other in known)
    memory = module.Memory(["зелёный дом", "красный дом"])
    assert memory.nearest("зелёный домик")[1] == 0 and memory.nearest("красный сад")[1] == -1


def test_translation_baseline_and_measure(sequence: Any) -> None:
    module = sequence("translation")
    known = module.dictionary([("ein haus", "a house"), ("ein buch", "a book"), ("das buch", "the book")])
    assert known == {"ein": "a", "haus": "house", "buch": "book", "das": "the"}
    assert module.word_by_word("Das Haus, ein Tisch!", known) == "The House, a Tisch!"
    assert module.chrf(["ein haus"], ["ein haus"]) == pytest.approx(1) and module.chrf(["abc"], ["xyz"]) == 0
    precision, recall = (1 + 1) / 2, (2 / 3 + 1 / 2) / 2  # of runs of one and two of "abc", where "ab" was written
    assert module.chrf(["ab"], ["abc"], 2) == pytest.approx(5 * precision * recall / (4 * precision + recall))


def test_language_is_tested_on_messages_like_no_other(sequence: Any) -> None:
    module = sequence("language")
    runs = sys.modules["catalogues"].runs
    (train, validation), (known, test) = module.texts("nb", True), module.texts("nb", False)
    assert len(train) > 300 and len(validation) > 50 and len(test) > 50 and "ja nei kanskje" in [*known, *test]
    assert set(train) < set(known) and set(validation) < set(known)
    for learned, asked in ((train, validation), (known, test)):
        all_runs = [runs(text) for text in learned]
        for text in asked:
            own = runs(text)
            assert text not in learned and all(2 * len(own & its) < len(own | its) for its in all_runs)
    asked = module.snippets([test, ["short", "long enough"]], 10, 5)
    assert [language for _, language in asked] == [0] * 5 + [1] * 5
    assert all(len(text) == 10 and any(text in whole for whole in test) for text, language in asked if not language)
    assert {text for text, language in asked if language} <= {"long enoug", "ong enough"}


def test_language_reads_no_further_than_the_text(sequence: Any) -> None:
    module = sequence("language")
    module.RUN = 4
    numbers = module.Numbers(["abab", "c"])
    known = numbers.runs
    assert set(known) == {"a", "b", "ab"}
    assert numbers("abc").tolist() == [[known["a"], 0, 0, 0], [known["b"], known["ab"], 0, 0], [0, 0, 0, 0]]
    model = module.Reader(len(known) + 1, 3).eval()
    alone = model(numbers("aba")[:, None], torch.tensor([3]))
    padded = torch.stack([torch.cat([numbers("aba"), numbers("bb")]), numbers("babab")], 1)
    check(model(padded, torch.tensor([3, 5]))[0], alone[0], alone[0])


def test_language_by_rank_order(sequence: Any) -> None:
    module = sequence("language")
    assert module.ranks("aab") == {"a": 0, "b": 1, "aa": 2, "ab": 3, "aab": 4}
    profiles = [module.ranks(body) for body in ("the hat that they have", "der hut den er hat")]
    assert [module.by_ranks(profiles, text) for text in ("then they", "der hund")] == [0, 1]


def test_capitals_taken_out_and_put_back(sequence: Any) -> None:
    capitals = sequence("capitals")
    text = "The lists, as Python has them. A tuple: it's fixed."
    words, tags = capitals.words_of(text + " ")
    assert words == ["the", "lists", "as", "python", "has", "them", "a", "tuple", "it's", "fixed"]
    assert capitals.written(words, tags) == text
    assert capitals.f1(tags, tags) == 1.0 and capitals.f1([(False, 0)] * len(tags), tags) == 0.0
    assert capitals.by_counting(words, tags, words) == tags


def test_names_of_a_newspaper(sequence: Any) -> None:
    """The corpus' marks as places, these as tags and back, and what is known by heart."""
    names = sequence("names")
    text, own = names.corpus()[1]
    assert {(text[b:e], kind) for b, e, kind in own} == {("中共中央", "nt"), ("江泽民", "nr")}
    both, places = names.joined([(text, own)] * 2)
    assert len(places) == 4 and {both[b:e] for b, e, _ in places} == {"中共中央", "江泽民"}
    close = {(0, 2, "nr"), (2, 3, "nr"), (3, 5, "ns"), (7, 8, "nt")}
    assert names.names_of(names.tags_of(9, close).tolist()) == close
    assert names.names_of([2, 2, 4, 0, 6]) == {(0, 2, "nr"), (2, 3, "ns"), (4, 5, "nt")}
    by_heart = names.ByHeart("ab a ab cd cd cd", {(0, 2, "nr"), (5, 7, "nr"), (0, 1, "ns"), (8, 10, "nt")})
    assert by_heart("cab") == {(1, 3, "nr")} and by_heart.known == {"ab": "nr"}
    assert names.f1({(0, 1, "nr"), (2, 3, "ns")}, {(0, 1, "nr"), (2, 3, "nt")}) == 0.5


def test_counting_knows_what_repeats(sequence: Any) -> None:
    """Of a text that repeats three characters, hardly a bit is left once two are seen; of noise, all bits are."""
    module = sequence("language_model")
    text = module.Text("abc", "abc", torch.arange(900) % 3, torch.arange(90) % 3)
    assert module.counted(text, 1) == pytest.approx(np.log2(3), abs=0.01) and module.counted(text, 3) < 0.01
    noise = module.Text("noise", "abcd", torch.randint(4, (9000,)), torch.randint(4, (900,)))
    assert module.counted(noise, 2) == pytest.approx(2, abs=0.05)


def test_memory_answers(sequence: Any) -> None:
    """The two problems are what they say."""
    memory = sequence("memory")
    x, total = memory.adding()
    assert torch.equal(x[..., 1].sum(0), torch.full((memory.BATCH,), 2.0))
    check((x[..., 0] * x[..., 1]).sum(0), total, total)
    x, first = memory.copying()
    assert torch.equal(x[0].argmax(-1), first) and not x[1:, :, : memory.KINDS].any()


def test_sunspot_baselines(sequence: Any) -> None:
    """The autoregression's first forecast is statsmodels' own, interval and all."""
    sunspots = sequence("sunspots")
    series = 150 + 40 * np.sin(2 * np.pi * np.arange(309) / 11) + np.random.default_rng(0).normal(0, 5, 309)
    found = sunspots.autoregressive(series)[0]
    end = sunspots.TRAINED
    theirs = sunspots.AutoReg(series[:end], lags=9).fit().get_prediction(end, end + sunspots.AHEAD - 1)
    low, high = theirs.conf_int(alpha=0.2).T
    for got, wanted in zip(found.T.numpy(), (low, theirs.predicted_mean, high), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert sunspots.seasonal(series).shape == sunspots.autoregressive(series).shape


def test_a_written_row_depends_on_what_is_above_and_left(sequence: Any) -> None:
    """No pixel's distribution sees the pixel itself, or one that is written later."""
    write = sequence("write_digits")
    model, images = write.Writer(16, 8).eval(), torch.randint(17, (1, 8, 8))
    other = images.clone()
    other[0, 3, 4] = (other[0, 3, 4] + 5) % 17
    with torch.no_grad():
        a, b = (model(torch.tensor([7]), x).flatten(1, 2) for x in (images, other))
    changed = (a != b).any(-1)[0]
    assert not changed[: 3 * 8 + 5].any() and changed[3 * 8 + 5] and changed[4 * 8 :].any()


def test_voice_features_are_causal(sequence: Any) -> None:
    voice = sequence("voice")
    sound, spoken = voice.recording(np.random.default_rng(0), 100)
    assert 0 < spoken.mean() < 1
    later = sound.copy()
    later[50 * voice.FRAME :] = 0
    assert np.array_equal(voice.features(sound)[:50], voice.features(later)[:50])


def test_padding_and_greedy_decoding(sequence: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence("memory")
    common = sys.modules["common"]
    rows, lengths = common.pad([[1, 2, 3], [4]], 9)
    assert rows.tolist() == [[1, 4], [2, 9], [3, 9]] and lengths.tolist() == [3, 1]
    from rnnkern.seq2seq import Decoder, Encoder, Seq2Seq

    model = Seq2Seq(Encoder(10, 4, 5), Decoder(6, 4, 5))
    with torch.no_grad():
        model.decoder.head.weight.zero_()
        model.decoder.head.bias.copy_(torch.tensor([0.0, 0, 0, 9, 0, 0]))
    written, weights = common.greedy(model, rows, lengths, begin=0, end=5, most=4)
    assert written.tolist() == [[3, 3]] * 4 and weights is None
    assert common.greedy(model, rows, lengths, begin=0, end=3, most=4)[0].tolist() == [[3, 3]]
