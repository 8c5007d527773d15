"""Experts of this package other than the windows. They take a LayerCall and return scores (B, H, S)."""

from __future__ import annotations

import torch
from kvpress import LagKVPress
from torch import Tensor
from torch.nn import functional as F

from kvpress_moe.errors import ExpertError
from kvpress_moe.experts.expert import Expert
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.experts.mixing import rank_within_head
from kvpress_moe.model.attention import per_kv_head
from kvpress_moe.routers import Routing


def score_selective(call: LayerCall, kernel_size: int = 5) -> Tensor:
    """
    Attention of the latest queries, smoothed over neighbours, as SnapKV (arXiv 2404.14469) scores it.

    SnapKV needs more than 64 tokens. Here the window of observed queries shrinks to half of a shorter prompt. Hit rates
    are counted with the same attention, and it is computed only once.
    """
    observed = call.window_mass[..., : -call.window]  # (B, num_heads, S - window)
    observed = F.avg_pool1d(observed, kernel_size, padding=kernel_size // 2, stride=1)
    scores = per_kv_head(observed, call.keys.shape[1])
    return F.pad(scores, (0, call.window), value=2.0)  # the window itself always stays, because no attention exceeds 1


def score_temporal(call: LayerCall) -> Tensor:
    """
    Recency and change in equal parts: the mean of the position's rank and of the rank by LagKV (arXiv 2504.04704).

    LagKV measures the change of a token relative to the group of tokens that follows it.
    """
    change = LagKVPress().score(call.view, call.hidden_states, call.keys, call.values, None, call.expert_kwargs)
    recency = (torch.arange(call.k_len, device=change.device) + 0.5) / call.k_len
    return (rank_within_head(change) + recency) / 2


class LearnedScorer(Expert):
    """
    The expert ``learned``: the layer's trained router computes log importance from the hidden states.

    The weights are in the router (:class:`kvpress_moe.routers.learned_expert.LearnedExpert`), not in this object.
    """

    def __init__(self) -> None:
        super().__init__("learned", _part_of_the_router, registered=True)

    def _score(
        self, call: LayerCall, compression_ratio: float | None, routing: Routing | None, ranks: Tensor | None
    ) -> Tensor:
        if routing is None or routing.router.learned is None:
            return _part_of_the_router()
        if call.q_len != call.k_len:
            raise ExpertError(
                f"expert 'learned' got hidden states of {call.q_len} tokens for {call.k_len} pairs, expected one token "
                "for each pair. It cannot judge a cache that is compressed again. Leave it out of `experts`."
            )
        return routing.router.learned.importance(call.hidden_states, ranks)


def _part_of_the_router(*arguments: object) -> Tensor:
    raise ExpertError(
        "expert 'learned' is part of a trained router. Pass router= with one that has it, or leave it out of `experts`."
    )
