"""
How long does a client wait for the first token of an answer about a long document?

    python -m experiments.serve_latency --out results/serve
    python -m experiments.serve_latency --out results/serve --tokens 2000 --rounds 5

A document is posted to the server, which reads and compresses it. Then the same question is asked in three ways, round
after round: of the server (a stream over HTTP, until the first token), in this process with the saved cache as
``kvpress-moe ask --cache`` does once it is warm (one token), and by reading the document anew without compression.
Times are medians. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kvpress.pipeline import KVPressTextGenerationPipeline
from transformers import DynamicCache

from experiments.served import QUESTIONS, Served, save, served, texts, versions
from kvpress_moe.cache import load_cache
from kvpress_moe.cache.answering import answer_each
from kvpress_moe.model.loading import load_model
from kvpress_moe.model.transformers_api import with_cache
from kvpress_moe.serve.work import CHUNK


def first_token(server: Served, model: str, document: str, question: str) -> float:
    """Seconds until the first token of a streamed answer."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "documents": [document],
        "stream": True,
        "max_tokens": 2,
        "temperature": 0,
    }
    started = time.perf_counter()
    with server.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                return time.perf_counter() - started
    raise RuntimeError("an answer without a token")


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the table")
    parser.add_argument("--tokens", type=int, default=8000, help="tokens of the document")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--anew", type=int, default=2, help="how often the document is read anew")
    parser.add_argument("--bytes", default="0.1", help="as of kvpress-moe serve")
    parser.add_argument("--model", help="hub id or directory; default: SmolLM2-135M-Instruct")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    text = next(texts(lambda text: len(tokenizer(text).input_ids), arguments.tokens))
    own = ["--bytes", arguments.bytes, *(["--model", arguments.model] if arguments.model else [])]
    found: dict[str, Any] = {"share": arguments.bytes, "rounds": arguments.rounds, "chunk": CHUNK}
    with tempfile.TemporaryDirectory() as name, served(Path(name), *own) as server, torch.no_grad():
        found["model"] = server.model
        found["post_seconds"] = timed(lambda: server.post(text))
        (document,) = server.client.get("/v1/documents").json()["data"]
        found |= {key: document[key] for key in ("tokens", "bytes", "full_bytes", "read_seconds")}
        saved = load_cache(Path(name) / f"{document['id']}.kv", model)
        pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
        prefix = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])

        def ask_cache(question: str) -> None:
            question_ids = pipeline.preprocess("", [question], "", sys.maxsize)["questions_ids"]
            answer_each(pipeline, saved.cache, question_ids, saved.n_tokens, 1)

        def anew() -> None:
            model.model(input_ids=prefix, **with_cache(DynamicCache()))

        rows: dict[str, list[float]] = {"server": [], "ask": [], "anew": []}
        first_token(server, found["model"], document["id"], QUESTIONS[0])
        ask_cache(QUESTIONS[0])
        for number in range(arguments.rounds):
            question = QUESTIONS[number % len(QUESTIONS)]
            rows["server"].append(first_token(server, found["model"], document["id"], question))
            rows["ask"].append(timed(lambda question=question: ask_cache(question)))  # type: ignore[misc]
            if number < arguments.anew:
                rows["anew"].append(timed(anew))
    found["seconds"] = {name: [round(x, 4) for x in times] for name, times in rows.items()}
    median = {name: statistics.median(times) for name, times in rows.items()}
    found["of_anew"] = median["server"] / median["anew"]
    found["of_ask"] = median["server"] / median["ask"]
    lines = [
        "# First token",
        "",
        f"A document of {found['tokens']} tokens; {found['model']}, float32, {torch.get_num_threads()} threads; "
        f"`--bytes {arguments.bytes}`; medians of {arguments.rounds} rounds; {versions()}.",
        "",
        "| what | seconds | ratio |",
        "|---|---|---|",
        f"| read the document anew, no compression | {median['anew']:.2f} | 1 |",
        f"| first token of the server | {median['server']:.3f} | {found['of_anew']:.4f} |",
        f"| first token in this process, from the saved cache | {median['ask']:.3f} | "
        f"{median['ask'] / median['anew']:.4f} |",
        "",
        f"Server over this process: {found['of_ask']:.2f}. Reading and compressing took the server "
        f"{found['read_seconds']:.1f} s, once.",
    ]
    save(arguments.out, "latency", lines, found)


if __name__ == "__main__":
    main()
