"""
Load a server with 1, 4 and 16 clients, with and without compression. The load comes from locust, a public tool.

    pip install 'locust>=2.40'
    python -m experiments.serve_load --out results/serve
    python -m experiments.serve_load --out results/serve/long --clients 16 --seconds 600 --shares 0.1

Each client asks one question after the other about one of a few documents, as a stream, and waits for the whole answer.
For each server and number of clients: questions answered, time until the first token and until the end, tokens per
second of all clients together, refusals (429), errors, and the resident memory of the server at the start and at the
end. The last line is one JSON document. The exit status is 1 if there was an error other than 429.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PLAN = "KVPRESS_MOE_LOAD"  # environment variable: what the clients ask, as JSON

if PLAN in os.environ:  # locust has loaded this file
    from locust import HttpUser, task

    class Asking(HttpUser):
        """A client that asks one question after the other."""

        plan = json.loads(os.environ[PLAN])
        host = plan["host"]

        @task
        def ask(self) -> None:
            """Ask a question, and read the answer as a stream."""
            body = {
                "model": self.plan["model"],
                "messages": [{"role": "user", "content": random.choice(self.plan["questions"])}],
                "documents": [random.choice(self.plan["documents"])],
                "stream": True,
                "stream_options": {"include_usage": True},
                "max_tokens": self.plan["max_tokens"],
            }
            started, first, n_tokens = time.monotonic(), None, 0
            with self.client.post(
                "/v1/chat/completions", json=body, stream=True, catch_response=True, name="chat"
            ) as answer:
                if answer.status_code == 429:
                    answer.success()
                    self.note({"status": 429})
                    time.sleep(float(answer.headers["retry-after"]))
                    return
                for line in answer.iter_lines():
                    if not line.startswith(b"data: {"):
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        answer.failure(event["error"]["message"])
                        self.note({"status": "error in the stream"})
                        return
                    if event["choices"] and event["choices"][0]["delta"].get("content") and first is None:
                        first = time.monotonic() - started
                    if event.get("usage"):
                        n_tokens = event["usage"]["completion_tokens"]
                if answer.status_code != 200 or not n_tokens:
                    answer.failure(f"status {answer.status_code}, {n_tokens} tokens")
            times = {"started": started, "first": first, "whole": time.monotonic() - started}
            self.note({"status": answer.status_code, "tokens": n_tokens, **times})

        def note(self, row: dict[str, Any]) -> None:
            """Add a line to the file of results."""
            with open(self.plan["results"], "a") as file:
                file.write(json.dumps(row) + "\n")


def load(server: Any, documents: Sequence[str], clients: int, seconds: int, max_tokens: int) -> dict[str, Any]:
    """Let locust's clients ask for some time. What they saw."""
    from experiments.served import QUESTIONS

    with tempfile.TemporaryDirectory() as name:
        results = Path(name) / "results.jsonl"
        plan = {
            "host": server.address,
            "model": server.model,
            "documents": list(documents),
            "questions": list(QUESTIONS),
            "max_tokens": max_tokens,
            "results": str(results),
        }
        command = [sys.executable, "-m", "locust", "-f", __file__, "--headless", "--only-summary"]
        command += ["-u", str(clients), "-r", str(clients), "-t", f"{seconds}s", "--stop-timeout", "120"]
        memory, done = [server.rss_mib()], threading.Event()

        def watch() -> None:
            while not done.wait(5):
                memory.append(server.rss_mib())

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            environment = {**os.environ, PLAN: json.dumps(plan)}
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        finally:
            done.set()
            watching.join()
        rows = [json.loads(line) for line in results.read_text().splitlines()]
    good = [row for row in rows if row["status"] == 200 and row["tokens"]]
    firsts = sorted(row["first"] or row["whole"] for row in good)
    half = len(memory) // 2
    return {
        "clients": clients,
        "answers": len(good),
        "refused": sum(row["status"] == 429 for row in rows),
        "errors": len(rows) - len(good) - sum(row["status"] == 429 for row in rows),
        "first_token_median": statistics.median(firsts),
        "first_token_p95": firsts[int(0.95 * (len(firsts) - 1))],
        "whole_median": statistics.median(row["whole"] for row in good),
        "tokens_per_second": tokens_within(good, seconds) / seconds,
        "rss_mib": [round(max(memory[1 : half + 1] or memory)), round(max(memory[half:]))],
    }


def tokens_within(answers: Sequence[dict[str, Any]], seconds: float) -> float:
    """
    Tokens of the answers in these seconds since the first question.

    Of answers that end later, the tokens after the first one are counted as if they came at even times.
    """
    stop = min(answer["started"] for answer in answers) + seconds
    found = 0.0
    for answer in answers:
        first = answer["first"] or 0.0
        writing = max(1e-9, answer["whole"] - first)
        found += answer["tokens"] * min(1.0, max(0.0, (stop - answer["started"] - first) / writing))
    return found


def main() -> int:
    from experiments.served import save, served, texts, versions
    from kvpress_moe.model.loading import load_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the table")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=int, default=60, help="for each number of clients")
    parser.add_argument("--shares", nargs="+", default=["1", "0.1"], help="--bytes of the servers; 1: no compression")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of a document")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--attention", default="compiled", help="as of kvpress-moe serve")
    arguments = parser.parse_args()
    _, tokenizer = load_model(None)
    asked = texts(lambda text: len(tokenizer(text, add_special_tokens=False).input_ids), arguments.tokens)
    some = [next(asked) for _ in range(arguments.documents)]
    found: dict[str, list[dict[str, Any]]] = {}
    for share in arguments.shares:
        own = ["--bytes", share, "--attention", arguments.attention]
        with tempfile.TemporaryDirectory() as name, served(Path(name), *own) as server:
            names = [server.post(text)["id"] for text in some]
            found[share] = []
            for clients in arguments.clients:
                row = load(server, names, clients, arguments.seconds, arguments.max_tokens)
                found[share].append(row)
                print(f"--bytes {share}: {row}", flush=True)
    lines = [
        "# Load",
        "",
        f"{arguments.documents} documents of about {arguments.tokens} tokens, answers of at most "
        f"{arguments.max_tokens} tokens, {arguments.seconds} s for each row; `--attention {arguments.attention}`; "
        f"SmolLM2-135M-Instruct, float32, {os.cpu_count()} CPU threads; {versions('locust')}.",
        "",
        "| `--bytes` | clients | answers | refused (429) | errors | first token, median s | 95th percentile "
        "| whole answer, median s | tokens/s, all | memory, first half | second half |",
        "|" + "---|" * 11,
    ]
    for share, rows in found.items():
        for row in rows:
            times = [f"{row[key]:.2f}" for key in ("first_token_median", "first_token_p95", "whole_median")]
            cells = [share, *(row[key] for key in ("clients", "answers", "refused", "errors")), *times]
            cells += [f"{row['tokens_per_second']:.1f}", *(f"{mib} MiB" for mib in row["rss_mib"])]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    name = "load" if arguments.attention == "compiled" else f"load_{arguments.attention}"
    save(arguments.out, name, lines, found)
    return int(any(row["errors"] for rows in found.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
