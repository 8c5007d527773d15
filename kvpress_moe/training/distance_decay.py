"""Distance decay: how much less a pair far from the prompt's end is worth. Each head learns it from longer prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.benchmark.prompts import Prompt
from kvpress_moe.experts.registry import make_expert
from kvpress_moe.routers import Routers
from kvpress_moe.training import end_to_end
from kvpress_moe.training.capture import observe
from kvpress_moe.training.checkpoints import FittedLayers
from kvpress_moe.training.config import TrainingConfig
from kvpress_moe.training.distributed import Processes, first_does
from kvpress_moe.training.shards import Shards
from kvpress_moe.training.tuning_samples import CapturedPrompt, TuningSample, reader

FORMAT = 1  # of saved states
EPOCHS = 3
RATE = 0.08  # highest learning rate, in nats per 1,024 tokens


class DecayTuning(end_to_end.EndToEnd):
    """
    End-to-end tuning of the decays alone. All other weights stay as they are.

    Parameters
    ----------
    As of :class:`kvpress_moe.training.end_to_end.EndToEnd`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.calibrations = [self.routers.layers[layer_idx].calibration for layer_idx in self.layers]
        self.parameters = [calibration.decay for calibration in self.calibrations]
        self.optimizer = torch.optim.Adam([{"params": self.parameters, "scale": 1.0}], self.learning_rate, (0.9, 0.98))

    def judge(self, captured: CapturedPrompt) -> tuple[Tensor, list[Tensor | None], Tensor]:
        with torch.no_grad():
            scores, worths, aux_loss = super().judge(captured)
        n_tokens = scores.shape[-1]
        distances = torch.arange(n_tokens - 1, -1, -1, device=scores.device)[None]
        fading = [calibration.fading(distances)[0] for calibration in self.calibrations]
        return scores - torch.stack(fading), worths, aux_loss

    def _scaling(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(self.layers), 1, 1), torch.ones(len(self.layers), 1, 1)

    @contextmanager
    def _scaled(self) -> Iterator[None]:
        yield  # the weights do not change, not even by rounding


def tune_decays(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    routers: Routers,
    config: TrainingConfig,
    shards: Shards,
    made: Sequence[tuple[str, Prompt]],
    captured: Sequence[str],
    told: dict[str, Any],
    progress: Callable[..., Any] = lambda description, done, total, loss=None: None,
    processes: Processes | None = None,
) -> list[dict[str, float]]:
    """
    Tune the decays of trained routers, in place. Returns the mean divergences of each epoch.

    Parameters
    ----------
    routers : Routers
        Their config has a ``reach``.
    shards : Shards
        For these prompts alone, and claimed: they hold only what :func:`kvpress_moe.training.capture.observe` returns.
    made : sequence of (str, Prompt)
        Prompts that are longer than the reach, with their names.
    captured : sequence of str
        Experts that the shards hold, in order.
    told : dict
        Everything that determines the routers. It is the same in all processes.
    processes : Processes, optional
        All of them observe prompts. Only the first one tunes; the others load its result.
    """
    processes = processes or Processes()
    experts = [make_expert(name) for name in captured]
    shards.fill(
        processes.part(made),
        lambda prompt: observe(model, prompt, experts),
        lambda done, total: progress("reading long prompts", done, total),
    )
    processes.wait()
    samples = [TuningSample(prompt, shards.path(name)) for name, prompt in made]
    own = {"format": FORMAT, "epochs": EPOCHS, "rate": RATE, "prompts": [sample.shard.name for sample in samples]}
    tuned = FittedLayers(shards.directory, {**told, "decays": own, "end_to_end": end_to_end.FORMAT})

    def tune() -> list[dict[str, float]]:
        tuner = DecayTuning(
            model,
            tokenizer,
            routers,
            samples,
            reader(config, captured),
            aux_loss_weight=0.0,
            epochs=EPOCHS,
            learning_rate=RATE,
            **end_to_end.settings_of(config, routers),
        )
        return tuner.run(tuned.directory, partial(progress, "tuning decays"))

    return first_does(processes, tune)
