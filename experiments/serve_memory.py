"""
How many documents does a server hold in the same memory, with and without compression?

    python -m experiments.serve_memory --out results/serve

Documents are posted to two servers with the same ``--memory`` until the first one leaves memory. One server compresses
them; the other one keeps them as they are. On a CPU caches are in float32; uncompressed ones take twice the bytes of a
16-bit cache there. So the table also gives the ratio to uncompressed caches in 16 bits. The last line is one JSON
document.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from experiments.served import save, served, texts, versions
from kvpress_moe.model.loading import load_model


def documents_held(memory: int, length: int, count_tokens: Any, own: list[str]) -> dict[str, float]:
    """Post documents until one leaves memory. What the server held just before."""
    with tempfile.TemporaryDirectory() as name, served(Path(name), "--memory", str(memory), *own) as server:
        before = server.rss_mib()
        n_held, n_tokens, full_bytes, held_bytes = 0, 0, 0, 0.0
        for text in texts(count_tokens, length):
            document = server.post(text)
            if server.metric("documents_evicted"):
                break
            n_held += 1
            n_tokens += document["tokens"]
            full_bytes += document["full_bytes"]
            held_bytes = server.metric("cache_bytes")
            print(f"{' '.join(own)}: {n_held} documents, {held_bytes / 2**20:.1f} MiB", flush=True)
        return {
            "documents": n_held,
            "tokens": n_tokens,
            "cache_mib": held_bytes / 2**20,
            "full_16_bit_mib": full_bytes / 2**20,
            "rss_growth_mib": server.rss_mib() - before,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the table")
    parser.add_argument("--memory", type=int, default=64, help="MiB of caches")
    parser.add_argument("--tokens", type=int, default=600, help="tokens of a document")
    parser.add_argument("--bytes", default="0.1", help="as of kvpress-moe serve")
    arguments = parser.parse_args()
    _, tokenizer = load_model(None)

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    found = {
        share: documents_held(arguments.memory, arguments.tokens, count_tokens, ["--bytes", share])
        for share in ("1", arguments.bytes)
    }
    whole, small = found["1"], found[arguments.bytes]
    in_16_bits = small["documents"] * arguments.memory / small["full_16_bit_mib"]  # of the same documents
    lines = [
        "# Documents in the same memory",
        "",
        f"`--memory {arguments.memory}` (MiB of caches), documents of about {arguments.tokens} tokens; "
        f"SmolLM2-135M-Instruct; seed 0; {versions()}.",
        "",
        "| `--bytes` | documents held | MiB of caches | ratio to 16 bits, uncompressed | growth of the process |",
        "|---|---|---|---|---|",
        f"| 1 (as they are, float32) | {whole['documents']} | {whole['cache_mib']:.1f} | | "
        f"{whole['rss_growth_mib']:.0f} MiB |",
        f"| 1, in 16 bits (computed) | {in_16_bits:.1f} | | 1 | |",
        f"| {arguments.bytes} | {small['documents']} | {small['cache_mib']:.1f} | "
        f"{small['documents'] / in_16_bits:.1f} | {small['rss_growth_mib']:.0f} MiB |",
        "",
        "The growth of the process has what it needs to read a document, about the same on both servers.",
    ]
    save(arguments.out, "memory", lines, found | {"ratio": small["documents"] / in_16_bits})


if __name__ == "__main__":
    main()
