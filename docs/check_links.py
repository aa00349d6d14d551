#!/usr/bin/env python3
"""Every link, anchor and picture inside a built site leads somewhere: ``python docs/check_links.py docs/_build``."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.links += [given[name] for name in ("href", "src") if name in given]


def dead(root: Path) -> list[str]:
    pages = {path.resolve(): Page(path) for path in sorted(root.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("data:"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            fragment = unquote(parts.fragment)
            if not target.exists():
                found.append(f"{path.relative_to(root.resolve())}: {link}: no such file")
            elif fragment and target in pages and fragment not in pages[target].anchors:
                found.append(f"{path.relative_to(root.resolve())}: {link}: no such anchor")
    return found


def main() -> int:
    root = Path(sys.argv[1])
    if not (root / "index.html").exists():
        print(f"{root} has no index.html: build the site first", file=sys.stderr)
        return 1
    found = dead(root)
    print(*found, sep="\n")
    print(f"{len(found)} dead links")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
