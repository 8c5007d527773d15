"""Quantised caches that people use: every pair stays, with a fixed number of bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import gcd
from typing import Any

import torch
from torch import Tensor

from kvpress_moe.errors import SettingError

GROUP = 64  # numbers that share a scale and a zero, as in transformers' QuantizedCache
KIVI_GROUP = 32
_SCALES = 4  # bytes of a scale and a zero in 16 bits


def quantised_share(bits: int, group: int) -> float:
    """Bytes of coded numbers over their 16-bit bytes."""
    return (bits / 8 + _SCALES / group) / 2


def from_transformers(bits: int, backend: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """
    Keys and values (1, H, S, D) after coding and decoding by transformers' QuantizedCache, with its default axes.

    HQQ fills whole bytes with numbers of different groups. The last tokens whose groups fill none stay as they are.

    Raises
    ------
    SettingError
        If the backend's package is not installed.
    """
    from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer

    make: Any = {"quanto": QuantoQuantizedLayer, "hqq": HQQQuantizedLayer}[backend]
    axis = {"quanto": 0, "hqq": 1}[backend]
    try:
        layer = make(nbits=bits, axis_key=axis, axis_value=axis, q_group_size=GROUP)
    except ImportError as error:
        package = {"quanto": "optimum-quanto", "hqq": "hqq"}[backend]
        raise SettingError(
            "methods", f"{backend}_{bits}", f"the package {package}", f"pip install {package}. It says: {error}"
        ) from error

    def coded(states: Tensor, which: int) -> Tensor:
        layer.keys = states  # HQQ reads device and type from it
        together = 8 // bits * GROUP // gcd(GROUP, states.shape[-1]) if backend == "hqq" else 1
        if states.shape[2] < together:
            return states
        whole, rest = states.split((states.shape[2] // together * together, states.shape[2] % together), dim=2)
        decoded: Tensor = layer._dequantize(layer._quantize(whole.contiguous(), which))
        return torch.cat((decoded.view_as(whole).to(states.dtype), rest), dim=2)

    return lambda keys, values: (coded(keys, layer.axis_key), coded(values, layer.axis_value))


def kivi(bits: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """
    KIVI's recipe (arXiv 2402.02750): keys by channel in groups of 32 tokens, values by token in groups of 32 channels.

    The last tokens that do not fill a group stay as they are.
    """
    whole = keys.shape[2] // KIVI_GROUP * KIVI_GROUP
    by_channel = keys[:, :, :whole].mT.unflatten(-1, (-1, KIVI_GROUP))
    coded = _asymmetric(by_channel, bits).flatten(-2).mT
    group = KIVI_GROUP if values.shape[-1] % KIVI_GROUP == 0 else values.shape[-1]
    by_token = _asymmetric(values.unflatten(-1, (-1, group)), bits).flatten(-2)
    return torch.cat((coded, keys[:, :, whole:]), dim=2), by_token


def _asymmetric(groups: Tensor, bits: int) -> Tensor:
    """Groups (..., n) rounded to ``2**bits`` levels between their smallest and largest number."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    rounded: Tensor = ((groups - low) / step).round() * step + low
    return rounded


Code = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # keys and values (1, H, S, D) -> the same, decoded


def _kivi(bits: int) -> Code:
    return partial(kivi, bits)


#: Name -> (share of a 16-bit cache, function that makes the code).
QUANTISED: dict[str, tuple[float, Callable[[], Code]]] = {
    **{f"kivi_{bits}": (quantised_share(bits, KIVI_GROUP), partial(_kivi, bits)) for bits in (2, 4)},
    **{
        f"{backend}_{bits}": (quantised_share(bits, GROUP), partial(from_transformers, bits, backend))
        for backend, several in (("quanto", (2, 4)), ("hqq", (1, 2, 4, 8)))
        for bits in several
    },
}
