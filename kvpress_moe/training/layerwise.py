"""Layer-by-layer fit: fit the router of one layer to its targets by gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from kvpress_moe.experts.mixing import calibrated_scores
from kvpress_moe.routers.base import BaseMoERouter
from kvpress_moe.routers.calibration import Calibration
from kvpress_moe.routers.gate import gate, load_balance
from kvpress_moe.routers.learned_expert import LearnedExpert
from kvpress_moe.training.losses import budget_loss


@dataclass(frozen=True)
class LayerData:
    """
    All captured tokens of one layer.

    Attributes
    ----------
    hidden : Tensor, shape (N, C), float32
    ranks : Tensor, shape (N, H, E), float32
        Ranks by the heuristic experts. The column of the learned expert is ignored.
    targets : Tensor, shape (N, H), float32
    weights : Tensor, shape (N, H), float32
    thresholds : Tensor, shape (3,), float32
        Values of the target at which budgets divide the pairs.
    """

    hidden: Tensor
    ranks: Tensor
    targets: Tensor
    weights: Tensor
    thresholds: Tensor


def predict(
    router: BaseMoERouter, hidden: Tensor, ranks: Tensor, top_k: int, learned: int | None
) -> tuple[Tensor, Tensor]:
    """
    Scores (N, H) of tokens, and the load-balancing loss.

    Computed by :func:`kvpress_moe.experts.mixing.calibrated_scores`, as in the press. Tokens of many prompts are
    treated as one prompt.

    Parameters
    ----------
    router : BaseMoERouter
        With a calibration.
    hidden, ranks : Tensor, shapes (N, C), (N, H, E)
    top_k : int
    learned : int or None
        Index of the learned expert.
    """
    num_experts = ranks.shape[-1]
    calibration, expert = cast(Calibration, router.calibration), cast(LearnedExpert, router.learned)
    decision = gate(router.logits(hidden[None]), top_k, capacity_factor=float(num_experts))
    ranked = [index for index in range(num_experts) if index != learned]
    of_ranked = ranks[..., ranked].permute(2, 1, 0)[None]  # (1, experts, H, N)
    scores = calibrated_scores(
        calibration,
        decision.weights[:, None],
        range(num_experts),
        of_ranked,
        ranked,
        learned,
        lambda: expert.importance(hidden[None], of_ranked),
    )
    return scores[0].T, load_balance(decision.probs, decision.chosen)


def fit_layer(
    router: BaseMoERouter,
    data: LayerData,
    top_k: int,
    learned: int | None,
    aux_loss_weight: float,
    epochs: int,
    learning_rate: float,
    seed: int,
    train_gate: bool = True,
    budget_weight: float = 0.0,
    batch_size: int = 2048,
) -> list[float]:
    """
    Fit a router in place. Returns the weighted squared error of each epoch.

    Hidden states are standardised during the fit. At the end this scaling is folded into the first linear layers.
    """
    mean, std = data.hidden.mean(0), data.hidden.std(0).clamp(min=1e-4)
    hidden = (data.hidden - mean) / std
    generator = torch.Generator().manual_seed(seed)
    calibration = cast(Calibration, router.calibration)
    with torch.no_grad():
        weighted = data.weights.sum(0)
        calibration.offset.copy_((data.targets * data.weights).sum(0) / weighted)
        calibration.slope.fill_(1.0 / data.ranks.shape[-1])
        if learned is not None:
            calibration.slope[:, learned] = 1.0
    for parameter in (*router.up.parameters(), *router.down.parameters()):
        parameter.requires_grad_(train_gate)
    parameters = [parameter for parameter in router.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    n_steps = epochs * -(-len(hidden) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=n_steps, pct_start=0.1)
    router.train()
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for dropout
        for _ in range(epochs):
            total = 0.0
            for batch in torch.randperm(len(hidden), generator=generator).split(batch_size):
                scores, aux_loss = predict(router, hidden[batch], data.ranks[batch], top_k, learned)
                weights = data.weights[batch]
                error = (weights * (scores - data.targets[batch]).square()).sum() / weights.sum()
                budget = budget_loss(scores, data.targets[batch], data.thresholds)
                optimizer.zero_grad()
                (error + budget_weight * budget + aux_loss_weight * aux_loss).backward()
                optimizer.step()
                schedule.step()
                total += error.item() * len(batch) / len(hidden)
            losses.append(total)
    router.eval().requires_grad_(True)
    fold_scaling(router.down, mean, std)
    if learned is not None:
        fold_scaling(cast(LearnedExpert, router.learned).down, mean, std)
    return losses


@torch.no_grad()
def fold_scaling(linear: nn.Linear, mean: Tensor, std: Tensor) -> None:
    """Change a linear layer that takes C standardised inputs first, so that it takes the raw inputs."""
    weight = linear.weight[:, : len(std)]
    weight.div_(std)
    linear.bias.sub_(weight @ mean)


@torch.no_grad()
def unfold_scaling(linear: nn.Linear, mean: Tensor, std: Tensor) -> None:
    """Undo :func:`fold_scaling`: the first C inputs of the linear layer are then standardised."""
    weight = linear.weight[:, : len(std)]
    linear.bias.add_(weight @ mean)
    weight.mul_(std)
