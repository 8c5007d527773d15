"""Where tuning stands after an epoch, on disk: a run that was killed goes on from there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from kvpress_moe.errors import CheckpointError
from kvpress_moe.files import check_finite, check_shapes, is_number, open_tensors, parse_json, read_shapes
from kvpress_moe.routers.checkpoint import write_atomically

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # Adam's


def save_state(
    path: Path, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Adam, figures: dict[str, float]
) -> None:
    """Write parameters, the optimiser's moments and the epoch's figures; all of it or nothing."""
    tensors = {f"parameter.{i}": parameter.detach().contiguous() for i, parameter in enumerate(parameters)}
    for i, parameter in enumerate(parameters):
        tensors |= {f"{name}.{i}": moment.contiguous() for name, moment in optimizer.state[parameter].items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, {"figures": json.dumps(figures)}))


@torch.no_grad()
def load_state(path: Path, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Adam) -> dict[str, float]:
    """
    Fill parameters and the optimiser's moments with what was saved; the epoch's figures.

    Raises
    ------
    CheckpointError
        If the file is none that :func:`save_state` wrote of such parameters.
    """
    try:
        with open_tensors(path) as saved:
            shapes = read_shapes(saved)
            expected: dict[str, tuple[int, ...]] = {}
            for i, parameter in enumerate(parameters):
                expected[f"parameter.{i}"] = tuple(parameter.shape)
                if f"step.{i}" in shapes:  # without it, no gradient has ever reached this one
                    sizes = ((), tuple(parameter.shape), tuple(parameter.shape))
                    expected |= {f"{name}.{i}": size for name, size in zip(_MOMENTS, sizes, strict=True)}
            check_shapes(shapes, expected)
            figures = parse_json((saved.metadata() or {})["figures"])
            if not isinstance(figures, dict) or not figures or not all(map(is_number, figures.values())):
                raise ValueError("figures: expected numbers by name")
            tensors = {name: saved.get_tensor(name) for name in shapes}
            for name, tensor in tensors.items():
                check_finite(tensor, name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"shards: {path} cannot be read ({type(error).__name__}: {error}), expected the state of an epoch. Delete "
            "it and those of later epochs; they are done again."
        ) from error
    for i, parameter in enumerate(parameters):
        parameter.copy_(tensors[f"parameter.{i}"])
        if f"step.{i}" in tensors:
            optimizer.state[parameter] = {name: tensors[f"{name}.{i}"] for name in _MOMENTS}
    return {str(name): float(figure) for name, figure in figures.items()}
