"""The page in headless Chromium, with a real server over a tiny model: from a dropped text to an answer, and all that
can go wrong on the way."""

import json
import re
from contextlib import ExitStack
from dataclasses import replace
from threading import Event, Semaphore

import httpx2 as httpx
import pytest

from kvpress_moe.serve.app import make_app
from kvpress_moe.serve.scheduler import Job, Scheduler
from tests.serve.made import NAME, TEXT, make_engine
from tests.serve.running import running

pytestmark = pytest.mark.browser

MOST_TOKENS = 40  # of an answer; a random model never ends by itself
SIZES = {"desk": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}
ATTACK = "<img src=x onerror=\"document.title='broken'\"><script>document.title = 'broken'</script>"

#: What a server may say of a document that it knows all about.
DOCUMENT = {
    "id": "doc-0123456789abcdef01234567",
    "object": "document",
    "title": "lease.txt",
    "tokens": 4012,
    "bytes": 3 * 2**20,
    "created": 1,
    "full_bytes": 30 * 2**20,
    "read_seconds": 12.4,
    "kept": {"K8V4": 0.05, "evict": 0.7, "K16V16": 0.0004, "K2V2": 0.2496},
    "expected_kl": 0.0123,
    "max_kl": 0.02,
    "is_promised": True,
}


class Served:
    """
    A server, with a hold on its work.

    ``go`` lets the model take so many steps (tokens of an answer, or layers of a document); ``go_on`` lets it run.
    """

    def __init__(self, address, engine, scheduler):
        self.address, self.engine, self.scheduler = address, engine, scheduler
        self._steps, self._is_held = Semaphore(0), False
        read, compress, answer = engine.read, engine.compress, engine.answer

        def read_when_let(reads):
            self._wait()
            return read(reads)

        def compress_when_let(work, between=lambda: None):
            self._wait()
            return compress(work, lambda: (self._wait(), between()))

        engine.read, engine.compress = read_when_let, compress_when_let
        engine.answer = lambda request: answer(replace(request, max_tokens=MOST_TOKENS))

    def _wait(self):
        if self._is_held:
            assert self._steps.acquire(timeout=20)

    def hold(self):
        self._steps, self._is_held = Semaphore(0), True

    def go(self, n_steps):
        self._steps.release(n_steps)

    def go_on(self):
        self._is_held = False
        self._steps.release(1000)


@pytest.fixture
def serve(llama, chat_tokenizer, tmp_path):
    """Starts servers: ``serve(api_key=None, **settings of the scheduler)``."""
    with ExitStack() as stack:

        def start(api_key=None, **settings):
            engine = make_engine(llama, chat_tokenizer, tmp_path)
            scheduler = Scheduler(engine, **settings)
            served = Served(stack.enter_context(running(make_app(engine, scheduler, api_key))), engine, scheduler)
            stack.callback(served.go_on)
            return served

        yield start


@pytest.fixture
def opened(chromium_page):
    """Opens the page of a server."""
    tabs = []

    def open_page(served, size="desk", **context):
        tab = chromium_page(viewport=SIZES[size], **context)
        tab.context.set_default_timeout(30_000)  # for a busy machine
        tab.page.goto(served.address)
        tabs.append(tab)
        return tab

    yield open_page
    for tab in tabs:  # Chromium says of streams that they failed, at random, although they were read to their end
        tab.complaints[:] = [
            one for one in tab.complaints if not re.match("failed: .*/v1/(documents|chat/completions)$", one)
        ]


def drop(tab, name, content):
    """Drop a file on the page, as a mouse does."""
    script = """([name, bytes]) => {
        const carried = new DataTransfer();
        carried.items.add(new File([new Uint8Array(bytes)], name));
        return carried;
    }"""
    content = content.encode() if isinstance(content, str) else content
    carried = tab.page.evaluate_handle(script, [name, list(content)])
    for event in ("dragenter", "dragover", "drop"):
        tab.page.dispatch_event("#chat", event, {"dataTransfer": carried})


def add(served, text=TEXT, title="mill.txt"):
    """A document that is there before the page is opened."""
    return httpx.post(f"{served.address}/v1/documents", json={"text": text, "title": title}, timeout=30).json()


def ask(tab, question):
    tab.page.fill("#question", question)
    tab.page.press("#question", "Enter")


def wait_for(tab, selector, text=None):
    tab.page.locator(selector, has_text=text).first.wait_for()


def answer(tab, number=-1):
    return tab.page.locator(".answered .text").nth(number).text_content()


def sent(tab):
    """Collects the bodies of the chats that the page asks for."""
    bodies = []
    tab.page.on(
        "request", lambda request: request.url.endswith("completions") and bodies.append(request.post_data_json)
    )
    return bodies


def assert_fits(tab):
    """Nothing has to be scrolled sideways, neither the page nor a part of it."""
    script = """() => [...document.querySelectorAll("html, body *")]
        .filter((one) => one.tagName === "HTML" || ["auto", "scroll"].includes(getComputedStyle(one).overflowX))
        .filter((one) => one.scrollWidth > one.clientWidth).map((one) => one.tagName + one.id)"""
    assert tab.page.evaluate(script) == []


def piece(text):
    """An event of an answer."""
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


def stream_of(*events, is_whole=True):
    """Answers a request with these events."""
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n" * is_whole
    return lambda route: route.fulfill(content_type="text/event-stream", body=body)


def refused(tab, status):
    """Chromium tells the console of every refusal; this one was meant."""
    tab.complaints.remove(next(one for one in tab.complaints if f"status of {status}" in one))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_a_dropped_text_is_read_listed_and_asked(serve, opened, size, scheme):
    served = serve()
    tab = opened(served, size, color_scheme=scheme)
    wait_for(tab, "#newcomer")
    assert "Add a text." in tab.text("#newcomer")
    assert_fits(tab)

    served.hold()
    served.go(1)  # the first of two layers
    drop(tab, "mill.txt", TEXT)
    wait_for(tab, ".card .state", "layer 1 of 2")
    assert tab.page.locator(".card progress").evaluate("(bar) => [bar.value, bar.max]") == [1, 2]
    assert_fits(tab)
    served.go_on()
    wait_for(tab, "#list .pick[aria-current]", "mill.txt")
    assert tab.page.locator(".card").count() == 0
    assert tab.page.locator("#newcomer").is_hidden()
    assert tab.text("#title") == "mill.txt"
    (document,) = httpx.get(f"{served.address}/v1/documents").json()["data"]
    assert f"{document['tokens']:,} tokens" in tab.text("#list .pick")

    served.hold()
    served.go(4)
    question = "Who signed?"
    ask(tab, question)
    wait_for(tab, ".asked", question)
    tab.page.locator(".answered .text:not(:empty)").wait_for()
    assert tab.page.locator("#stop").is_visible()
    assert tab.page.locator(".took").count() == 0
    early = answer(tab)
    served.go_on()
    wait_for(tab, ".took")
    body = {"model": NAME, "messages": [{"role": "user", "content": question}], "documents": [document["id"]]}
    same = {"max_tokens": 256, "temperature": 0}
    whole = httpx.post(f"{served.address}/v1/chat/completions", json=body | same, timeout=60).json()
    assert answer(tab) == whole["choices"][0]["message"]["content"]
    assert answer(tab).startswith(early)
    assert early != answer(tab)
    took = tab.text(".took")
    assert re.search(r"first token after \d+\.\d+ s", took)
    assert re.search(r"\d+ tokens per second", took)
    usage = whole["usage"]
    assert f"{document['tokens']:,} of {usage['prompt_tokens']:,} prompt tokens from the cache" in took
    assert re.search(r"reading the document anew takes about \d+\.\d+ s", took)
    assert tab.page.locator("#stop").is_hidden()
    assert tab.page.locator("#spoken").text_content().startswith(answer(tab))  # told to screen readers, once
    assert_fits(tab)
    assert {request.split("/")[2] for request in tab.requests} == {served.address.split("/")[2]}


def test_later_questions_carry_the_earlier_turns_and_each_document_has_its_own(serve, opened):
    served = serve()
    add(served)
    add(served, "Another text. " * 20, "other.txt")
    tab = opened(served)
    bodies = sent(tab)
    wait_for(tab, "#list .pick[aria-current]", "other.txt")  # the newest
    tab.page.click("#list .pick >> text=mill.txt")
    ask(tab, "Who signed?")
    wait_for(tab, ".took")
    ask(tab, "When?")
    tab.page.locator(".took").nth(1).wait_for()
    first = {"role": "user", "content": "Who signed?"}
    assert bodies[0]["messages"] == [first]
    assert bodies[1]["messages"] == [
        first,
        {"role": "assistant", "content": answer(tab, 0)},
        {"role": "user", "content": "When?"},
    ]
    assert bodies[0]["documents"] == bodies[1]["documents"] == [add(served)["id"]]

    tab.page.click("#list .pick >> text=other.txt")
    assert tab.page.locator(".turns > li").count() == 0
    tab.page.click("#list .pick >> text=mill.txt")
    assert tab.page.locator(".turns > li").count() == 2
    tab.page.click("#anew")
    assert tab.page.locator(".turns > li").count() == 0
    tab.page.click("#none")
    ask(tab, "Hello?")
    wait_for(tab, ".took")
    assert "documents" not in bodies[2]
    assert bodies[2]["messages"] == [{"role": "user", "content": "Hello?"}]
    assert "anew" not in tab.text(".took")


def test_an_answer_can_be_stopped_and_what_came_is_kept(serve, opened):
    served = serve()
    add(served)
    tab = opened(served)
    bodies = sent(tab)
    wait_for(tab, "#list .pick[aria-current]")
    served.hold()
    served.go(6)
    ask(tab, "Who signed?")
    tab.page.locator(".answered .text:not(:empty)").wait_for()
    tab.page.click("#stop")
    wait_for(tab, ".answered .state", "You stopped it.")
    stopped = answer(tab)
    assert stopped
    assert tab.page.locator("#ask").is_visible()
    served.go_on()
    ask(tab, "When?")
    wait_for(tab, "li:nth-child(2) .took", "tokens per second")
    assert bodies[1]["messages"][1] == {"role": "assistant", "content": stopped}


def test_a_document_goes_only_after_a_second_question(serve, opened):
    served = serve()
    document = add(served)
    tab = opened(served)
    page, remove = tab.page, "#list .remove"
    page.click(remove)
    assert page.locator(".confirm").get_attribute("aria-label") == "Delete mill.txt?"
    page.click(".confirm button >> text=keep it")
    assert page.locator(".confirm").count() == 0
    page.click(remove)
    page.keyboard.press("Escape")
    assert page.locator(".confirm").count() == 0
    assert httpx.get(f"{served.address}/v1/documents/{document['id']}").status_code == 200
    page.click(remove)
    page.click(".confirm .danger")
    page.locator("#list li").first.wait_for(state="detached")
    assert httpx.get(f"{served.address}/v1/documents/{document['id']}").status_code == 404
    assert page.locator("#newcomer").is_visible()
    assert page.locator("#kept").is_hidden()
    assert page.evaluate("document.activeElement.id") == "choose"


def test_a_document_that_another_client_deleted_is_told_and_can_be_taken_off_the_list(serve, opened):
    served = serve()
    document = add(served)
    tab = opened(served)
    wait_for(tab, "#list .pick[aria-current]")
    httpx.delete(f"{served.address}/v1/documents/{document['id']}")
    ask(tab, "Who signed?")
    wait_for(tab, ".answered .error", "The server does not have this document any more.")
    refused(tab, 404)
    tab.page.click("#list .remove")
    tab.page.click(".confirm .danger")
    tab.page.locator("#list li").first.wait_for(state="detached")
    refused(tab, 404)


def test_a_key_is_asked_for_where_the_server_wants_one_and_forgotten_with_the_tab(serve, opened):
    served = serve("secret")
    tab = opened(served)
    page = tab.page
    page.locator("#key").wait_for()
    refused(tab, 401)
    page.locator("#shell").wait_for(state="hidden")
    assert page.evaluate("document.activeElement.id") == "key-field"
    for wrong, said in (("wrong", "does not take this key"), ("schlüssel", "English letters")):
        page.fill("#key-field", wrong)
        page.keyboard.press("Enter")
        wait_for(tab, "#key-error", said)
    refused(tab, 401)
    page.fill("#key-field", "secret")
    page.keyboard.press("Enter")
    page.locator("#newcomer").wait_for()
    assert page.locator("#key").is_hidden()
    drop(tab, "mill.txt", TEXT)
    wait_for(tab, "#list .pick[aria-current]", "mill.txt")
    assert page.evaluate("[Object.values({ ...sessionStorage }), localStorage.length, document.cookie]") == [
        ["secret"],
        0,
        "",
    ]
    page.reload()
    wait_for(tab, "#list .pick[aria-current]", "mill.txt")
    other = opened(served)
    other.page.locator("#key").wait_for()
    refused(other, 401)


def test_a_text_that_is_refused_says_why_in_its_own_card(serve, opened):
    served = serve()
    tab = opened(served)
    wait_for(tab, "#newcomer")
    drop(tab, "long.txt", "word " * 1000)
    wait_for(tab, ".card .error", "This is too long for the model: it has 5")
    assert "Shorten the text." in tab.text(".card .error")
    refused(tab, 400)
    for name, content, said in (
        ("picture.png", b"\x89PNG\r\n\x1a\n\xff", "This is no plain text."),
        ("zeros.txt", b"a\0b", "This is no plain text."),
        ("empty.txt", b" \n", "There is no text in it."),
    ):
        drop(tab, name, content)
        wait_for(tab, ".card .error", said)
        assert name in tab.page.locator(".card", has_text=said).last.inner_text()
    assert_fits(tab)
    while tab.page.locator(".card").count():
        tab.page.locator(".card button >> text=dismiss").first.click()
    drop(tab, "windows.txt", "\ufeffThe crane\r\nlifts.".encode("utf-16le"))
    wait_for(tab, "#list .pick", "windows.txt")
    (document,) = httpx.get(f"{served.address}/v1/documents").json()["data"]
    assert add(served, "The crane\nlifts.") == document


def test_a_card_can_be_cancelled_and_the_next_text_is_read(serve, opened):
    served = serve()
    tab = opened(served)
    wait_for(tab, "#newcomer")
    served.hold()
    served.go(1)
    drop(tab, "first.txt", TEXT)
    wait_for(tab, ".card .state", "layer 1 of 2")
    drop(tab, "second.txt", "A short text.")
    tab.page.locator(".card", has_text="first.txt").locator("button").click()
    served.go_on()
    wait_for(tab, "#list .pick", "second.txt")
    assert tab.page.locator(".card").count() == 0
    assert tab.page.locator("#list .pick b").all_inner_texts() == ["second.txt"]


def test_a_busy_server_is_asked_again_after_the_time_it_names(serve, opened):
    served = serve(max_active=1, max_waiting=1)
    tab = opened(served)
    wait_for(tab, "#newcomer")
    begun, going = Event(), Event()

    def steps(emit):
        begun.set()
        yield going.wait(20)

    for _ in range(2):
        served.scheduler.submit(Job(steps, lambda *_: None))
        assert begun.wait(10)
    ask(tab, "Hello?")
    wait_for(tab, ".answered .state", "The server is busy. Next try in 2 s (1 of 3).")
    going.set()
    wait_for(tab, ".took")
    refused(tab, 429)


def test_a_server_that_stays_busy_is_left_alone_after_a_few_tries(serve, opened):
    served = serve()
    tab = opened(served)
    wait_for(tab, "#newcomer")
    tries = []
    full = {"error": {"message": "Too many requests wait already.", "code": "queue_full"}}

    def refuse(route):
        tries.append(route.request.url)
        route.fulfill(status=429, headers={"Retry-After": "0"}, json=full)

    tab.page.route("**/v1/documents", refuse)
    drop(tab, "mill.txt", TEXT)
    wait_for(tab, ".card .error", "The server is still busy.")
    assert len(tries) == 4
    for _ in tries:
        refused(tab, 429)
    tab.page.unroute("**/v1/documents")
    tab.page.click(".card button >> text=try again")
    wait_for(tab, "#list .pick", "mill.txt")


def test_a_lost_connection_is_told_where_it_was_lost(serve, opened):
    served = serve()
    tab = opened(served)
    wait_for(tab, "#newcomer")
    tab.page.route("**/completions", stream_of(piece("The lease"), is_whole=False))
    ask(tab, "Who signed?")
    wait_for(tab, ".answered .error", "The connection to the server was lost.")
    assert answer(tab) == "The lease"
    tab.page.unroute("**/completions")
    bodies = sent(tab)
    tab.page.click("button >> text=ask again")
    wait_for(tab, ".took")
    assert tab.page.locator(".turns > li").count() == 1
    assert [message["content"] for message in bodies[0]["messages"]] == ["Who signed?"]

    tab.page.route("**/v1/**", lambda route: route.abort())
    drop(tab, "mill.txt", TEXT)
    wait_for(tab, ".card .error", "The connection to the server was lost.")
    tab.page.reload()
    wait_for(tab, "#shelf-error", "The connection to the server was lost.")
    tab.page.unroute("**/v1/**")
    tab.page.click("#shelf-error button")
    wait_for(tab, "#newcomer")
    assert tab.page.locator("#shelf-error").is_hidden()
    assert all("v1/" in complaint or "ERR_FAILED" in complaint for complaint in tab.complaints)
    tab.complaints.clear()


def test_an_error_inside_a_stream_is_told(serve, opened):
    served = serve()
    tab = opened(served)
    wait_for(tab, "#newcomer")
    served.engine.read = lambda reads: 1 / 0
    ask(tab, "Who signed?")
    wait_for(tab, ".answered .error", "The server failed (ZeroDivisionError). Its log says more.")
    refused(tab, 500)
    error = {"error": {"message": "The disk is full.", "code": "storage_full"}}
    progress = {"object": "document.progress", "done": 1, "total": 2}
    tab.page.route("**/v1/documents", stream_of(progress, error))
    drop(tab, "mill.txt", TEXT)
    wait_for(tab, ".card .error", "The disk is full.")


def known(tab, **changes):
    """Open the page with one document of which the server says this."""
    document = {name: value for name, value in (DOCUMENT | changes).items() if value != "missing"}
    listed = {"object": "list", "data": [document]}
    wait_for(tab, "#newcomer")
    tab.page.route("**/v1/documents", lambda route: route.fulfill(json=listed))
    tab.page.reload()
    wait_for(tab, "#list .pick[aria-current]", document["title"])


def test_a_bound_that_is_not_promised_is_shown_as_such(serve, opened):
    tab = opened(serve())
    known(tab, is_promised=False)
    assert "asked for (not promised)" in tab.text("#kept")


def test_what_was_kept_is_shown_in_figures_and_bars(serve, opened):
    tab = opened(serve())
    known(tab)
    assert "4,012 tokens, 3 of 30 MiB" in tab.text("#list .pick")
    assert "10 %" in tab.text(".size")
    facts = dict(zip(*[iter(tab.page.locator("#kept dt, #kept dd").all_inner_texts())] * 2, strict=True))
    assert facts == {
        "tokens": "4,012",
        "compressed cache": "3 MiB",
        "full cache, 16 bits": "30 MiB",
        "time to read it": "12 s",
        "expected KL divergence": "0.012",
        "promised: at most": "0.02",
    }
    rows = tab.page.locator("#kept table tr")
    assert [row.split() for row in rows.all_inner_texts()] == [
        ["evicted", "70", "%"],
        ["K2V2", "25", "%"],
        ["K8V4", "5", "%"],
        ["K16V16", "<", "0.1", "%"],
    ]
    widths = "(rows) => rows.map((row) => row.querySelector('.bar b').getBoundingClientRect().width)"
    whole = tab.page.locator("#kept table .bar").first.bounding_box()["width"]
    assert rows.evaluate_all(widths)[:3] == pytest.approx([0.7 * whole, 0.2496 * whole, 0.05 * whole], abs=1)


@pytest.mark.parametrize("unknown", ["missing", None])
def test_what_the_server_does_not_know_is_left_out(serve, opened, unknown):
    tab = opened(serve())
    known(tab, **dict.fromkeys(("full_bytes", "read_seconds", "kept", "expected_kl", "max_kl"), unknown))
    assert tab.page.locator("#kept dt").all_inner_texts() == ["tokens", "compressed cache"]
    assert tab.page.locator("#kept .bar").count() == 0
    assert "4,012 tokens, 3 MiB" in tab.text("#list .pick")
    said = tab.text("body")
    assert not re.search("NaN|null|undefined|Infinity", said)


def test_tags_in_titles_questions_and_answers_are_shown_as_text(serve, opened):
    served = serve()
    tab = opened(served)
    wait_for(tab, "#newcomer")
    tab.page.click("#paste-open")
    tab.page.fill("#paste-text", ATTACK)
    tab.page.fill("#paste-title", ATTACK)
    tab.page.click("#paste button[type=submit]")
    wait_for(tab, "#list .pick[aria-current]")
    assert tab.text("#title") == tab.text("#list .pick b") == ATTACK
    tab.page.route("**/completions", stream_of(piece(ATTACK)))
    ask(tab, ATTACK)
    wait_for(tab, ".took")
    assert answer(tab) == tab.text(".asked p") == ATTACK
    tab.page.click("#list .remove")
    assert ATTACK in tab.page.locator(".confirm").get_attribute("aria-label")
    assert tab.page.title() == "Ask your documents"
    assert tab.page.locator("img").count() == 0


def test_the_policy_refuses_what_is_not_the_pages_own(serve, opened):
    tab = opened(serve())
    wait_for(tab, "#newcomer")
    tab.page.evaluate(
        "() => document.body.append(Object.assign(document.createElement('script'), { text: 'window.stolen = 1' }))"
    )
    tab.page.evaluate("() => fetch('http://127.0.0.1:9/').catch(() => {})")
    assert tab.page.evaluate("window.stolen") is None
    assert sum("Content Security Policy" in complaint for complaint in tab.complaints) >= 2
    tab.complaints.clear()


def test_the_keyboard_does_everything(serve, opened):
    served = serve()
    tab = opened(served)
    page, choosers = tab.page, []
    page.on("filechooser", lambda chooser: choosers.append(chooser))  # early: Chromium is told of it meanwhile
    wait_for(tab, "#newcomer")

    def tab_to(selector, most=15):
        for _ in range(most):
            page.keyboard.press("Tab")
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                outline = page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)")
                assert outline >= 2, f"{selector} does not show that it has the focus"
                return
        raise AssertionError(f"no key leads to {selector}")

    tab_to(".skip", 1)
    tab_to("#choose")
    page.keyboard.press("Enter")
    for _ in range(200):
        if not choosers:
            page.wait_for_timeout(50)
    assert len(choosers) == 1
    tab_to("#paste-open")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "paste-text"
    page.keyboard.type("The crane lifts twelve tons.")
    tab_to("#paste button[type=submit]")
    page.keyboard.press("Enter")
    wait_for(tab, "#list .pick[aria-current]", "The crane lifts twelve tons.")
    tab_to("#list .pick")
    tab_to("#list .remove")
    tab_to("#none")
    page.keyboard.press("Enter")
    assert tab.text("#title") == "No document"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    assert tab.text("#title") == "The crane lifts twelve tons."
    tab_to("#kept summary")
    tab_to("#chat")
    tab_to("#question")
    page.keyboard.type("How much")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("does it lift?")
    served.hold()
    served.go(3)
    page.keyboard.press("Enter")
    wait_for(tab, ".asked p", "How much\ndoes it lift?")
    tab_to("#stop")
    served.go_on()
    wait_for(tab, ".answered .state, .took")
    tab.page.locator("#list .remove").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.textContent") == "keep it"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.locator("#list li").first.wait_for(state="detached")


#: WCAG's ratio of each text that is shown to what is behind it: the texts that are below 4.5.
FAINT = """() => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const luminance = (colours) => {
        for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
        const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((c) => c / 255)
            .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const faint = {};
    let seen = 0;
    for (const element of document.querySelectorAll("body *")) {
        const { placeholder, childNodes } = element, own = [...childNodes].filter((node) => node.nodeType === 3);
        if (!placeholder && !own.some((node) => node.data.trim())) continue;
        if (!element.checkVisibility({ visibilityProperty: true })) continue;
        seen++;
        const behind = [];
        for (let one = element; one; one = one.parentElement) behind.unshift(getComputedStyle(one).backgroundColor);
        const { color: colour } = getComputedStyle(element, placeholder ? "::placeholder" : undefined);
        const back = luminance(behind), text = luminance([...behind, colour]);
        const ratio = (Math.max(back, text) + 0.05) / (Math.min(back, text) + 0.05);
        if (ratio < 4.5) faint[`${element.tagName}.${element.className} ${element.textContent.slice(0, 30)}`] = ratio;
    }
    return [seen, faint];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(serve, opened, scheme):
    served = serve()
    add(served)
    tab = opened(served, color_scheme=scheme, reduced_motion="reduce")
    wait_for(tab, "#list .pick[aria-current]")
    ask(tab, "Who signed?")
    wait_for(tab, ".took")
    tab.page.click("#list .remove")
    tab.page.click("#paste-open")
    drop(tab, "zeros.txt", b"a\0b")
    wait_for(tab, ".card .error")
    tab.page.evaluate("() => document.getElementById('key').removeAttribute('hidden')")
    seen, faint = tab.page.evaluate(FAINT)
    assert seen > 30
    assert faint == {}
    tab.page.set_viewport_size({"width": 320, "height": 640})  # a desk's page at 400 %
    assert_fits(tab)


@pytest.mark.parametrize("wish", ["reduce", "no-preference"])
def test_nothing_moves_for_those_who_want_it_still(serve, opened, wish):
    served = serve()
    tab = opened(served, reduced_motion=wish)
    wait_for(tab, "#newcomer")
    served.hold()
    served.go(4)
    ask(tab, "Hello?")
    tab.page.locator(".answered .text:not(:empty)").wait_for()
    moving = tab.page.evaluate("document.getAnimations().length")
    assert (moving > 0) == (wish == "no-preference")
    served.go_on()
    wait_for(tab, ".took")


@pytest.mark.parametrize("size", SIZES)
def test_the_page_follows_a_long_answer_and_lets_go_if_one_scrolls_up(serve, opened, size):
    served = serve()
    tab = opened(served, size)
    wait_for(tab, "#newcomer")
    stream = stream_of(*[piece("A line of a long answer.\n")] * 80)
    tab.page.route("**/completions", stream)
    ask(tab, "Hello?")
    wait_for(tab, ".took")
    composer, took = (tab.page.locator(selector).bounding_box() for selector in ("#composer", ".took"))
    assert 0 < took["y"] + took["height"] <= composer["y"]
    assert composer["y"] + composer["height"] <= SIZES[size]["height"]
    assert_fits(tab)

    tab.page.unroute("**/completions")
    served.hold()
    served.go(20)  # the long turn is read again, 256 tokens at a time
    ask(tab, "More?")
    wait_for(tab, "li:nth-child(2) .text:not(:empty)")
    place = "chat" if size == "desk" else "scroller"
    tab.page.evaluate(f"(scroller => {{ {place}.scrollTop = 0; }})(document.scrollingElement)")
    early = answer(tab)
    served.go_on()
    tab.page.locator(".took").nth(1).wait_for()
    assert len(answer(tab)) > len(early)
    assert tab.page.evaluate(f"(scroller => {place}.scrollTop)(document.scrollingElement)") == 0
