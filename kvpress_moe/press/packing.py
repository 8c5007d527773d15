"""Packing: every pair gets a strategy under a byte budget, and the layers of the cache become packed layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvpress_moe.budget.cross_layer import Observation
from kvpress_moe.budget.shared_bytes import ByteBudget, SharedBytes, as_costs, strategy_costs
from kvpress_moe.cache.masks import fit_masks
from kvpress_moe.cache.packed_layer import PackedLayer
from kvpress_moe.cache.tier import TABLE_BYTES
from kvpress_moe.codes.distortion import Distortion, distortions
from kvpress_moe.codes.exact import exact
from kvpress_moe.codes.key_transform import KeyBasis, KeyTransform
from kvpress_moe.codes.precision import WHOLE, Precision
from kvpress_moe.codes.rotary import Rotary
from kvpress_moe.experts.layer_call import LayerCall, latest_queries
from kvpress_moe.experts.mixing import rank_within_head
from kvpress_moe.model.layers import first_to_compress, last_to_compress
from kvpress_moe.press.input_checks import check_can_turn_ragged, check_still_there
from kvpress_moe.routers import Routers, Routing

N_SINK = 1  # first tokens, whose pairs stay as the model wrote them; nearly every query attends to the first one
SINKS_SHARE = 0.25  # of a head's bytes that they may take


@dataclass(frozen=True)
class PackedPart:
    """
    The strategies of one part of a batch in one layer, and what was known of them.

    Attributes
    ----------
    strategies : Tensor, shape (B, H, S), uint8
        0: evicted; m: stored with the m-th precision of the menu.
    costs : Tensor, shape (M, B, H, S), bfloat16
        See :func:`cost_of_strategies`.
    observation : Observation
    """

    strategies: Tensor
    costs: Tensor
    observation: Observation


@dataclass(frozen=True)
class Menu:
    """
    The precisions that a press may choose from, and what pairs take in a certain cache.

    Attributes
    ----------
    precisions : tuple of Precision
    nbytes : Tensor, shape (M,), int64
        Bytes of a pair with each strategy. The first strategy evicts.
    pair_bytes : int
        Bytes of a pair as the model wrote it.
    head_dim : int
    """

    precisions: tuple[Precision, ...]
    nbytes: Tensor
    pair_bytes: int
    head_dim: int

    @classmethod
    def of(cls, precisions: Sequence[Precision], head_dim: int, element_size: int, basis: KeyBasis | None) -> Menu:
        """Sorted by bytes."""
        by_bytes = sorted(precisions, key=lambda precision: precision.nbytes(head_dim, element_size, basis))
        nbytes = [0, *(precision.nbytes(head_dim, element_size, basis) for precision in by_bytes)]
        return cls(tuple(by_bytes), torch.tensor(nbytes), 2 * head_dim * element_size, head_dim)

    def budget(self, k_len: int, keep: float) -> int:
        """Bytes of a head's pairs that stay within the share ``keep`` of ``k_len`` whole pairs, tables included."""
        return max(0, int(k_len * self.pair_bytes * keep) - TABLE_BYTES * len(self.precisions))

    def floor(self, budget: int, n_pairs: float) -> int:
        """Number of pairs that a head keeps at least: ``n_pairs`` if they fit, and always 1."""
        return max(1, min(int(n_pairs), budget // int(self.nbytes[1])))

    def whole(self, budget: int) -> int:
        """Number of first tokens whose pairs stay as the model wrote them, with ``budget`` bytes for a head."""
        return N_SINK if self.has_whole and N_SINK * self.pair_bytes <= SINKS_SHARE * budget else 0

    def nbytes_in(self, element_size: int) -> Tensor:
        """Bytes of a pair with each strategy (M,), in a cache whose numbers take ``element_size`` bytes."""
        n_whole = [0, *((p.key_bits == WHOLE) + (p.value_bits == WHOLE) for p in self.precisions)]
        return self.nbytes + torch.tensor(n_whole) * (self.head_dim * element_size - self.pair_bytes // 2)

    def plan(self, k_len: int, keep: float, n_pairs: float) -> ByteBudget:
        """
        The budget of a head with ``k_len`` pairs, of which the share ``keep`` of the bytes stays.

        If everything stays, tables come on top.
        """
        nbytes = self.budget(k_len, keep) if keep < 1 else k_len * self.pair_bytes
        return ByteBudget(nbytes, self.floor(nbytes, n_pairs), self.whole(nbytes))

    @property
    def has_whole(self) -> bool:
        """Whether pairs may stay as the model wrote them."""
        return self.precisions[-1] == Precision(WHOLE, WHOLE)


def key_basis(call: LayerCall, layer_idx: int, routers: Routers | None, positions: Tensor) -> KeyBasis | None:
    """The basis of a layer's keys, if the routers have one. ``call`` is of any layer that is compressed."""
    transforms = None if routers is None else routers.key_transforms
    if not transforms:
        return None
    return basis_at(transforms[layer_idx].to(call.keys.device), call.view.rotary_emb, int(positions.max()) + 1)


def basis_at(transform: KeyTransform, rotary_emb: Callable[[Tensor, Tensor], Any], n_positions: int) -> KeyBasis:
    """The basis of a transform for keys at positions below ``n_positions``, on the transform's device."""
    device = transform.mean.device
    probes = torch.tensor([[0, 1, n_positions - 1]], device=device)  # LongRoPE looks at the largest
    cos, sin = rotary_emb(torch.zeros(1, device=device), probes)
    return KeyBasis(transform, Rotary.of(cos[0, :2], sin[0, :2]), n_positions)


def positions_of(call: LayerCall, text_starts: Sequence[int] | None) -> Tensor:
    """Positions (B or 1, S) of a prompt's keys, as the rotary embedding got them. Padding has position 0."""
    given = call.kwargs.get("position_ids")
    if isinstance(given, Tensor) and given.dim() == 2 and given.shape[1] == call.k_len:
        return given.long()
    counted = torch.arange(call.k_len, device=call.keys.device)[None]
    if text_starts is None:
        return counted
    return (counted - torch.tensor(text_starts, device=counted.device)[:, None]).clamp(min=0)


def query_power(call: LayerCall) -> Tensor:
    """Mean squared norm of the latest queries of each KV head, shape (H,), float32."""
    queries = latest_queries(call, call.window).float().square().sum(-1)  # (B, num_heads, window)
    power: Tensor = queries.unflatten(1, (call.keys.shape[1], -1)).mean((0, 2, 3))
    return power


def cost_of_strategies(
    call: LayerCall, routing: Routing, scores: Tensor, menu: Menu, basis: KeyBasis | None, positions: Tensor
) -> Tensor:
    """
    What each strategy costs for each pair, from its weight and its expected loss.

    Parameters
    ----------
    call : LayerCall
    routing : Routing
        If its router was trained to choose strategies, the costs are those of its rule. If it is only calibrated, a
        pair weighs ``exp(score)``; see :func:`kvpress_moe.budget.shared_bytes.strategy_costs`. Otherwise a pair with
        rank r within its head weighs ``1 / (1 - r)``.
    scores : Tensor, shape (B, H, S)
    menu : Menu
    basis : KeyBasis or None
    positions : Tensor, shape (B or 1, S)

    Returns
    -------
    Tensor, shape (M, B, H, S), bfloat16
    """
    with exact(call.keys.device):
        return _costs(call, routing, scores, menu, basis, positions)


def losses_of_strategies(call: LayerCall, menu: Menu, basis: KeyBasis | None, positions: Tensor) -> Tensor:
    """What each strategy but the first loses of each pair: (M - 1, B, H, S), float32. 1 is the loss of eviction."""
    with exact(call.keys.device):
        return _losses(call, menu, basis, positions).total(menu.precisions, call.keys[..., 0])


def _losses(call: LayerCall, menu: Menu, basis: KeyBasis | None, positions: Tensor) -> Distortion:
    power = query_power(call)
    return distortions(call.keys, call.values, menu.precisions, call.module.scaling, power, basis, positions)


def _costs(
    call: LayerCall, routing: Routing, scores: Tensor, menu: Menu, basis: KeyBasis | None, positions: Tensor
) -> Tensor:
    lost = _losses(call, menu, basis, positions)
    router = routing.router
    worths = router.worths(call.hidden_states)
    if router.rule is not None and worths is not None:
        return as_costs(router.rule.log_costs(scores, worths, lost, menu.precisions))
    log_weights = scores if router.calibration is not None else -torch.log1p(-rank_within_head(scores.float()))
    return strategy_costs(log_weights, lost.total(menu.precisions, scores))


def pack_shared(
    shared: SharedBytes,
    call: LayerCall,
    costs: Sequence[Tensor],
    observed: Sequence[Observation],
    menu: Menu,
    plan: Callable[[int, Tensor], ByteBudget],
    budget: str,
    basis: KeyBasis | None,
    positions: Tensor,
    inside_wrapper: bool = False,
) -> list[tuple[int, list[PackedPart]]]:
    """
    Let pairs compete for bytes. Layers whose pairs are decided become packed.

    Parameters
    ----------
    shared : SharedBytes
        It contains the layers of the prompt that are already waiting.
    call : LayerCall
    costs, observed : sequence
        One entry for the whole batch, or one for each row of a padded batch.
    menu : Menu
    plan : callable
        ``plan(part, costs)`` gives the budget of a part of the batch, see
        :meth:`kvpress_moe.budget.shared_bytes.SharedBytes.decide`.
    budget : {"uniform", "layer", "global"}
    basis : KeyBasis or None
        Of this layer's keys.
    positions : Tensor, shape (B or 1, S)
    inside_wrapper : bool
        Whether a wrapper of kvpress calls the press. Wrappers store keys and values themselves.

    Returns
    -------
    list of (layer index, list of PackedPart)
        For each layer that is decided, part by part of the batch. Empty while all layers wait.

    Raises
    ------
    SettingError, UnsupportedInputError
        If layers cannot become packed, or if another press evicted pairs in the meantime.
    """
    named = [(precision.key_bits, precision.value_bits) for precision in menu.precisions]
    check_can_turn_ragged(call.cache, call.layer_idx, inside_wrapper, "precision", str(named))
    if first_to_compress(call.module):
        shared.clear()
    shared.add(call.layer_idx, list(zip(costs, observed, strict=True)), basis)
    if budget == "global" and not last_to_compress(call.module):
        return []
    decided = shared.decide(menu.nbytes, plan, each_head=budget == "uniform")
    cache: Any = call.cache
    check_still_there(cache, dict.fromkeys(decided, call.k_len))
    found = []
    for layer_idx, parts in decided.items():
        dense: Any = call if layer_idx == call.layer_idx else cache.layers[layer_idx]
        strategies = torch.cat([F.pad(one, (call.k_len - one.shape[-1], 0)) for one, _, _ in parts])
        cache.layers[layer_idx] = PackedLayer.from_strategies(
            dense.keys, dense.values, strategies, menu.precisions, shared.notes.pop(layer_idx), positions
        )
        found.append((layer_idx, [PackedPart(*part) for part in parts]))
    fit_masks(cache, call.module.config)
    return found
