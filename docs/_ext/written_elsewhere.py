"""Sections of the README and other Markdown files of the repository as parts of the site, so that each is written once.

A line ``[from README.md: Streams](...)``, which on GitHub is a link to it, becomes what stands below that heading;
``[from README.md: Examples, row by row](...)`` a section for each row of that table, with its picture.
"""

from __future__ import annotations

import posixpath
import re
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
LINE = re.compile(r"^\[from (?P<file>[^\s:\]]+)(?:: (?P<heading>.+))?\]\([^#\s]+(?P<anchor>#\S+)?\)$", re.MULTILINE)
EXAMPLES = "Examples, row by row"
LINK = re.compile(r"\]\((?!https?://)(?P<path>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "benchmarks/README.md": "protocol.md"}


def section(file: str, heading: str | None) -> str:
    """What stands between a heading of the second level and the next; without one all behind the title."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if heading is None:
        return text.partition("\n")[2].strip("\n")
    _, found, rest = f"\n{text}".partition(f"\n## {heading}\n")
    if not found:
        raise ValueError(f"{file} has no section {heading!r}")
    return re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0].strip("\n")


@cache
def places() -> dict[str, str]:
    """The page of each section of the README that the site has, by its anchor there."""
    found = {}
    for page in (ROOT / "docs").rglob("*.md"):
        for line in LINE.finditer(page.read_text(encoding="utf-8")):
            if line["file"] == "README.md":
                found[line["anchor"]] = page.relative_to(ROOT).as_posix()
    return found


def moved(text: str, file: str, docname: str) -> str:
    """With links as they are from that page of the site."""

    def link(found: re.Match[str]) -> str:
        path, anchor = found["path"], found["anchor"] or ""
        if not path and file != "README.md":
            return found[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
        if not path:
            if anchor not in places():
                raise ValueError(f"{file} links to its section {anchor}, which is on no page of the site")
            target, anchor = places()[anchor], ""
        elif target in PAGES:
            target = f"docs/{PAGES[target]}"
        return f"]({posixpath.relpath(target, posixpath.dirname(f'docs/{docname}'))}{anchor})"

    return LINK.sub(link, text)


def rows() -> list[dict[str, str]]:
    """Of the README's table of examples."""
    found = []
    for line in section("README.md", "Examples").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| [") and len(cells) == 5:
            name = cells[0][1 : cells[0].index("]")]
            found.append(dict(zip(("name", "what", "number", "baseline", "seconds"), [name, *cells[1:]], strict=True)))
    return found


def examples() -> str:
    parts = []
    for row in rows():
        stem = row["name"].removesuffix(".py")
        parts += [f"## {row['name']}", "", f"{row['what'][0].upper()}{row['what'][1:]}.", ""]
        parts += [f"```\npython examples/{row['name']}\n```", ""]
        if row["number"] and row["number"] != "above":
            parts += [f"* Its number: {row['number']}", f"* Baseline: {row['baseline']}"]
            parts += [f"* Processor time: {row['seconds']} s", ""]
        picture = next((p for p in (f"examples/{stem}.png", f"{stem}.png") if (ROOT / "docs" / p).exists()), None)
        if picture:
            parts += [f"![What {row['name']} draws]({picture})", ""]
        parts += [f"Source: [{row['name']}](../examples/{row['name']})", ""]
    return "\n".join(parts)


def expand(app: Any, docname: str, source: list[str]) -> None:
    def replaced(found: re.Match[str]) -> str:
        app.env.note_dependency(str(ROOT / found["file"]), docname=docname)
        if found["heading"] == EXAMPLES:
            return examples()
        return moved(section(found["file"], found["heading"]), found["file"], docname)

    source[0] = LINE.sub(replaced, source[0])


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", expand)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
