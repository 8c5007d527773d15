"""The page's routes: its files and nothing else, without a key, under a strict policy; its code keeps to the rules."""

import re
from importlib.resources import files

import pytest
from starlette.testclient import TestClient

from kvpress_moe.explore.page import asset
from kvpress_moe.serve.app import MAX_BODY, make_app
from kvpress_moe.serve.loopback import HEADERS
from kvpress_moe.serve.scheduler import Scheduler
from kvpress_moe.serve.web_page import POLICY
from tests.serve.made import make_engine

ADDRESS = "http://127.0.0.1:8000"
ASSETS = files("kvpress_moe.serve").joinpath("assets")
TEXTS = {entry.name: entry.read_text(encoding="utf-8") for entry in ASSETS.iterdir()}
PROGRAM = {name: text for name, text in TEXTS.items() if name.endswith(".js")}


@pytest.fixture
def client(llama, chat_tokenizer, tmp_path):
    """With a key, which the page must not need."""
    engine = make_engine(llama, chat_tokenizer, tmp_path)
    with TestClient(make_app(engine, Scheduler(engine), "secret"), base_url=ADDRESS) as client:
        yield client


def test_the_page_comes_without_a_key_and_with_a_strict_policy(client):
    answer = client.get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.text == TEXTS["page.html"]
    assert answer.headers["content-security-policy"] == POLICY
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert not re.search("unsafe|http|\\*", POLICY)
    assert "access-control-allow-origin" not in answer.headers
    assert client.get("/v1/documents").status_code == 401


def test_all_that_the_page_loads_is_served_and_nothing_is_left_over(client):
    needed = {name for name in re.findall(r'(?:href|src)="([^"#:]+)"', TEXTS["page.html"])}
    assert needed == {"assets/page.css", "assets/main.js"}
    found, types = set(), {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
    while needed:
        path = needed.pop()
        answer = client.get(f"/{path}")
        assert answer.status_code == 200, path
        assert answer.headers["content-type"] == types[path.rpartition(".")[2]]
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert answer.headers["content-security-policy"] == POLICY
        found.add(path)
        needed |= {f"assets/{name}" for name in re.findall(r'from "\./([^"]+)";', answer.text)} - found
    assert found == {f"assets/{name}" for name in TEXTS if name != "page.html"}


@pytest.mark.parametrize(
    "path", ["none.js", "page.html", "../web_page.py", "..%2fweb_page.py", "%2e%2e/web_page.py", "assets/main.js", ""]
)
def test_other_names_are_refused_in_the_servers_shape(client, path):
    answer = client.get(f"/assets/{path}")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"


def test_only_reading_is_allowed_and_only_under_this_hosts_names(client):
    assert client.post("/").status_code == 405
    assert client.post("/assets/main.js").status_code == 405
    for path in ("/", "/assets/main.js"):
        assert client.get(path, headers={"host": "evil.example"}).status_code == 400
        assert client.get(path, headers={"host": "localhost:8000"}).status_code == 200


def test_text_is_never_read_as_html_and_nothing_comes_from_elsewhere():
    for name, text in PROGRAM.items():
        forbidden = (
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|\balert\(|localStorage"
        )
        assert not re.search(forbidden, text), name
        assert text.startswith("// "), name  # says what it is for
    assert not re.search(r"<style|<script(?! type=\"module\" src)|\son\w+=|\sstyle=", TEXTS["page.html"])
    for name, text in TEXTS.items():
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name


def test_every_element_that_the_program_looks_for_is_there_once():
    ids = re.findall(r'\sid="([^"]+)"', TEXTS["page.html"])
    assert len(ids) == len(set(ids))
    wanted = {name for text in PROGRAM.values() for name in re.findall(r'find\("([^"]+)"\)', text)}
    assert wanted - set(ids) == set()
    assert len(wanted) > 20


def test_every_field_has_a_label():
    page = TEXTS["page.html"]
    fields = re.findall(r'<(?:input|textarea) id="([^"]+)"', page)
    assert set(fields) - set(re.findall(r'<label[^>]* for="([^"]+)"', page)) == {
        "file"
    }  # never shown; a button opens it


def test_both_pages_have_the_same_colours():
    def colours(text):
        return re.findall(r"(--[\w-]+): (#[0-9a-f]{3,6});", text)

    ours, explorers = colours(TEXTS["page.css"]), colours(asset("colours.css")) + colours(asset("app.css"))
    shared = {name for name, _ in ours} & {name for name, _ in explorers}
    assert {"--text", "--dim", "--back", "--raised", "--line", "--accent", "--wrong", "--0", "--7"} <= shared
    assert {colour for colour in ours if colour[0] in shared} == {colour for colour in explorers if colour[0] in shared}


def test_the_page_knows_how_much_the_server_takes():
    (limit,) = re.findall(r"MOST_MIB = (\d+);", PROGRAM["reading.js"])
    assert int(limit) * 2**20 == MAX_BODY
