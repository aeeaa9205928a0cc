"""What Sphinx builds the site with: `make book` calls it, on pages that scripts/book.py has laid out."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

project = "SPEED, step by step"
extensions = ["myst_nb"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # outputs are taken as they are
nb_code_prompt_show, nb_code_prompt_hide = "Show a solution", "Hide it"  # scripts/book.py folds nothing else
nb_ipywidgets_js: dict[str, Any] = {}  # it would load widgets from the network; the outputs hold none
html_theme = "sphinx_book_theme"
html_title = project
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "navbar_persistent": [],  # the search button stands in the sidebar already
    "footer_content_items": ["extra-footer"],  # it says which run the outputs are of
}
html_context = {"default_mode": "light"}  # figures and marked code are drawn on white
html_static_path, html_css_files = ["site.css"], ["site.css"]
html_math_renderer = "mathml"

# A page that lies in a folder may not fetch another one, so results come without an excerpt there.
FOLDER = "if (location.protocol === 'file:') DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;"


def _math(display: str) -> Any:
    """Write an equation as MathML, which browsers draw themselves: no script, no font and no network is needed."""

    def visit(self: Any, node: nodes.Element) -> None:
        self.body.append(convert(node.astext(), display=display))
        raise nodes.SkipNode

    return visit


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_math("inline"), None), (_math("block"), None))
    app.add_js_file(None, body=FOLDER)
