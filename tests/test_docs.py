"""The documentation: its Python runs, every public name is in its reference, and links between Markdown files lead
somewhere. That it builds without warnings and without dead links is CI's step "documentation" (docs/check_links.py)."""

from __future__ import annotations

import doctest
import importlib.util
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
FENCED = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)  # and code in a line
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
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_between_files_lead_somewhere() -> None:
    """As GitHub shows them. Anchors in pages of the site may be in parts that only the built one has: CI has those."""
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


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_its_section() -> None:
    written = loaded(DOCS / "_ext" / "written_elsewhere.py")
    names = {path.name for path in (ROOT / "examples").glob("*.py")} - {"catalogues.py", "common.py"}
    assert {row["name"] for row in written.rows()} == names  # in the README's table
    text = written.examples()
    for name in names:
        assert f"## {name}\n" in text and f"python examples/{name}\n" in text
    for picture in (DOCS / "examples").glob("*.png"):
        assert f"(examples/{picture.name})" in text, f"{picture.name} belongs to no example"


def test_dead_links_are_found(tmp_path: Path) -> None:
    dead = loaded(DOCS / "check_links.py").dead
    (tmp_path / "other.html").write_text('<h1 id="top">Other</h1><a href="https://example.org/nowhere">x</a>')
    page = tmp_path / "index.html"
    page.write_text('<p id="here"><a href="other.html#top">x</a><a href="#here">x</a><img src="other.html"></p>')
    assert dead(tmp_path) == []
    page.write_text('<a href="other.html#gone">x</a><a href="#gone">x</a><img src="gone.png">')
    assert [line.rpartition(": ")[2] for line in dead(tmp_path)] == ["no such anchor", "no such anchor", "no such file"]
