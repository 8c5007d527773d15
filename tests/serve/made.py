"""A server over a tiny model, without a network."""

from __future__ import annotations

from pathlib import Path

from kvpress_moe import MoERouterPress
from kvpress_moe.serve.document_store import DocumentStore
from kvpress_moe.serve.engine import Engine

TEXT = "The lease of the mill was signed by Anna Brandt in 1911. Its wheel stood still for a year.\n" * 8
NAME = "tiny"
SETTINGS = {"experts": ["expected_attention"], "budget": "global", "compression_ratio": 0.5}


def make_engine(model, tokenizer, directory: Path, max_bytes: int = 2**30, settings=SETTINGS) -> Engine:
    press = None if settings is None else MoERouterPress(**settings, cache_aware=False)
    return Engine(model, tokenizer, DocumentStore(directory, model, "recipe", max_bytes), press, NAME)
