# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Settings of the documentation site: python -m sphinx -c docs . work_dirs/site

The site holds the Markdown pages of the whole repository, so the source folder is the root. The same
files read well on a code host: all that only Sphinx needs is made here.
"""

import re
import sys
from pathlib import Path
from typing import List

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
INDEX = 'docs/README'
sys.path.insert(0, str(ROOT))

from mmlinglo import __version__  # noqa: E402

project = 'mmlinglo'
author = 'mmlinglo contributors'
project_copyright = f'{author}, Apache-2.0'
version = release = __version__
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode']
root_doc = INDEX
include_patterns = ['*.md', 'configs/**.md', 'docs/**']
exclude_patterns = ['.[a-z]*', 'data', 'work_dirs']

myst_heading_anchors = 4
myst_enable_extensions = ['colon_fence']
suppress_warnings = ['myst.strikethrough']

autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented_params'
autodoc_member_order = 'bysource'
autodoc_inherit_docstrings = False
maximum_signature_line_length = 60
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False

html_theme = 'furo'
html_title = f'mmlinglo {__version__}'
html_static_path = ['_static']
html_css_files = ['site.css']
html_additional_pages = {'index': 'redirect.html'}
templates_path = ['_templates']
html_copy_source = False
html_show_sphinx = False


def navigation(index: str) -> str:
    """The index page's links as Sphinx's table of contents, a part for each second-level heading."""
    parts = []
    for section in re.split(r'^## ', index, flags=re.MULTILINE)[1:]:
        caption, _, text = section.partition('\n')
        pages = re.findall(r'\[([^]]+)\]\(([^)#:]+)\.(?:md|rst)\)', text)
        entries = '\n'.join(f'{title} <{page}>' for title, page in pages)
        parts.append(f'\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n')
    return ''.join(parts)


def prepare_page(_: Sphinx, docname: str, source: List[str]) -> None:
    """Add the navigation to the index; a link to a folder becomes one to its README, or text."""
    folder = (ROOT / docname).parent

    def replace(link: re.Match) -> str:
        text, target = link.groups()
        if not (folder / target).is_dir():
            return link[0]
        readme = folder / target / 'README.md'
        return f'[{text}]({target.rstrip("/")}/README.md)' if readme.is_file() else text

    if docname == INDEX:
        source[0] += navigation(source[0])
    if docname.startswith('docs/results/'):  # reports of tools, to which pages link
        source[0] = f'---\norphan: true\n---\n{source[0]}'
    source[0] = re.sub(r'(?<!!)\[([^]\n]+)\]\(([^)#:\s]+)\)', replace, source[0])


def setup(app: Sphinx) -> None:
    app.connect('source-read', prepare_page)
