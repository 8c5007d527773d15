"""RaggedCache: heads of different lengths, stored flat, so that bytes in memory are kept pairs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from kvpress_moe.cache.attention_dispatch import register_ragged_attention
from kvpress_moe.cache.masks import fit_masks
from kvpress_moe.cache.tiling import Tiling
from kvpress_moe.errors import UnsupportedInputError
from kvpress_moe.model.layers import full_attention_layers, language_model

# B = batch, H = KV heads, S = tokens of the prompt, T = tokens since, D = head dim, N = kept pairs in all


class RaggedLayer(CacheLayerMixin):
    """
    One layer whose heads keep different numbers of pairs.

    The prompt's pairs lie in one flat tensor of keys and one of values, shape (N, D), row by row and head by head;
    tokens that came since are dense, shape (B, H, T, D), because no head evicts them. ``get_seq_length`` counts the
    tokens read, not the pairs kept, so that positions go on rightly.

    Attention over it is computed by :mod:`kvpress_moe.cache.attention_dispatch`; ``update`` hands transformers a
    placeholder on the meta device, on which any other attention fails loudly.

    Parameters
    ----------
    flat_keys, flat_values : Tensor, shape (N, D)
    lengths : list of lists of int
        Pairs of each head, (B, H); they sum to N.
    n_read : int
        Tokens that the pairs were chosen from.
    """

    is_sliding = False
    is_compileable = False

    def __init__(self, flat_keys: Tensor, flat_values: Tensor, lengths: list[list[int]], n_read: int):
        super().__init__()  # type: ignore[no-untyped-call]
        register_ragged_attention()
        self.dtype, self.device = flat_keys.dtype, flat_keys.device
        self.is_initialized = True
        self.n_read, self.lengths = n_read, lengths
        self.flat_keys, self.flat_values = flat_keys, flat_values
        self._forget_derived()
        empty = (len(lengths), len(lengths[0]), 0)
        self.new_keys = flat_keys.new_empty(*empty, flat_keys.shape[-1])  # (B, H, T, D)
        self.new_values = flat_values.new_empty(*empty, flat_values.shape[-1])

    @classmethod
    def from_dense(cls, keys: Tensor, values: Tensor, kept: Tensor) -> RaggedLayer:
        """Of keys and values (B, H, S, D), the pairs marked in ``kept`` (B, H, S), in fresh memory."""
        return cls(keys[kept], values[kept], kept.sum(-1).tolist(), keys.shape[2])

    # ── what kvpress's pipeline does to a layer ──

    @property  # type: ignore[override]
    def keys(self) -> _Sliceable | None:
        return _Sliceable(self) if "flat_keys" in self.__dict__ else None

    @keys.setter
    def keys(self, sliced: Any) -> None:
        if isinstance(sliced, _Sliced) and sliced.layer is self:
            self.crop(sliced.length)
        elif sliced is not None:
            raise TypeError("a RaggedLayer holds heads of different lengths; its keys cannot be replaced by a tensor")

    values = keys  # type: ignore[assignment]

    # ── transformers' interface of a layer ──

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """A RaggedLayer is made from pairs; there is nothing to initialise."""

    def update(
        self, key_states: Tensor, value_states: Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append tokens to all heads; returns a placeholder that only ragged attention can read."""
        self.new_keys = torch.cat((self.new_keys, key_states), dim=2)
        self.new_values = torch.cat((self.new_values, value_states), dim=2)
        placeholder = torch.empty(*key_states.shape[:2], self.get_seq_length(), key_states.shape[3], device="meta")
        placeholder.ragged_layer = self  # type: ignore[attr-defined]
        return placeholder, placeholder

    def get_seq_length(self) -> int:
        """Tokens read, kept or not."""
        return self.n_read + self.new_keys.shape[2]

    def get_mask_sizes(self, cache_position: Tensor) -> tuple[int, int]:
        """A mask over the new tokens alone; ragged attention builds its own."""
        return cache_position.shape[0], int(cache_position[0])

    def get_max_cache_shape(self) -> int:
        return -1

    def crop(self, max_length: int) -> None:
        """
        Forget the newest tokens until ``max_length`` are left (or, if negative, forget so many).

        Raises
        ------
        UnsupportedInputError
            If that would cut into the prompt, whose pairs no longer say which positions are missing.
        """
        max_length = self.get_seq_length() + max_length if max_length < 0 else max_length
        if max_length < self.n_read:
            raise UnsupportedInputError(
                f"max_length: got {max_length}, expected at least the {self.n_read} tokens of the compressed prompt. "
                "Prefill the shorter prompt instead."
            )
        self.new_keys = self.new_keys[:, :, : max_length - self.n_read]
        self.new_values = self.new_values[:, :, : max_length - self.n_read]

    def reset(self) -> None:
        """Forget the tokens that came after the prompt."""
        self.crop(self.n_read)

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        self._forget_derived()
        for name in ("flat_keys", "flat_values", "new_keys", "new_values"):
            setattr(self, name, getattr(self, name).to(device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in another order, possibly repeated: beam search."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows of the batch."""
        self._select(torch.arange(len(self.lengths))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch ``repeats`` times."""
        self._select([row for row in range(len(self.lengths)) for _ in range(repeats)])

    def _select(self, rows: list[int]) -> None:
        self._forget_derived()
        per_row = [sum(heads) for heads in self.lengths]
        keys, values = self.flat_keys.split(per_row), self.flat_values.split(per_row)
        self.flat_keys = torch.cat([keys[row] for row in rows])
        self.flat_values = torch.cat([values[row] for row in rows])
        self.lengths = [list(self.lengths[row]) for row in rows]
        index = torch.tensor(rows, device=self.new_keys.device)
        self.new_keys, self.new_values = self.new_keys[index], self.new_values[index]

    def _forget_derived(self) -> None:
        self._runs: list[tuple[Tensor, Tensor]] | None = None
        self._tilings: dict[int, Tiling] = {}

    # ── reading it ──

    def heads(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Keys and values of the prompt's kept pairs by row and head, each (pairs, D), as views."""
        flat_lengths = [length for heads in self.lengths for length in heads]
        pairs = list(zip(self.flat_keys.split(flat_lengths), self.flat_values.split(flat_lengths), strict=True))
        n_heads = len(self.lengths[0])
        return [pairs[row * n_heads : (row + 1) * n_heads] for row in range(len(self.lengths))]

    def runs(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (R, pairs, D) of each run of R neighbouring heads of equal length, in order, as views."""
        if self._runs is None:  # a Python loop that every decoding step would repeat
            lengths = [(length, len(list(run))) for length, run in groupby(chain.from_iterable(self.lengths))]
            flat_lengths = [length * n_heads for length, n_heads in lengths]
            keys, values = self.flat_keys.split(flat_lengths), self.flat_values.split(flat_lengths)
            self._runs = [
                (k.view(n_heads, length, k.shape[-1]), v.view(n_heads, length, v.shape[-1]))
                for k, v, (length, n_heads) in zip(keys, values, lengths, strict=True)
            ]
        return self._runs

    def tiling(self, tile_size: int) -> Tiling:
        """The heads cut into tiles of at most ``tile_size`` pairs, on the layer's device."""
        if tile_size not in self._tilings:
            self._tilings[tile_size] = Tiling.of(self.lengths, tile_size, self.flat_keys.device)
        return self._tilings[tile_size]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and values of the prompt's pairs (N, D), and of the tokens since (B, H, T, D)."""
        return self.flat_keys, self.flat_values, self.new_keys, self.new_values

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values; tables made from the lengths (12 bytes for 128 pairs or more) are not counted."""
        return sum(tensor.nbytes for tensor in self.tensors)


class _Sliceable:
    """What ``layer.keys`` is: kvpress's pipeline takes an answer back by slicing it and storing the slice."""

    def __init__(self, layer: RaggedLayer):
        self.layer = layer
        self.device = layer.device

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a RaggedLayer holds heads of different lengths; its keys are no tensor and have no {name!r}. What reads "
            "them, such as another press, cannot be used with budget='layer' or 'global'."
        )

    def __getitem__(self, index: tuple[slice, slice, slice]) -> _Sliced:
        everything, heads, tokens = index
        if (everything, heads, tokens.start, tokens.step) != (slice(None), slice(None), None, None):
            raise TypeError("a RaggedLayer can be cut at the end only: keys[:, :, :length]")
        return _Sliced(self.layer, self.layer.get_seq_length() if tokens.stop is None else tokens.stop)


class _Sliced:
    def __init__(self, layer: RaggedLayer, length: int):
        self.layer, self.length = layer, length


class RaggedCache(DynamicCache):
    """
    A cache with ragged layers.

    Under ``MoERouterPress(budget="layer")`` or ``"global"`` the layers of the DynamicCache in use turn ragged by
    themselves; this class is for making one from other caches.
    """

    @classmethod
    def from_kept(cls, cache: Cache, kept: Callable[[int], Tensor | None]) -> RaggedCache:
        """
        Copy a cache, keeping some pairs.

        Parameters
        ----------
        cache : Cache
            With dense layers.
        kept : callable
            Layer index -> bool (B, H, S), or None for a layer to be copied whole (sliding windows).
        """
        ragged = cls()
        layers: list[Any] = cache.layers
        for layer_idx, layer in enumerate(layers):
            mask = kept(layer_idx)
            ragged.layers.append(
                copy.copy(layer) if mask is None else RaggedLayer.from_dense(layer.keys, layer.values, mask)
            )
        return ragged

    @classmethod
    def from_dynamic(cls, cache: Cache) -> RaggedCache:
        """All pairs of a dense cache, in ragged layers."""
        layers: list[Any] = cache.layers
        return cls.from_kept(cache, lambda i: torch.ones_like(layers[i].keys[..., 0], dtype=torch.bool))

    @classmethod
    def from_masked(cls, model: PreTrainedModel, cache: Cache) -> RaggedCache:
        """
        Free what a kvpress press masked (AdaKVPress, CriticalAdaKVPress, DMSPress, KVzipPress, …).

        Layers with sliding-window attention stay as they are, whatever was masked there: ragged attention knows no
        windows.

        Parameters
        ----------
        model : PreTrainedModel
            Whose attention layers hold ``masked_key_indices``; they are taken off, since they index the full cache.
        cache : Cache
            The cache that was masked.
        """
        layers: list[Any] = cache.layers
        attentions = [layer.self_attn for layer in language_model(model).layers]
        full = full_attention_layers(model)

        def kept(layer_idx: int) -> Tensor | None:
            if layer_idx not in full:
                return None
            mask = torch.ones_like(layers[layer_idx].keys[..., 0], dtype=torch.bool)
            indices = getattr(attentions[layer_idx], "masked_key_indices", None)
            if indices is not None:
                mask[tuple(index.to(mask.device) for index in indices)] = False
            return mask

        ragged = cls.from_kept(cache, kept)
        for attention in attentions:
            attention.masked_key_indices = None
        fit_masks(ragged, model.config.get_text_config(decoder=True))
        return ragged

    def to_dynamic(self) -> DynamicCache:
        """
        A dense cache of the same pairs.

        Raises
        ------
        UnsupportedInputError
            If heads of a layer have different lengths.
        """
        pairs = []
        for layer_idx, layer in enumerate(self.layers):
            if not isinstance(layer, RaggedLayer):
                pairs.append((layer.keys, layer.values))
                continue
            if len({length for heads in layer.lengths for length in heads}) > 1:
                raise UnsupportedInputError(
                    f"layer {layer_idx}: got heads of {sorted({n for heads in layer.lengths for n in heads})} pairs, "
                    "expected equal lengths. A dense cache cannot hold them."
                )
            shape = (*layer.new_keys.shape[:2], -1, layer.flat_keys.shape[-1])
            keys = torch.cat((layer.flat_keys.view(shape), layer.new_keys), dim=2)
            pairs.append((keys, torch.cat((layer.flat_values.view(shape), layer.new_values), dim=2)))
        return DynamicCache(pairs)
