"""A real browser for pages, where there is one."""

from __future__ import annotations

import shutil

import pytest

EXECUTABLES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def chromium():
    """Headless Chromium (Playwright's ``Browser``), the system's own; skips where it or Playwright is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    executable = next(filter(None, map(shutil.which, EXECUTABLES)), None)
    if executable is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()
