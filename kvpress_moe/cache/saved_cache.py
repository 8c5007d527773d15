"""Compressed caches on disk: a text is compressed once, and questions can be asked later."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvpress_moe.cache.masks import WholeSlidingLayer
from kvpress_moe.cache.packed_files import check_packed, packed_facts, packed_tensors, restore_packed
from kvpress_moe.cache.packed_layer import PackedLayer
from kvpress_moe.cache.ragged_layer import RaggedLayer
from kvpress_moe.cache.shortened_layer import ShortenedLayer, shorten
from kvpress_moe.codes.key_transform import KeyTransform
from kvpress_moe.codes.transform_files import FILE as TRANSFORMS
from kvpress_moe.codes.transform_files import read_transforms
from kvpress_moe.errors import CheckpointError, UnsupportedInputError
from kvpress_moe.files import (
    MAX_JSON,
    check_shapes,
    check_tensor_finite,
    is_text,
    is_whole,
    open_tensors,
    parse_json,
    read_shapes,
    write_atomically,
)
from kvpress_moe.model.fingerprint import check_fingerprint, check_form, fingerprint
from kvpress_moe.model.kvpress_host import teach_kvpress
from kvpress_moe.model.layers import Attention, language_model

FORMAT = "kvpress-moe cache 1"
PACKED_FORMAT = "kvpress-moe cache 2"  # of files with packed layers, which version 0.1 cannot read
_MIN_COSINE = 0.9999  # a fine-tune or a 4-bit copy of the model would compute other pairs
_MOST_TENSORS = 200  # of a layer
SHIPPED = Path(__file__).parents[1] / "data" / "routers"
_DENSE = {"dense": DynamicLayer, "shortened": ShortenedLayer, "sliding": WholeSlidingLayer}
_TENSORS = {
    "ragged": ("flat_keys", "flat_values", "new_keys", "new_values"),
    **dict.fromkeys(_DENSE, ("keys", "values")),
}


@dataclass(frozen=True)
class SavedCache:
    """
    A cache that was loaded from a file.

    Attributes
    ----------
    cache : DynamicCache
        The cache, ready for questions.
    n_tokens : int
        Number of tokens of the prompt. It is also the position of the next token.
    token_hash : str
        SHA-256 of the token ids. It tells whether a text is the one in the cache.
    recipe : str
        Config of the press: its ``repr``.
    """

    cache: DynamicCache
    n_tokens: int
    token_hash: str
    recipe: str


def hash_tokens(input_ids: Tensor) -> str:
    """SHA-256 of token ids (B, S). It does not depend on their integer type."""
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
        A cache with ragged, packed or dense layers.
    model : PreTrainedModel
        The model that made the cache. The file is for this model only.
    input_ids : Tensor, shape (B, S)
        Tokens of the prompt.
    press : optional
        The press that compressed the cache. Its ``repr`` is stored as the config.

    Raises
    ------
    UnsupportedInputError
        If layers cannot be stored (quantised layers, sliding windows of transformers), or if the batch has thousands
        of rows.
    WriteError
        If the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    layers = []
    for layer_idx, layer in enumerate(cache.layers):
        if isinstance(layer, PackedLayer):
            layers.append(packed_facts(layer))
            own = packed_tensors(layer)
            tensors |= {f"{layer_idx}.{name}": tensor.contiguous().cpu() for name, tensor in own.items()}
            continue
        if isinstance(layer, RaggedLayer):
            facts: dict[str, Any] = {"kind": "ragged", "lengths": layer.lengths, "n_read": layer.n_read}
        else:
            kind = next((kind for kind, layer_class in _DENSE.items() if type(layer) is layer_class), None)
            if kind is None:
                raise UnsupportedInputError(
                    f"cache: layer {layer_idx} is a {type(layer).__name__}, expected ragged layers or a plain "
                    "DynamicCache. Prefill into DynamicCache()."
                )
            facts = {"kind": kind}
            if isinstance(layer, ShortenedLayer):
                facts |= {"n_read": layer.n_read, "n_evicted": layer.n_evicted}
        layers.append(facts)
        tensors |= {f"{layer_idx}.{name}": getattr(layer, name).contiguous().cpu() for name in _TENSORS[facts["kind"]]}
    header = {
        "format": PACKED_FORMAT if any(facts["kind"] == "packed" for facts in layers) else FORMAT,
        "fingerprint": fingerprint(model.config.get_text_config(decoder=True), _first_attention(model)),
        "n_tokens": input_ids.shape[1],
        "token_hash": hash_tokens(input_ids),
        "recipe": repr(press),
        "layers": layers,
        "versions": {name: version(name) for name in ("kvpress-moe", "kvpress", "torch", "transformers")},
    }
    text = json.dumps(header)
    if len(text) > MAX_JSON:
        raise UnsupportedInputError(
            f"cache: its description takes {len(text)} characters, expected at most {MAX_JSON}. Save fewer rows a file."
        )
    metadata = {"header": text, "sha256": _digest(text, tensors)}
    path = Path(path)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    return path


def load_cache(path: str | Path, model: PreTrainedModel, router: str | Path | None = None) -> SavedCache:
    """
    Load a cache onto the device of ``model``.

    Parameters
    ----------
    path : path
    model : PreTrainedModel
    router : path, optional
        Directory of the routers that compressed the cache, if they are not those in the package and have key
        transforms. The file holds codes, and only a hash of the transforms.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, changed, made for another model, or does not fit the model.
    """
    teach_kvpress()  # a press may never be made beside this cache
    path = Path(path)
    config = model.config.get_text_config(decoder=True)
    attentions = [layer.self_attn for layer in language_model(model).layers]
    try:
        with open_tensors(path) as file:
            metadata = file.metadata() or {}
            shapes = read_shapes(file, codes=True)
            if len(shapes) > _MOST_TENSORS * len(attentions):
                raise ValueError(f"{len(shapes)} tensors for {len(attentions)} layers")
            tensors = {name: file.get_tensor(name) for name in shapes}
        text = metadata["header"]
        intact = metadata["sha256"] == _digest(text, tensors)
        header = parse_json(text)
        known = header["format"] in (FORMAT, PACKED_FORMAT)
        saved = check_form(header["fingerprint"])
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise _unreadable(path, error) from error
    if not (intact and known):
        raise CheckpointError(
            f"cache: {path} was changed after it was written, or has another format (expected {FORMAT!r}). "
            "Compress the text again."
        )
    check_fingerprint(saved, fingerprint(config, attentions[0]), str(path), what="cache", min_cosine=_MIN_COSINE)
    try:
        n_tokens, token_hash, recipe = header["n_tokens"], header["token_hash"], header["recipe"]
        if not (is_whole(n_tokens) and is_text(token_hash) and is_text(recipe)):
            raise ValueError("n_tokens, token_hash or recipe has a wrong type or value")
        cache, batch_sizes = DynamicCache(), set()
        find = partial(_find_transform, path, router, len(attentions))
        if router is not None and not any(facts.get("transform") for facts in header["layers"]):
            raise CheckpointError(
                f"router: got {str(router)!r}, expected none: {path} was not coded with key transforms. Leave it out."
            )
        for layer_idx, (facts, attention) in enumerate(zip(header["layers"], attentions, strict=True)):
            if facts["kind"] == "shortened":  # files of version 0.1 do not say how many tokens were evicted
                _, _, n_stored, _ = tensors[f"{layer_idx}.keys"].shape
                facts = {"n_read": n_tokens, "n_evicted": max(0, n_tokens - n_stored), **facts}
            per_pair = (config.num_key_value_heads, attention.head_dim)
            if facts["kind"] == "packed":
                place = f"{layer_idx}."
                own = {name.removeprefix(place): tensors[name] for name in tensors if name.startswith(place)}
                tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(place)}
                batch_sizes.add(check_packed(facts, own, per_pair))
                copied = {name: tensor.to(model.device, copy=True) for name, tensor in own.items()}
                cache.layers.append(restore_packed(facts, copied, layer_idx, find, model.device))
                continue
            own = {name: tensors.pop(f"{layer_idx}.{name}") for name in _TENSORS[facts["kind"]]}
            batch_sizes.add(_check_layer(facts, own, per_pair))
            cache.layers.append(_restore(facts, own, model.device))
        if tensors or len(batch_sizes) != 1:
            raise ValueError("layers of different batches, or tensors that belong to none")
    except CheckpointError:
        raise
    except (KeyError, ValueError, TypeError) as error:
        raise _unreadable(path, error) from error
    return SavedCache(cache, n_tokens, token_hash, recipe)


@lru_cache(maxsize=4)
def _transforms(file: Path, written: int, num_layers: int) -> dict[int, KeyTransform]:
    """Key transforms by layer. All caches share them, so a server that holds many caches holds the transforms once."""
    return read_transforms(file, num_layers)


def _find_transform(
    path: Path,
    router: str | Path | None,
    num_layers: int,
    layer_idx: int,
    wanted: str,
) -> KeyTransform:
    """The key transform with a hash, from the given routers or from those in the package."""
    if router is not None and not (Path(router) / TRANSFORMS).is_file():
        raise CheckpointError(
            f"router: got {str(router)!r}, expected a directory with {TRANSFORMS}. {path} was coded with key "
            "transforms. Download the routers that compressed it, and name their directory."
        )
    directories = sorted(SHIPPED.glob("*/")) if router is None else [Path(router)]
    for directory in directories:
        file = directory / TRANSFORMS
        if not file.exists():
            continue
        try:
            found = _transforms(file, file.stat().st_mtime_ns, num_layers).get(layer_idx)
        except CheckpointError:  # of a model with more layers
            if router is not None:
                raise
            continue
        if found is not None and found.hash == wanted:
            return found
    raise CheckpointError(
        f"cache: {path} was coded with key transforms that {router or 'the package'} does not hold, expected those of "
        "the routers that compressed it. "
        "Name their directory: load_cache(path, model, router=...), or --router DIRECTORY."
    )


def _check_layer(facts: dict[str, Any], tensors: dict[str, Tensor], per_pair: tuple[int, int]) -> int:
    """A layer's batch size. Raises ValueError unless its tensors have the shapes that its facts and the model need."""
    n_heads, head_dim = per_pair
    n_batch, _, n_dense, _ = next(reversed(tensors.values())).shape  # values or new_values, dense in all kinds
    if not n_batch or not (n_dense or facts["kind"] == "ragged"):
        raise ValueError("a layer without pairs")
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(tensors, (n_batch, n_heads, n_dense, head_dim))
    if facts["kind"] == "ragged":
        lengths, n_read = facts["lengths"], facts["n_read"]
        # an empty tensor may declare any batch size, so n_batch is compared with the lengths and never used in a loop
        if len(lengths) != n_batch or {len(heads) for heads in lengths} != {n_heads} or not is_whole(n_read):
            raise ValueError("lengths or n_read of other heads")
        if not all(is_whole(length) and length <= n_read for heads in lengths for length in heads):
            raise ValueError("lengths that are no numbers of pairs")
        expected["flat_keys"] = expected["flat_values"] = (sum(map(sum, lengths)), head_dim)
    if facts["kind"] == "shortened" and not (
        is_whole(facts["n_read"]) and is_whole(facts["n_evicted"]) and facts["n_evicted"] <= facts["n_read"]
    ):
        raise ValueError("n_read or n_evicted is not what it should be")
    check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected)
    for name, tensor in tensors.items():
        check_tensor_finite(tensor, name)
    return n_batch


def _restore(facts: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> Any:
    # Copies: the tensors of the file are only mapped into memory. They would change or disappear with the file.
    own = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
    if facts["kind"] == "ragged":
        ragged = RaggedLayer(own["flat_keys"], own["flat_values"], facts["lengths"], facts["n_read"])
        ragged.new_keys, ragged.new_values = own["new_keys"], own["new_values"]
        return ragged
    layer = _DENSE[facts["kind"]]()
    layer.update(own["keys"], own["values"])
    if facts["kind"] == "shortened":
        shorten(layer, facts["n_evicted"], facts["n_read"])
    return layer


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cache: {path} cannot be read ({type(error).__name__}: {error}), expected a file written by save_cache. "
        "Compress the text again."
    )


def _first_attention(model: PreTrainedModel) -> Attention:
    return language_model(model).layers[0].self_attn


def _digest(header: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the header and of the tensors: names, types, shapes and bytes."""
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
