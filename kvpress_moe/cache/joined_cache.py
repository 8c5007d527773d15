"""JoinedCache: several caches of one row each, which one forward pass reads and writes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from kvpress_moe.cache.attention_dispatch import register_ragged_attention
from kvpress_moe.cache.ragged_layer import RaggedLayer
from kvpress_moe.errors import UnsupportedInputError
from kvpress_moe.model.transformers_api import with_cache

# D = head dim; Q_i = new tokens of cache i


class JoinedCache(DynamicCache):
    """
    Several caches that grow together, for requests of different users.

    The new tokens of all caches are one row: first those of the first cache, then those of the second one, and so on.
    So the model's weights are read once for all of them. Only attention is computed for each cache by itself. The
    caches may have different lengths, ragged or dense layers, and any number of new tokens. This is the selective
    batching of Orca (Yu et al., OSDI 2022).

    Parameters
    ----------
    caches : sequence of DynamicCache
        Each holds one row. They grow; the joined cache holds nothing itself.
    lengths : sequence of int
        Number of new tokens of each cache, ``Q_i``.

    Raises
    ------
    UnsupportedInputError
        If the numbers of caches and lengths differ, a length is not positive, or a cache has several rows.
    """

    def __init__(self, caches: Sequence[DynamicCache], lengths: Sequence[int]):
        super().__init__()
        if not caches or len(caches) != len(lengths) or min(lengths) < 1:
            raise UnsupportedInputError(
                f"lengths: got {list(lengths)} for {len(caches)} caches, expected one positive number for each cache."
            )
        rows = {n_rows(cache) for cache in caches} - {0, 1}
        if rows:
            raise UnsupportedInputError(
                f"caches: got a cache of {rows.pop()} rows, expected one row each. Select one: "
                "cache.batch_select_indices."
            )
        register_ragged_attention()
        self.caches, self.lengths = list(caches), list(lengths)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """
        Append the new tokens of each cache to it.

        Returns a placeholder for both keys and values, which only transformers' attention interface can use.
        """
        if key_states.shape[0] != 1 or key_states.shape[2] != sum(self.lengths):
            raise UnsupportedInputError(
                f"input_ids: got {tuple(key_states.shape[::2])} rows and tokens, expected 1 row of {sum(self.lengths)} "
                "tokens, those of all caches."
            )
        new = zip(
            self.caches, key_states.split(self.lengths, dim=2), value_states.split(self.lengths, dim=2), strict=True
        )
        parts = [cache.update(keys, values, layer_idx) for cache, keys, values in new]
        placeholder = torch.empty(key_states.shape, device="meta").as_subclass(_Placeholder)
        placeholder.parts = list(zip(self.lengths, *zip(*parts, strict=True), strict=True))
        return placeholder, placeholder

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: positions are those that are given with the tokens."""
        return 0

    def get_mask_sizes(self, query: Tensor | int, layer_idx: int) -> tuple[int, int]:
        """Sizes of a mask over the new tokens only. Attention builds a mask for each cache."""
        return (query if isinstance(query, int) else query.shape[0]), 0


class _Placeholder(torch.Tensor):
    """Stands for the keys of all caches."""

    #: For each cache its number of new tokens, and its keys and values as its layer returned them.
    parts: list[tuple[int, Tensor, Tensor]]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__ in ("__get__", "__set__", "__repr__", "dim", "size"):
            return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise UnsupportedInputError(
            f"attention: got an attention implementation that computes with the keys of a JoinedCache "
            f"({function.__name__}), expected one of transformers' attention interface. Call "
            "model.set_attn_implementation('sdpa')."
        )


def rotary_changes(model: Any) -> bool:
    """Whether a model's rotary embedding depends on the length of the text: ``"longrope"`` and ``"dynamic"``."""
    config = model.config.get_text_config(decoder=True)
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_layer = [found, *(one for one in found.values() if isinstance(one, dict))]
    return any(one.get("rope_type", one.get("type")) in ("longrope", "dynamic") for one in by_layer)


def n_rows(cache: DynamicCache) -> int:
    """Number of rows of a cache; 0 if it is empty."""
    first: Any = cache.layers[0] if cache.layers else None
    if isinstance(first, RaggedLayer):
        return len(first.lengths)
    return 0 if first is None or first.keys is None else int(first.keys.shape[0])


@torch.no_grad()
def read_together(
    model: Any,
    caches: Sequence[DynamicCache],
    input_ids: Sequence[Sequence[int]],
    starts: Sequence[int] | None = None,
) -> Tensor:
    """
    Read the next tokens of several texts in one forward pass.

    Parameters
    ----------
    model : PreTrainedModel
        With a language model head.
    caches : sequence of DynamicCache
        One for each text. They grow.
    input_ids : sequence of sequence of int
        The next tokens of each text, at least one.
    starts : sequence of int, optional
        Number of tokens of each text that were read before. By default what the caches say. A cache that kvpress alone
        has shortened does not know it.

    Returns
    -------
    Tensor, shape (number of texts, V), float32
        Logits after the last token of each text.

    Raises
    ------
    UnsupportedInputError
        If the model's attention implementation is not ``"sdpa"``, or if its rotary embedding changes with the length
        of the longest text and there are several.
    """
    if len(caches) > 1 and rotary_changes(model):
        raise UnsupportedInputError(
            "model: got a rotary embedding that depends on the longest text (longrope or dynamic), expected one that "
            "is the same for all texts. Read them one by one."
        )
    lengths = [len(ids) for ids in input_ids]
    joined = JoinedCache(caches, lengths)
    if starts is None:
        starts = [cache.get_seq_length() for cache in caches]
    positions = torch.cat(
        [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    ).to(model.device)
    last = torch.tensor(lengths).cumsum(0).to(model.device) - 1
    output = model(
        input_ids=torch.tensor([[token for ids in input_ids for token in ids]], device=model.device),
        position_ids=positions[None],
        logits_to_keep=last,
        **with_cache(joined, positions),
    )
    return cast(Tensor, output.logits[0].float())
