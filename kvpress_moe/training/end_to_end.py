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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.benchmark.cache_eval import step
from kvpress_moe.errors import NotFiniteError
from kvpress_moe.model.layers import full_attention_layers
from kvpress_moe.routers import Routers
from kvpress_moe.routers.learned_expert import LearnedExpert
from kvpress_moe.training.checkpoints import load_tuning_state, save_tuning_state
from kvpress_moe.training.layerwise import fold_scaling, predict, unfold_scaling
from kvpress_moe.training.prompt_cache import Pairs, as_cache, full_cache
from kvpress_moe.training.soft_budget import soft_share
from kvpress_moe.training.soft_eviction import softly_evicted
from kvpress_moe.training.tuning_samples import CapturedPrompt, TuningSample, question, repetition

FORMAT = 1  # of saved states; a state of another format is not used
SINKS, RECENT, MIN_SHARE = 4, 16, 0.2  # the benchmark's protection and minimum
KEPT = (0.07, 0.55)  # range of the share of pairs that a budget keeps, drawn evenly on a log scale
TEMPERATURES = (0.5, 0.15)  # nats, at the start and at the end
BATCH = 4  # prompts per step of the optimiser
WARM_UP = 0.1  # share of the steps


class EndToEnd:
    """
    End-to-end tuning of fitted routers: make the answers under a budget similar to those of the full cache.

    For each prompt a budget is drawn, and the routers score all pairs of all layers. The frozen model then processes
    the question and the right answer over the cache. Log shares of
    :func:`kvpress_moe.training.soft_budget.soft_share` are added to the attention logits. The loss is the KL divergence
    of the next-token distributions from those of the full cache. Its gradient tells for every pair of every layer how
    much the answer needs it, not how much attention it gets. The model is also asked to repeat a part of the context
    (KVzip's question, arXiv 2505.23416), so that pairs which no training question needs keep their scores.

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
        self.aux_loss_weight, self.replay_weight, self.learning_rate = aux_loss_weight, replay_weight, learning_rate
        self.layers = full_attention_layers(model)
        self.mean, self.std = self._scaling()
        tuned = [routers.layers[layer_idx] for layer_idx in self.layers]
        gates = {id(p) for router in tuned for linear in (router.up, router.down) for p in linear.parameters()}
        of_tuned = [parameter for router in tuned for parameter in router.parameters()]
        self.parameters = [p for p in of_tuned if train_gate or id(p) not in gates]
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate, betas=(0.9, 0.98))
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
                seen: list[tuple[float, float]] = []
                for start in range(0, len(order), BATCH):
                    batch = order[start : start + BATCH]
                    done = epoch * -(-len(order) // BATCH) + start // BATCH
                    for index in batch:
                        seen.append(self._learn(self.samples[index], done / self.n_steps, len(batch), rng))
                        progress(epoch * len(order) + len(seen), total, sum(a for a, _ in seen) / len(seen))
                    self._step(done)
                answer, repeated = (sum(column) / len(seen) for column in zip(*seen, strict=True))
                history.append({"answer": round(answer, 4), "replay": round(repeated, 4)})
                save_tuning_state(state, self.parameters, self.optimizer, history[-1])
        return history

    def _learn(self, sample: TuningSample, part_done: float, n_batch: int, rng: random.Random) -> tuple[float, float]:
        """Add the gradient of one prompt. Returns its divergences of answer and repetition."""
        temperature = TEMPERATURES[0] * (TEMPERATURES[1] / TEMPERATURES[0]) ** part_done
        kept_share = math.exp(rng.uniform(math.log(KEPT[0]), math.log(KEPT[1])))
        scores, aux_loss = self.scores(self.read(sample.shard))
        n_layers, _, n_tokens = scores.shape
        protected = torch.zeros(n_tokens, dtype=torch.bool, device=scores.device)
        protected[:SINKS] = protected[-RECENT:] = True
        n_kept = max(compute_n_kept(n_tokens, 1 - kept_share), SINKS + RECENT + 1)
        log_kept = soft_share(scores.flatten(0, 1), protected, n_kept, MIN_SHARE, temperature)
        log_kept = log_kept.unflatten(0, (n_layers, -1))
        cache = full_cache(self.model, sample.prompt.context, sample.cache_path)
        answer = self.divergence(cache, *question(sample.prompt), log_kept)
        repeated = torch.zeros(())
        if self.replay_weight:
            asked = repetition(sample.prompt, self.tokenizer, rng)
            repeated = self.divergence(cache, *asked, log_kept)
        loss = answer + self.replay_weight * repeated + self.aux_loss_weight * aux_loss
        if not bool(loss.isfinite()):
            raise NotFiniteError(
                f"loss: got {loss.item()} for {sample.shard.stem}, expected a finite number. The model overflows in "
                f"{self.model.dtype} (try bfloat16 or float32), or the learning rate is too high (end_to_end_rate)."
            )
        (loss / n_batch).backward()
        return answer.item(), repeated.item()

    def scores(self, captured: CapturedPrompt) -> tuple[Tensor, Tensor]:
        """Scores (L, H, S) of a prompt's pairs, and the mean load-balancing loss."""
        scored, balance = [], []
        for number, layer_idx in enumerate(self.layers):
            hidden = (captured.hidden[number] - self.mean[number]) / self.std[number]
            router = self.routers.layers[layer_idx]
            scores, aux_loss = predict(router, hidden, captured.ranks[number], self.top_k, self.learned)
            scored.append(scores.T)
            balance.append(aux_loss)
        return torch.stack(scored), torch.stack(balance).mean()

    def divergence(self, cache: Pairs, tokens: Tensor, n_logits: int, log_kept: Tensor) -> Tensor:
        """Mean KL divergence, in nats, that soft eviction causes at the last ``n_logits`` of the tokens (1, T)."""
        n_read, tokens = cache[0][0].shape[2], tokens.to(self.model.device)
        with torch.no_grad():
            full = step(self.model, as_cache(cache), tokens, n_read, None, n_logits)[0].float().log_softmax(-1)
        with softly_evicted(self.model, self.layers, log_kept):
            own = step(self.model, as_cache(cache), tokens, n_read, None, n_logits)[0].float().log_softmax(-1)
        return (full.exp() * (full - own)).sum(-1).mean().cpu()

    def _step(self, done: int) -> None:
        """One step of the optimiser. The learning rate rises linearly, then falls along half a cosine."""
        at = (done + 1) / (self.n_steps + 1)
        rate = at / WARM_UP if at < WARM_UP else 0.5 * (1 + math.cos(math.pi * (at - WARM_UP) / (1 - WARM_UP)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * rate
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
