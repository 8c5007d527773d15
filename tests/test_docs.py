"""Every Python block of the guides and the README runs as printed, with a tiny model in the named one's place."""

import re
from pathlib import Path

import pytest

from kvpress_moe.model.loading import DEFAULT_MODEL

ROOT = Path(__file__).parent.parent
PAGES = ["docs/guide.en.md", "docs/guide.zh.md", "README.md"]


def blocks(page, language="python"):
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.mark.filterwarnings("default")  # what a user sees as a warning is no error in a guide
@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_runs(page, model_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "guide"}
    assert blocks(page)
    for number, block in enumerate(blocks(page), start=1):
        code = block.replace(DEFAULT_MODEL, str(model_directory))
        exec(compile(code, f"{page}, block {number}", "exec"), namespace)


def test_both_guides_hold_the_same_code():
    """Comments and printed words are translated, code is not."""

    def skeleton(page):
        without_words = [re.sub(r"#.*|([\"']).*?\1", "", block) for block in blocks(page)]
        return ["".join(block.split()) for block in without_words]

    assert skeleton("docs/guide.en.md") == skeleton("docs/guide.zh.md")


def test_links_between_pages_lead_somewhere():
    others = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")]
    for page in dict.fromkeys([*PAGES, *others]):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
