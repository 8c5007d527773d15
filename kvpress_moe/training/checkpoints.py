"""Fitted layers on disk: what a run that was interrupted need not fit again, and what processes hand each other."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from kvpress_moe.errors import CheckpointError
from kvpress_moe.files import fill, open_tensors
from kvpress_moe.routers.checkpoint import write_atomically

FORMAT = 2  # of fitted layers


class Fitted:
    """
    The fitted layers of one recipe and one set of prompts.

    Parameters
    ----------
    directory : Path
        Of the shards; each recipe gets a directory in it.
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
        """Keep a layer's router and the loss of each epoch of its fit; all of it or nothing."""
        tensors = {name: tensor.contiguous() for name, tensor in router.state_dict().items()}
        write_atomically(self.path(layer_idx), lambda path: save_file(tensors, path, {"losses": json.dumps(losses)}))

    def load(self, layer_idx: int, router: nn.Module) -> list[float]:
        """
        Fill a router with what was fitted; the loss of each epoch of its fit.

        Raises
        ------
        CheckpointError
            If the file is none that `save` wrote.
        """
        path = self.path(layer_idx)
        try:
            with open_tensors(path) as tensors:
                losses = [float(loss) for loss in json.loads(tensors.metadata()["losses"])]
                if not losses:
                    raise ValueError("no loss of any epoch")
                fill(router, tensors)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"shards: {path} cannot be read ({type(error).__name__}: {error}), expected a fitted layer. Delete it; "
                "the layer is fitted again."
            ) from error
        return losses
