"""Message catalogues as texts: what Django says to its users, the same in many languages; and which texts are like
which, so that none of a test is like one of training."""

from __future__ import annotations

import importlib.util
import re
import zlib
from collections import Counter, defaultdict
from pathlib import Path

from babel.messages.mofile import read_mo

WORD = re.compile(r"[^\W\d_]+")


def messages(language: str) -> dict[tuple[str | None, str], str]:
    """Django's in one language, by context and English text; of those with a plural, both."""
    spec = importlib.util.find_spec("django")  # its files are read, it is not imported
    assert spec is not None and spec.submodule_search_locations, "Django is not installed"
    folder, name = Path(spec.submodule_search_locations[0]), f"locale/{language}/LC_MESSAGES/*.mo"
    found: dict[tuple[str | None, str], str] = {}
    for path in sorted([*folder.glob(f"*/{name}"), *folder.glob(f"*/*/{name}")]):
        with path.open("rb") as file:
            for message in read_mo(file):
                if message.pluralizable:
                    found[message.context, message.id[0]] = message.string[0]
                    found[message.context, message.id[1]] = message.string[-1]
                elif message.id:
                    found[message.context, message.id] = message.string
    return found


def runs(text: str) -> set[str]:
    """Of four letters, words apart."""
    words = f" {' '.join(WORD.findall(text.lower()))} "
    return {words[i : i + 4] for i in range(len(words) - 3)}


class Memory:
    """The most similar of texts: the one with which the greatest share of both's runs is common."""

    def __init__(self, texts: list[str]) -> None:
        self.runs = [runs(text) for text in texts]
        self.having: dict[str, list[int]] = defaultdict(list)
        for i, own in enumerate(self.runs):
            for run in own:
                self.having[run].append(i)

    def nearest(self, text: str) -> tuple[float, int]:
        """That share, and minus its place."""
        own = runs(text)
        shared = Counter(i for run in own for i in self.having.get(run, ()))
        return max(((n / len(own | self.runs[i]), -i) for i, n in shared.items()), default=(0.0, 0))


def lot(text: str, of: int) -> int:
    """One of so many, by the text alone, so in every run the same."""
    return zlib.crc32(text.encode()) % of
