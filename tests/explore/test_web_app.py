"""The app: one text at a time, clear refusals, nothing for or from other sites; and one whole run in Chromium."""

import json
import os
import signal
import sys
from threading import Event, Thread
from urllib.request import urlopen

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from kvpress_moe.cli import app as cli
from kvpress_moe.errors import SettingError
from kvpress_moe.explore.jobs import KEPT_JOBS, JobRunner
from kvpress_moe.explore.web_app import MAX_BYTES, make_app
from kvpress_moe.serve.loopback import listen, run
from tests.explore.made import TEXT
from tests.explore.test_command import explore

ADDRESS = "http://127.0.0.1:8720"
DEFAULTS = {"text": TEXT, "question": "</script>", "ratio": 0.5, "experts": None, "budget": None, "router": None}
SETTING = {"ratio": "0.5", "experts": "", "budget": "", "router": "", "precision": ""}


class Patient(JobRunner):
    """Does its work when the test says so."""

    def _start(self, work):
        self.work = work


@pytest.fixture
def runner(llama, tokenizer):
    return Patient(llama, tokenizer, 4)


@pytest.fixture
def client(runner):
    with TestClient(make_app(runner, DEFAULTS), base_url=ADDRESS) as client:
        yield client


def post(client, settings=(SETTING,), text=TEXT, **options):
    request = {"text": text, "question": "What?", "settings": list(settings)}
    return client.post("/jobs", json=request, **options)


def test_a_job_says_how_far_it_is_and_ends_in_one_page_for_each_setting(client, runner):
    answer = post(client, [SETTING, SETTING | {"ratio": "0.9", "experts": "knorm", "budget": "layer"}])
    assert answer.status_code == 202
    address = f"/jobs/{answer.json()['job']}"
    job = client.get(address).json()
    assert (job["state"], job["pages"]) == ("working", 0)
    assert client.get(f"{address}/pages/0").status_code == 404
    runner.work()
    job = client.get(address).json()
    assert (job["state"], job["pages"], job["error"]) == ("done", 2, "")
    budgets = [payload_of(client.get(f"{address}/pages/{number}").text)["budget"] for number in (0, 1)]
    assert budgets == [
        {"ratio": 0.5, "scope": "uniform", "min_share": 0.2, "min_pairs": 40},
        {"ratio": 0.9, "scope": "layer", "min_share": 0.2, "min_pairs": 40},
    ]
    assert client.get(f"{address}/pages/2").status_code == 404


def payload_of(html):
    return json.loads(html.split('type="application/json">')[1].split("</script>")[0])


def test_progress_names_each_step(llama, tokenizer):
    runner, seen = Patient(llama, tokenizer, 4), []
    name = runner.submit(TEXT, ["What?"], [{"compression_ratio": 0.5}])
    job = runner.jobs[name]
    step = job.step
    job.step = lambda *args, **kwargs: (step(*args, **kwargs), seen.append((job.description, job.done, job.total)))
    runner.work()
    assert [part for part in seen if part[0] == "prefill"] == [("prefill", n, 2) for n in (0, 1, 2)]
    assert ("asking the full cache", 1, 1) in seen
    assert ("asking the compressed cache", 1, 1) in seen


def test_a_busy_model_says_so_and_is_free_again_afterwards(client, runner):
    assert post(client).status_code == 202
    busy = post(client)
    assert (busy.status_code, busy.json()["error"][:15]) == (409, "The model works")
    runner.work()
    assert post(client).status_code == 202
    runner.work()


def test_a_text_that_is_too_long_fails_with_its_length_and_frees_the_model(client, runner):
    job = post(client, text="word " * 2000).json()["job"]
    runner.work()
    failed = client.get(f"/jobs/{job}").json()
    assert failed["state"] == "failed"
    assert "got '10001 tokens', expected at most" in failed["error"]
    assert post(client).status_code == 202
    runner.work()


def test_an_unforeseen_failure_is_told_and_frees_the_model(client, runner, monkeypatch, caplog):
    monkeypatch.setattr("kvpress_moe.explore.jobs.prefill_text", lambda *args: 1 / 0)
    job = post(client).json()["job"]
    runner.work()
    assert client.get(f"/jobs/{job}").json()["error"] == "ZeroDivisionError: division by zero"
    assert "exploring a text failed" in caplog.text
    assert post(client).status_code == 202


@pytest.mark.parametrize(
    ("changes", "text", "error"),
    [
        ({}, " \n", "TEXT: got"),
        ({"experts": "nobody"}, TEXT, "experts: got"),
        ({"ratio": "1"}, TEXT, "compression_ratio: got 1.0"),
        ({"ratio": "0"}, TEXT, "ratio: got 0.0"),
        ({"ratio": "much"}, TEXT, "request: got"),
        ({"budget": "heads"}, TEXT, "budget: got"),
        ({"precision": "few"}, TEXT, "precision: got 'few'"),
        ({"max_kl": "0"}, TEXT, "max_kl: got 0.0"),
        ({"max_kl": "nan"}, TEXT, "max_kl: got nan"),
        ({"max_kl": "little"}, TEXT, "request: got"),
    ],
)
def test_wrong_input_is_refused_with_the_reason(client, runner, changes, text, error):
    answer = post(client, [SETTING | changes], text)
    assert answer.status_code == 422
    assert answer.json()["error"].startswith(error)
    assert not runner.jobs
    assert post(client).status_code == 202  # the model is free


@pytest.mark.parametrize(
    "body", ["", "[]", "{}", '{"text": 1, "question": 2, "settings": []}', '{"settings": 3}', "[" * 100_000]
)
def test_what_the_form_cannot_have_sent_is_refused(client, body):
    answer = client.post("/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422


def test_a_request_without_end_is_cut_off(client):
    assert post(client, text="a" * MAX_BYTES).status_code == 413


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8720", "127.0.0.1.evil.example", ""])
def test_other_names_for_this_machine_are_refused(client, host):
    """What keeps a foreign page whose name was pointed at 127.0.0.1 from reading along."""
    for answer in (client.get("/", headers={"Host": host}), post(client, headers={"Host": host})):
        assert answer.status_code == 400
    assert client.get("/", headers={"Host": "localhost:8720"}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "https://127.0.0.1:8720"])
def test_posts_of_other_sites_are_refused(client, runner, origin):
    assert post(client, headers={"Origin": origin}).status_code == 403
    assert not runner.jobs
    assert post(client, headers={"Origin": ADDRESS}).status_code == 202


def test_a_form_of_another_site_cannot_post_without_asking_first(client, runner):
    body = json.dumps({"text": TEXT, "question": "", "settings": [SETTING]})
    assert client.post("/jobs", content=body, headers={"Content-Type": "text/plain"}).status_code == 415
    assert client.options("/jobs").status_code == 405
    assert not runner.jobs


def test_every_answer_keeps_to_its_origin(client, runner):
    job = post(client).json()["job"]
    runner.work()
    answers = [client.get(path) for path in ("/", f"/jobs/{job}", f"/jobs/{job}/pages/0", "/jobs/none")]
    for answer in answers:
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers
    assert "frame-ancestors 'none'" in answers[0].headers["content-security-policy"]
    assert "unsafe" not in answers[0].headers["content-security-policy"]
    assert "sandbox allow-scripts; frame-ancestors 'self'" in answers[2].headers["content-security-policy"]


def test_old_pages_are_forgotten(client, runner):
    names = []
    for _ in range(KEPT_JOBS + 1):
        names.append(post(client).json()["job"])
        runner.work()
    assert client.get(f"/jobs/{names[0]}").status_code == 404
    assert [client.get(f"/jobs/{name}").status_code for name in names[1:]] == [200] * KEPT_JOBS


def test_only_the_loopback_interface_is_listened_on_and_a_taken_port_is_refused():
    listening = listen(0)
    host, port = listening.getsockname()
    assert host == "127.0.0.1"
    listening.listen()
    with pytest.raises(SettingError, match=rf"port: got {port}, expected a free port"):
        listen(port)
    listening.close()


def test_serving_takes_no_text(tmp_path):
    for more in (["text.txt"], ["--question", "What?"], ["--out", str(tmp_path / "page.html")]):
        assert str(explore("--serve", *more).exception).startswith("serve: got True, expected no TEXT")
    assert "--serve" in CliRunner().invoke(cli, ["explore", "--help"]).output


def test_an_interrupt_ends_the_server_in_order(runner, capfd):
    """Runs in this thread, where signals arrive."""

    def interrupt(address):
        with urlopen(address, timeout=10) as answer:  # waits in the socket's queue until the server is there
            assert answer.status == 200
        os.kill(os.getpid(), signal.SIGINT)

    with listen(0) as listening:
        listening.listen()
        run(make_app(runner, DEFAULTS), listening, lambda address: Thread(target=interrupt, args=[address]).start())
    assert "Traceback" not in "".join(capfd.readouterr())


def test_without_its_packages_the_app_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "kvpress_moe.explore.web_app")
    monkeypatch.delitem(sys.modules, "kvpress_moe.serve.loopback")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert str(explore("--serve").exception).endswith("pip install 'kvpress-moe[serve]'")


@pytest.fixture
def address(llama, tokenizer):
    """A real server on a free port."""
    import uvicorn

    started: list[uvicorn.Server] = []
    ready = Event()

    class Known(uvicorn.Server):
        async def startup(self, *args, **kwargs):
            await super().startup(*args, **kwargs)
            started.append(self)
            ready.set()

    with pytest.MonkeyPatch.context() as patch, listen(0) as listening:
        patch.setattr(uvicorn, "Server", Known)
        app, addresses = make_app(JobRunner(llama, tokenizer, 4), DEFAULTS), []
        thread = Thread(target=run, args=(app, listening, addresses.append))
        thread.start()
        assert ready.wait(10)
        yield addresses[0]
        started[0].should_exit = True
        thread.join(10)


@pytest.mark.browser
def test_two_settings_are_compared_side_by_side_in_chromium(chromium_page, address):
    tab = chromium_page(viewport={"width": 1500, "height": 900})
    page = tab.page
    page.goto(address)
    assert page.input_value("#question") == "</script>"

    page.fill("#text", " ")
    page.click("#go")
    page.wait_for_selector("#error:visible")
    assert tab.text("#error").startswith("TEXT: got")
    assert "422" in tab.complaints.pop()  # Chromium tells the console of every refusal

    page.fill("#text", TEXT)
    page.check("#compare")
    page.fill("fieldset:nth-of-type(2) [name=experts]", "knorm, tova")
    page.click("#go")
    frames = page.locator("iframe")
    frames.nth(1).wait_for()
    assert frames.count() == 2
    assert not page.locator("#error").is_visible()
    experts = []
    for number in (0, 1):
        inside = page.frame_locator("iframe").nth(number)
        inside.locator("#total").wait_for()
        experts.append(inside.locator("#legend .swatch").all_inner_texts())
        assert inside.locator("#text").text_content().startswith("<s>The crane lifts")
        inside.locator("#ratio").press("ArrowLeft")
        inside.locator("#removed", has_text="49 %").wait_for()
    assert experts == [["aggressive", "moderate", "conservative", "selective"], ["knorm", "tova"]]
    boxes = [frames.nth(number).bounding_box() for number in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    assert {request.split("/jobs")[0].rstrip("/") for request in tab.requests} == {address}
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
