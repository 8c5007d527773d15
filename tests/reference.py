"""Each stage once more, as loops that can be checked by reading. Slow on purpose."""

import math

import torch


def tie_key(position: int) -> int:
    return (position * 2654435769) % 2**32


def preferences(logits: torch.Tensor) -> list[list[list[int]]]:
    """Experts of each token, best first; ties go round by position."""
    n_batch, n_tokens, num_experts = logits.shape
    order = []
    for b in range(n_batch):
        rows = []
        for s in range(n_tokens):
            experts = [(s + offset) % num_experts for offset in range(num_experts)]
            rows.append(sorted(experts, key=lambda e: -logits[b, s, e].item()))  # Python's sort is stable
        order.append(rows)
    return order


def assign(logits: torch.Tensor, top_k: int, capacity_factor: float) -> torch.Tensor:
    """Choices in rounds: everybody's first, then second …; a full expert turns away those it is least sure of."""
    n_batch, n_tokens, num_experts = logits.shape
    probs = logits.softmax(-1)
    capacity = math.ceil(capacity_factor * n_tokens * top_k / num_experts)
    order = preferences(logits)
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    for b in range(n_batch):
        load = [0] * num_experts
        for choice in range(num_experts):
            for e in range(num_experts):
                asking = [s for s in range(n_tokens) if order[b][s][choice] == e and chosen[b, s].sum().item() < top_k]
                asking.sort(key=lambda s: (-probs[b, s, e].item(), tie_key(s)))
                for s in asking[: capacity - load[e]]:
                    chosen[b, s, e] = True
                load[e] += min(len(asking), capacity - load[e])
    return chosen


def weights(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    result = torch.zeros_like(logits)
    for b in range(logits.shape[0]):
        for s in range(logits.shape[1]):
            picked = [e for e in range(logits.shape[2]) if chosen[b, s, e]]
            top = max(logits[b, s, e].item() for e in picked)
            total = sum(math.exp(logits[b, s, e].item() - top) for e in picked)
            for e in picked:
                result[b, s, e] = math.exp(logits[b, s, e].item() - top) / total
    return result


def aux_loss(logits: torch.Tensor, chosen: torch.Tensor) -> float:
    n_batch, n_tokens, num_experts = logits.shape
    probs = logits.softmax(-1)
    n_assigned = chosen.sum().item()
    total = 0.0
    for e in range(num_experts):
        mean_prob = sum(probs[b, s, e].item() for b in range(n_batch) for s in range(n_tokens)) / (n_batch * n_tokens)
        total += mean_prob * chosen[:, :, e].sum().item() / n_assigned
    return total


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """(pairs of the head that score lower + half of those that score alike) / number of pairs."""
    result = torch.zeros(scores.shape)
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            head = scores[b, h].tolist()
            for s, score in enumerate(head):
                lower = sum(other < score for other in head)
                alike = sum(other == score for other in head)
                result[b, h, s] = (lower + alike / 2) / len(head)
    return result


def mixed(expert_scores: list[torch.Tensor], routing: torch.Tensor) -> torch.Tensor:
    n_batch, n_heads, n_tokens = expert_scores[0].shape
    ranked = [ranks(scores) for scores in expert_scores]
    result = torch.zeros(n_batch, n_heads, n_tokens)
    for b in range(n_batch):
        for h in range(n_heads):
            for s in range(n_tokens):
                for e in range(len(ranked)):
                    result[b, h, s] += routing[b, min(h, routing.shape[1] - 1), s, e] * ranked[e][b, h, s]
    return result


def mixed_calibrated(terms: torch.Tensor, routing: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Terms (B, E, H, S) of all experts, each times its weight and the number of experts, plus the head's offset."""
    n_batch, num_experts, n_heads, n_tokens = terms.shape
    result = torch.zeros(n_batch, n_heads, n_tokens)
    for b in range(n_batch):
        for h in range(n_heads):
            for s in range(n_tokens):
                result[b, h, s] = offset[h]
                for e in range(num_experts):
                    weight = routing[b, min(h, routing.shape[1] - 1), s, e]
                    result[b, h, s] += num_experts * weight * terms[b, e, h, s]
    return result


def mass_by_expert(mass: torch.Tensor, routed: torch.Tensor) -> list[float]:
    n_batch, n_heads, n_tokens = mass.shape
    totals = [0.0] * routed.shape[-1]
    for b in range(n_batch):
        for h in range(n_heads):
            for s in range(n_tokens):
                for e in range(routed.shape[-1]):
                    if routed[b, min(h, routed.shape[1] - 1), s, e]:
                        totals[e] += mass[b, h, s].item()
    return totals


def shared(scores: torch.Tensor, n_kept: int, min_share: float, min_pairs: int = 40) -> list[list[int]]:
    """[unit, position] of the pairs that stay: each unit's best few, then the best of all the others."""
    n_units, n_tokens = scores.shape
    pairs = [[unit, position] for unit in range(n_units) for position in range(n_tokens)]
    best_first = sorted(pairs, key=lambda pair: -scores[pair[0], pair[1]].item())  # Python's sort is stable
    floor = int(n_kept * min_share)
    while floor < min_pairs and floor < n_kept and floor + 1 <= 2 * n_kept * min_share:
        floor += 1
    floor = max(1, floor)
    kept = [pair for unit in range(n_units) for pair in [p for p in best_first if p[0] == unit][:floor]]
    others = [pair for pair in best_first if pair not in kept]
    return sorted(kept + others[: n_units * n_kept - len(kept)])
