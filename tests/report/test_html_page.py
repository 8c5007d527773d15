"""The report's page in a real browser: names are text whatever they hold, and nothing is run, loaded or sent."""

import json

import pytest

from tests.report.test_benchmark_report import GROUPS, TASKS, write_run

pytestmark = pytest.mark.browser

EVIL = (
    "<script>window.hit = 1; fetch('https://example.com/stolen')</script>",
    "\"><img src=https://example.com/x.png onerror='window.hit = 2'>",
    "' onmouseover='window.hit = 3' style='background: url(https://example.com/y.png)",
    "</style></td></table><iframe srcdoc='<script>parent.hit = 4</script>'></iframe>",
    "<meta http-equiv=refresh content='0; url=https://example.com/'>",
    "$\\frac{$ | a\n\n![](https://example.com/z.png)",
)


def evil_run(directory):
    """A run of which every text is an attack."""
    names = dict(zip([*TASKS, *list(GROUPS)[1:]], [*EVIL, EVIL[0] + "again"], strict=True))
    groups = {names.get(method, method): {"group": group} for method, group in GROUPS.items()}
    texts = {"model": EVIL[0], "setting": EVIL[1], "split": EVIL[2], "commands": list(EVIL)}
    run = write_run(directory, versions={EVIL[0]: EVIL[1]}, methods=groups, **texts)
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    for record in records:
        record["task"] = names[record["task"]]
        record["sample"] = record["task"] + record["sample"]
        for row in record["results"]:
            row[0] = names.get(row[0], row[0])
    (run / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run, names


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    pytest.importorskip("matplotlib")
    from kvpress_moe.report.benchmark_report import write_report

    directory = tmp_path_factory.mktemp("evil")
    run, names = evil_run(directory / "run")
    write_report([run], directory / "out")
    return directory / "out", names


@pytest.fixture
def page(browser):
    """A tab that writes down what it asked of the network and what it said."""
    tab = browser.new_page()
    tab.asked, tab.said = [], []
    tab.route("http**", lambda route: (tab.asked.append(route.request.url), route.abort()))
    tab.on("console", lambda message: tab.said.append(message.text))
    yield tab
    tab.close()


def test_names_from_records_are_shown_as_text_and_run_nothing(evil, page):
    out, names = evil
    page.goto((out / "report.html").as_uri())
    shown = page.evaluate("[...document.querySelectorAll('th, td, dd')].map(cell => cell.textContent)")
    for name in names.values():
        assert any(name in text for text in shown), name
    assert page.evaluate("window.hit") is None
    assert page.evaluate("document.querySelectorAll('script, iframe, [onerror], [onmouseover], [style]').length") == 0
    page.wait_for_timeout(50)
    assert page.url == (out / "report.html").as_uri()
    assert page.asked == []
    assert page.said == []


def test_the_pages_policy_lets_its_own_style_and_images_through_and_nothing_else(evil, page):
    out, _ = evil
    page.goto((out / "report.html").as_uri())
    assert page.evaluate("getComputedStyle(document.querySelector('dt')).fontWeight") == "600"
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0) && document.images.length") >= 2
    page.evaluate("""async () => {
        for (const [tag, text] of [['script', 'window.hit = 5'], ['style', 'dt { font-weight: 100 }']]) {
            const element = document.createElement(tag);
            element.textContent = text;
            document.head.append(element);
        }
        const image = new Image();
        image.src = 'https://example.com/x.png';
        document.body.append(image);
        await fetch('https://example.com/').catch(() => null);
    }""")
    assert page.evaluate("window.hit") is None
    assert page.evaluate("getComputedStyle(document.querySelector('dt')).fontWeight") == "600"
    assert page.asked == []
    assert sum("Content Security Policy" in text for text in page.said) >= 4


def test_the_markdown_report_makes_no_tag_link_or_image_of_a_name(evil):
    text = (evil[0] / "report.md").read_text()
    assert "<" not in text
    assert text.count("](") == 2  # the plots
