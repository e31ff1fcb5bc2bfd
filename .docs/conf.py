"""Settings of the site, by Sphinx: the guide's pages, and a reference made from the docstrings.

sphinx-build -W .docs build/site
"""

import shutil
from pathlib import Path

import lrcompress

HERE = Path(__file__).parent

# Sphinx reads pages below its own folder alone, and resolves the links in one that is linked there.
shutil.rmtree(HERE / "guide", ignore_errors=True)
shutil.copytree(Path(lrcompress.__file__).parent / "guide", HERE / "guide")

project = "lrcompress"
version = release = lrcompress.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"lrcompress {version}"
html_copy_source = False
html_show_copyright = False
html_show_search_summary = False  # it is read from other pages, which browsers refuse from disk

autodoc_default_options = {"members": True, "exclude-members": "forward, preview"}
autodoc_inherit_docstrings = False  # hooks of Lightning are Lightning's to explain
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 72
python_use_unqualified_type_names = True
napoleon_attr_annotations = False  # the signature has them
napoleon_custom_sections = ["Shapes", "Cost", "Source"]

nitpicky = True  # a reference to a name without an entry is a warning
nitpick_ignore_regex = [("py:.*", r"(?!lrcompress\.).*")]  # other libraries are not linked
# In signatures, of names that no caller makes.
nitpick_ignore = [
    ("py:class", "lrcompress.distributed.Processes"),
    ("py:class", "lrcompress.export.dense.Model"),
    ("py:class", "lrcompress.statistics.offload.Arrival"),
    ("py:class", "lrcompress.structure.selection.Selection"),
    ("py:class", "lrcompress.tasks.classification_data.ClassificationData"),
]
