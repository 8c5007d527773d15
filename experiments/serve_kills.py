"""
Kill servers (SIGKILL) while they write documents. No confirmed document may be lost, and none may be half there.

    python -m experiments.serve_kills                    20 kills, a tiny model with random weights
    python -m experiments.serve_kills --kills 40 --seed 1

Two servers share a directory. Documents are posted to both at once; at a random moment one of them is killed, and
started again. Every second kill waits for a file that has been begun. After each kill the other server, and the new
one, must know every document that any server has confirmed, answer a question about it, and list no document that
cannot be read. A document that the killed server did not finish is posted to the other server. Prints a table; the
last line is one JSON document. The exit status is 1 if something was lost.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx

from experiments.served import Served, start
from tests.tiny import byte_tokenizer, tiny_model

LENGTH = 3000  # characters of a document; its cache takes some time to write


def make_model(directory: Path) -> Path:
    """A tiny model with a chat template, on disk."""
    tiny_model("llama", max_position_embeddings=8192).save_pretrained(directory)
    byte_tokenizer(chat=True).save_pretrained(directory)
    return directory


def text_of(number: int, chance: random.Random) -> str:
    words = ["mill", "lease", "river", "wheel", "clerk", "year", "stone", "bread"]
    return f"Document {number}. " + " ".join(chance.choice(words) for _ in range(LENGTH // 6))


class Poster(threading.Thread):
    """Posts documents to a server until it is gone. Knows which ones were confirmed."""

    def __init__(self, address: str, texts: list[str]):
        super().__init__()
        self.address, self.texts = address, texts
        self.confirmed: list[str] = []
        self.is_stopped = False

    def run(self) -> None:
        for text in self.texts:
            if self.is_stopped:
                return
            try:
                answer = httpx.post(f"{self.address}/v1/documents", json={"text": text}, timeout=60)
            except httpx.HTTPError:
                return
            if answer.status_code == 201:
                self.confirmed.append(answer.json()["id"])


def wait_for_a_file(directory: Path, seconds: float = 10.0) -> None:
    """Wait until a file is being written."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not any(path.name.startswith(".doc-") for path in directory.iterdir()):
        pass


def faults(server: Served, confirmed: set[str], model: str, known: frozenset[str] = frozenset()) -> list[str]:
    """What is wrong with the documents that a server shows. Those that are ``known`` are not asked about."""
    listed = {document["id"] for document in server.client.get("/v1/documents").json()["data"]}
    found = [f"{name} is lost" for name in sorted(confirmed - listed)]
    for name in sorted(listed - known):
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "Who?"}],
            "documents": [name],
            "max_tokens": 1,
            "temperature": 0,
        }
        answer = server.client.post("/v1/chat/completions", json=body)
        if answer.status_code != 200:
            found.append(f"{name} is half there: {answer.text}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    confirmed: set[str] = set()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        directory = make_model(Path(name) / "model")
        caches = Path(name) / "caches"
        own = ["--model", str(directory), "--bytes", "0.5"]
        servers = [start(caches, *own) for _ in range(2)]
        model = servers[0].model
        number, seconds, known = 0, 0.0, frozenset[str]()
        for _ in range(3):  # how long one takes
            started = time.perf_counter()
            confirmed.add(servers[0].post(text_of(number, chance))["id"])
            seconds, number = time.perf_counter() - started, number + 1
        print("| kill | after s | confirmed | files left without a card | faults |\n|---|---|---|---|---|")
        for kill in range(arguments.kills):
            batches = [[text_of(number + 6 * which + one, chance) for one in range(6)] for which in (0, 1)]
            number += 12
            posters = [Poster(server.address, batch) for server, batch in zip(servers, batches, strict=True)]
            for poster in posters:
                poster.start()
            after = chance.uniform(0, 6 * seconds)
            time.sleep(after)
            killed, was_writing = kill // 2 % 2, kill % 2 == 1
            if was_writing:
                wait_for_a_file(caches)
                time.sleep(chance.uniform(0, 0.01))
            servers[killed].kill()
            for poster in posters:
                poster.is_stopped = True
            for poster in posters:
                poster.join()
                confirmed.update(poster.confirmed)
            servers[killed].client.close()
            cards, files = (sorted(path.stem for path in caches.glob(f"doc-*.{kind}")) for kind in ("json", "kv"))
            left = len(set(files) - set(cards)) + len(list(caches.glob(".doc-*")))
            other = servers[1 - killed]
            for text in batches[killed][len(posters[killed].confirmed) :][:1]:  # what the killed server did not finish
                confirmed.add(other.post(text)["id"])
            servers[killed] = start(caches, *own)
            wrong = [fault for server in servers for fault in faults(server, confirmed, model, known)]
            known = frozenset(confirmed)
            rows.append({"after": after, "confirmed": len(confirmed), "left": left, "faults": wrong})
            print(
                f"| {kill + 1} | {after:.2f} | {len(confirmed)} | {left} | {'; '.join(wrong) or 'none'} |", flush=True
            )
        n_faults = sum(len(row["faults"]) for row in rows)
        statuses = []
        for server in servers:
            n_faults += len(faults(server, confirmed, model))
            statuses.append(server.interrupt())
            server.client.close()
    n_left = sum(row["left"] > 0 for row in rows)
    found = {"kills": len(rows), "confirmed": len(confirmed), "kills_that_left_files": n_left, "faults": n_faults}
    print(json.dumps(found | {"seed": arguments.seed}))
    return int(n_faults > 0 or any(statuses))


if __name__ == "__main__":
    sys.exit(main())
