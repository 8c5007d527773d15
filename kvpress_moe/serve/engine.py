"""Engine: one model that compresses prefixes and answers chats. One thread at a time uses it."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.cache import read_together
from kvpress_moe.cache.joined_cache import rotary_changes
from kvpress_moe.errors import CheckpointError, KVPressMoEError
from kvpress_moe.model.end_tokens import end_tokens
from kvpress_moe.model.hooks import hooked
from kvpress_moe.model.layers import language_model
from kvpress_moe.model.transformers_api import with_cache
from kvpress_moe.model.twin import twin_of
from kvpress_moe.press.moe_router_press import MoERouterPress
from kvpress_moe.serve.api_error import APIError
from kvpress_moe.serve.chat_request import ChatRequest
from kvpress_moe.serve.document_report import report_of
from kvpress_moe.serve.document_store import Document, DocumentStore
from kvpress_moe.serve.generation import Sampling, TextOfTokens, borrowed, draw, generator_of
from kvpress_moe.serve.work import CHUNK, Compress, Read, read_in_chunks

logger = logging.getLogger(__name__)

LONG_PREFIX = 512  # tokens from which on the beginning of a chat is compressed and kept
DEFAULT_MAX_TOKENS = 256
CHARACTERS_PER_TOKEN = 64  # longer texts are refused before they are cut into tokens
_MARK = secrets.token_hex(16)  # no text holds it


@dataclass(frozen=True)
class Piece:
    """
    A piece of an answer; most hold one token.

    Attributes
    ----------
    text : str
    finish : {"stop", "length"} or None
        Why the answer ends, in the last piece.
    prompt_tokens, cached_tokens, completion_tokens : int
        So far.
    """

    text: str
    finish: str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Engine:
    """
    A model with a store of compressed documents. One thread at a time may use it.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
        With a chat template.
    store : DocumentStore
    press : MoERouterPress or None
        Compresses documents. None: they are kept as they are. Nothing of one document may change the next one, so it
        must have ``cache_aware=False``.
    name : str
        The model's name for clients.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        store: DocumentStore,
        press: MoERouterPress | None,
        name: str,
    ):
        self.model, self.tokenizer, self.store, self.press, self.name = model, tokenizer, store, press, name
        self.limit = int(language_model(model).config.max_position_embeddings)
        self._ends = end_tokens(model, tokenizer)
        self._reads_alone = rotary_changes(model)
        self._reader = twin_of(model)  # reads documents, with the hooks of a press
        self.prefix_of("a")  # raises if the template cannot serve documents

    # ── texts ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def prefix_of(self, text: str) -> str:
        """What the chat template makes of a document: all that comes before the first message's own text."""
        return self._around([{"role": "user", "content": f"{text}\n\n{_MARK}"}])[0]

    def _around(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, str]:
        """The rendered chat before and after the mark in it."""
        before, mark, after = self._render(messages).rpartition(_MARK)
        if not mark:
            raise APIError(500, "The chat template of this model changes texts; documents cannot be served with it.")
        return before, after

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        try:
            text: Any = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=False,
            )
        except TemplateError as error:
            raise APIError(400, f"messages: the model's chat template refuses them: {error}", "messages") from error
        return str(text)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a part of a rendered chat. Raises APIError if it is far too long for the model."""
        if len(text) > CHARACTERS_PER_TOKEN * self.limit:
            raise APIError(
                400,
                f"text: got {len(text)} characters, expected at most {CHARACTERS_PER_TOKEN * self.limit}.",
                code="context_length_exceeded",
            )
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def chat_text(self, request: ChatRequest) -> tuple[str, Document | None]:
        """
        The rendered chat, and the document that it begins with.

        Raises
        ------
        APIError
            If a document is not known, or if several are named.
        """
        if not request.documents:
            text = self._render(request.messages)
            return text, self.store.longest_prefix(text)
        if len(request.documents) > 1:
            raise APIError(
                400,
                f"documents: got {len(request.documents)}, expected one. Caches of different documents cannot be "
                "joined without an error. Post the texts together as one document.",
                "documents",
            )
        document = self.store.find(request.documents[0])
        if document is None:
            raise APIError(
                404,
                f"documents: there is no document {request.documents[0]!r}. GET /v1/documents lists them.",
                "documents",
                "not_found",
            )
        system = [message["content"] for message in request.messages if message["role"] == "system"]
        others = [message for message in request.messages if message["role"] != "system"]
        if not others or others[0]["role"] != "user":
            raise APIError(400, "messages: with documents, the first message must be the user's.", "messages")
        first = "\n\n".join((*system, others[0]["content"]))
        _, rest = self._around([{"role": "user", "content": _MARK + first}, *others[1:]])
        return rest, document

    def long_prefix(self, messages: Sequence[Mapping[str, str]]) -> str:
        """
        The beginning of a chat that other questions are likely to share: its first user message but the last paragraph.

        Empty if it has fewer than ``LONG_PREFIX`` tokens.
        """
        number = next((n for n, message in enumerate(messages) if message["role"] == "user"), None)
        if number is None:
            return ""
        content = messages[number]["content"]
        cut = content.rstrip().rfind("\n\n")
        if cut <= 0:
            return ""
        marked = {"role": "user", "content": content[: cut + 2] + _MARK + content[cut + 2 :]}
        prefix, _ = self._around([*messages[:number], marked, *messages[number + 1 :]])
        return prefix if len(self.tokens(prefix)) >= LONG_PREFIX else ""

    # ── work ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, reads: Sequence[Read]) -> list[Tensor]:
        """Read tokens of several chats in one forward pass. Logits (V,) after each, on the CPU."""
        groups = [[one] for one in reads] if self._reads_alone else [reads]
        parts = (([one.cache for one in group], [one.input_ids for one in group]) for group in groups)
        return [logits for part in parts for logits in read_together(self.model, *part).cpu()]

    def compress(self, work: Compress, between: Callable[[], Any] = lambda: None) -> Document:
        """
        Read a prefix, compress its cache, and store it. A prefix that is stored already is not read again.

        Parameters
        ----------
        work : Compress
        between : callable
            Called after each layer. Meanwhile the model may answer.

        Raises
        ------
        APIError
            If the prefix is too long for the model.
        WriteError
            If it cannot be stored.
        """
        known = self.store.find(self.store.id_of(work.prefix))
        if known is not None and self._is_whole(known) and (known.kind == work.kind or work.kind == "prefix"):
            return known
        input_ids = self.tokens(work.prefix)
        if len(input_ids) + 64 > self.limit:
            raise APIError(
                400,
                f"text: got {len(input_ids)} tokens, expected at most {self.limit - 64} for this model. Shorten it.",
                "text",
                "context_length_exceeded",
            )
        if self.press is not None:
            self.press.reset_stats()
        layers, own = language_model(self._reader).layers, 0.0
        cache, done, since = DynamicCache(), iter(range(1, len(layers) + 1)), time.perf_counter()

        def after_layer(*_: Any) -> None:
            nonlocal own, since
            own += time.perf_counter() - since
            work.on_layer(next(done), len(layers))
            between()
            since = time.perf_counter()

        with (
            torch.no_grad(),
            nullcontext() if self.press is None else self.press(self._reader),
            hooked(layers, after_layer),
        ):
            self._reader.model(input_ids=torch.tensor([input_ids], device=self.model.device), **with_cache(cache))
        report = report_of(self.model, len(input_ids), self.press, own + time.perf_counter() - since)
        return self.store.add(work.title, work.prefix, input_ids, cache, self.press, work.kind, report)

    def _is_whole(self, document: Document) -> bool:
        """Whether a document's cache can be read. If not, the document is deleted."""
        try:
            self.store.cache(document)
        except CheckpointError as error:
            logger.warning("document %s is deleted: %s", document.id, error)
            self.store.delete(document.id)
            return False
        return True

    def answer(self, request: ChatRequest) -> Generator[Any, Any, None]:
        """
        The pieces of an answer, with what has to be computed between them: see :mod:`kvpress_moe.serve.work`.

        Raises
        ------
        APIError
            If the chat is too long for the model.
        """
        text, document = self.chat_text(request)
        n_cached = 0 if document is None else document.n_tokens
        if not request.documents:
            prefix = self.long_prefix(request.messages)
            if prefix and text.startswith(prefix) and (document is None or 2 * document.n_characters < len(prefix)):
                document, n_cached = (yield from _kept(prefix)), 0
        if document is not None and not self._is_whole(document):
            if request.documents:
                raise APIError(404, f"documents: {document.id} cannot be read.", "documents", "not_found")
            document, n_cached = None, 0
        if document is not None and not request.documents:
            text = text[document.n_characters :]
        n_read = 0 if document is None else document.n_tokens
        cache = DynamicCache() if document is None else borrowed(self.store.cache(document))
        input_ids = self.tokens(text)
        n_prompt = n_read + len(input_ids)
        room = self.limit - n_prompt
        if room < 1:
            raise APIError(
                400,
                f"messages: got {n_prompt} tokens, expected fewer than {self.limit} for this model.",
                "messages",
                "context_length_exceeded",
            )
        wanted = min(request.max_tokens or DEFAULT_MAX_TOKENS, room)
        sampling = Sampling(wanted, request.temperature, request.top_p, request.seed)
        written, chance = TextOfTokens(self.tokenizer, request.stop), generator_of(sampling)
        chunk = len(input_ids) if self._reads_alone else CHUNK
        logits = yield from read_in_chunks(cache, input_ids, chunk)
        for n_new in range(1, wanted + 1):
            token = draw(logits, sampling, chance)
            if token in self._ends:
                yield Piece(written.rest(), "stop", n_prompt, n_cached, n_new - 1)
                return
            text = written.add(token)
            if written.is_stopped:
                yield Piece(text, "stop", n_prompt, n_cached, n_new)
                return
            if n_new == wanted:
                yield Piece(text + written.rest(), "length", n_prompt, n_cached, n_new)
                return
            yield Piece(text, None, n_prompt, n_cached, n_new)
            logits = yield from read_in_chunks(cache, [token])


def _kept(prefix: str) -> Generator[Compress, Document, Document | None]:
    """Compress the beginning of a chat. None if that fails, as on a full disk: the chat is then read as it is."""
    try:
        return (yield Compress("", prefix, "prefix"))
    except KVPressMoEError as error:
        logger.warning("the beginning of a chat is not kept: %s", error)
        return None
