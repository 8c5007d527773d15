"""RaggedLayer: a cache layer whose heads keep different numbers of pairs. Evicted pairs take no memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvpress_moe.cache.attention_dispatch import register_ragged_attention
from kvpress_moe.cache.ragged_pairs import RaggedPairs
from kvpress_moe.cache.shortened_layer import length_after_crop, refuse_drafts
from kvpress_moe.errors import UnsupportedInputError

# B = batch, H = KV heads, S = tokens of the prompt, T = later tokens, D = head dim, N = kept pairs of all heads


class RaggedLayer(RaggedPairs, CacheLayerMixin):
    """
    One layer whose heads keep different numbers of pairs.

    The prompt's pairs are in one flat tensor of keys and one of values, shape (N, D), row by row and head by head.
    Later tokens are dense, shape (B, H, T, D), because no head evicts them. ``get_seq_length`` counts all tokens that
    were processed, not the pairs that were kept, so that positions continue correctly.

    :mod:`kvpress_moe.cache.attention_dispatch` computes attention over it. ``update`` gives transformers a placeholder
    on the meta device. Any other attention function raises an error on it.

    Parameters
    ----------
    flat_keys, flat_values : Tensor, shape (N, D)
    lengths : list of lists of int
        Number of pairs of each head, (B, H). The sum is N.
    n_read : int
        Number of tokens that the pairs were chosen from.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, flat_keys: Tensor, flat_values: Tensor, lengths: list[list[int]], n_read: int):
        self._begin(n_read, flat_keys.dtype, flat_keys.device)
        self._hold(flat_keys, flat_values, lengths)

    def _begin(self, n_read: int, dtype: torch.dtype, device: torch.device) -> None:
        CacheLayerMixin.__init__(self)
        register_ragged_attention()
        self.dtype, self.device = dtype, device
        self.is_initialized = True
        self.n_read = n_read

    @classmethod
    def from_dense(cls, keys: Tensor, values: Tensor, kept: Tensor) -> RaggedLayer:
        """From keys and values (B, H, S, D): the pairs marked in ``kept`` (B, H, S), in new memory."""
        dtype = min(keys.dtype, values.dtype, key=lambda dtype: dtype.itemsize)  # autocast may leave keys in float32
        return cls(keys[kept].to(dtype), values[kept].to(dtype), kept.sum(-1).tolist(), keys.shape[2])

    # ── what kvpress's pipeline does to a layer ──

    @property  # type: ignore[override]
    def keys(self) -> _Sliceable | None:
        return _Sliceable(self) if "lengths" in self.__dict__ else None

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

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens to all heads. Returns a placeholder that only ragged attention can use."""
        self.new_keys = torch.cat((self.new_keys, key_states.to(self.new_keys.dtype)), dim=2)  # of autocast
        self.new_values = torch.cat((self.new_values, value_states.to(self.new_values.dtype)), dim=2)
        shape = (*key_states.shape[:2], self.get_seq_length(), key_states.shape[3])
        placeholder = torch.empty(shape, device="meta").as_subclass(_Placeholder)
        placeholder.ragged_layer = self
        return placeholder, placeholder

    def get_seq_length(self) -> int:
        """Number of tokens that were processed, whether their pairs were kept or not."""
        return self.n_read + self.new_keys.shape[2]

    def get_mask_sizes(self, query: Tensor | int) -> tuple[int, int]:
        """
        Sizes of a mask over the new tokens only. Ragged attention builds its own mask.

        Parameters
        ----------
        query : Tensor or int
            Positions of the new tokens, or in newer releases of transformers their number.
        """
        return (query, self.get_seq_length()) if isinstance(query, int) else (query.shape[0], int(query[0]))

    def get_max_cache_shape(self) -> int:
        return -1

    get_max_length = get_max_cache_shape  # its name in newer releases of transformers

    def crop(self, max_length: int) -> None:
        """
        Forget the newest tokens.

        Parameters
        ----------
        max_length : int
            Number of tokens that are left; if negative, number of tokens to forget. 0 forgets nothing in releases of
            transformers whose ``crop`` takes a number of tokens to remove.

        Raises
        ------
        UnsupportedInputError
            If this would cut into the prompt. Its pairs do not say which positions are missing.
        """
        left = length_after_crop(self.get_seq_length(), max_length, self.n_read)
        self.new_keys = self.new_keys[:, :, : left - self.n_read]
        self.new_values = self.new_values[:, :, : left - self.n_read]

    def activate_past_recording(self) -> None:
        """Called before drafts are read, in newer releases of transformers."""
        refuse_drafts()

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
        """Put the rows of the batch in another order, possibly with repeats. Used by beam search."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of the batch."""
        self._select(torch.arange(len(self.lengths))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch ``repeats`` times."""
        self._select([row for row in range(len(self.lengths)) for _ in range(repeats)])


#: What attention implementations begin with when they compute with keys.
_COMPUTING = {"__getitem__", "expand", "reshape", "transpose", "repeat_interleave", "matmul", "__matmul__", "einsum"}


class _Placeholder(torch.Tensor):
    """Stands for the keys of a RaggedLayer. Its shape can be read; eager attention, which computes with it, is told."""

    ragged_layer: RaggedLayer

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__ not in _COMPUTING:
            return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise UnsupportedInputError(
            f"attention: got an attention implementation that computes with the keys of a RaggedLayer "
            f"({function.__name__}), expected one of transformers' attention interface. Eager attention is not one of "
            "them: call model.set_attn_implementation('sdpa'), or prefill with budget='uniform' and precision=None."
        )


class _Sliceable:
    """What ``layer.keys`` returns. To remove an answer, kvpress's pipeline slices it and stores the slice."""

    def __init__(self, layer: RaggedLayer):
        self.layer = layer
        self.device = layer.device

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a RaggedLayer holds heads of different lengths; its keys are no tensor and have no {name!r}. Another "
            "press that uses them does not work with budget='layer' or 'global', or with a precision."
        )

    def __getitem__(self, index: tuple[slice, slice, slice]) -> _Sliced:
        everything, heads, tokens = index
        if (everything, heads, tokens.start, tokens.step) != (slice(None), slice(None), None, None):
            raise TypeError("a RaggedLayer can be cut at the end only: keys[:, :, :length]")
        return _Sliced(self.layer, self.layer.get_seq_length() if tokens.stop is None else tokens.stop)


class _Sliced:
    def __init__(self, layer: RaggedLayer, length: int):
        self.layer, self.length = layer, length
