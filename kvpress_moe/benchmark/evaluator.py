"""Evaluator: a loaded model that evaluates the samples of a plan."""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

from kvpress_moe.benchmark.methods import as_in_model, find_methods, touches_windows
from kvpress_moe.benchmark.plan import Cell, Plan
from kvpress_moe.benchmark.prompts import Prompt, check_fits, encode
from kvpress_moe.benchmark.records import COLUMNS
from kvpress_moe.benchmark.tasks import Sample, find_tasks, make_sample
from kvpress_moe.errors import SettingError, UnsupportedModelError
from kvpress_moe.model.end_tokens import end_tokens


class Evaluator:
    """
    A loaded model that evaluates the samples of a plan, one at a time.

    Parameters
    ----------
    plan : Plan
    loaded : tuple, optional
        Model and tokenizer, if they are already loaded.
    """

    def __init__(self, plan: Plan, loaded: tuple[Any, ...] | None = None):
        from kvpress_moe.model.layers import some_layers_slide
        from kvpress_moe.model.loading import load_model
        from kvpress_moe.model.support import UNKNOWN_NORMS, check_model

        self.plan = plan
        chosen = find_methods(plan.methods)
        if not plan.by_bytes:  # ratios are shares of the pairs, of which codes keep more
            chosen = {name: method for name, method in chosen.items() if method.precision is None}
        self.model, self.tokenizer = loaded or load_model(plan.model, plan.device)
        check_model(self.model)
        found = chosen | find_methods(["full"])
        self.methods = {name: as_in_model(method, self.model, plan.min_share) for name, method in found.items()}
        if isinstance(self.model, UNKNOWN_NORMS):
            raise UnsupportedModelError(
                f"model: got {type(self.model).__name__}, whose norms of queries and keys kvpress does not know, "
                "expected another. Its presses would compute wrong queries; MoERouterPress itself can serve the model."
            )
        if some_layers_slide(self.model):
            self._leave_windows_alone()

    def _leave_windows_alone(self) -> None:
        """Drop methods that would change sliding-window layers. Raise SettingError if such a method was named."""
        reasons = {name: touches_windows(method) for name, method in self.methods.items()}
        unfit = {name: reason for name, reason in reasons.items() if reason}
        said = ", ".join(f"{name} {reason}" for name, reason in unfit.items())
        if unfit and self.plan.methods is not None:
            raise SettingError(
                "methods",
                list(unfit),
                "methods that can leave this model's layers with sliding-window attention alone",
                f"{said}. Leave them out.",
            )
        if unfit:
            warnings.warn(f"bench: left out, as some of the model's layers slide: {said}.", stacklevel=3)
        self.methods = {name: method for name, method in self.methods.items() if name not in unfit}

    def cells(self) -> list[Cell]:
        """All (method, ratio) of a sample, the full cache first. Some methods take a share of their own."""
        cells = [("full", 0.0)]
        for name, method in self.methods.items():
            if method.fixed_share is not None:
                cells.append((name, round(1 - method.fixed_share, 4)))
            elif name != "full":
                cells += [(name, ratio) for ratio in self.plan.ratios]
        return cells

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    @cached_property
    def samples(self) -> list[Sample]:
        """All samples of the plan. Every index has all tasks, so that a part of a run covers the tasks equally."""
        plan = self.plan
        if plan.hub is not None:
            from kvpress_moe.benchmark.tasks.hub import load_hub_samples

            samples = load_hub_samples(plan.hub, self.count_tokens)
            return [s for s in samples if s.index < plan.limit and (plan.tasks is None or s.task in plan.tasks)]
        return [
            make_sample(task, self.count_tokens, length, index, plan.seed, plan.split)
            for index in range(plan.limit)
            for length in plan.lengths
            for task in find_tasks(plan.tasks or None)
        ]

    def prompt(self, sample: Sample) -> Prompt:
        prompt = encode(sample, self.tokenizer, self.plan.setting)
        check_fits(prompt, sample, self.model.config.get_text_config(decoder=True).max_position_embeddings)
        return prompt

    def evaluate(self, sample: Sample, cells: list[Cell], decode: bool = True) -> dict[str, Any]:
        """
        Prefill a sample once and evaluate all cells. Returns the sample's record.

        Without ``decode`` no answer is decoded, and F1 scores are 0.
        """
        from kvpress_moe.benchmark.cache_eval import evaluate_caches, evaluate_full_cache
        from kvpress_moe.benchmark.metrics import score
        from kvpress_moe.benchmark.multi_pass import select_in_own_prefill
        from kvpress_moe.benchmark.shared_prefill import select_pairs

        plan = self.plan
        prompt = self.prompt(sample)
        protection = (plan.sinks, plan.recent, plan.min_share)
        selections = select_pairs(self.model, prompt.context, self.methods, cells, *protection)
        select_in_own_prefill(self.model, self.tokenizer, prompt, selections, self.methods, cells, *protection)
        reference = evaluate_full_cache(self.model, selections.cache, prompt)
        full = self._keep_all(selections, prompt)
        kept = [full if cell[0] == "full" else selections.kept[cell] for cell in cells]
        write = prompt.answer.shape[1] + 8 if decode and sample.metric in ("f1", "any") else 0
        answers = evaluate_caches(self.model, selections, prompt, reference, kept, write, self._ended)
        results = []
        for (name, ratio), one, answer in zip(cells, kept, answers, strict=True):
            text = None if answer.written is None else self.tokenizer.decode(answer.written, skip_special_tokens=True)
            figures = (answer.nll, answer.kl, answer.hit_rate, answer.n_pairs, answer.n_bytes, one.seconds)
            results.append([name, ratio, score(sample, answer, text), *figures])
        return {
            "sample": sample.id,
            "task": sample.task,
            "length": sample.length,
            "index": sample.index,
            "depth": sample.depth,
            "tokens": prompt.context.shape[1],
            "prefill_s": selections.prefill_seconds,
            "columns": list(COLUMNS),
            "results": results,
        }

    def _keep_all(self, selections: Any, prompt: Prompt) -> Any:
        import torch

        from kvpress_moe.benchmark.selections import Kept

        layers = [selections.cache.layers[layer_idx] for layer_idx in selections.layers]
        masks = [torch.ones_like(layer.keys[0, :, :, 0], dtype=torch.bool) for layer in layers]
        return Kept(masks, None, prompt.context.shape[1])

    @cached_property
    def _stop_tokens(self) -> frozenset[int]:
        return end_tokens(self.model, self.tokenizer)

    def _ended(self, tokens: list[int]) -> bool:
        """Whether a decoded answer is complete: the model or a blank line ended it. Scores ignore what follows."""
        return tokens[-1] in self._stop_tokens or "\n\n" in self.tokenizer.decode(tokens).strip()
