"""How the docs site is built: `make docs` writes it to site/, without a network."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent / "src"))

import lisatune  # noqa: E402 - from the source beside these pages

project = "lisatune"
author = "The lisatune authors"
copyright = "2026, the lisatune authors"
release = version = lisatune.__version__

extensions = ["myst_parser", "autodoc2", "generated"]
exclude_patterns = ["_build"]

suppress_warnings = ["autodoc2.dup_item"]  # overloads, and attributes that are set and read by a property
myst_heading_anchors = 3
myst_enable_extensions = ["deflist", "fieldlist"]

autodoc2_packages = [{"path": "../src/lisatune", "auto_mode": False}]
autodoc2_docstring_parser_regexes = [(r".*", "google_markdown")]
autodoc2_render_plugin = "myst"
autodoc2_hidden_objects = {"dunder", "private", "inherited"}

highlight_language = "none"  # of blocks that name no language
smartquotes = False  # they would make a dash of an option's --
html_theme = "furo"
html_title = f"lisatune {release}"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
