"""Models with random weights, for measurements of speed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


def small_llama(n_tokens: int, device: str = "cpu", num_layers: int = 8, num_heads: int = 16) -> PreTrainedModel:
    """A small Llama with random weights. Most time goes to attention: heads of 64, four of them per KV head."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1000,
            hidden_size=64 * num_heads,
            intermediate_size=64 * num_heads,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads // 4,
            max_position_embeddings=n_tokens + 1000,
        )
        model: PreTrainedModel = LlamaForCausalLM(config).eval().to(device)
        return model


def llama_8b(n_tokens: int, device: str = "cuda") -> PreTrainedModel:
    """A model of the shape of Llama 3.1 8B, with random bfloat16 weights (15 GiB), made on the device."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_theta=500_000.0,
        max_position_embeddings=n_tokens + 1000,
    )
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    return model


#: Models with random weights, by their names in the command.
RANDOM_MODELS: dict[str, Callable[[int, str], PreTrainedModel]] = {
    "random": small_llama,
    "tiny": partial(small_llama, num_layers=2, num_heads=8),
    "llama-8b": llama_8b,
}
