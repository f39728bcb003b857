"""How Sphinx builds these pages."""

from importlib.metadata import version as installed_version

project = "druvarpc"
author = "the druvarpc contributors"
project_copyright = author
version = release = installed_version("druvarpc")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"druvarpc {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
# Headings can be linked to as file.md#heading.
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
# Short names in signatures: Status, not druvarpc.errors.Status.
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Attributes described in a class's docstring, and found in its body, are described once.
napoleon_use_ivar = True

# A short name in a type, such as Reset, may be that of an event and of a method: the first will do.
suppress_warnings = ["ref.python"]
