"""The documentation: its Python runs, every public name is in its reference, and links between Markdown files lead
somewhere. That it builds without warnings and without dead links is CI's step "documentation" (docs/check_links.py)."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import rnnkern

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(python|pycon)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts and BLOCK.search(page.read_text()))
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_code_of_a_page_runs(page: Path) -> None:
    """Its blocks one after the other, as a reader would paste them: ``python`` is run, ``pycon`` compared as well."""
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": page.stem}
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        line = text[: found.start()].count("\n") + 1
        if found[1] == "python":
            exec(compile("\n" * line + found[2], str(page), "exec"), names)
        else:
            test = parser.get_doctest(found[2], names, page.name, str(page), line)
            said: list[str] = []
            assert not runner.run(test, out=said.append, clear_globs=False).failed, "".join(said)
            names.update(test.globs)


def public() -> list[str]:
    """Every name that the package offers, with its module."""
    found = []
    for name in rnnkern.__all__:
        value = getattr(rnnkern, name)
        if not isinstance(value, ModuleType):
            found.append(f"rnnkern.{name}")
            continue
        listed = getattr(value, "__all__", None) or [
            key
            for key, function in vars(value).items()
            if inspect.isfunction(function) and function.__module__ == value.__name__ and not key.startswith("_")
        ]
        found += [f"{value.__name__}.{key}" for key in listed]
    return found


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.rst"))
    whole = set(re.findall(r"automodule:: (\S+)", text))
    single = set(re.findall(r"auto(?:class|function):: ([\w.]+)", text))
    missing = [name for name in public() if name not in single and name.rpartition(".")[0] not in whole]
    assert not missing, f"no place in docs/api/ for {missing}"
    undocumented = [name for name in public() if not inspect.getdoc(_named(name))]
    assert not undocumented, f"no docstring: {undocumented}"


def _named(name: str) -> object:
    value: object = rnnkern
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    return value


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_between_files_lead_somewhere() -> None:
    """As GitHub shows them. Anchors in pages of the site may be in parts that only the built one has: CI checks those."""
    names = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
    pages = [page for page in DOCS.rglob("*.md") if "_build" not in page.parts]
    for file in [*(ROOT / name for name in names), *pages]:
        for link in LINK.findall(FENCED.sub("", file.read_text(encoding="utf-8"))):
            path, _, anchor = link.partition("#")
            target = file.parent / path if path else file
            assert target.exists(), f"{file.relative_to(ROOT)}: {link}"
            if anchor and target.suffix == ".md" and DOCS not in target.parents:
                found = anchors(target.read_text(encoding="utf-8"))
                assert anchor in found, f"{file.relative_to(ROOT)}: {link}"
