"""From a training config to trained routers: prompts, shards, one fit per layer, end-to-end tuning."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.benchmark.prompts import Prompt, check_fits, encode
from kvpress_moe.benchmark.tasks import find_tasks, make_sample
from kvpress_moe.errors import NotFiniteError, SettingError, UnsupportedModelError
from kvpress_moe.experts.expert import Expert
from kvpress_moe.experts.registry import make_expert
from kvpress_moe.model.fingerprint import model_fingerprint
from kvpress_moe.model.layers import full_attention_layers, full_attentions
from kvpress_moe.model.support import check_model
from kvpress_moe.routers import RouterConfig, Routers
from kvpress_moe.training import end_to_end
from kvpress_moe.training.capture import capture
from kvpress_moe.training.checkpoints import FittedLayers
from kvpress_moe.training.config import TrainingConfig
from kvpress_moe.training.distance_decay import tune_decays
from kvpress_moe.training.distributed import Processes, first_does
from kvpress_moe.training.key_transforms import fit_key_transforms
from kvpress_moe.training.layerwise import LayerData, fit_layer
from kvpress_moe.training.losses import tail_weights, target
from kvpress_moe.training.shards import Shards, about
from kvpress_moe.training.soft_eviction import check_takes_masks
from kvpress_moe.training.study_prompts import study_prompts
from kvpress_moe.training.tuning_samples import TuningSample, reader

KEPT_SHARES = (0.5, 0.25, 0.1)

T = TypeVar("T")

Aim = Callable[[dict[str, Tensor]], Tensor]  # a layer of a shard -> target of its pairs' scores, (H, S)


def prompts(config: TrainingConfig, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[tuple[str, Prompt]]:
    """The prompts of a config with their names. Kinds and lengths are taken in turn."""
    tasks = find_tasks(config.tasks)
    made = []
    for number in range(config.samples):
        index = number // len(tasks)
        length = config.length - (index % 4) * config.length // 8
        made.append(prompt_of(tasks[number % len(tasks)], length, index, config.seed, tokenizer, limit))
    return made


def long_prompts(config: TrainingConfig, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[tuple[str, Prompt]]:
    """
    Prompts that are longer than the reach, with their names. They have 6/6, 4/6 and 5/6 of the longest in turn.

    The second round of tasks starts with another length than the first.
    """
    longest, tasks = config.longest(limit), find_tasks(config.tasks)
    made = []
    for number in range(config.long_samples if longest else 0):
        length = longest * (6, 4, 5)[(number + number // len(tasks)) % 3] // 6
        made.append(prompt_of(tasks[number % len(tasks)], length, number, config.seed, tokenizer, limit))
    return made


def prompt_of(
    task: str, length: int, index: int, seed: int, tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[str, Prompt]:
    """A prompt of the train split, with its name."""

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    sample = make_sample(task, count_tokens, length, index, seed, "train")
    prompt = encode(sample, tokenizer)
    check_fits(prompt, sample, limit)
    return sample.id, prompt


def made_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainingConfig,
    shards: Path,
    progress: Callable[..., Any] = lambda description, done, total, loss=None: None,
    processes: Processes | None = None,
) -> list[tuple[str, Prompt]]:
    """The prompts of a config's tasks, and between them those that the model makes itself. They are kept in shards."""
    processes = processes or Processes()
    made = prompts(config, tokenizer, max_tokens(model))
    if not config.study:
        return made
    if processes.rank:
        processes.wait()  # the first process writes the prompts, the others read them
    studied = study_prompts(model, tokenizer, config.study, config.length, config.seed, shards, progress)
    if not processes.rank:
        processes.wait()
    return interleave(made, studied)


def max_tokens(model: PreTrainedModel) -> int:
    """How many tokens the model reads at most."""
    limit: int = model.config.get_text_config(decoder=True).max_position_embeddings
    return limit


def interleave(first: Sequence[T], second: Sequence[T]) -> list[T]:
    """Both lists in one, each evenly spread and in its own order."""
    placed = [((number + 0.5) / len(each), item) for each in (first, second) for number, item in enumerate(each)]
    return [item for _, item in sorted(placed, key=lambda at: at[0])]


def check_has_weights(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError if output projections are packed: training measures what values write with them."""
    projection = full_attentions(model)[0].o_proj
    if not isinstance(getattr(projection, "weight", None), Tensor) or not projection.weight.is_floating_point():
        raise UnsupportedModelError(
            f"model: got packed weights ({type(projection).__name__}), expected floating-point ones: training reads "
            "o_proj.weight. Train with the model as it was before it was quantised; the routers serve both."
        )


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainingConfig,
    shards: Path | None = None,
    progress: Callable[..., Any] = lambda description, done, total, loss=None: None,
    processes: Processes | None = None,
) -> tuple[Routers, dict[str, Any]]:
    """
    Train routers for a frozen model.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
    config : TrainingConfig
    shards : Path, optional
        Directory of captured prompts and fitted layers. What is already there is not computed again. Default: a
        temporary directory.
    progress : callable
        ``progress(description, done, total, loss)``.
    processes : Processes, optional
        Processes that share the work and the directory ``shards``. Default: this process alone.

    Returns
    -------
    routers, metrics
        The same in every process.

    Raises
    ------
    SettingError
        If the config is wrong, or processes that share the work do not share a directory.
    UnsupportedModelError
        If the press does not support the model, or if the tuning needs additive masks and the model's attention does
        not take them.
    CheckpointError
        If a file of an earlier run in ``shards`` cannot be read.
    NotFiniteError
        If the loss of the tuning is not finite. Earlier epochs are kept.
    """
    config.check()
    check_model(model)
    check_has_weights(model)
    if config.end_to_end:
        check_takes_masks(model)
    processes = processes or Processes()
    if shards is None:
        if processes.size > 1:
            raise SettingError("shards", None, "a directory that all processes share", "Add --shards DIRECTORY.")
        with tempfile.TemporaryDirectory() as temporary:
            return train(model, tokenizer, config, Path(temporary), progress)
    fill = Shards(shards)
    captured = fill.claim(model_fingerprint(model), config.heuristics or ("knorm",), config.seed)
    longer = long_prompts(config, tokenizer, max_tokens(model))
    far = Shards(shards / "long")
    if longer:
        far.claim(model_fingerprint(model), captured, config.seed)
    made = made_prompts(model, tokenizer, config, shards, progress, processes)
    experts: Sequence[Expert] = [make_expert(name) for name in captured]
    fill.fill(
        processes.part(made),
        lambda prompt: capture(model, tokenizer, prompt, experts),
        lambda done, total: progress("capturing", done, total),
    )
    processes.wait()
    routers, metrics = fit_routers(
        model, config, fill, [fill.path(name) for name, _ in made], captured, progress, processes
    )
    contexts = [prompt.context for _, prompt in made[: config.transform_prompts]]
    if contexts:
        routers.key_transforms = fit_key_transforms(model, contexts, partial(progress, "fitting key transforms"))
    if config.end_to_end:
        metrics["end_to_end"] = tune_routers(
            model, tokenizer, routers, config, fill, made, captured, progress, processes
        )
    if routers.config.reach:
        told = about(asdict(config), [fill.path(name) for name, _ in made])
        metrics["decay"] = tune_decays(
            model, tokenizer, routers, config, far, longer, captured, told, progress, processes
        )
    return routers, metrics


def fit_routers(
    model: PreTrainedModel,
    config: TrainingConfig,
    shards: Shards,
    paths: Sequence[Path],
    captured: Sequence[str],
    progress: Callable[..., Any] = lambda description, done, total, loss=None: None,
    processes: Processes | None = None,
) -> tuple[Routers, dict[str, Any]]:
    """
    Fit every layer's router to captured prompts. Layers that were already fitted in this way are read from disk.

    Parameters
    ----------
    captured : sequence of str
        Experts that the shards hold, in order. The config may use only some of them.
    """
    processes = processes or Processes()
    text_config = model.config.get_text_config(decoder=True)
    learned = config.experts.index("learned") if "learned" in config.experts else None
    router_config = RouterConfig(
        config.router_type,
        config.experts,
        text_config.num_hidden_layers,
        text_config.hidden_size,
        dropout=config.dropout,
        bottleneck=config.bottleneck,
        trained=True,
        num_heads=text_config.num_key_value_heads,
        learned=config.learned_width if learned is not None else 0,
        learned_sees=config.learned_sees,
        top_k=config.top_k,
        strategies=config.end_to_end > 0 and config.coded_share > 0,
        reach=config.reach(max_tokens(model)),
    )
    routers = Routers(router_config, model_fingerprint(model))
    columns = [captured.index(name) if name != "learned" else 0 for name in config.experts]
    aim = partial(target, teacher=config.teacher, value_weight=config.value_weight)
    fitted = FittedLayers(shards.directory, about(config.layer_by_layer, paths))
    layers = full_attention_layers(model)  # the press never routes the others
    mine = processes.part(layers)
    missing = [layer_idx for layer_idx in mine if not fitted.path(layer_idx).exists()]
    thresholds = kept_thresholds(shards, paths, len(layers), aim) if missing else torch.empty(0)
    for layer_idx in missing:
        data = layer_data(shards.layer(layers.index(layer_idx), paths), columns, aim, thresholds)
        losses = fit_layer(
            routers.layers[layer_idx],
            data,
            config.top_k,
            learned,
            config.aux_loss_weight,
            config.epochs,
            config.learning_rate,
            config.seed + layer_idx,
            train_gate=config.gate,
            budget_weight=config.budget_weight,
        )
        if not math.isfinite(losses[-1]):
            raise NotFiniteError(
                f"loss: got {losses[-1]} for layer {layer_idx}, expected a finite number. The model overflows in "
                f"{model.dtype} (try bfloat16 or float32), or the learning rate is too high (learning_rate)."
            )
        fitted.save(layer_idx, routers.layers[layer_idx], losses)
        progress("fitting layers", len(mine) - len(missing) + missing.index(layer_idx) + 1, len(mine), losses[-1])
    processes.wait()
    for layer_idx in set(range(text_config.num_hidden_layers)) - set(layers):
        for weights in routers.layers[layer_idx].parameters():
            nn.init.zeros_(weights)  # never used: no random numbers in the file
    by_epoch = [[round(loss, 4) for loss in fitted.load(idx, routers.layers[idx])] for idx in layers]
    metrics = {
        "recipe": asdict(config),
        "prompts": len(paths),
        "loss_by_layer": [losses[-1] for losses in by_epoch],
        "loss_by_epoch": by_epoch,
    }
    return routers, metrics


def tune_routers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    routers: Routers,
    config: TrainingConfig,
    shards: Shards,
    made: Sequence[tuple[str, Prompt]],
    captured: Sequence[str],
    progress: Callable[..., Any] = lambda description, done, total, loss=None: None,
    processes: Processes | None = None,
) -> list[dict[str, float]]:
    """
    Tune fitted routers end to end, in place. Returns the mean divergences of each epoch.

    If there are several processes, only the first one tunes; the others load its result.
    """
    processes = processes or Processes()
    tuning_samples = [TuningSample(prompt, shards.path(name)) for name, prompt in made]
    recipe = {name: value for name, value in asdict(config).items() if name != "long_samples"}
    told = about(recipe, [sample.shard for sample in tuning_samples])
    tuned = FittedLayers(shards.directory, {**told, "end_to_end": end_to_end.FORMAT})

    def tune() -> list[dict[str, float]]:
        tuner = end_to_end.EndToEnd(
            model,
            tokenizer,
            routers,
            tuning_samples,
            reader(config, captured),
            aux_loss_weight=config.aux_loss_weight,
            epochs=config.end_to_end,
            learning_rate=config.end_to_end_rate,
            **end_to_end.settings_of(config, routers),
        )
        return tuner.run(tuned.directory, partial(progress, "tuning end to end"))

    return first_does(processes, tune)


def kept_thresholds(shards: Shards, paths: Sequence[Path], num_layers: int, aim: Aim) -> Tensor:
    """Targets above which half, a quarter and a tenth of all captured pairs lie, from a sample of them: shape (3,)."""
    sampled = []
    for number in range(num_layers):
        values = torch.cat([aim(shard).flatten() for shard in shards.layer(number, paths)])
        sampled.append(values[:: max(1, len(values) // 20_000)])
    pooled = torch.cat(sampled)
    return torch.stack([pooled.quantile(1 - share) for share in KEPT_SHARES])


def layer_data(
    captured: Sequence[dict[str, Tensor]], columns: Sequence[int], aim: Aim, thresholds: Tensor
) -> LayerData:
    """Tokens of all prompts of one layer, without the template's prefix, for which there is no target."""
    hidden, ranks_of, targets_of = [], [], []
    for shard in captured:
        known = shard["replay"].isfinite().any(0)
        hidden.append(shard["hidden"][known].float())
        ranks_of.append(shard["ranks"][columns].permute(2, 1, 0)[known].float())  # (E, H, S) -> (S, H, E)
        targets_of.append(aim(shard).T[known])
    targets = torch.cat(targets_of)
    ranks = torch.cat(ranks_of).clamp(max=1 - 1e-4)  # half precision rounds the best rank of a long prompt to 1
    return LayerData(torch.cat(hidden), ranks, targets, tail_weights(targets, thresholds), thresholds)
