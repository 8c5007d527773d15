"""Key transforms from data: the mean of a model's keys, and the basis in which few bits suffice for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from kvpress.utils import get_prerope_query_states
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvpress_moe.codes.key_transform import KeyTransform
from kvpress_moe.errors import SettingError
from kvpress_moe.model.attention import apply_rope
from kvpress_moe.model.attention_view import AttentionView
from kvpress_moe.model.hooks import hooked
from kvpress_moe.model.layers import Attention, full_attentions
from kvpress_moe.model.transformers_api import attention_arguments, with_cache

N_SINK = 4  # the first tokens, whose keys are unlike all others
_FLOOR = 1e-4  # smallest share of the largest variance that a direction of the queries counts with


class _Moments:
    """Sums over the prompts of one layer: keys before the rotary embedding, keys after it, and queries."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []  # (H, S, D), float16
        self.cos: list[Tensor] = []
        self.sin: list[Tensor] = []
        self.queries: Tensor | float = 0.0  # (H, D, D)
        self.n_queries = 0

    def add(self, keys: Tensor, queries: Tensor, cos: Tensor, sin: Tensor) -> None:
        scaling = (
            cos.square() + sin.square()
        ).sqrt()  # of YaRN and LongRoPE; it lengthens keys, so it belongs to their mean
        self.keys.append(keys[0, :, N_SINK:].half())
        self.cos.append((cos / scaling)[0, N_SINK:])
        self.sin.append((sin / scaling)[0, N_SINK:])
        of_head = queries[0, :, N_SINK:].unflatten(0, (keys.shape[1], -1)).flatten(1, 2).float()  # (H, G·S, D)
        self.queries = self.queries + of_head.mT @ of_head
        self.n_queries += of_head.shape[1]

    def transform(self) -> KeyTransform:
        pairs = list(zip(self.keys, self.cos, self.sin, strict=True))
        unturned = torch.cat([apply_rope(k[None].float(), c[None], -s[None])[0] for k, c, s in pairs], dim=1)
        mean = unturned.mean(1).half().float()
        rest = torch.cat(
            [
                k.float() - apply_rope(mean[None, :, None].expand(-1, -1, len(c), -1), c[None], s[None])[0]
                for k, c, s in pairs
            ],
            dim=1,
        ).double()
        assert isinstance(self.queries, Tensor)
        if not bool(rest.isfinite().all() & self.queries.isfinite().all()):
            raise _unfit(len(pairs))
        weight, unweight = _roots(self.queries.double() / self.n_queries)
        weighted = rest @ weight
        variances, basis = torch.linalg.eigh(weighted.mT @ weighted / weighted.shape[1])
        variances, basis = variances.flip(-1).clamp(min=1e-12), basis.flip(-1)
        synthesis = variances.sqrt()[..., None] * (basis.mT @ unweight)
        rounded = synthesis.to(torch.bfloat16).half()  # zeros in the last bits let a wheel compress the file
        return KeyTransform(mean.half(), rounded, variances.sqrt().half())


def _roots(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of positive matrices, and its inverse."""
    values, vectors = torch.linalg.eigh(matrices)
    values = values.clamp(min=values.amax(-1, keepdim=True) * _FLOOR)
    return (vectors * values.sqrt()[..., None, :]) @ vectors.mT, (vectors * values.rsqrt()[..., None, :]) @ vectors.mT


def _unfit(n_prompts: int) -> SettingError:
    return SettingError(
        "transform_prompts",
        n_prompts,
        f"prompts of more than {N_SINK} tokens, and keys within the range of float16",
        "Use longer prompts, or 0 to leave key transforms out.",
    )


@torch.no_grad()
def fit_key_transforms(
    model: PreTrainedModel, prompts: Sequence[Tensor], progress: Callable[[int, int], Any] = lambda done, total: None
) -> dict[int, KeyTransform]:
    """
    Key transforms of all layers with full attention.

    Parameters
    ----------
    model : PreTrainedModel
    prompts : sequence of Tensor, shape (1, S)
        Token ids of different texts. About 10,000 tokens in all suffice.
    progress : callable, optional
        Called with the number of prompts that were read and the number of all.

    Raises
    ------
    SettingError
        If the prompts are too short, or keys are too large for float16.
    """
    if not any(prompt.shape[1] > N_SINK for prompt in prompts):
        raise _unfit(len(prompts))
    moments = {attention.layer_idx: _Moments() for attention in full_attentions(model)}
    for done, input_ids in enumerate(prompts, start=1):
        cache = DynamicCache()

        def add(
            module: Attention, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, cache: Any = cache
        ) -> None:
            kwargs = attention_arguments(module, kwargs)
            cos, sin = kwargs["position_embeddings"]
            hidden_states = kwargs["hidden_states"]
            queries = get_prerope_query_states(AttentionView(module, hidden_states), hidden_states)
            keys = cache.layers[module.layer_idx].keys
            moments[module.layer_idx].add(keys, apply_rope(queries, cos, sin), cos.float(), sin.float())

        with hooked(full_attentions(model), add):
            model.model(input_ids=input_ids.to(model.device), **with_cache(cache))
        progress(done, len(prompts))
    return {layer_idx: of_layer.transform() for layer_idx, of_layer in moments.items()}
