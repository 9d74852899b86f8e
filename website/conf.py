# SPDX-License-Identifier: Apache-2.0
"""Settings of Sphinx. Everything that a page needs is in the site: no fonts, scripts or pictures of other servers."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "madtp-kernels"
author = "The madtp-kernels authors"
copyright = "the madtp-kernels authors, Apache-2.0"
version = release = (ROOT / "madtp_kernels" / "_version.py").read_text().split('"')[-2]

extensions = ["myst_parser"]
root_doc = "index"
highlight_language = "none"
myst_heading_anchors = 4
myst_heading_slug_func = "website.anchors.slug"
suppress_warnings = ["misc.highlighting_failure"]  # of shortened programs and files

html_theme = "furo"
html_title = f"madtp-kernels {release}"
html_copy_source = False
html_show_sourcelink = False
