"""
Takes the pictures of docs/explore.md and docs/serve.md: the explorer's page, its app and the server's page, with the
embedded model and the built-in text.

    python docs/screenshots.py          # writes docs/images/*.png; needs Debian's chromium and the package playwright
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from kvpress_moe import MoERouterPress
from kvpress_moe.cache.attention_dispatch import use_ragged_attention
from kvpress_moe.cli.ask import BUILT_IN_QUESTION
from kvpress_moe.cli.options import read_context
from kvpress_moe.explore import explore, make_press, page, prefill_text
from kvpress_moe.explore.jobs import JobRunner
from kvpress_moe.explore.web_app import make_app
from kvpress_moe.model.loading import DEFAULT_MODEL, load_model
from kvpress_moe.serve import app as serve_app
from kvpress_moe.serve.document_store import DocumentStore
from kvpress_moe.serve.engine import Engine
from kvpress_moe.serve.loopback import listen
from kvpress_moe.serve.scheduler import Scheduler

IMAGES = Path(__file__).parent / "images"
QUESTIONS = [BUILT_IN_QUESTION, "How much does the new crane lift?"]
RATIO = 0.9
DESK = {"viewport": {"width": 1280, "height": 1000}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}


def main() -> None:
    """Read the text once, then take all pictures."""
    model, tokenizer = load_model()
    prefilled = prefill_text(model, tokenizer, read_context(None), QUESTIONS, 32, lambda *args, **kwargs: None)
    pages = {
        name: page(explore(prefilled, make_press({"compression_ratio": RATIO, **more}), lambda *args, **kwargs: None))
        for name, more in (("pairs", {}), ("bytes", {"precision": "mixed"}))
    }
    IMAGES.mkdir(exist_ok=True)
    with TemporaryDirectory() as directory, sync_playwright() as playwright:
        path, of_bytes = Path(directory) / "page.html", Path(directory) / "bytes.html"
        path.write_text(pages["pairs"], encoding="utf-8")
        of_bytes.write_text(pages["bytes"], encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        shoot_page(browser, path.as_uri(), "explore.png", DESK, full_page=True)
        shoot_page(browser, path.as_uri(), "explore-dark.png", {**DESK, "color_scheme": "dark"}, layer="20")
        shoot_page(browser, path.as_uri(), "explore-phone.png", PHONE, layer="17")
        shoot_page(browser, of_bytes.as_uri(), "explore-bytes.png", DESK)
        shoot_app(browser, JobRunner(model, tokenizer))
        shoot_server(browser, model, tokenizer, Path(directory))
        browser.close()


def shoot_page(
    browser: Browser, address: str, name: str, context: dict, layer: str = "-1", full_page: bool = False
) -> None:
    """The page with a token chosen; of one layer, coloured by how far weights are above their average."""
    tab = browser.new_page(**context)
    tab.goto(address)
    if layer != "-1":
        tab.select_option("#layer", layer)
        tab.select_option("#colouring", "lift")
    tab.locator(".chunk span", has_text="electricity").first.click()
    if not full_page:
        tab.evaluate("document.getElementById('controls').scrollIntoView()")
    else:
        tab.evaluate("scrollTo(0, 0)")
    save(tab.screenshot(full_page=full_page), name)
    tab.close()


def save(picture: bytes, name: str, method: Image.Quantize = Image.Quantize.MEDIANCUT) -> None:
    """Keep a picture with 256 colours, a third of its bytes."""
    colours = Image.open(BytesIO(picture)).convert("RGB")
    colours.quantize(256, method, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)


def shoot_app(browser: Browser, runner: JobRunner) -> None:
    """The app, two settings side by side."""
    defaults = {"text": read_context(None), "question": BUILT_IN_QUESTION, "ratio": RATIO}
    with running(make_app(runner, defaults)) as address:
        tab = browser.new_page(viewport={"width": 1500, "height": 1500})
        tab.goto(address)
        tab.check("#compare")
        tab.click("#go")
        for number in (0, 1):
            tab.frame_locator("iframe").nth(number).locator("#total").wait_for(timeout=300_000)
        save(tab.screenshot(), "app.png")
        tab.close()


def shoot_server(browser: Browser, model: Any, tokenizer: Any, directory: Path) -> None:
    """The server's page: a document and two answers, with the settings of ``kvpress-moe serve``."""
    use_ragged_attention("compiled")
    store = DocumentStore(directory / "caches", model, "pictures", 2**30)
    press = MoERouterPress(1 - 0.1 * 2 / model.dtype.itemsize, precision="mixed", cache_aware=False)
    engine = Engine(model, tokenizer, store, press, DEFAULT_MODEL.rpartition("/")[2])
    (directory / "harbour.txt").write_text(read_context(None), encoding="utf-8")
    desk = {"viewport": {"width": 1280, "height": 760}}
    with running(serve_app.make_app(engine, Scheduler(engine)), lifespan="on") as address:
        for name, context in (("serve.png", desk), ("serve-dark.png", {**desk, "color_scheme": "dark"})):
            shoot_chat(browser.new_page(**context), address, directory / "harbour.txt", name)
        shoot_chat(browser.new_page(**PHONE), address, directory / "harbour.txt", "serve-phone.png")


def shoot_chat(tab: Page, address: str, text: Path, name: str) -> None:
    tab.goto(address)
    tab.locator("#main").wait_for()
    tab.set_input_files("#file", text)  # the second time the server has it already
    tab.locator("#list .pick[aria-current]").wait_for(timeout=300_000)
    for number, question in enumerate(QUESTIONS):
        tab.fill("#question", question)
        tab.click("#ask")
        tab.locator(".took").nth(number).wait_for(timeout=300_000)
    tab.locator("#question").blur()
    tab.mouse.move(0, 0)
    save(tab.screenshot(), name, Image.Quantize.MAXCOVERAGE)  # keeps the colours of small bars
    tab.close()


@contextmanager
def running(app: Any, lifespan: str = "off") -> Iterator[str]:
    """The address of a server for an app, which ends with the block."""
    with listen(0) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan=lifespan))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
