"""Captured prompts on disk, one safetensors file each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from kvpress_moe.benchmark.prompts import Prompt
from kvpress_moe.errors import SettingError
from kvpress_moe.files import is_text, read_json, write_atomically
from kvpress_moe.training.checkpoints import own_tensors

FORMAT = 3  # of shards


TENSORS = ("hidden", "ranks", "replay", "answer", "writes", "power")  # see :func:`kvpress_moe.training.capture.capture`
SEEN = ("hidden", "ranks", "power")  # what the press sees of a prompt, too


def about(config: dict[str, Any], paths: Sequence[Path]) -> dict[str, Any]:
    """Everything that determines a result of training, besides the shards."""
    made_by = {"version": version("kvpress-moe"), "torch": version("torch"), "shards": FORMAT}
    return {**made_by, "recipe": config, "prompts": [path.name for path in paths]}


@dataclass(frozen=True)
class Shards:
    """
    Captured prompts on disk, one safetensors file each.

    Parameters
    ----------
    directory : Path
    """

    directory: Path

    def path(self, name: str) -> Path:
        return self.directory / f"{name.replace('/', '-')}.safetensors"

    def names(self) -> list[Path]:
        return sorted(self.directory.glob("*.safetensors"))

    def claim(self, model: dict[str, Any], experts: Sequence[str], seed: int) -> tuple[str, ...]:
        """
        Note what the shards belong to, or check that existing shards fit. Returns the experts that they hold.

        Parameters
        ----------
        model : dict
            Fingerprint of the model.
        experts : sequence of str
            Experts that are needed. Shards that hold more experts fit too.
        seed : int
            Seed of the prompts.

        Raises
        ------
        SettingError
            If the directory holds shards of another model, seed or format, or of fewer experts, or if its note cannot
            be read.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        note = self.directory / "recipe.json"
        if note.exists():
            try:
                there = read_json(note)
                if not all(map(is_text, there["experts"])):
                    raise ValueError("experts: expected a list of names")
                there["model"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise SettingError(
                    "shards", str(note), "a note that `train` wrote", f"{type(error).__name__}: {error}"
                ) from error
            same = (there["model"], there.get("seed"), there.get("format")) == (model, seed, FORMAT)
            if same and set(experts) <= set(there["experts"]):
                return tuple(there["experts"])
            raise SettingError(
                "shards",
                str(self.directory),
                f"shards of this model, of seed {seed}, of experts {list(experts)} and of format {FORMAT} (there are "
                f"shards of seed {there.get('seed')}, of experts {there['experts']} and of format "
                f"{there.get('format', 1)})",
                "Name another directory, or delete it.",
            )
        text = json.dumps({"format": FORMAT, "model": model, "seed": seed, "experts": list(experts)}, indent=1)
        write_atomically(note, lambda path: path.write_text(text))
        return tuple(experts)

    def fill(
        self,
        prompts: Sequence[tuple[str, Prompt]],
        capture_one: Callable[[Prompt], dict[str, Tensor]],
        progress: Callable[[int, int], Any] = lambda done, total: None,
    ) -> None:
        """Capture the prompts that have no shard yet."""
        for done, (name, prompt) in enumerate(prompts):
            progress(done, len(prompts))
            if not self.path(name).exists():
                shard = capture_one(prompt)
                write_atomically(self.path(name), partial(save_file, shard))
        progress(len(prompts), len(prompts))

    def layer(self, number: int, names: Sequence[Path]) -> list[dict[str, Tensor]]:
        """One captured layer of all these prompts. The other layers are not read."""
        prompts: list[dict[str, Tensor]] = []
        for name in names:
            with own_tensors(name) as shard:
                prompts.append({key: shard.get_slice(key)[number] for key in TENSORS})
        return prompts

    def seen(self, name: Path) -> dict[str, Tensor]:
        """What the press sees of one prompt, all layers."""
        with own_tensors(name) as shard:
            return {key: shard.get_tensor(key) for key in SEEN}
