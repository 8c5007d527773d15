"""DocumentStore: compressed documents on disk, and as many of them in memory as fit."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from kvpress_moe.cache import load_cache, save_cache
from kvpress_moe.cache.prefill import cache_bytes
from kvpress_moe.errors import CheckpointError
from kvpress_moe.files import is_text, is_whole, read_json, write_atomically
from kvpress_moe.serve.document_report import DocumentReport

logger = logging.getLogger(__name__)

MOST_PREFIXES = 64  # beginnings of chats on disk; the oldest go first
_ID = re.compile(r"doc-[0-9a-f]{24}")


@dataclass(frozen=True)
class Document:
    """
    A text whose compressed cache is on disk.

    Attributes
    ----------
    id : str
        Follows from the text and from how it was compressed: the same text has the same id.
    title : str
    n_tokens : int
        Tokens of the prefix.
    n_characters : int
        Characters of the prefix: the text, and what the chat template puts before it.
    text_hash : str
        SHA-256 of the prefix.
    n_bytes : int
        Bytes of the compressed cache.
    created : int
        Seconds since 1970.
    kind : {"document", "prefix"}
        A document that was posted, or the beginning of a chat, which is not listed and has no name for clients.
    report : DocumentReport, optional
        What is told of it.
    """

    id: str
    title: str
    n_tokens: int
    n_characters: int
    text_hash: str
    n_bytes: int
    created: int
    kind: str = "document"
    report: DocumentReport | None = None

    @classmethod
    def from_card(cls, card: Mapping[str, Any]) -> Document:
        """
        A document from what its card says.

        Raises
        ------
        KeyError, TypeError, ValueError
            If a field is missing or wrong.
        """
        fields = {name: card[name] for name in cls.__dataclass_fields__ if name != "report"}
        document = cls(**fields, report=DocumentReport.from_card(card["report"]))
        texts = (document.id, document.title, document.text_hash)
        whole = (document.n_tokens, document.n_characters, document.created)
        if not (all(map(is_text, texts)) and all(map(is_whole, whole)) and type(document.n_bytes) is int):
            raise ValueError("a field has a wrong type")
        if document.kind not in ("document", "prefix"):
            raise ValueError("an unknown kind")
        return document


def hash_text(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


class DocumentStore:
    """
    Compressed documents in a directory, which several servers may share.

    A document is two files: ``ID.kv``, the saved cache, and ``ID.json``, what is known of it. The second one is written
    last and removed first. So a document is there as a whole or not at all, whenever a server is killed.

    Parameters
    ----------
    directory : Path
    model : PreTrainedModel
    recipe : str
        How documents are compressed. Documents of other recipes in the directory are not shown.
    max_bytes : int
        Bytes of caches in memory. The least recently used ones leave it first; they stay on disk.
    router : str or Path, optional
        Directory of the routers, if they are not those in the package.
    """

    def __init__(
        self,
        directory: Path,
        model: PreTrainedModel,
        recipe: str,
        max_bytes: int,
        router: str | Path | None = None,
    ):
        self.directory, self.model, self.recipe, self.max_bytes, self.router = (
            directory,
            model,
            recipe,
            max_bytes,
            router,
        )
        directory.mkdir(parents=True, exist_ok=True)
        self.sweep()
        self._caches: OrderedDict[str, tuple[DynamicCache, int]] = OrderedDict()
        #: By name: when the card was written, and what it says; None for another recipe. Cards are never changed.
        self._cards: dict[str, tuple[tuple[int, int], Document | None]] = {}
        self._lock = threading.Lock()
        self.n_evicted = 0

    def id_of(self, prefix: str) -> str:
        """The id of a document with this prefix."""
        return "doc-" + hash_text(f"{self.recipe} {hash_text(prefix)}")[:24]

    def add(
        self,
        title: str,
        prefix: str,
        input_ids: Sequence[int],
        cache: DynamicCache,
        press: Any,
        kind: str = "document",
        report: DocumentReport | None = None,
    ) -> Document:
        """
        Write a document, and keep its cache in memory.

        Raises
        ------
        WriteError
            If a file cannot be written. The document is not there then.
        """
        name, n_bytes = self.id_of(prefix), cache_bytes(cache)
        sizes = (len(input_ids), len(prefix), hash_text(prefix), n_bytes)
        document = Document(name, title, *sizes, int(time.time()), kind, report)
        save_cache(self._cache_file(name), cache, self.model, torch.tensor([list(input_ids)]), press)
        text = json.dumps({**asdict(document), "recipe": self.recipe})
        write_atomically(self._card(name), lambda path: path.write_text(text, encoding="utf-8"))
        self._remember(name, cache, n_bytes)
        prefixes = [one for one in self._all() if one.kind == "prefix"]
        for old in prefixes[: max(0, len(prefixes) - MOST_PREFIXES)]:
            self.delete(old.id)
        return document

    def documents(self) -> list[Document]:
        """All documents that were posted, the oldest first."""
        return [document for document in self._all() if document.kind == "document"]

    def _all(self) -> list[Document]:
        names = {path.stem for path in self.directory.glob("doc-*.json")}
        for name in set(self._cards) - names:  # another server has deleted them
            self._cards.pop(name, None)
        found = (self.find(name) for name in names)
        return sorted((document for document in found if document), key=lambda one: (one.created, one.id))

    def sweep(self, older_than: float = 3600.0) -> None:
        """Delete what servers left behind that were killed while they wrote: files without a card, an hour old."""
        for path in self.directory.iterdir():
            is_ours = re.fullmatch(r"\.?doc-[0-9a-f]{24}\.(kv|json)(\..*)?", path.name)
            is_whole_pair = not path.name.startswith(".") and self._card(path.stem).exists()
            if is_ours and not is_whole_pair and time.time() - path.stat().st_mtime > older_than:
                path.unlink(missing_ok=True)

    def find(self, name: str) -> Document | None:
        """A document by its id. None if there is none, or if its files cannot be read."""
        if not _ID.fullmatch(name):
            return None
        path = self._card(name)
        try:
            at = path.stat()
            known = self._cards.get(name)
            if known is None or known[0] != (at.st_mtime_ns, at.st_ino):
                card = read_json(path)
                document = None if card["recipe"] != self.recipe else Document.from_card(card)
                if document is not None and document.id != name:
                    raise ValueError("the card of another document")
                self._cards[name] = known = ((at.st_mtime_ns, at.st_ino), document)
            return known[1] if self._cache_file(name).is_file() else None
        except FileNotFoundError:
            self._cards.pop(name, None)
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("document %s cannot be read (%s), and is left out", name, type(error).__name__)
            return None

    def cache(self, document: Document) -> DynamicCache:
        """
        The cache of a document. It must not be changed; see :func:`kvpress_moe.serve.generation.borrowed`.

        Raises
        ------
        CheckpointError
            If its file is missing or broken.
        """
        with self._lock:
            held = self._caches.get(document.id)
            if held is not None:
                self._caches.move_to_end(document.id)
                return held[0]
        saved = load_cache(self._cache_file(document.id), self.model, self.router)
        if saved.n_tokens != document.n_tokens:
            raise CheckpointError(f"document {document.id}: its two files do not belong together. Delete it.")
        self._remember(document.id, saved.cache, document.n_bytes)
        return saved.cache

    def delete(self, name: str) -> bool:
        """Delete a document. Returns whether there was one."""
        if self.find(name) is None:
            return False
        self._card(name).unlink(missing_ok=True)
        self._cache_file(name).unlink(missing_ok=True)
        with self._lock:
            self._caches.pop(name, None)
        return True

    def longest_prefix(self, text: str) -> Document | None:
        """The longest document or prefix that a text begins with."""
        by_length = sorted(self._all(), key=lambda document: -document.n_characters)
        hashes: dict[int, str] = {}
        for document in by_length:
            n = document.n_characters
            if n < len(text) and n not in hashes:
                hashes[n] = hash_text(text[:n])
            if hashes.get(n) == document.text_hash:
                return document
        return None

    @property
    def held_bytes(self) -> int:
        """Bytes of the caches in memory."""
        with self._lock:
            return sum(n_bytes for _, n_bytes in self._caches.values())

    @property
    def n_held(self) -> int:
        """Number of caches in memory."""
        return len(self._caches)

    def _remember(self, name: str, cache: DynamicCache, n_bytes: int) -> None:
        with self._lock:
            self._caches[name] = (cache, n_bytes)
            self._caches.move_to_end(name)
            while len(self._caches) > 1 and sum(size for _, size in self._caches.values()) > self.max_bytes:
                self._caches.popitem(last=False)
                self.n_evicted += 1

    def _cache_file(self, name: str) -> Path:
        return self.directory / f"{name}.kv"

    def _card(self, name: str) -> Path:
        return self.directory / f"{name}.json"
