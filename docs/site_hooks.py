"""
Hooks of the documentation site: pages of the repository that lie outside docs/ are part of it, and links follow.

A link to ``../results/benchmark/report.md`` is right in a checkout; on the site the same page lies elsewhere. Pages
named in ``OUTSIDE`` are part of the site, other files of the repository that a page links to become downloads, and
every relative link is led to where its target lies on the site. A link to what is not there is left as it is, and the
strict build refuses it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = ("README.md", "CHANGELOG.md", "results/**/*.md", "results/**/*.png")

_LINK = re.compile(r"(\]\()(?!https?://|mailto:|#)([^)#\s]+)")
_ROLE = re.compile(r":(?:class|meth|func|attr|mod):<code>~?([\w.]+)</code>")  # as Sphinx writes them
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lies outside docs/: pages and their pictures, then what pages link to."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            _add(files, config, path.relative_to(ROOT).as_posix())
    for source in [source for source in _sources(files) if source.endswith(".md")]:
        for link in _LINK.finditer(_FENCE.sub("", (ROOT / source).read_text(encoding="utf-8"))):
            target = _target(source, link)
            if (ROOT / target).is_file() and files.get_file_from_path(site_path(target)) is None:
                _add(files, config, target)
    return files


def _add(files: Files, config: MkDocsConfig, source: str) -> None:
    files.append(File.generated(config, site_path(source), abs_src_path=str(ROOT / source)))


def _target(source: str, link: re.Match) -> str:
    """What a link of a page means, as a path in the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links from where files lie in the repository to where they lie on the site."""
    here = page.file.src_uri
    if here.startswith("results/"):
        page.meta["hide"] = ["toc"]  # tables of many tasks need the room
    repository = {site_path(source): source for source in _sources(files)}

    def lead(match: re.Match) -> str:
        target = _target(repository[here], match)
        if files.get_file_from_path(site_path(target)) is None:
            return match[0]
        return match[1] + posixpath.relpath(site_path(target), posixpath.dirname(here) or ".")

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):  # code stays as it is
        parts += [_LINK.sub(lead, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(lead, markdown[end:])])


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn docstrings' roles into links; say in which language the Chinese guide is, for screen readers and fonts."""
    html = _ROLE.sub(_reference, html)
    return f'<div lang="zh-Hans">{html}</div>' if page.file.src_uri.endswith(".zh.md") else html


def _reference(role: re.Match) -> str:
    name = role[1].rpartition(".")[2]
    return f'<autoref identifier="{role[1]}" optional><code>{name}</code></autoref>'


def site_path(source: str) -> str:
    """Where a file of the repository lies on the site: docs/ is its root, and a README is no index there."""
    directory, name = posixpath.split(source.removeprefix("docs/"))
    if name == "README.md":
        name = "about.md" if directory else "overview.md"
    return posixpath.join(directory, name)


def _sources(files: Files) -> list[str]:
    """Every file of the site as a path in the repository."""
    paths = [Path(file.abs_src_path) for file in files if file.abs_src_path]
    return [path.relative_to(ROOT).as_posix() for path in paths if path.is_relative_to(ROOT)]
