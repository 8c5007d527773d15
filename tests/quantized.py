"""The least that a quantised cache is, without a library."""

import torch
from transformers import Cache, QuantizedCache
from transformers.cache_utils import QuantizedLayer


class RoundedLayer(QuantizedLayer):
    """The least that a quantised layer is: numbers of eight bits, and a scale."""

    def _quantize(self, states, axis):
        scale = states.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127
        return (states / scale).round().to(torch.int8), scale

    def _dequantize(self, quantized):
        return quantized[0] * quantized[1]


class RoundedCache(QuantizedCache):
    def __init__(self, num_layers, residual_length):
        Cache.__init__(self, layers=[RoundedLayer(residual_length=residual_length) for _ in range(num_layers)])


def quantized_lengths(cache):
    """Pairs that each layer of a quantised cache holds: the quantised ones, and those not quantised yet."""
    return [
        layer._dequantize(layer._quantized_keys).shape[2] + (layer.keys.shape[2] if layer.keys.dim() == 4 else 0)
        for layer in cache.layers
    ]
