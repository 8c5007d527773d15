"""Prompt caches: the full cache of each training prompt, computed once, kept on disk, used many times."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvpress_moe.files import write_atomically
from kvpress_moe.model.transformers_api import with_cache
from kvpress_moe.training.checkpoints import own_tensors

Pairs = Sequence[tuple[Tensor, Tensor]]  # keys and values of every layer, (1, H, S, D) each


@torch.no_grad()
def full_cache(model: PreTrainedModel, context: Tensor, path: Path) -> Pairs:
    """
    Keys and values of a context, all layers, in the model's dtype. On disk they have half precision.

    Parameters
    ----------
    model : PreTrainedModel
    context : Tensor, shape (1, S)
    path : Path
        File of the prompt cache. It is written if it does not exist.
    """
    if not path.exists():
        cache = DynamicCache()
        model.model(input_ids=context.to(model.device), **with_cache(cache))
        layers: list[Any] = cache.layers
        tensors = {f"keys-{i}": layer.keys.half().contiguous().cpu() for i, layer in enumerate(layers)}
        tensors |= {f"values-{i}": layer.values.half().contiguous().cpu() for i, layer in enumerate(layers)}
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, partial(save_file, tensors))
    n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    with own_tensors(path) as saved:
        names = [f"{what}-{i}" for what in ("keys", "values") for i in range(n_layers)]
        tensors = {name: saved.get_tensor(name) for name in names}
    like = {"device": model.device, "dtype": model.dtype}
    return [(tensors[f"keys-{i}"].to(**like), tensors[f"values-{i}"].to(**like)) for i in range(n_layers)]


def as_cache(pairs: Pairs) -> DynamicCache:
    """A cache with these keys and values. Appending to it does not change them."""
    cache = DynamicCache()
    for layer_idx, (keys, values) in enumerate(pairs):
        cache.update(keys, values, layer_idx)
    return cache
