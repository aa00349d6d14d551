"""Message catalogues as corpora: what programs say to their users, the same in many languages. Django's are read, which
are compiled (.mo) files inside its package, by Babel; Django itself is not imported."""

from __future__ import annotations

import importlib.util
import re
import zlib
from collections.abc import Hashable
from pathlib import Path

from babel.messages.mofile import read_mo

FIELD = re.compile(r"%\(\w+\)[a-z]?|%[a-z]|\{\w*\}|<[^>]*>|&\w+;|https?:\S+")


def messages(language: str) -> dict[Hashable, str]:
    """All messages in one language, by context and English text; of those with a plural, both."""
    spec = importlib.util.find_spec("django")
    assert spec is not None and spec.submodule_search_locations, "Django is not installed"
    folder, name = Path(spec.submodule_search_locations[0]), f"locale/{language}/LC_MESSAGES/*.mo"
    found: dict[Hashable, str] = {}
    for path in sorted([*folder.glob(f"*/{name}"), *folder.glob(f"*/*/{name}")]):
        with path.open("rb") as file:
            for message in read_mo(file):
                if message.pluralizable:
                    found[message.context, message.id[0]] = message.string[0]
                    found[message.context, message.id[1]] = message.string[-1]
                elif message.id:
                    found[message.context, message.id] = message.string
    return {key: text for key, text in found.items() if text}


def kept_for_test(text: str, one_in: int) -> bool:
    """Whether it is among the one in so many that are never trained on: by the text alone, so in every run the same."""
    return zlib.crc32(text.encode()) % one_in == 0
