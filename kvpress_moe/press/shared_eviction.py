"""Eviction under a budget that heads share. Layers wait until the budget is decided, then they become ragged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from kvpress_moe.budget.cross_layer import Observation, SharedBudget
from kvpress_moe.cache.masks import fit_masks
from kvpress_moe.cache.ragged_layer import RaggedLayer
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.model.layers import first_to_compress, last_to_compress
from kvpress_moe.press.input_checks import check_can_turn_ragged, check_still_there
from kvpress_moe.press.padding import join_rows

Decided = list[tuple[int, list[tuple[Tensor, Observation]]]]


def evict_shared(
    shared: SharedBudget,
    call: LayerCall,
    scores: Sequence[Tensor],
    observed: Sequence[Observation],
    n_kept: Callable[[int, Mapping[int, Tensor]], int],
    budget: str,
    floor: Callable[[int], int],
    inside_wrapper: bool,
) -> Decided:
    """
    Let heads compete for the budget. Layers whose pairs are decided become ragged.

    Parameters
    ----------
    shared : SharedBudget
        It contains the layers of the prompt that are already waiting.
    call : LayerCall
    scores, observed : sequence
        One entry for the whole batch, or one for each row of a padded batch.
    n_kept : callable
        See :meth:`kvpress_moe.budget.cross_layer.SharedBudget.decide`.
    budget : {"uniform", "layer", "global"}
    floor : callable
        ``floor(n)`` tells how many pairs each head keeps at least, if heads keep n on average. Of no effect if
        ``budget`` is "uniform".
    inside_wrapper : bool
        Whether a wrapper of kvpress calls the press. Wrappers store layers of equal heads.

    Returns
    -------
    list of (layer index, list of (kept, observation))
        For each layer that is decided: the pairs (B, H, S) that stay and what was observed, row by row. Empty while
        all layers wait.

    Raises
    ------
    SettingError, UnsupportedInputError
        If layers cannot become ragged, or if another press evicted pairs in the meantime.
    """
    check_can_turn_ragged(call.cache, call.layer_idx, inside_wrapper)
    if first_to_compress(call.module):
        shared.clear()
    shared.add(call.layer_idx, list(zip(scores, observed, strict=True)))
    if budget == "global" and not last_to_compress(call.module):
        return []
    decided = shared.decide(n_kept, (lambda n: n) if budget == "uniform" else floor)
    cache: Any = call.cache
    check_still_there(cache, dict.fromkeys(decided, call.k_len))
    for layer_idx, parts in decided.items():
        dense: Any = call if layer_idx == call.layer_idx else cache.layers[layer_idx]
        kept = join_rows([kept for kept, _ in parts], call.k_len)
        cache.layers[layer_idx] = RaggedLayer.from_dense(dense.keys, dense.values, kept)
    fit_masks(cache, call.module.config)
    return list(decided.items())
