"""The site of the documentation: `make docs`.

Its pages are the Markdown files of the whole tree, as they stand there, so that a link from one to
another works on the site and beside the sources alike. The README is the home page.
"""

import re
import shutil
from pathlib import Path

import gmc_cuda

project = "gmc_cuda"
version = release = gmc_cuda.__version__
html_title = f"gmc_cuda {version}"
html_theme = "furo"
html_show_copyright = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "*/*.md", "tests/*/*.md"]
exclude_patterns = ["build", "dist", ".*"]

myst_heading_anchors = 3  # as in the links that hosts of Markdown make
suppress_warnings = ["myst.header"]  # Benchmarks' README and others may begin at any level

# The frameworks need not be installed.
autodoc_mock_imports = ["accelerate", "lightning", "lightning_fabric", "pytorch_lightning"]
autodoc_mock_imports += ["transformers"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|gmc_cuda\._engine)\..*"), ("py:class", "optional")]
autodoc_typehints = "none"  # the docstrings tell them, with shapes and units
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_custom_sections = [("Warns", "params_style")]


def table_of_contents(app, docname, source):
    """The sidebar: what the home page lists as documentation, then all other pages."""
    if docname == root_doc:
        listed = source[0].split("\n## Documentation\n")[1].split("\n## ")[0]
        guide = re.findall(r"\]\(([^)#:]+)\.md\)", listed)
        others = sorted(app.env.found_docs - {*guide, root_doc})
        for caption, pages in {"Documentation": guide, "In the tree": others}.items():
            options = ["", "```{toctree}", ":hidden:", f":caption: {caption}", ""]
            source[0] += "\n".join([*options, *pages, "```", ""])


def indented_lines_are_code(app, what, name, obj, options, lines):
    """Formulas and programs in docstrings are indented after a colon."""
    for i in range(len(lines) - 2):
        follows = next((line for line in lines[i + 1 :] if line.strip()), "")
        indent = len(lines[i]) - len(lines[i].lstrip())
        introduces = re.search(r"[^:]:$", lines[i]) and not lines[i + 1].strip()
        if introduces and follows.startswith(" " * (indent + 4)):
            lines[i] += ":"


def home_page_is_index(app, exception):
    if exception is None and app.builder.format == "html":
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app):
    app.connect("source-read", table_of_contents)
    app.connect("autodoc-process-docstring", indented_lines_are_code)
    app.connect("build-finished", home_page_is_index)
