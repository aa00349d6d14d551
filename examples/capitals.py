"""A bidirectional tagger: capitals and punctuation put back into text that has lost them.

The text is the prose in the docstrings of scikit-learn, scipy and statsmodels, as words: all small, without any
punctuation. Of every word a bidirectional LSTM says whether it began with a capital, and which mark stood behind it. To
know that a sentence ends one has to see the next one begin, so the same network that reads in one direction only is a
baseline, beside the most frequent answer for every word and the word after it. The measure is F1 over all that was
taken out.

    pip install -c constraints.txt -e '.[examples]' && python examples/capitals.py

F1: 0.64 in both directions, 0.45 in one; counting: 0.50. 35 s of one core.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import scipy
import sklearn
import statsmodels
import torch
from common import BLUE, GREEN, ORANGE, figure, options, save, train
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rnnkern

PACKAGES = (scipy, sklearn, statsmodels)
MARKS = ("", ",", ".", ":", ";")
LENGTH, BATCH, KNOWN = 40, 32, 5000  # words in a crop, crops in a batch, words with an embedding of their own
DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*[,.:;]?(?=\s)")

Tags = list[tuple[bool, int]]


def prose(text: str) -> bool:
    """A sentence or more, of hardly anything but words."""
    count = len(text.split())
    return count >= 8 and text[0].isupper() and text[-1] == "." and len(WORD.findall(text + " ")) >= 0.95 * count


def paragraphs() -> tuple[list[str], list[str]]:
    """Of training and of the test, a twentieth of all, each once."""
    train: dict[str, None] = {}
    test: dict[str, None] = {}
    for package in PACKAGES:
        for path in sorted(Path(package.__file__).parent.rglob("*.py")):
            for docstring in DOCSTRING.findall(path.read_text(encoding="utf-8")):
                for block in re.split(r"\n\s*\n", docstring):
                    text = " ".join(block.split())
                    if text and prose(text):
                        (train if zlib.crc32(text.encode()) % 20 else test)[text] = None
    return list(train), list(test)


def words_of(text: str) -> tuple[list[str], Tags]:
    """Words in small letters; of each, whether it began with a capital, and the number of its mark."""
    words, tags = [], []
    for word in WORD.findall(text):
        mark = word[-1] if word[-1] in MARKS else ""
        words.append(word.removesuffix(mark).lower())
        tags.append((word[0].isupper(), MARKS.index(mark)))
    return words, tags


class Tagger(nn.Module):
    """Two answers for every word: capital or not, and which mark."""

    def __init__(self, words: int, bidirectional: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 64)
        self.rnn = rnnkern.LSTM(64, 96, bidirectional=bidirectional)
        self.dropout = nn.Dropout(0.4)
        self.head = nn.Linear(96 * (1 + bidirectional), 2 + len(MARKS))

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:  # [T, N] -> [T, N, 2], [T, N, marks]
        y, _ = self.rnn(self.dropout(self.embedding(words)))
        capital, mark = self.head(self.dropout(y)).split([2, len(MARKS)], -1)
        return capital, mark


def f1(found: Tags, right: Tags) -> float:
    """Of capitals and marks together: what was put back, and what should have been."""
    hits = sum(a[0] and b[0] for a, b in zip(found, right, strict=True))
    hits += sum(a[1] == b[1] > 0 for a, b in zip(found, right, strict=True))
    put = sum(capital + (mark > 0) for tags in (found, right) for capital, mark in tags)
    return 2 * hits / max(put, 1)


def by_counting(words: list[str], tags: Tags, test: list[str]) -> Tags:
    """The most frequent answer for a word and the next one, else for the word."""
    seen: dict[object, Counter[tuple[bool, int]]] = defaultdict(Counter)
    for (word, after), tag in zip(pairwise([*words, ""]), tags, strict=True):
        seen[word][tag] += 1
        seen[word, after][tag] += 1
    found = []
    for word, after in pairwise([*test, ""]):
        counts = seen.get((word, after)) or seen.get(word)
        found.append(counts.most_common(1)[0][0] if counts else (False, 0))
    return found


def written(words: list[str], tags: Tags) -> str:
    pairs = zip(words, tags, strict=True)
    return " ".join((word.capitalize() if capital else word) + MARKS[mark] for word, (capital, mark) in pairs)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    args = options(__doc__, arguments, steps=900, out="capitals.png")
    texts, test_texts = paragraphs()
    words, tags = words_of(" ".join(texts) + " ")
    test, right = words_of(" ".join(test_texts) + " ")
    number = {word: i + 1 for i, (word, _) in enumerate(Counter(words).most_common(KNOWN))}
    x = torch.tensor([number.get(word, 0) for word in words])
    capital, mark = torch.tensor(tags).long().unbind(1)
    test_x = torch.tensor([number.get(word, 0) for word in test])

    scores, answers = {"counting": f1(by_counting(words, tags, test), right)}, {}
    for name, bidirectional in (("one direction", False), ("both directions", True)):
        torch.manual_seed(args.seed)
        model = Tagger(KNOWN + 1, bidirectional)

        def loss(model: Tagger = model) -> Tensor:
            rows = torch.randint(len(x) - LENGTH, (BATCH,)) + torch.arange(LENGTH)[:, None]
            capitals, marks = model(x[rows])
            return cross_entropy(capitals.flatten(0, 1), capital[rows].flatten()) + cross_entropy(
                marks.flatten(0, 1), mark[rows].flatten()
            )

        train(model, loss, args.steps, 5e-3, name)
        model.eval()
        with torch.no_grad():
            capitals, marks = (v[:, 0].argmax(-1).tolist() for v in model(test_x[:, None]))
        answers[name] = [(bool(a), b) for a, b in zip(capitals, marks, strict=True)]
        scores[name] = f1(answers[name], right)
    for name, score in scores.items():
        print(f"{name:16} F1 {score:.3f}")
    part = slice(200, 260)
    print(f"\ngiven:   {' '.join(test[part])}\nwritten: {written(test[part], answers['both directions'][part])}")
    print(f"right:   {written(test[part], right[part])}\n")

    picture, axes = figure(5, 3.2)
    bars = axes.bar(scores.keys(), scores.values(), color=[ORANGE, GREEN, BLUE], width=0.6)
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set(ylabel="F1 of capitals and punctuation", ylim=(0, 1))
    save(picture, args.out)
    return scores


if __name__ == "__main__":
    main()
