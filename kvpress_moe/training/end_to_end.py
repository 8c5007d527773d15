"""End-to-end tuning: train the routers of all layers together, by the effect of eviction on the model's answers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from kvpress.utils import compute_n_kept
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.benchmark.byte_strategies import ELEMENT_SIZE
from kvpress_moe.benchmark.cache_eval import step
from kvpress_moe.budget.eviction import best
from kvpress_moe.codes.precision import Precision, menu_of
from kvpress_moe.errors import NotFiniteError
from kvpress_moe.model.layers import full_attention_layers, language_model
from kvpress_moe.press.packing import Menu
from kvpress_moe.routers import Routers
from kvpress_moe.routers.gate import load_balance
from kvpress_moe.routers.learned_expert import LearnedExpert
from kvpress_moe.training.checkpoints import load_tuning_state, save_tuning_state
from kvpress_moe.training.coded_pairs import CodedPairs, layer_basis
from kvpress_moe.training.config import TrainingConfig
from kvpress_moe.training.layerwise import fold_scaling, predict, unfold_scaling
from kvpress_moe.training.prompt_cache import Pairs, as_cache, full_cache
from kvpress_moe.training.soft_budget import soft_share
from kvpress_moe.training.soft_bytes import draw_share, soft_strategies
from kvpress_moe.training.soft_eviction import softly_evicted
from kvpress_moe.training.tuning_samples import CapturedPrompt, TuningSample, question, repetition

FORMAT = 2  # of saved states; a state of another format is not used
SINKS, RECENT, MIN_SHARE = 4, 16, 0.2  # the benchmark's protection and minimum
KEPT = (0.07, 0.55)  # range of the share of pairs that a budget keeps, drawn evenly on a log scale
BYTES = (0.03, 0.5)  # the same for the share of the bytes of a 16-bit cache
TEMPERATURES = (0.5, 0.15)  # nats, at the start and at the end
RULE_RATE = 10.0  # learning rate of a rule's few powers and worths, times that of the weights
_CERTAIN = 1e-4  # nats; the square root of a divergence below has no steep gradient
BATCH = 4  # prompts per step of the optimiser
WARM_UP = 0.1  # share of the steps


class EndToEnd:
    """
    End-to-end tuning of fitted routers: make the answers under a budget similar to those of the full cache.

    For each prompt a budget is drawn, and the routers score all pairs of all layers. The frozen model then processes
    the question and the right answer over the cache. Log shares of
    :func:`kvpress_moe.training.soft_budget.soft_share` are added to the attention logits. The loss is the square
    root of the KL divergence of the next-token distributions from those of the full cache. (Small budgets have a
    divergence a hundred times as large as that of large ones; under the root both count.) Its gradient tells for every
    pair of every layer how much the answer needs it, not how much attention it gets. The model is also asked to repeat
    a part of the context (KVzip's question, arXiv 2505.23416), so that pairs which no training question needs keep
    their scores.

    A part of the prompts gets a budget of bytes. The routers then also choose a strategy for each pair, with the
    probabilities of :func:`kvpress_moe.training.soft_bytes.soft_strategies`. Keys and values become the mean of what
    the codes leave of them. So the gradient also tells what a loss of a key or of a value is worth.

    A soft mask with a falling temperature is the method of Concrete and L0 gates (Louizos et al., arXiv 1712.01312).
    Learning whole budgets end to end is the method of LKV (arXiv 2605.06676).

    Parameters
    ----------
    model : PreTrainedModel
        Its weights do not change.
    tokenizer : PreTrainedTokenizerBase
    routers : Routers
        With a calibration; changed in place.
    tuning_samples : sequence of TuningSample
    read : callable
        Path of a sample's shard -> what the routers see.
    top_k : int
    learned : int or None
        Index of the learned expert.
    menu : sequence of Precision
        What pairs may be stored with if bytes are the budget.
    coded_share : float
        Share of the prompts whose budget counts bytes.
    train_gate : bool
    aux_loss_weight, replay_weight : float
    epochs : int
    learning_rate : float
        The highest learning rate, at the end of the warm-up.
    seed : int
        Seed of the order of prompts, of the budgets and of the parts to repeat.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        routers: Routers,
        tuning_samples: Sequence[TuningSample],
        read: Callable[[Path], CapturedPrompt],
        *,
        top_k: int,
        learned: int | None,
        menu: Sequence[Precision],
        coded_share: float,
        train_gate: bool,
        aux_loss_weight: float,
        replay_weight: float,
        epochs: int,
        learning_rate: float,
        seed: int,
    ):
        self.model, self.tokenizer, self.routers = model, tokenizer, routers
        self.samples, self.read, self.epochs, self.seed = tuning_samples, read, epochs, seed
        self.top_k, self.learned = top_k, learned
        self.precisions, self.coded_share, self.byte_shares = menu, coded_share, BYTES
        self.aux_loss_weight, self.replay_weight, self.learning_rate = aux_loss_weight, replay_weight, learning_rate
        self.layers = full_attention_layers(model)
        self.mean, self.std = self._scaling()
        tuned = [routers.layers[layer_idx] for layer_idx in self.layers]
        gates = {id(p) for router in tuned for linear in (router.up, router.down) for p in linear.parameters()}
        of_tuned = [parameter for router in tuned for parameter in router.parameters()]
        decays = {id(router.calibration.decay) for router in tuned}  # see distance_decay
        self.parameters = [p for p in of_tuned if (train_gate or id(p) not in gates) and id(p) not in decays]
        few = {id(p) for router in tuned if router.rule is not None for p in (router.rule.powers, router.rule.worth)}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters if id(p) not in few], "scale": 1.0},
            {"params": [p for p in self.parameters if id(p) in few], "scale": RULE_RATE},
        ]
        self.optimizer = torch.optim.Adam([group for group in groups if group["params"]], learning_rate, (0.9, 0.98))
        self.optimizer.zero_grad()  # the layer-by-layer fit left the gradient of its last step

    @property
    def n_steps(self) -> int:
        """Number of steps of the optimiser, all epochs together."""
        return self.epochs * -(-len(self.samples) // BATCH)

    def run(
        self, states: Path, progress: Callable[[int, int, float], Any] = lambda done, total, loss: None
    ) -> list[dict[str, float]]:
        """
        Tune all epochs. Returns the mean divergences of each epoch.

        Parameters
        ----------
        states : Path
            Directory where every epoch saves its state. Epochs that are already there are not repeated.
        progress : callable
            Called with the number of prompts done, of all prompts, and the mean answer divergence of this epoch so far.
        """
        history: list[dict[str, float]] = []
        total = self.epochs * len(self.samples)
        with self._only_parameters_learn(), self._scaled():
            for epoch in range(self.epochs):
                state = states / f"epoch-{epoch}.safetensors"
                if state.exists():
                    history.append(load_tuning_state(state, self.parameters, self.optimizer))
                    continue
                rng = random.Random(f"{self.seed} {epoch}")
                order = rng.sample(range(len(self.samples)), len(self.samples))
                seen: list[dict[str, float]] = []
                for start in range(0, len(order), BATCH):
                    batch = order[start : start + BATCH]
                    done = epoch * -(-len(order) // BATCH) + start // BATCH
                    for index in batch:
                        seen.append(self._learn(self.samples[index], done / self.n_steps, len(batch), rng))
                        progress(epoch * len(order) + len(seen), total, _means(seen)["answer"])
                    self._step(done)
                history.append({name: round(mean, 4) for name, mean in _means(seen).items()})
                save_tuning_state(state, self.parameters, self.optimizer, history[-1])
        return history

    def _learn(self, sample: TuningSample, part_done: float, n_batch: int, rng: random.Random) -> dict[str, float]:
        """Add the gradient of one prompt. Returns its divergences."""
        temperature = TEMPERATURES[0] * (TEMPERATURES[1] / TEMPERATURES[0]) ** part_done
        cache = full_cache(self.model, sample.prompt.context, sample.cache_path)
        coded = rng.random() < self.coded_share
        of_prompt = self.read(sample.shard)
        scores, worths, aux_loss = self.judge(of_prompt)
        if coded:
            share = draw_share(*self.byte_shares, rng.random())
            pairs, log_kept, balance = self.code_softly(cache, scores, worths, of_prompt.power, share, temperature)
            aux_loss = aux_loss + balance
        else:
            share = draw_share(*KEPT, rng.random())
            pairs, log_kept = cache, self.evict_softly(scores, share, temperature)
        answer = self.divergence(cache, pairs, *question(sample.prompt), log_kept)
        repeated = torch.zeros(())
        if self.replay_weight:
            asked = repetition(sample.prompt, self.tokenizer, rng)
            repeated = self.divergence(cache, pairs, *asked, log_kept)
        loss = (answer + _CERTAIN).sqrt() + self.replay_weight * (repeated + _CERTAIN).sqrt()
        loss = loss + self.aux_loss_weight * aux_loss
        if not bool(loss.isfinite()):
            raise NotFiniteError(
                f"loss: got {loss.item()} for {sample.shard.stem}, expected a finite number. The model overflows in "
                f"{self.model.dtype} (try bfloat16 or float32), or the learning rate is too high (end_to_end_rate)."
            )
        (loss / n_batch).backward()
        names = ("coded_answer", "coded_replay") if coded else ("evicted_answer", "evicted_replay")
        found = {"answer": answer.item(), "replay": repeated.item()}
        return found | dict(zip(names, found.values(), strict=True))

    def judge(self, captured: CapturedPrompt) -> tuple[Tensor, list[Tensor | None], Tensor]:
        """Scores (L, H, S) of a prompt's pairs, worths (2, 1, H, S) by layer, and the mean load-balancing loss."""
        scored, worths, balance = [], [], []
        for number, layer_idx in enumerate(self.layers):
            hidden = (captured.hidden[number] - self.mean[number]) / self.std[number]
            router = self.routers.layers[layer_idx]
            scores, aux_loss = predict(router, hidden, captured.ranks[number], self.top_k, self.learned)
            scored.append(scores.T)
            worths.append(router.worths(hidden[None]))
            balance.append(aux_loss)
        return torch.stack(scored), worths, torch.stack(balance).mean()

    def evict_softly(self, scores: Tensor, share: float, temperature: float) -> Tensor:
        """Logarithms of how far each pair stays, (L, H, S), if a share of the pairs stays."""
        n_tokens = scores.shape[2]
        protected = torch.zeros(n_tokens, dtype=torch.bool, device=scores.device)
        protected[:SINKS] = protected[-RECENT:] = True
        n_kept = max(compute_n_kept(n_tokens, 1 - share), SINKS + RECENT + 1)
        log_kept = soft_share(scores.flatten(0, 1), protected, n_kept, MIN_SHARE, temperature)
        return log_kept.view_as(scores)

    def code_softly(
        self,
        cache: Pairs,
        scores: Tensor,
        worths: Sequence[Tensor | None],
        power: Tensor,
        share: float,
        temperature: float,
    ) -> tuple[Pairs, Tensor, Tensor]:
        """
        Pairs of all layers after a soft choice of strategies.

        With them come logarithms (L, H, S) of how far each pair stays, and the load-balancing loss of the strategies.
        ``share`` is the share of the bytes of a 16-bit cache.
        """
        n_tokens = scores.shape[2]
        coded, costs = [], []
        for number, (layer_idx, worth) in enumerate(zip(self.layers, worths, strict=True)):
            keys, values = cache[layer_idx]
            router, attention = self.routers.layers[layer_idx], language_model(self.model).layers[layer_idx].self_attn
            basis = layer_basis(self.model, layer_idx, self.routers.key_transforms, n_tokens)
            menu = Menu.of(self.precisions, keys.shape[-1], ELEMENT_SIZE, basis)
            layer = CodedPairs.of(keys, values, menu.precisions, attention.scaling, power[number], basis)
            lost = layer.distortion.to(scores.device)
            costs.append(router.rule.log_costs(scores[number][None], worth, lost, menu.precisions)[:, 0])
            coded.append(layer)
        log_costs = torch.stack(costs, 1)  # (M + 1, L, H, S)
        budget = menu.budget(n_tokens, share)
        log_costs = forbid(log_costs, menu.whole(budget), menu.floor(budget, MIN_SHARE * share * n_tokens))
        log_probs = soft_strategies(
            log_costs.flatten(1), menu.nbytes, budget * log_costs[0, ..., 0].numel(), temperature
        ).view_as(log_costs)
        pairs = list(cache)
        for number, (layer_idx, layer) in enumerate(zip(self.layers, coded, strict=True)):
            pairs[layer_idx] = layer.mixed(*cache[layer_idx], log_probs[:, number], menu.precisions)
        probs = log_probs.flatten(1).exp().T[None]  # (1, L·H·S, M + 1)
        chosen = F.one_hot(probs.argmax(-1), probs.shape[-1]).bool()
        return pairs, log_probs[1:].logsumexp(0), load_balance(probs, chosen)

    def divergence(self, cache: Pairs, pairs: Pairs, tokens: Tensor, n_logits: int, log_kept: Tensor) -> Tensor:
        """Mean KL divergence, in nats, that softly compressed pairs cause at the last ``n_logits`` of tokens (1, T)."""
        n_read, tokens = cache[0][0].shape[2], tokens.to(self.model.device)
        with torch.no_grad():
            full = step(self.model, as_cache(cache), tokens, n_read, None, n_logits)[0].float().log_softmax(-1)
        with softly_evicted(self.model, self.layers, log_kept):
            own = step(self.model, as_cache(pairs), tokens, n_read, None, n_logits)[0].float().log_softmax(-1)
        return (full.exp() * (full - own)).sum(-1).mean().cpu()

    def _step(self, done: int) -> None:
        """One step of the optimiser. The learning rate rises linearly, then falls along half a cosine."""
        at = (done + 1) / (self.n_steps + 1)
        rate = at / WARM_UP if at < WARM_UP else 0.5 * (1 + math.cos(math.pi * (at - WARM_UP) / (1 - WARM_UP)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * rate * group["scale"]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _scaling(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the captured hidden states, by layer, (L, 1, C) each."""
        n_tokens, total, squares = 0, torch.zeros(()), torch.zeros(())
        for sample in self.samples:
            hidden = self.read(sample.shard).hidden
            n_tokens += hidden.shape[1]
            total = total + torch.stack([layer.sum(0, keepdim=True) for layer in hidden])
            squares = squares + torch.stack([layer.double().square().sum(0, keepdim=True) for layer in hidden])
        mean = total / n_tokens
        return mean, (squares / n_tokens - mean.double().square()).clamp(min=1e-8).sqrt().float()

    def _first_maps(self) -> Iterator[tuple[nn.Linear, Tensor, Tensor]]:
        for number, layer_idx in enumerate(self.layers):
            router = self.routers.layers[layer_idx]
            yield router.down, self.mean[number, 0], self.std[number, 0]
            if self.learned is not None:
                yield cast(LearnedExpert, router.learned).down, self.mean[number, 0], self.std[number, 0]

    @contextmanager
    def _scaled(self) -> Iterator[None]:
        """Inside the block the routers take standardised hidden states, which are easier to optimise."""
        for linear, mean, std in self._first_maps():
            unfold_scaling(linear, mean, std)
        try:
            yield
        finally:
            for linear, mean, std in self._first_maps():
                fold_scaling(linear, mean, std)

    @contextmanager
    def _only_parameters_learn(self) -> Iterator[None]:
        """Inside the block only the tuned parameters have gradients. Afterwards all is as before."""
        everything = [*self.model.parameters(), *self.routers.parameters()]
        before = [parameter.requires_grad for parameter in everything]
        try:
            for parameter in everything:
                parameter.requires_grad_(False)
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, asked in zip(everything, before, strict=True):
                parameter.requires_grad_(asked)


def settings_of(config: TrainingConfig, routers: Routers) -> dict[str, Any]:
    """Arguments of :class:`EndToEnd` that follow from the recipe alone."""
    return {
        "top_k": config.top_k,
        "learned": config.experts.index("learned") if "learned" in config.experts else None,
        "menu": menu_of("mixed", bool(routers.key_transforms)),
        "coded_share": config.coded_share,
        "train_gate": config.gate,
        "replay_weight": config.replay_weight,
        "seed": config.seed,
    }


def _means(seen: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each figure over the prompts that have it."""
    names = dict.fromkeys(name for figures in seen for name in figures)
    having = {name: [figures[name] for figures in seen if name in figures] for name in names}
    return {name: sum(values) / len(values) for name, values in having.items()}


def forbid(log_costs: Tensor, whole: int, floor: int) -> Tensor:
    """
    Costs (M, L, H, S) with infinity for what budgets and the benchmark never do.

    The first ``whole`` tokens stay as the model wrote them. The first and the latest tokens are not evicted, nor are
    the ``floor`` pairs of each head whose eviction costs most.
    """
    forbidden = torch.zeros_like(log_costs, dtype=torch.bool)
    forbidden[:-1, ..., :whole] = True
    forbidden[0, ..., :SINKS] = forbidden[0, ..., -RECENT:] = True
    eviction = log_costs[0].detach().masked_fill(forbidden[0], torch.inf)  # what stays anyway counts
    forbidden[0] |= best(eviction, floor)
    return log_costs.masked_fill(forbidden, torch.inf)
