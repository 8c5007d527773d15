"""Metrics of the server, in Prometheus's text format."""

from __future__ import annotations

from kvpress_moe.errors import SettingError
from kvpress_moe.serve.engine import Engine, Piece
from kvpress_moe.serve.scheduler import Scheduler

try:
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
except ImportError as error:
    raise SettingError("serve", True, "the package prometheus-client", "pip install 'kvpress-moe[serve]'") from error


class Metrics:
    """
    Counts requests and tokens, and shows the state of the queue and of the documents in memory.

    Parameters
    ----------
    engine : Engine
    scheduler : Scheduler
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine, scheduler: Scheduler):
        own = self._registry = CollectorRegistry()
        self._requests = Counter("kvpress_moe_requests", "Requests", ["path", "status"], registry=own)
        self._seconds = Histogram("kvpress_moe_request_seconds", "Time until the reply began", ["path"], registry=own)
        self._prompt = Counter("kvpress_moe_prompt_tokens", "Tokens of prompts", registry=own)
        self._cached = Counter("kvpress_moe_cached_tokens", "Tokens of prompts that caches held", registry=own)
        self._written = Counter("kvpress_moe_completion_tokens", "Tokens that were written", registry=own)
        shown = {
            "active_requests": ("Requests that are computed", lambda: scheduler.n_active),
            "waiting_requests": ("Requests that wait", lambda: scheduler.n_waiting),
            "documents_in_memory": ("Documents whose caches are in memory", lambda: engine.store.n_held),
            "cache_bytes": ("Bytes of caches in memory", lambda: engine.store.held_bytes),
            "documents_evicted": ("Documents that left memory", lambda: engine.store.n_evicted),
        }
        for name, (what, value) in shown.items():
            Gauge(f"kvpress_moe_{name}", what, registry=own).set_function(value)

    def count(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def tokens(self, piece: Piece) -> None:
        """Count the tokens of an answer, by its last piece."""
        self._prompt.inc(piece.prompt_tokens)
        self._cached.inc(piece.cached_tokens)
        self._written.inc(piece.completion_tokens)

    def text(self) -> bytes:
        """All metrics."""
        return generate_latest(self._registry)
