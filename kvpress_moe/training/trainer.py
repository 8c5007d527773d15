"""From a recipe to trained routers: prompts, shards, one fit per layer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.benchmark.prompts import Prompt, check_fits, encode
from kvpress_moe.benchmark.tasks import make_sample
from kvpress_moe.errors import SettingError
from kvpress_moe.experts.registry import Expert, make_expert
from kvpress_moe.model.fingerprint import model_fingerprint
from kvpress_moe.model.layers import check_model, full_attention_layers
from kvpress_moe.routers import RouterConfig, Routers
from kvpress_moe.training import end_to_end
from kvpress_moe.training.capture import FORMAT, Shards, capture
from kvpress_moe.training.checkpoints import Fitted
from kvpress_moe.training.config import Recipe
from kvpress_moe.training.distributed import Crew
from kvpress_moe.training.layerwise import LayerData, fit_layer
from kvpress_moe.training.losses import tail_weights, target
from kvpress_moe.training.soft_eviction import check_reads_softly
from kvpress_moe.training.tuning_samples import Captured, Lesson

KEPT_SHARES = (0.5, 0.25, 0.1)

Aim = Callable[[dict[str, Tensor]], Tensor]  # a layer of a shard -> what its pairs should score, (H, S)


def prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[tuple[str, Prompt]]:
    """The recipe's prompts with their names, all kinds in turn, lengths in turn."""

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    made = []
    for number in range(recipe.samples):
        task = recipe.tasks[number % len(recipe.tasks)]
        index = number // len(recipe.tasks)
        length = recipe.length - (index % 4) * recipe.length // 8
        sample = make_sample(task, count_tokens, length, index, recipe.seed, "train")
        prompt = encode(sample, tokenizer)
        check_fits(prompt, sample, limit)
        made.append((sample.id, prompt))
    return made


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    shards: Path | None = None,
    progress: Callable[..., Any] = lambda description, done, total, loss=None: None,
    crew: Crew | None = None,
) -> tuple[Routers, dict[str, Any]]:
    """
    Train routers for a frozen model.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
    recipe : Recipe
    shards : Path, optional
        Where captured prompts and fitted layers are kept; what is there already is not done again. A temporary
        directory otherwise.
    progress : callable
        ``progress(description, done, total, loss)``.
    crew : Crew, optional
        Processes that share the work, and the ``shards``; this one alone otherwise.

    Returns
    -------
    routers, metrics
        The same in every process.

    Raises
    ------
    SettingError
        If the recipe is wrong, or processes that share the work do not share a directory.
    UnsupportedModelError
        If the press cannot serve the model, or its attention takes no additive masks and is to be tuned end to end.
    CheckpointError
        If a file that an earlier run left among the shards is damaged.
    NotFiniteError
        If the loss of the tuning is not finite; epochs before that are kept.
    """
    recipe.check()
    check_model(model)
    if recipe.end_to_end:
        check_reads_softly(model)
    crew = crew or Crew()
    if shards is None:
        if crew.size > 1:
            raise SettingError("shards", None, "a directory that all processes share", "Add --shards DIRECTORY.")
        with tempfile.TemporaryDirectory() as temporary:
            return train(model, tokenizer, recipe, Path(temporary), progress)
    limit = model.config.get_text_config(decoder=True).max_position_embeddings
    fill = Shards(shards)
    made = prompts(recipe, tokenizer, limit)
    captured = fill.claim(model_fingerprint(model), recipe.heuristics, recipe.seed)
    experts: Sequence[Expert] = [make_expert(name) for name in captured]
    fill.fill(
        crew.part(made),
        lambda prompt: capture(model, tokenizer, prompt, experts),
        lambda done, total: progress("capturing", done, total),
    )
    crew.wait()
    routers, metrics = fit_routers(model, recipe, fill, [fill.path(name) for name, _ in made], captured, progress, crew)
    if recipe.end_to_end:
        metrics["end_to_end"] = tune_routers(model, tokenizer, routers, recipe, fill, made, captured, progress, crew)
    return routers, metrics


def fit_routers(
    model: PreTrainedModel,
    recipe: Recipe,
    shards: Shards,
    paths: Sequence[Path],
    captured: Sequence[str],
    progress: Callable[..., Any] = lambda description, done, total, loss=None: None,
    crew: Crew | None = None,
) -> tuple[Routers, dict[str, Any]]:
    """
    Fit every layer's router to captured prompts; layers that were fitted so before are read from the shards' directory.

    Parameters
    ----------
    captured : sequence of str
        Experts that the shards hold, in order; the recipe's may be some of them.
    """
    crew = crew or Crew()
    config = model.config.get_text_config(decoder=True)
    learned = recipe.experts.index("learned") if "learned" in recipe.experts else None
    router_config = RouterConfig(
        recipe.router_type,
        recipe.experts,
        config.num_hidden_layers,
        config.hidden_size,
        dropout=recipe.dropout,
        bottleneck=recipe.bottleneck,
        trained=True,
        num_heads=config.num_key_value_heads,
        learned=recipe.learned_width if learned is not None else 0,
        learned_sees=recipe.learned_sees,
        top_k=recipe.top_k,
    )
    routers = Routers(router_config, model_fingerprint(model))
    columns = [captured.index(name) if name != "learned" else 0 for name in recipe.experts]
    aim = partial(target, teacher=recipe.teacher, value_weight=recipe.value_weight)
    fitted = Fitted(shards.directory, about(recipe.layer_by_layer, paths))
    layers = full_attention_layers(model)  # the others are never routed
    mine = crew.part(layers)
    missing = [layer_idx for layer_idx in mine if not fitted.path(layer_idx).exists()]
    if missing:
        sizes = {"L": len(layers), "C": config.hidden_size, "H": config.num_key_value_heads, "E": len(captured)}
        shards.check(paths[0], sizes)
    thresholds = kept_thresholds(shards, paths, len(layers), aim) if missing else torch.empty(0)
    for layer_idx in missing:
        data = layer_data(shards.layer(layers.index(layer_idx), paths), columns, aim, thresholds)
        losses = fit_layer(
            routers.layers[layer_idx],
            data,
            recipe.top_k,
            learned,
            recipe.aux_loss_weight,
            recipe.epochs,
            recipe.learning_rate,
            recipe.seed + layer_idx,
            train_gate=recipe.gate,
            budget_weight=recipe.budget_weight,
        )
        fitted.save(layer_idx, routers.layers[layer_idx], losses)
        progress("fitting layers", len(mine) - len(missing) + missing.index(layer_idx) + 1, len(mine), losses[-1])
    crew.wait()
    for layer_idx in set(range(config.num_hidden_layers)) - set(layers):
        for weights in routers.layers[layer_idx].parameters():
            nn.init.zeros_(weights)  # never used: nothing that a file should carry about
    by_epoch = [[round(loss, 4) for loss in fitted.load(idx, routers.layers[idx])] for idx in layers]
    metrics = {
        "recipe": asdict(recipe),
        "prompts": len(paths),
        "loss_by_layer": [losses[-1] for losses in by_epoch],
        "loss_by_epoch": by_epoch,
    }
    return routers, metrics


def about(recipe: dict[str, Any], paths: Sequence[Path]) -> dict[str, Any]:
    """What determines a result of training, besides the shards."""
    made_by = {"version": version("kvpress-moe"), "torch": version("torch"), "shards": FORMAT}
    return {**made_by, "recipe": recipe, "prompts": [path.name for path in paths]}


def tune_routers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    routers: Routers,
    recipe: Recipe,
    shards: Shards,
    made: Sequence[tuple[str, Prompt]],
    captured: Sequence[str],
    progress: Callable[..., Any] = lambda description, done, total, loss=None: None,
    crew: Crew | None = None,
) -> list[dict[str, float]]:
    """
    Tune fitted routers end to end, in place; the mean divergences of each epoch. Of a crew the first process works, and
    all get what it found.
    """
    crew = crew or Crew()
    lessons = [Lesson(prompt, shards.path(name)) for name, prompt in made]
    columns = [captured.index(name) if name != "learned" else 0 for name in recipe.experts]

    def read(path: Path) -> Captured:
        shard = shards.prompt(path)
        ranks = shard["ranks"][:, columns].permute(0, 3, 2, 1).float().clamp(max=1 - 1e-4)  # (L, S, H, E)
        return Captured(shard["hidden"].float(), ranks)

    told = about(asdict(recipe), [lesson.shard for lesson in lessons])
    tuned = Fitted(shards.directory, {**told, "end_to_end": end_to_end.FORMAT})

    def tune() -> list[dict[str, float]]:
        tuner = end_to_end.EndToEnd(
            model,
            tokenizer,
            routers,
            lessons,
            read,
            top_k=recipe.top_k,
            learned=recipe.experts.index("learned") if "learned" in recipe.experts else None,
            train_gate=recipe.gate,
            aux_loss_weight=recipe.aux_loss_weight,
            replay_weight=recipe.replay_weight,
            epochs=recipe.end_to_end,
            learning_rate=recipe.end_to_end_rate,
            seed=recipe.seed,
        )
        return tuner.run(tuned.directory, partial(progress, "tuning end to end"))

    figures = tune() if crew.rank == 0 else []
    crew.wait()
    return figures or tune()  # the others read the first one's epochs


def kept_thresholds(shards: Shards, paths: Sequence[Path], num_layers: int, aim: Aim) -> Tensor:
    """Target above which half, a quarter and a tenth of all captured pairs lie: shape (3,)."""
    sampled = []
    for number in range(num_layers):
        values = torch.cat([aim(shard).flatten() for shard in shards.layer(number, paths)])
        sampled.append(values[:: max(1, len(values) // 20_000)])
    pooled = torch.cat(sampled)
    return torch.stack([pooled.quantile(1 - share) for share in KEPT_SHARES])


def layer_data(
    captured: Sequence[dict[str, Tensor]], columns: Sequence[int], aim: Aim, thresholds: Tensor
) -> LayerData:
    """Tokens of all prompts of one layer; those of a template's prefix, which the teacher cannot judge, left out."""
    hidden, ranks_of, targets_of = [], [], []
    for shard in captured:
        judged = shard["replay"].isfinite().any(0)
        hidden.append(shard["hidden"][judged].float())
        ranks_of.append(shard["ranks"][columns].permute(2, 1, 0)[judged].float())  # (E, H, S) -> (S, H, E)
        targets_of.append(aim(shard).T[judged])
    targets = torch.cat(targets_of)
    ranks = torch.cat(ranks_of).clamp(max=1 - 1e-4)  # half precision rounds the best rank of a long prompt to 1
    return LayerData(torch.cat(hidden), ranks, targets, tail_weights(targets, thresholds), thresholds)
