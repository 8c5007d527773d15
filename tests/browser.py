"""Debian's Chromium under Playwright, and what a page must not do in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def chromium() -> Iterator:
    """A headless browser; the test is skipped where there is none. Nothing is downloaded."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


class Watched:
    """
    A tab, and what happened in it.

    Attributes
    ----------
    page : playwright.sync_api.Page
    complaints : list of str
        Console warnings and errors, uncaught exceptions, refused requests.
    requests : list of str
        Addresses that were asked for.
    """

    def __init__(self, browser, **context):
        self.context = browser.new_context(**context)
        self.context.set_default_timeout(10_000)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", lambda request: self.complaints.append(f"failed: {request.url}"))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def _listen(self, message) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def table(self, selector: str) -> list[list[str]]:
        """The cells of a table's body, without the heads of its rows."""
        rows = f"[...document.querySelectorAll('{selector} tbody tr')]"
        return self.page.evaluate(f"{rows}.map((row) => [...row.querySelectorAll('td')].map((cell) => cell.innerText))")
