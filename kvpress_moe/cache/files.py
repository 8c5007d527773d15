"""Compressed caches on disk: compress once, ask for ever."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvpress_moe.cache.masks import ShortenedLayer, WholeSlidingLayer
from kvpress_moe.cache.ragged import RaggedLayer
from kvpress_moe.checkpoint import write_atomically
from kvpress_moe.errors import CheckpointError, UnsupportedInputError
from kvpress_moe.fingerprint import check_fingerprint, fingerprint
from kvpress_moe.model_support import language_model

FORMAT = "kvpress-moe cache 1"
_MIN_COSINE = 0.9999  # pairs of a fine-tune or of a 4-bit copy are other pairs
_DENSE = {"dense": DynamicLayer, "shortened": ShortenedLayer, "sliding": WholeSlidingLayer}


@dataclass(frozen=True)
class SavedCache:
    """
    A cache that was read from a file.

    Attributes
    ----------
    cache : DynamicCache
        Ready for questions.
    n_tokens : int
        Tokens that were read; the position of the next one.
    token_hash : str
        SHA-256 of the token ids, to tell whether a text is the one in the cache.
    recipe : str
        ``repr`` of the press.
    """

    cache: DynamicCache
    n_tokens: int
    token_hash: str
    recipe: str


def hash_tokens(input_ids: Tensor) -> str:
    """SHA-256 of token ids (B, S), independent of their integer type."""
    return hashlib.sha256(json.dumps(input_ids.tolist()).encode()).hexdigest()


def save_cache(
    path: str | Path, cache: DynamicCache, model: PreTrainedModel, input_ids: Tensor, press: Any = None
) -> Path:
    """
    Write a compressed cache to one file, atomically.

    Parameters
    ----------
    path : path
    cache : DynamicCache
        With ragged or dense layers.
    model : PreTrainedModel
        That made it; the file is for this model only.
    input_ids : Tensor, shape (B, S)
        Tokens that were read.
    press : optional
        That compressed it; its ``repr`` is kept as the recipe.

    Raises
    ------
    UnsupportedInputError
        For layers that cannot be stored (quantised, windows of their own).
    """
    tensors: dict[str, Tensor] = {}
    layers = []
    for layer_idx, layer in enumerate(cache.layers):
        if isinstance(layer, RaggedLayer):
            names, facts = ("flat_keys", "flat_values", "new_keys", "new_values"), {"lengths": layer.lengths}
            facts |= {"kind": "ragged", "n_read": layer.n_read}
        else:
            kind = next((kind for kind, layer_class in _DENSE.items() if type(layer) is layer_class), None)
            if kind is None:
                raise UnsupportedInputError(
                    f"cache: layer {layer_idx} is a {type(layer).__name__}, expected ragged layers or a plain "
                    "DynamicCache. Prefill into DynamicCache()."
                )
            names, facts = ("keys", "values"), {"kind": kind}
        layers.append(facts)
        tensors |= {f"{layer_idx}.{name}": getattr(layer, name).contiguous().cpu() for name in names}
    header = {
        "format": FORMAT,
        "fingerprint": fingerprint(model.config.get_text_config(decoder=True), _first_attention(model)),
        "n_tokens": input_ids.shape[1],
        "token_hash": hash_tokens(input_ids),
        "recipe": repr(press),
        "layers": layers,
        "versions": {name: version(name) for name in ("kvpress-moe", "kvpress", "torch", "transformers")},
    }
    text = json.dumps(header)
    metadata = {"header": text, "sha256": _digest(text, tensors)}
    path = Path(path)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    return path


def load_cache(path: str | Path, model: PreTrainedModel) -> SavedCache:
    """
    Read a cache onto the device of ``model``.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, altered, or of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        text = metadata["header"]
        intact = metadata["sha256"] == _digest(text, tensors)
        header = json.loads(text)
        known = header["format"] == FORMAT
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"cache: {path} cannot be read ({type(error).__name__}: {error}), expected a file written by save_cache. "
            "Compress the text again."
        ) from error
    if not (intact and known):
        raise CheckpointError(
            f"cache: {path} was altered since it was written, or by another format (expected {FORMAT!r}). "
            "Compress the text again."
        )
    own = fingerprint(model.config.get_text_config(decoder=True), _first_attention(model))
    check_fingerprint(header["fingerprint"], own, str(path), what="cache", min_cosine=_MIN_COSINE)
    cache = DynamicCache()
    for layer_idx, facts in enumerate(header["layers"]):
        cache.layers.append(_restore(facts, layer_idx, tensors, model.device))
    return SavedCache(cache, header["n_tokens"], header["token_hash"], header["recipe"])


def _restore(facts: dict[str, Any], layer_idx: int, tensors: dict[str, Tensor], device: torch.device) -> Any:
    def tensor(name: str) -> Tensor:
        return tensors[f"{layer_idx}.{name}"].to(device)

    if facts["kind"] == "ragged":
        layer = RaggedLayer(tensor("flat_keys"), tensor("flat_values"), facts["lengths"], facts["n_read"])
        layer.new_keys, layer.new_values = tensor("new_keys"), tensor("new_values")
        return layer
    layer = _DENSE[facts["kind"]]()
    layer.update(tensor("keys"), tensor("values"))
    return layer


def _first_attention(model: PreTrainedModel) -> torch.nn.Module:
    return language_model(model).layers[0].self_attn


def _digest(header: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of header and tensors, bytes, shapes and all."""
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.contiguous().view(torch.uint8).numpy()) if tensor.numel() else b"")
    return digest.hexdigest()
