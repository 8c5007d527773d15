"""The documentation site builds without a warning; no link of it is dead, and nothing comes from elsewhere."""

import posixpath
import re
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("material", reason="the extra [docs] is not installed")
pytest.importorskip("mkdocstrings_handlers.python")
from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parent.parent


class _Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.parts = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
        elif tag == "link" and attrs.get("rel") in ("stylesheet", "icon"):
            self.parts.append(attrs["href"])
        elif "src" in attrs:
            self.parts.append(attrs["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Page -> what it holds, by path in the site, of a strict build."""
    directory = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(directory), strict=True))
    pages = {path.relative_to(directory).as_posix(): _Page(path) for path in directory.rglob("*.html")}
    return directory, pages


def test_no_link_is_dead_and_nothing_is_fetched_from_elsewhere(site):
    directory, pages = site
    dead = []
    for name, page in pages.items():
        if name == "404.html":  # its links are absolute: it is served at any depth
            continue
        for target in page.links + page.parts:
            parts = urlsplit(target)
            if parts.scheme:
                assert target in page.links, f"{name} fetches {target}"
                continue
            path = (
                posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(parts.path))) if parts.path else name
            )
            anchor = unquote(parts.fragment)
            there = (directory / path).is_file()
            if not there or (path in pages and anchor and anchor not in pages[path].ids):
                dead.append(f"{name}: {target}")
    assert not dead
    for sheet in directory.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet
    assert {"results/benchmark/report.html", "overview.html", "routing.html", "guide.zh.html"} <= set(pages)


@pytest.mark.parametrize("module", ["kvpress_moe", "kvpress_moe.cache", "kvpress_moe.routers", "kvpress_moe.plots"])
def test_every_public_name_is_in_the_reference(site, module):
    pages = [page for name, page in site[1].items() if name.startswith("reference/")]
    documented = {
        name.rpartition(".")[2] for page in pages for name in page.ids if name and name.startswith("kvpress_moe.")
    }
    missing = set(import_module(module).__all__) - documented - {"ROUTERS"}  # a table of two classes
    assert not missing


def test_docstrings_leave_no_markup_of_sphinx(site):
    directory, pages = site
    for name in pages:
        text = (directory / name).read_text(encoding="utf-8")
        assert not any(f":{role}:<code>" in text for role in ("class", "meth", "func", "attr", "mod")), name


def test_pictures_are_small():
    pictures = list((ROOT / "docs").rglob("*.png"))
    assert {"weights.png", "kept_positions.png"} <= {picture.name for picture in pictures}
    assert all(picture.stat().st_size < 200_000 for picture in pictures if picture.parent.name == "pictures")
