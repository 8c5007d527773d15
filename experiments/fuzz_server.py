"""
Fuzz a server by what it says of itself: its OpenAPI document. The requests come from schemathesis, a public tool.

    pip install 'schemathesis>=4'
    python -m experiments.fuzz_server                                  a tiny model, without a key, then with one
    python -m experiments.fuzz_server --cases 20 --seed 1              fewer requests, others
    python -m experiments.fuzz_server --url http://127.0.0.1:8000 --key KEY

Right and wrong requests are sent to all routes. No answer may be a server error. Each must have a status, a type and a
schema that the document names; what the document forbids must be refused; without its key the server must answer 401.
Chats ask about a document that is there, too. ``--cases`` is for each route and phase of schemathesis: values at the
edge of what is allowed, random ones, and chains of requests. Prints a table; the last line is one JSON document. The
exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2 as httpx

from kvpress_moe.serve.app import make_app
from kvpress_moe.serve.scheduler import Scheduler
from tests.serve.made import make_engine
from tests.serve.running import running
from tests.tiny import byte_tokenizer, tiny_model

CONTEXT = 160  # tokens; answers are no longer, so that many fit into a minute
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "allow_header_conformance",
    "unsupported_method",
    "ignored_auth",
)
TEXT = "The lease was signed by Anna."
COLUMNS = ("server", "routes", "requests", "server errors", "other failures", "seconds")


@contextmanager
def tiny_server(key: str | None) -> Iterator[str]:
    """The address of a server over a tiny model with random weights."""
    with tempfile.TemporaryDirectory() as directory:
        model = tiny_model("llama", max_position_embeddings=CONTEXT)
        engine = make_engine(model, byte_tokenizer(chat=True), Path(directory))
        with running(make_app(engine, Scheduler(engine), key)) as address:
            yield address


def with_a_document(schema: dict[str, Any], client: httpx.Client) -> dict[str, Any]:
    """The OpenAPI document, so changed that many chats are about a document that is there."""
    answer = client.post("/v1/documents", json={"text": TEXT})
    answer.raise_for_status()
    names = schema["components"]["schemas"]["ChatRequest"]["properties"]["documents"]
    names["items"] = {"anyOf": [{"enum": [answer.json()["id"]]}, names["items"]]}
    return schema


def server_errors(client: httpx.Client) -> int:
    """How many requests a server has answered with a status of 500 or more, by its own count."""
    answer = client.get("/metrics")
    if answer.status_code >= 500:
        return 0  # that it cannot count is a failure that schemathesis finds
    answer.raise_for_status()
    lines = [line for line in answer.text.splitlines() if line.startswith("kvpress_moe_requests_total{")]
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if 'status="5' in line)


def fuzz(address: str, key: str | None, cases: int, seed: int) -> dict[str, Any]:
    """Fuzz one server. Returns a row of the table, with the failures."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory, httpx.Client(base_url=address, headers=headers) as client:
        errors_before = server_errors(client)
        schema, report = Path(directory) / "openapi.json", Path(directory) / "report.json"
        schema.write_text(json.dumps(with_a_document(client.get("/openapi.json").json(), client)))
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", str(schema), "--url", address]
        command += ["--checks", ",".join(CHECKS), "--max-examples", str(cases), "--seed", str(seed)]
        command += ["--generation-database", "none", "--continue-on-failure", "--no-color"]
        command += ["--report", "json", "--report-json-path", str(report)]
        command += [part for name, value in headers.items() for part in ("--header", f"{name}: {value}")]
        ended = subprocess.run(command, cwd=directory, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(f"schemathesis did not run: {ended.stdout[-2000:]}{ended.stderr[-2000:]}")
        found = json.loads(report.read_text())
        n_errors = server_errors(client) - errors_before
    failures = [{name: one[name] for name in ("type", "title", "count", "operations")} for one in found["failures"]]
    errors = [failure["count"] for failure in failures if failure["type"] == "ServerError"]
    if failures or found["errors"]:
        print(ended.stdout[-20_000:], file=sys.stderr)
    return {
        "server": "without a key" if key is None else "with a key",
        "routes": found["operations"]["tested"],
        "requests": found["test_cases"]["generated"],
        "server errors": max(n_errors, *errors, 0),
        "other failures": len(failures) - len(errors) + len(found["errors"]),
        "seconds": round(time.perf_counter() - started),
        "failures": failures,
    }


def main() -> None:
    """Fuzz the servers that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--key", help="its key")
    given = parser.parse_args()
    rows = []
    if given.url is not None:
        rows.append(fuzz(given.url, given.key, given.cases, given.seed))
    else:
        for key in (None, "secret"):
            with tiny_server(key) as address:
                rows.append(fuzz(address, key, given.cases, given.seed))
    print(" | ".join(COLUMNS))
    for row in rows:
        print(" | ".join(str(row[name]) for name in COLUMNS))
    print(json.dumps({"seed": given.seed, "schemathesis": version("schemathesis"), "runs": rows}))
    sys.exit(any(row["server errors"] or row["other failures"] for row in rows))


if __name__ == "__main__":
    main()
