"""Files that let an interrupted training run continue: fitted layers, and states of the end-to-end tuning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from kvpress_moe.errors import CheckpointError
from kvpress_moe.files import write_atomically

FORMAT = 2  # of fitted layers

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # Adam's


@contextmanager
def own_tensors(path: Path) -> Iterator[Any]:
    """
    Open a safetensors file that training wrote.

    Such files are written completely or not at all, so their contents are not checked again.

    Raises
    ------
    CheckpointError
        If the file cannot be read, or if a tensor is missing.
    """
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"shards: {path} cannot be read ({type(error).__name__}: {str(error)[:200]}), expected a file that `train` "
            "wrote. Delete it; it is made again."
        ) from error


class FittedLayers:
    """
    The fitted layers of one training config and one set of prompts.

    Parameters
    ----------
    directory : Path
        Directory of the shards. Each config gets its own directory in it.
    about : dict
        Everything that determines the fit, besides the shards.
    """

    def __init__(self, directory: Path, about: dict[str, Any]):
        text = json.dumps({"format": FORMAT, **about}, sort_keys=True)
        self.directory = directory / f"fitted-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.directory.mkdir(exist_ok=True)
        write_atomically(self.directory / "about.json", lambda path: path.write_text(text))

    def path(self, layer_idx: int) -> Path:
        return self.directory / f"layer-{layer_idx:03d}.safetensors"

    def save(self, layer_idx: int, router: nn.Module, losses: list[float]) -> None:
        """Save a layer's router and the loss of each epoch of its fit. The file is written completely or not at all."""
        tensors = {name: tensor.contiguous() for name, tensor in _fitted(router).items()}
        write_atomically(self.path(layer_idx), lambda path: save_file(tensors, path, {"losses": json.dumps(losses)}))

    def load(self, layer_idx: int, router: nn.Module) -> list[float]:
        """Load a fitted layer into a router. Returns the loss of each epoch of its fit."""
        with own_tensors(self.path(layer_idx)) as tensors:
            router.load_state_dict({name: tensors.get_tensor(name) for name in _fitted(router)}, strict=False)
            losses: list[float] = json.loads(tensors.metadata()["losses"])
        return losses


def _fitted(router: nn.Module) -> dict[str, Any]:
    """The weights that the layer-by-layer fit determines: all but those of the rule of strategies, and the decays."""
    held = router.state_dict().items()
    return {name: tensor for name, tensor in held if not name.startswith("rule.") and name != "calibration.decay"}


def save_tuning_state(
    path: Path, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Adam, figures: dict[str, float]
) -> None:
    """Save parameters, the optimiser's moments and the epoch's figures; the file is complete or not there."""
    tensors = {f"parameter.{i}": parameter.detach().contiguous() for i, parameter in enumerate(parameters)}
    for i, parameter in enumerate(parameters):
        tensors |= {f"{name}.{i}": moment.contiguous() for name, moment in optimizer.state[parameter].items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, {"figures": json.dumps(figures)}))


@torch.no_grad()
def load_tuning_state(path: Path, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Adam) -> dict[str, float]:
    """Load parameters and the optimiser's moments in place. Returns the epoch's figures."""
    with own_tensors(path) as saved:
        names = set(saved.keys())
        tensors = {f"parameter.{i}": saved.get_tensor(f"parameter.{i}") for i in range(len(parameters))}
        reached = [i for i in range(len(parameters)) if f"step.{i}" in names]  # had a gradient before
        tensors |= {f"{name}.{i}": saved.get_tensor(f"{name}.{i}") for i in reached for name in _MOMENTS}
        figures: dict[str, float] = json.loads(saved.metadata()["figures"])
    for i, parameter in enumerate(parameters):
        parameter.copy_(tensors[f"parameter.{i}"])
    for i in reached:
        optimizer.state[parameters[i]] = {name: tensors[f"{name}.{i}"] for name in _MOMENTS}
    return figures
