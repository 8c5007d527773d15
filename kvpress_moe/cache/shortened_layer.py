"""ShortenedLayer: a dense cache layer after an eviction from which every head kept the same number of pairs."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from torch import Tensor
from transformers import __version__ as version
from transformers.cache_utils import DynamicLayer

from kvpress_moe.errors import UnsupportedInputError
from kvpress_moe.model.transformers_api import CROPS_REMOVE


def length_after_crop(length: int, wanted: int, n_prompt: int) -> int:
    """
    How many tokens are left after ``crop(wanted)`` of a layer whose prompt was compressed.

    Parameters
    ----------
    length : int
        Number of tokens that the layer has processed.
    wanted : int
        The argument of ``crop``.
    n_prompt : int
        Number of tokens of the compressed prompt.

    Raises
    ------
    UnsupportedInputError
        If fewer would be left than the prompt has. Its pairs do not say which positions are missing.
    """
    relative = wanted < 0 or (wanted == 0 and CROPS_REMOVE)
    left = length + wanted if relative else min(wanted, length)
    if left < n_prompt:
        raise UnsupportedInputError(
            f"max_length: got a crop to {left} tokens, expected at least the {n_prompt} tokens of the compressed "
            "prompt. Prefill the shorter prompt instead."
        )
    return left


def refuse_drafts() -> None:
    """
    Raise UnsupportedInputError: releases of transformers that announce drafts to a cache read the whole history again.

    They do so with any cache that already holds a prompt (5.24), and what they write is wrong. Older releases do not
    call this, and are right.
    """
    raise UnsupportedInputError(
        f"generate: got assisted decoding or prompt lookup with a compressed cache in transformers {version}, expected "
        "generation without drafts. This release reads the whole history again into a cache that holds it already. "
        "Leave the drafts out, or use transformers 5.2."
    )


@cache
def shortened_class(layer_class: Any) -> Any:
    """
    The class of a layer of ``layer_class`` after an eviction.

    transformers uses a layer's length for the positions of the next tokens, for masks, and to crop. So the length is
    the number of tokens that were processed, as in a :class:`~kvpress_moe.cache.RaggedLayer`, not the number of pairs
    that are stored. The class is derived here, not mixed in, because Python changes an object's class in place only
    between classes of one memory layout.
    """
    if hasattr(layer_class, "n_evicted"):
        return layer_class

    class Shortened(layer_class):  # type: ignore[misc]
        """
        A layer after eviction.

        Attributes
        ----------
        n_evicted : int
            Number of tokens whose pairs are gone.
        n_read : int
            Number of tokens of the compressed prompt.
        """

        n_evicted = 0
        n_read = 0

        @property
        def n_stored(self) -> int:
            """Number of pairs that each head holds."""
            stored: int = super().get_seq_length()
            return stored

        def get_seq_length(self) -> int:
            """Number of tokens that were processed, whether their pairs were kept or not."""
            return self.n_stored + self.n_evicted

        def get_mask_sizes(self, query: Tensor | int) -> tuple[int, int]:
            """
            Number of keys, and the offset that puts the first new token directly after the stored ones.

            Parameters
            ----------
            query : Tensor or int
                Positions of the new tokens, or in newer releases of transformers their number.
            """
            if isinstance(query, int):
                n_new, first = query, self.get_seq_length()
            else:
                n_new, first = query.shape[0], int(query[0])
            return self.n_stored + n_new, first - self.n_stored

        def crop(self, length: int) -> None:
            """
            Forget the newest tokens.

            Parameters
            ----------
            length : int
                Number of tokens that are left; if negative, number of tokens to forget. 0 forgets nothing in releases
                of transformers whose ``crop`` takes a number of tokens to remove.

            Raises
            ------
            UnsupportedInputError
                If this would cut into the compressed prompt, or the layer is quantised.
            """
            if type(self) is not ShortenedLayer:
                raise UnsupportedInputError(
                    f"max_length: got a crop of a {layer_class.__name__} after eviction, expected a DynamicCache. "
                    "Quantised pairs cannot be cut."
                )
            left = length_after_crop(self.get_seq_length(), length, self.n_read) - self.n_evicted
            layer: Any = self
            layer.keys, layer.values = layer.keys[..., :left, :], layer.values[..., :left, :]

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return _empty_shortened, (layer_class,), self.__dict__

        def activate_past_recording(self) -> None:
            """Called before drafts are read."""
            refuse_drafts()

        def reset(self) -> None:
            """Forget everything, as the layer's class does."""
            super().reset()
            if not self.is_initialized:
                self.n_evicted = self.n_read = 0

    Shortened.__name__ = Shortened.__qualname__ = f"Shortened{layer_class.__name__.removeprefix('Dynamic')}"
    return Shortened


def _empty_shortened(layer_class: Any) -> Any:
    """For pickle and copy, which find classes by name: this class has none that could be imported."""
    shortened = shortened_class(layer_class)
    return shortened.__new__(shortened)


#: A DynamicLayer after eviction.
ShortenedLayer = shortened_class(DynamicLayer)


def shorten(layer: Any, n_evicted: int, n_read: int) -> None:
    """
    Let a layer, in place, count tokens that were processed. Its pairs are about to be replaced by the kept ones.

    Parameters
    ----------
    layer : DynamicLayer or a layer derived from it
    n_evicted : int
        Number of tokens whose pairs are not kept.
    n_read : int
        Number of tokens of the prompt.
    """
    layer.__class__ = shortened_class(cast(Any, type(layer)))
    layer.n_evicted, layer.n_read = n_evicted, n_read
