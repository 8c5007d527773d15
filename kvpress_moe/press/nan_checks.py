"""Errors for NaN and infinity where they would decide which pairs stay. (``topk`` ranks NaN first.)"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress_moe.budget.cross_layer import Observation
from kvpress_moe.errors import NotFiniteError
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.routers import Routing


def is_finite(states: Tensor) -> Tensor:
    """Whether all numbers of a tensor are finite: a bool scalar on its device. The largest or smallest shows it."""
    return torch.stack((states.amax(), states.amin())).isfinite().all()


def active_experts(call: LayerCall, weights: Tensor, logits: Tensor) -> list[int]:
    """
    Indices of the experts with a routing weight (B, 1 or H, S, E) above zero for any pair of a call.

    The same step checks that keys, values and the router's logits (B, S, E) are finite, so that the device is read only
    once. Hidden states are checked through the logits: one NaN or infinity in a token's hidden state makes its logits
    NaN or infinite.

    Raises
    ------
    NotFiniteError
        If hidden states, keys, values or logits are not finite.
    """
    used = (weights > 0).flatten(0, 2).any(0)
    finite = torch.stack([is_finite(states).to(used.device) for states in (logits, call.keys, call.values)])
    *judging, logits_are, keys_are, values_are = torch.cat((used, finite)).tolist()
    if not (logits_are and keys_are and values_are):
        dtype = call.keys.dtype
        model = f"The model or its input is broken, or overflows in {dtype}: try bfloat16 or float32."
        for what, states in (("hidden states", call.hidden_states), ("keys", call.keys), ("values", call.values)):
            if not bool(is_finite(states)):
                raise not_finite(what, call, states, model)
        raise not_finite("router logits", call, logits, "The router's weights are broken; load or train it again.")
    return [index for index, judges in enumerate(judging) if judges]


def check_all_finite(
    rows: Sequence[LayerCall], routed: Sequence[Routing], scores: Sequence[Tensor], observed: Sequence[Observation]
) -> None:
    """Run :func:`check_finite` for each row of a batch."""
    for row, routing, mixed, observation in zip(rows, routed, scores, observed, strict=True):
        check_finite(row, routing, mixed, observation.mass)


def check_finite(
    call: LayerCall, routing: Routing | None = None, scores: Tensor | None = None, mass: Tensor | None = None
) -> None:
    """
    Raise if calibrated scores, or the attention that hit rates are counted with, are not finite.

    The device is read once.

    Parameters
    ----------
    call : LayerCall
    routing : Routing, optional
        The routing that the scores were mixed by.
    scores : Tensor, shape (B, H, S), optional
        Mixed scores. Calibrated scores estimate the logarithm of attention and have to be finite. Ranks are always
        finite. :meth:`kvpress_moe.experts.expert.Expert.score` checks the scores of a single expert.
    mass : Tensor, optional
        Attention that was paid to the pairs.

    Raises
    ------
    NotFiniteError
    """
    found = {}
    if mass is not None:
        found["attention"] = (mass, f"Queries or keys overflow in {call.keys.dtype}: try bfloat16 or float32.")
    if scores is not None and routing is not None and routing.router.calibration is not None:
        found["mixed scores"] = (scores, "The router's weights are broken, or overflow; load or train it again.")
    if found:
        finite = torch.stack([is_finite(states) for states, _ in found.values()]).tolist()
        for healthy, (what, (states, remedy)) in zip(finite, found.items(), strict=True):
            if not healthy:
                raise not_finite(what, call, states, remedy)


def not_finite(what: str, call: LayerCall, states: Tensor, remedy: str) -> NotFiniteError:
    """The error that names the stage and the layer."""
    n_wrong = int((~states.isfinite()).sum())
    return NotFiniteError(
        f"{what}: got NaN or infinity on layer {call.layer_idx} ({n_wrong} of {states.numel()} numbers), expected "
        f"finite numbers; nothing was evicted. {remedy}"
    )
