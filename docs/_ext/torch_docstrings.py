"""torch.nn's form of docstrings as Sphinx reads it: ``Inputs: input, h_0, *, lengths`` is the title of a section."""

from __future__ import annotations

import re
from typing import Any

TITLE = re.compile(r"(Inputs|Outputs): (.+)")


def rewrite(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    for at, line in enumerate(lines):
        found = TITLE.fullmatch(line)
        if found:
            lines[at] = f"{found[1]}: ``{found[2]}``"  # the * in it is not emphasis


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", rewrite, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
