"""Sphinx's configuration: ``python -m sphinx -W --keep-going -n -b html docs docs/_build``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "rnnkern"
author = "rnnkern authors"
copyright = author

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    "mathml",
    "references",
    "torch_docstrings",
    "written_elsewhere",
]
exclude_patterns = ["_build"]
default_role = "code"  # `N` in a docstring is code, as in torch's
nitpicky = True

autodoc_typehints = "none"  # the sections of a docstring say it
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_custom_sections = ["Shape", ("Attributes", "params_style")]  # several names in a line
napoleon_use_rtype = False
myst_enable_extensions = ["dollarmath", "fieldlist"]
myst_heading_anchors = 3
suppress_warnings: list[str] = []

html_theme = "furo"
html_title = "rnnkern"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
