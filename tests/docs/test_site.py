# SPDX-License-Identifier: Apache-2.0
"""The site of the documentation, without building it: every page has its place, every link a target, nothing is
fetched, and what is drawn or made from sources is up to date."""

import posixpath
import re
import subprocess

import pytest
from pages import ALL, ROOT

from website import links, op_pages, pictures, svg, tree
from website.anchors import slug
from website.api_check import is_public
from website.docstrings import arguments, sections
from website.navigation import FIRST, NAVIGATION, pages


def test_what_only_links_lead_to_says_so():
    """Or the build would ask where it is in the navigation."""
    outside = [path for path in links.all_files().values() if path.endswith(".md") and path not in pages()]
    assert outside and all(tree.with_place(path, "text").startswith("---\norphan: true\n---\n") for path in outside)
    assert tree.with_place(FIRST, "text") == "text"


def test_every_page_is_in_the_navigation_once():
    listed = pages()
    assert len(listed) == len(set(listed))
    written = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in listed if page.startswith("docs/")} == written
    assert all((ROOT / page).is_file() for page in listed)
    assert re.findall(r"^:caption: (.+)$", tree.toctrees(), re.MULTILINE) == list(NAVIGATION)


def test_every_link_of_the_site_leads_to_a_page_or_picture():
    files = links.all_files()
    assert set(pages()) <= set(files.values()) and files["index.md"] == FIRST
    for uri, path in files.items():
        if not path.endswith(".md"):
            continue
        text = links.moved(path, (ROOT / path).read_text(encoding="utf-8"))
        found = []
        links.in_prose(lambda prose, found=found: found.extend(links.LINK.findall(prose)) or prose, text)
        for target in found:
            place = posixpath.normpath(posixpath.join(posixpath.dirname(uri), target))
            assert place in files, f"{path} links to {target}, which is not on the site"


def test_links_are_moved_and_code_is_not():
    text = "[a](../CONTRIBUTING.md#names) ![b](https://img.example/x.svg) [c](#d)\n```\n[a](../CONTRIBUTING.md)\n```\n"
    moved = links.moved("docs/architecture.md", text)
    assert moved == "[a](repository/CONTRIBUTING.md#names) b [c](#d)\n```\n[a](../CONTRIBUTING.md)\n```\n"
    assert links.moved("CONTRIBUTING.md", "[a](docs/README.md)") == "[a](../index.md)"
    assert links.place("csrc/include/madtp/tokens.h") == "repository/csrc/include/madtp/tokens.h.md"


def test_a_source_is_shown_and_a_folder_listed():
    assert "~~~~~~python\n# SPDX" in links.shown("website/anchors.py")
    assert "* `anchors.py`\n" in links.shown("website")


def test_nothing_is_drawn_by_a_script_of_others():
    """Mermaid would be fetched, and does not show on package indices; pictures are drawn here."""
    for page in ALL:
        assert "```mermaid" not in page.read_text(encoding="utf-8"), page


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_what_is_drawn(name):
    text = (ROOT / "docs" / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
    assert text == pictures.PICTURES[name]().svg(), "run python -m website.pictures"
    assert "prefers-color-scheme: dark" in text and "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_pictures_are_those_that_are_shown():
    shown = {path for page in ALL for path in links.linked(page.relative_to(ROOT).as_posix()) if path.endswith(".svg")}
    assert shown == {f"docs/pictures/{name}.svg" for name in pictures.PICTURES}
    assert shown == {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "pictures").iterdir()}


def test_pictures_escape_their_texts():
    picture = svg.Picture(10, 10, "a < b")
    picture.text(1.50, 2.0, "c & d")
    assert (
        "<title>a &lt; b</title>" in picture.svg()
        and '<text class="ink" x="1.5" y="2">c &amp; d</text>' in picture.svg()
    )


def test_more_is_kept_at_lower_temperatures():
    kept = [sum(share > pictures.threshold(tau) for share in pictures.importance()) for tau in (0.02, 0.15, 1000.0)]
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1]


@pytest.mark.parametrize(("path", "part"), op_pages.parts().items(), ids=lambda value: getattr(value, "stem", ""))
def test_the_page_of_an_op_says_what_the_sources_say(path, part):
    text = path.read_text(encoding="utf-8")
    assert op_pages.filled(text, part) == text, "run python -m website.op_pages"


def test_every_op_has_a_page():
    written = {path.stem for path in op_pages.FOLDER.glob("*.md")} - {"README"}
    assert written == set(op_pages.ops()) and len(written) > 10


def test_docstrings_are_taken_apart():
    text = """What it does.

    Args:
        a, b: two
            of them: here.
        **more: others.

    Returns:
        (T,) a thing:
        and more.

    Raises:
        ValueError: always.
    """
    assert sections(text) == {
        "": "What it does.",
        "Args": "a, b: two\n    of them: here.\n**more: others.",
        "Returns": "(T,) a thing:\nand more.",
        "Raises": "ValueError: always.",
    }
    assert list(arguments(text)) == [(["a", "b"], "two of them: here."), (["**more"], "others.")]


@pytest.mark.parametrize("package", ["madtp", "madtp_kernels"])
def test_every_public_name_is_in_the_api(package):
    module = __import__(package)
    text = (ROOT / "docs" / "api" / f"{package}.md").read_text(encoding="utf-8")
    named = [path.rsplit(".", 1) for path in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)]
    assert sorted(name for _, name in named) == sorted(set(module.__all__) - {"__version__"})
    for room, name in named:
        source = ROOT / ("python" if package == "madtp" else "") / room.replace(".", "/")
        source = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
        text = source.read_text(encoding="utf-8")
        assert re.search(rf"^(def |class |from .* import .*\b){name}\b", text, re.MULTILINE), f"{room}.{name}"


def test_the_tools_of_the_site_are_pinned():
    lines = (ROOT / "requirements-docs.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines if line and not line.startswith("#"))


def test_anchors_are_those_of_github():
    assert slug("DTP: token pruning (`madtp/dtp/`, ops)") == "dtp-token-pruning-madtpdtp-ops"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """With the tools in build/docs-env, which make docs installs."""
    python = ROOT / "build" / "docs-env" / "bin" / "python"
    if not python.exists():
        pytest.skip("make docs has not installed its tools")
    for command in (
        ["website.tree", tmp_path / "docs"],
        ["sphinx", "-W", "-q", "-b", "html", "-c", ROOT / "website", tmp_path / "docs", tmp_path / "site"],
    ):
        done = subprocess.run([python, "-m", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(
            r'<(?:script|img|link)[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text(encoding="utf-8")
        )
        assert not fetched, f"{page.name} fetches {fetched}"


def test_the_check_of_the_api_is_of_what_the_pages_name():
    names = {"madtp.exporting.export", "madtp.budgets.plan.Plan"}
    public = ("madtp.exporting.export", "madtp.exporting.export(inputs)", "madtp.budgets.plan.Plan.save")
    others = ("madtp.exporting", "madtp.exporting.export_all", "madtp.budgets.plan.Planner")
    assert all(is_public(path, names) for path in public) and not any(is_public(path, names) for path in others)
