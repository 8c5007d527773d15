"""The model's full caches of training prompts: read once, kept on disk, asked many times."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvpress_moe.errors import CheckpointError
from kvpress_moe.files import check_finite, open_tensors, read_shapes
from kvpress_moe.routers.checkpoint import write_atomically

Pairs = Sequence[tuple[Tensor, Tensor]]  # keys and values of every layer, (1, H, S, D) each


@torch.no_grad()
def kept_cache(model: PreTrainedModel, context: Tensor, path: Path) -> Pairs:
    """
    Keys and values of a context, all layers, in half precision as they were written.

    Parameters
    ----------
    model : PreTrainedModel
    context : Tensor, shape (1, S)
    path : Path
        Written if it is not there.

    Raises
    ------
    CheckpointError
        If the file is none of this model's caches of so many tokens.
    """
    if not path.exists():
        cache = DynamicCache()
        model.model(input_ids=context.to(model.device), past_key_values=cache)
        layers: list[Any] = cache.layers
        tensors = {f"keys-{i}": layer.keys.half().contiguous().cpu() for i, layer in enumerate(layers)}
        tensors |= {f"values-{i}": layer.values.half().contiguous().cpu() for i, layer in enumerate(layers)}
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, partial(save_file, tensors))
    n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    try:
        with open_tensors(path) as saved:
            _check(read_shapes(saved), n_layers, context.shape[1])
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118 (no mapping)
        for name, tensor in tensors.items():
            check_finite(tensor, name)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"shards: {path} cannot be read ({error}), expected the model's cache of {context.shape[1]} tokens. Delete "
            "it; it is made again."
        ) from error
    like = {"device": model.device, "dtype": model.dtype}
    return [(tensors[f"keys-{i}"].to(**like), tensors[f"values-{i}"].to(**like)) for i in range(n_layers)]


def _check(shapes: dict[str, tuple[int, ...]], n_layers: int, n_tokens: int) -> None:
    expected = {f"{what}-{i}" for what in ("keys", "values") for i in range(n_layers)}
    if shapes.keys() != expected:
        raise ValueError(f"tensors {sorted(shapes)[:8]}, expected keys and values of {n_layers} layers")
    for name, shape in shapes.items():
        if len(shape) != 4 or (shape[0], shape[2]) != (1, n_tokens):
            raise ValueError(f"{name} has shape {shape}, expected (1, H, {n_tokens}, D)")


def filled(pairs: Pairs) -> DynamicCache:
    """A cache that holds these keys and values; what is appended leaves them as they are."""
    cache = DynamicCache()
    for layer_idx, (keys, values) in enumerate(pairs):
        cache.update(keys, values, layer_idx)
    return cache
