"""Tiny models of every supported family, initialised at random from a seed: nothing is downloaded or trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from kvpress_moe.routers import RouterConfig, Routers

VOCABULARY = 300

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,  # ten times the usual: attention that prefers some tokens, answers that differ
    "bos_token_id": None,
    "eos_token_id": None,  # generation always runs to max_new_tokens
    "pad_token_id": 0,
}
_GEMMA: dict[str, Any] = {
    **_TEXT,
    "num_hidden_layers": 3,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "tie_word_embeddings": False,  # tied, it answers the same token again and again
}
_SLIDING: dict[str, Any] = {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 16}
_MIXTURE: dict[str, Any] = {**_TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "qwen2_sliding": (Qwen2Config, Qwen2ForCausalLM, {**_SLIDING, "max_window_layers": 1}),  # full, then sliding
    "qwen3_sliding": (
        Qwen3Config,
        Qwen3ForCausalLM,  # the last layer is another one
        {**_SLIDING, "head_dim": 8, "layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    ),
    "phi3": (Phi3Config, Phi3ForCausalLM, {}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {**_GEMMA, "attn_logit_softcapping": 2.0}),  # low enough to be felt
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM, _GEMMA),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        {**_MIXTURE, "shared_expert_intermediate_size": 32},
    ),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {**_MIXTURE, "head_dim": 8}),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {**_MIXTURE, "clip_qkv": 2.0}),
}

if hasattr(transformers, "MinistralForCausalLM"):  # from transformers 5 on
    _CLASSES["ministral"] = (
        transformers.MinistralConfig,
        transformers.MinistralForCausalLM,
        {
            "num_hidden_layers": 3,
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    )

#: Every family that the press serves. ``gemma3`` is the multimodal class, ``gemma3_text`` the text-only one.
FAMILIES = (*_CLASSES, "gemma3")
OLD_MAKE = ("qwen2_moe", "olmoe") if transformers.__version__.startswith("4.56") else ()  # refused there
TOO_NEW = () if "ministral" in _CLASSES else ("ministral",)
EAGER_ONLY = () if Gemma2ForCausalLM._supports_sdpa else ("gemma2",)  # transformers 5.24 refuses to load it with SDPA
FAMILIES = tuple(family for family in FAMILIES if family not in (*OLD_MAKE, *EAGER_ONLY))


def tiny_config(family: str, **overrides: Any):
    """A family's configuration, tiny; ``overrides`` go to the language model's part."""
    if family == "gemma3":
        # image tokens lie outside the vocabulary, so that random prompts hold none
        special = {"boi_token_index": 396, "eoi_token_index": 397, "image_token_index": 398}
        text = tiny_config("gemma3_text", **overrides)
        return Gemma3Config(text_config=text, vision_config=_VISION, mm_tokens_per_image=4, pad_token_id=0, **special)
    config_class, _, family_settings = _CLASSES[family]
    return config_class(**{**_TEXT, **family_settings, **overrides})


def tiny_model(family: str, *, attn_implementation: str = "sdpa", dtype=torch.float32, **overrides: Any):
    """A family's model in eval mode, the same weights every time; ``overrides`` go to :func:`tiny_config`."""
    config = tiny_config(family, **overrides)
    model_class = Gemma3ForConditionalGeneration if family == "gemma3" else _CLASSES[family][1]
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation=attn_implementation, dtype=dtype)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):  # plain ones would hide a forgotten norm
            torch.nn.init.normal_(weight, mean=0.0 if family.startswith("gemma") else 1.0, std=0.2)
    return model.eval()


def calibrated_routers(model: PreTrainedModel, experts=("learned", "keydiff", "cur"), seed: int = 0) -> Routers:
    """Routers such as training leaves them, with random weights: gate, calibration and learned expert are used."""
    config = model.config.get_text_config(decoder=True)
    routers = Routers(
        RouterConfig(
            "pikv",
            tuple(experts),
            config.num_hidden_layers,
            config.hidden_size,
            bottleneck=8,
            trained=True,
            num_heads=config.num_key_value_heads,
            learned=8 if "learned" in experts else 0,
            learned_sees="learned" in experts,
            strategies=True,
            reach=16,
        )
    )
    generator = torch.Generator().manual_seed(seed)
    decays = [layer.calibration.decay for layer in routers.layers]
    with torch.no_grad():
        for parameter in routers.parameters():
            if all(parameter is not decay for decay in decays):
                parameter.normal_(std=0.3, generator=generator)
        for layer, decay in zip(routers.layers, decays, strict=True):
            layer.rule.powers.mul_(0.1).add_(0.85)
            decay.normal_(std=1.0, generator=generator)
    return routers


CHAT = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}<s>assistant: "


def byte_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Every byte is a token (0 to 255), and <s>, </s>, <pad> are 256 to 258; with a chat template or without."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", "<pad>")])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    names = ["input_ids", "attention_mask"]  # transformers 4 would add token_type_ids
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=4096, model_input_names=names, **special
    )
    wrapped.chat_template = CHAT if chat else None
    return wrapped


def tokens(n_tokens: int, batch_size: int = 1, seed: int = 0) -> Tensor:
    """Random token ids, shape (batch_size, n_tokens), the same every time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch_size, n_tokens), generator=generator)


def distinct_tokens(n_tokens: int) -> Tensor:
    """Random token ids (1, n_tokens), none of them twice: no two of a prompt's pairs are alike in the first layer."""
    return torch.randperm(VOCABULARY - 1, generator=torch.Generator().manual_seed(0))[None, :n_tokens] + 1


def padded_tokens(n_tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Prompts of these lengths, padded on the left: ids and mask (B, longest); row r holds ``tokens(…, seed=r)``."""
    input_ids = torch.zeros(len(n_tokens), max(n_tokens), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(n_tokens):
        input_ids[row, -length:] = tokens(length, seed=row)
        mask[row, -length:] = 1
    return input_ids, mask


def decoder(model: PreTrainedModel):
    """The stack of decoder layers."""
    return getattr(model.model, "language_model", model.model)


def prefill(model: PreTrainedModel, input_ids: Tensor, press=None, cache=None):
    """Read a prompt under a press (or none), and return the cache it left."""
    cache = DynamicCache() if cache is None else cache
    with torch.no_grad(), press(model) if press is not None else nothing():
        model.model(input_ids=input_ids, past_key_values=cache)
    return cache


@contextmanager
def nothing() -> Iterator[None]:
    yield


def lengths(cache) -> list[int]:
    """Pairs that each layer holds, counted from its tensors."""
    return [layer.keys.shape[2] for layer in cache.layers]


def kept_positions(full, compressed) -> list[Tensor]:
    """Per layer the original positions (B, H, K) of the pairs left, in cache order, found by comparing keys."""
    return [positions_of(after.keys, before.keys) for before, after in zip(full.layers, compressed.layers, strict=True)]


def positions_of(kept_keys: Tensor, keys: Tensor) -> Tensor:
    """Where each of ``kept_keys`` (B, H, K, D) stands among ``keys`` (B, H, S, D)."""
    equal = (kept_keys[:, :, :, None] == keys[:, :, None]).all(-1)  # (B, H, K, S)
    assert bool((equal.sum(-1) == 1).all()), "a key left in the cache is not one of the prompt's"
    return equal.float().argmax(-1)


def overlap(positions: Tensor, others: Tensor) -> float:
    """Share of ``positions`` (B, H, K) that are also among ``others`` of the same head."""
    return (positions[..., None] == others[..., None, :]).any(-1).float().mean().item()


@torch.no_grad()
def greedy(model: PreTrainedModel, input_ids: Tensor, cache, position: int, n_tokens: int) -> Tensor:
    """
    The likeliest ``n_tokens`` after ``input_ids`` (B, Q), which stand at ``position`` and after, by a loop of our own.
    """
    answer = []
    for _ in range(n_tokens):
        positions = torch.arange(position, position + input_ids.shape[1], device=model.device)[None]
        logits = model(input_ids=input_ids, past_key_values=cache, position_ids=positions).logits
        position += input_ids.shape[1]
        input_ids = logits[:, -1].argmax(-1, keepdim=True)
        answer.append(input_ids)
    return torch.cat(answer, dim=1)


def promised_routers(model: PreTrainedModel, n_prompts: int = 24, **settings: Any) -> Routers:
    """Calibrated routers that can promise a KL divergence, for ``"mixed"`` and for no precision; on random prompts."""
    from kvpress_moe.benchmark.prompts import Prompt
    from kvpress_moe.training.calibration import calibrate

    routers = calibrated_routers(model, **settings)

    def prompts(first: int) -> list[Prompt]:
        lengths = [60 + 7 * (number % 5) for number in range(n_prompts)]
        return [
            Prompt(*(tokens(n, seed=first + 3 * number + part) for part, n in enumerate((length, 5, 6))))
            for number, length in enumerate(lengths)
        ]

    about = {"prompts": "random tokens", "seed": 0}
    routers.promises = calibrate(model, routers, ["mixed", None], prompts(1000), lambda: prompts(2000), about)
    return routers
