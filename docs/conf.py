"""Configuration of Sphinx: `make docs` builds the pages into docs/_build/html, without network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from diffaccel.version import __version__

project = "diffaccel"
author = "The diffaccel authors"
copyright = author
release = version = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "myst_nb",
    "directives",
]
exclude_patterns = ["_build", "_generated", "**.ipynb_checkpoints"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

html_theme = "furo"
html_title = f"diffaccel {__version__}"
html_static_path = ["_static"]
html_extra_path = ["_generated/extra"]
html_css_files = ["custom.css"]
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

# The notebook has no outputs in the repository: its figures are those of the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Types in signatures: those of other libraries, whose inventories would have to be downloaded, and parts of this one
# that are no part of the public interface.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|lightning|pathlib|collections|typing)(\..*)?"),
    (r"py:.*", r"(Tensor|Module|Path|Mapping|Sequence|Callable|Iterator|Iterable|Any|Generator|ndarray|dtype)"),
    (r"py:.*", r"(diffaccel\.)?[a-z_]+(\.[a-z_]+)*\.[A-Za-z_.]+"),
]
nitpick_ignore = [("py:class", "Advice")]  # a result whose attributes are described where it is returned
