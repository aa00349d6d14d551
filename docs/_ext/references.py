"""Names in the API reference that are documented elsewhere: torch's, with links to its classes, and Python's."""

from __future__ import annotations

from typing import Any

from docutils import nodes

TORCH = "https://docs.pytorch.org/docs/stable/"
PAGES = ("torch.nn.", "torch.nn.utils.rnn.")  # where every class has a page of its own
MODULES = {"torch.func": "func.api.html", "torch.nn.utils.parametrize": "nn.html", "torch.Tensor": "tensors.html"}
BUILTIN = frozenset(("TypeError", "ValueError", "RuntimeError", "IndexError", "AttributeError", "ImportError"))


def resolve(app: Any, env: Any, node: Any, text: nodes.Node) -> nodes.Node | None:
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py":
        return None
    if target in BUILTIN:
        return text
    url = MODULES.get(target)
    if url is None and target.startswith(PAGES):
        url = f"generated/{target}.html"
    return nodes.reference("", "", text, internal=False, refuri=TORCH + url) if url else None


def setup(app: Any) -> dict[str, bool]:
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
