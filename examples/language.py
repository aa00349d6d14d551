"""Many to one: the language of a snippet of twenty characters, out of 39 that are written in Latin letters.

The text is what Django says to its users, small letters without anything else, as its message catalogues have it in
every language: some 17 000 characters each. Snippets begin anywhere, in the middle of a word as well; those of the test
come from messages that no language was trained on. A bidirectional GRU reads a snippet, each character with the two
before it, and answers from the mean and the maximum of its outputs. Baselines: naive Bayes over runs of up to n
characters, for the n and the smoothing that are best on the test, and the rank order of the most frequent runs (Cavnar
and Trenkle 1994). The picture shows which languages are taken for which.

    pip install -c constraints.txt -e '.[examples]' && python examples/language.py

Right: ? % of 3000 snippets; naive Bayes: ? %; rank order: ? %. ? s of one core.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import torch
from catalogues import FIELD, kept_for_test, messages
from common import figure, options, save, train
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rnnkern

LANGUAGES = (
    "af ast az ca cs cy da de eo es et eu fi fr ga gd gl hr hu id is it lt lv ms nb nl nn pl pt ro sk sl sq sv sw tr "
    "uz vi"
).split()
LENGTH, TESTED, BATCH, HIDDEN = 20, 3000, 128, 128
RUNS, RANKED = (3, 4, 5), 400  # longest runs that naive Bayes counts; length of a language's list in the rank order
WORD = re.compile(r"[^\W\d_]+(?:['’·-][^\W\d_]+)*")

Snippets = list[tuple[str, int]]


def texts(language: str) -> tuple[str, str]:
    """Of training and of the test, a sixth of the messages, the same in every language; each text once."""
    parts: tuple[dict[str, None], dict[str, None]] = ({}, {})
    for (_, english), text in messages(language).items():
        words = " ".join(WORD.findall(FIELD.sub(" ", text).lower()))
        if words:
            parts[kept_for_test(english, 6)][words] = None
    return " ".join(parts[0]), " ".join(text for text in parts[1] if text not in parts[0])


def snippets(bodies: list[str], count: int, seed: int) -> Snippets:
    """From anywhere, of all languages alike."""
    chance = random.Random(seed)
    found = []
    for i in range(count):
        text = bodies[i % len(bodies)]
        begin = chance.randrange(len(text) - LENGTH)
        found.append((text[begin : begin + LENGTH], i % len(bodies)))
    return found


def bayes(bodies: list[str], test: Snippets) -> float:
    """Share of right answers of naive Bayes, all languages as likely, at its best."""
    best = 0.0
    right = [language for _, language in test]
    for longest in RUNS:
        counter = CountVectorizer(analyzer="char", ngram_range=(1, longest), lowercase=False)
        counts, asked = counter.fit_transform(bodies), counter.transform([text for text, _ in test])
        for alpha in (0.1, 0.01, 0.001):
            model = MultinomialNB(alpha=alpha, fit_prior=False).fit(counts, range(len(bodies)))
            best = max(best, model.score(asked, right))
    return best


def ranks(text: str) -> dict[str, int]:
    """The most frequent runs of one to five characters, and their places."""
    counts = Counter(text[i : i + n] for n in range(1, 6) for i in range(len(text) - n + 1))
    return {run: place for place, (run, _) in enumerate(counts.most_common(RANKED))}


def rank_order(bodies: list[str], test: Snippets) -> float:
    """Cavnar and Trenkle 1994: the language in which the snippet's runs have the most similar places."""
    profiles = [ranks(text) for text in bodies]
    right = 0
    for text, language in test:
        own = ranks(text).items()
        apart = [sum(abs(profile.get(run, RANKED) - place) for run, place in own) for profile in profiles]
        right += apart.index(min(apart)) == language
    return right / len(test)


class Reader(nn.Module):
    def __init__(self, characters: int, runs: int, languages: int) -> None:
        super().__init__()
        self.character, self.run = nn.Embedding(characters, 64), nn.Embedding(runs, 64)
        self.rnn = rnnkern.GRU(64, HIDDEN, bidirectional=True)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4 * HIDDEN + 64, languages)

    def forward(self, characters: Tensor, runs: Tensor) -> Tensor:  # twice [T, N] -> [N, languages]
        x = self.dropout(self.character(characters) + self.run(runs))
        y, _ = self.rnn(x)
        return self.head(self.dropout(torch.cat([y.mean(0), y.amax(0), x.mean(0)], -1)))


class Numbers:
    """Characters, and runs of three that occur twice or more in training, as numbers; 0 is whatever else there is."""

    def __init__(self, bodies: list[str]) -> None:
        self.characters = {c: i + 1 for i, c in enumerate(sorted(set("".join(bodies))))}
        counts = Counter(text[i : i + 3] for text in bodies for i in range(len(text) - 2))
        self.runs = {run: i + 1 for i, run in enumerate(run for run, count in counts.items() if count > 1)}

    def __call__(self, text: str) -> tuple[Tensor, Tensor]:
        """The characters from the third on, and the run that ends with each."""
        characters = [self.characters.get(c, 0) for c in text[2:]]
        return torch.tensor(characters), torch.tensor([self.runs.get(text[i : i + 3], 0) for i in range(len(text) - 2)])


def draw(found: Tensor, right: Tensor, out: Path) -> None:
    """Of every language's snippets, what share went to which."""
    picture, axes = figure(8, 7.2)
    table = torch.zeros(len(LANGUAGES), len(LANGUAGES))
    table.index_put_((right, found), torch.ones(len(right)), accumulate=True)
    image = axes.imshow(table / table.sum(1, keepdim=True), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(LANGUAGES)), LANGUAGES, fontsize=8, rotation=90)
    axes.set_yticks(range(len(LANGUAGES)), LANGUAGES, fontsize=8)
    axes.set(xlabel="answer", ylabel="language of the snippet")
    picture.colorbar(image, shrink=0.6, label="share of its snippets")
    save(picture, out)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    args = options(__doc__, arguments, steps=1000, out="language.png")
    bodies, test_bodies = zip(*(texts(language) for language in LANGUAGES), strict=True)
    numbers, test = Numbers(list(bodies)), snippets(list(test_bodies), TESTED, seed=1)
    numbered = [numbers(text) for text in bodies]
    starts = torch.tensor([0, *(len(characters) for characters, _ in numbered)]).cumsum(0)
    characters, runs = (torch.cat(part) for part in zip(*numbered, strict=True))
    model = Reader(len(numbers.characters) + 1, len(numbers.runs) + 1, len(LANGUAGES))
    steps = torch.arange(LENGTH - 2)[:, None]

    def loss() -> Tensor:
        language = torch.randint(len(LANGUAGES), (BATCH,))
        room = starts[language + 1] - starts[language] - LENGTH
        at = starts[language] + (torch.rand(BATCH) * room).long() + steps
        return cross_entropy(model(characters[at], runs[at]), language, label_smoothing=0.1)

    train(model, loss, args.steps)
    model.eval()
    right = torch.tensor([language for _, language in test])
    with torch.no_grad():
        asked = [torch.stack(part, 1) for part in zip(*(numbers(text) for text, _ in test), strict=True)]
        found = model(*asked).argmax(-1)
    scores = {
        "gru": (found == right).float().mean().item(),
        "naive Bayes": bayes(list(bodies), test),
        "rank order": rank_order(list(bodies), test),
    }
    for name, score in scores.items():
        print(f"{name:12} {score:.1%} of {len(test)} snippets right")
    for (text, language), answer in list(zip(test, found.tolist(), strict=True))[:8]:
        print(f"    {text!r} is {LANGUAGES[language]}, taken for {LANGUAGES[answer]}")
    draw(found, right, args.out)
    return scores


if __name__ == "__main__":
    main()
