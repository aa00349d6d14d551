"""Sequence to sequence with attention: short texts from Russian to Ukrainian, character by character.

Pairs are what Django says to its users, from its message catalogues, and the names of languages, countries, scripts and
currencies from the Unicode CLDR, by Babel. An encoder reads the Russian characters in both directions, a decoder with
attention writes the Ukrainian ones. Tested are texts like none of the training's: of no training text do they share
half of their runs of four letters, and no translation is the same. The measure is chrF (Popović 2015), F of the runs of
up to six characters, recall counted twice. Baselines: the source as it is; a translation memory, which has the
translation of the most similar training text; every word replaced by the one that it goes with most often in training
(IBM model 1, Brown et al. 1993), or left as it is.

    pip install -c constraints.txt -e '.[examples]' && python examples/translation.py

chrF of 155 texts: 0.46; word by word: 0.44; source: 0.37; translation memory: 0.35. Exactly right: 32 %; word by word:
19 %; source: 15 %; translation memory: none. 2039 pairs are few: names come out well, sentences badly. 52 s of one
core.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable

import torch
from babel import Locale
from babel.numbers import get_currency_name
from catalogues import WORD, Memory, lot, messages
from common import draw_attention, greedy, options, pad, train
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rnnkern.seq2seq import Decoder, Encoder, Seq2Seq

SOURCE, TARGET = "ru", "uk"
LONGEST, ONE_IN = 60, 10  # characters of a text; of so many texts one is for the test, if nothing is like it
BATCH, HIDDEN, DROPOUT = 64, 128, 0.3
Pair = tuple[str, str]


def names(language: str) -> dict[Hashable, str]:
    """Names of things in one language, by what they are and their code; of currencies as they are counted, too."""
    locale = Locale.parse(language)
    found: dict[Hashable, str] = {}
    for kind in ("languages", "territories", "scripts", "currencies"):
        found |= {(kind, code): name for code, name in getattr(locale, kind).items()}
    for count in (1, 2, 5):
        found |= {(count, code): get_currency_name(code, count, locale) for code in locale.currencies}
    return found


def pairs() -> list[Pair]:
    """Short texts with a word in them, each once, and its translation."""
    found: dict[str, str] = {}
    for read in (messages, names):
        source, target = read(SOURCE), read(TARGET)
        for key, text in source.items():
            other = target.get(key, "")
            if WORD.search(text) and "\n" not in text + other and len(text) <= LONGEST and 0 < len(other) <= LONGEST:
                found.setdefault(text, other)
    return list(found.items())


def split(found: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Of training and of the test. By the translation, so that no two of one meaning are on both sides."""
    train = [pair for pair in found if lot(pair[1], ONE_IN)]
    memory = Memory([text for text, _ in train])
    kept = (pair for pair in found if not lot(pair[1], ONE_IN))
    return train, [pair for pair in kept if memory.nearest(pair[0])[0] < 0.5]


def dictionary(train: list[Pair], rounds: int = 8) -> dict[str, str]:
    """For every source word the likeliest target word, by expectation maximisation (Brown et al. 1993, model 1)."""
    data = [tuple(WORD.findall(text.lower()) for text in pair) for pair in train]
    odds: dict[Pair, float] = defaultdict(lambda: 1.0)
    for _ in range(rounds):
        counts: dict[Pair, float] = defaultdict(float)
        totals: dict[str, float] = defaultdict(float)
        for source, target in data:
            for other in target:
                whole = sum(odds[word, other] for word in source)
                for word in source:
                    share = odds[word, other] / whole
                    counts[word, other] += share
                    totals[word] += share
        odds = defaultdict(float, {pair: count / totals[pair[0]] for pair, count in counts.items()})
    best: dict[str, tuple[float, str]] = {}
    for (word, other), p in odds.items():
        best[word] = max(best.get(word, (0.0, "")), (p, other))
    return {word: other for word, (_, other) in best.items()}


def word_by_word(text: str, known: dict[str, str]) -> str:
    def other(match: re.Match[str]) -> str:
        word = known.get(match[0].lower(), match[0])
        return word.capitalize() if match[0][0].isupper() else word

    return WORD.sub(other, text)


def chrf(written: list[str], right: list[str], longest: int = 6) -> float:
    """F2 of runs of characters over all texts, precision and recall each the mean over the runs' lengths; without
    spaces, as Popović has it."""
    precision = recall = 0.0
    for n in range(1, longest + 1):
        hits = put = wanted = 0
        for texts in zip(written, right, strict=True):
            bare = [text.replace(" ", "") for text in texts]
            found, should = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in bare)
            hits, put, wanted = hits + (found & should).total(), put + found.total(), wanted + should.total()
        precision += hits / max(put, 1) / longest
        recall += hits / max(wanted, 1) / longest
    return 5 * precision * recall / max(4 * precision + recall, 1e-9)


class Letters:
    """Texts as numbers; 0 is what training does not know."""

    def __init__(self, train: list[Pair]) -> None:
        self.letters = ["", *sorted({letter for pair in train for text in pair for letter in text})]
        self.number = {letter: i for i, letter in enumerate(self.letters)}
        self.begin, self.end = len(self.letters), len(self.letters) + 1

    def __call__(self, text: str) -> list[int]:
        return [self.number.get(letter, 0) for letter in text]

    def text(self, numbers: list[int]) -> str:
        return "".join(self.letters[i] for i in numbers if i < self.begin)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    args = options(__doc__, arguments, steps=400, out="translation.png")
    train_pairs, test = split(pairs())
    letters = Letters(train_pairs)
    tokens = letters.end + 1
    encoder = Encoder(tokens, 64, HIDDEN, cell="GRU", bidirectional=True)
    decoder = Decoder(tokens, 64, 2 * HIDDEN, cell="GRU", attention="dot", source_size=encoder.output_size)
    model = Seq2Seq(encoder, decoder)
    for part in (encoder, decoder):
        part.embedding = nn.Sequential(part.embedding, nn.Dropout(DROPOUT))

    # Batches of texts of one length, nearly: short ones do not wait for long ones.
    train_pairs.sort(key=lambda pair: len(pair[0]))
    sources = [letters(text) for text, _ in train_pairs]
    targets = [[letters.begin, *letters(text), letters.end] for _, text in train_pairs]

    def loss() -> Tensor:
        at = int(torch.randint(-BATCH // 2, len(sources) - BATCH // 2, ()))
        rows = slice(max(at, 0), at + BATCH)
        source, lengths = pad(sources[rows])
        target, _ = pad(targets[rows], -1)
        logits, _ = model(source, target[:-1].clamp(min=0), lengths)
        return cross_entropy(logits.flatten(0, 1), target[1:].flatten(), ignore_index=-1, label_smoothing=0.1)

    train(model, loss, args.steps, 4e-3)
    model.eval()
    source, lengths = pad([letters(text) for text, _ in test])
    found, weights = greedy(model, source, lengths, letters.begin, letters.end, most=LONGEST)
    written = [letters.text(row) for row in found.t().tolist()]

    memory, known = Memory([text for text, _ in train_pairs]), dictionary(train_pairs)
    ways: dict[str, Callable[[str], str]] = {
        "source": lambda text: text,
        "translation memory": lambda text: train_pairs[-memory.nearest(text)[1]][1],
        "word by word": lambda text: word_by_word(text, known),
    }
    answers = {"network": written} | {name: [way(text) for text, _ in test] for name, way in ways.items()}
    right = [text for _, text in test]
    scores = {}
    print(f"{len(train_pairs)} texts trained on, {len(test)} of the test")
    for name, texts in answers.items():
        exact = sum(a == b for a, b in zip(texts, right, strict=True)) / len(test)
        scores[name] = {"chrF": chrf(texts, right), "exact": exact}
        print(f"{name:18} chrF {scores[name]['chrF']:.3f}, exactly right {exact:.1%}")
    for row in range(0, len(test), len(test) // 8):
        print(f"    {test[row][0]} -> {written[row]} (right: {right[row]})")
    fits = [row for row, text in enumerate(written) if text == right[row] and len(text) <= 32]
    row = max(fits or [0], key=lambda row: len(written[row]))
    text, answer = test[row][0], written[row]
    draw_attention(text, answer, weights[: len(answer), row, : len(text)], args.out, height=5)
    return scores


if __name__ == "__main__":
    main()
