"""Capture: one prompt through the frozen model -> one shard with all that the routers of every layer learn from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.benchmark.cache_eval import ask_full
from kvpress_moe.benchmark.kvzip_scores import ReplayScores
from kvpress_moe.benchmark.prompts import Prompt
from kvpress_moe.benchmark.shared_prefill import prepared
from kvpress_moe.errors import SettingError
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.experts.mixing import rank_within_head
from kvpress_moe.experts.registry import Expert
from kvpress_moe.files import check_finite, is_text, open_tensors, read_json, read_shapes
from kvpress_moe.model.layers import Attention, full_attention_layers, language_model
from kvpress_moe.routers.checkpoint import write_atomically

FORMAT = 2  # of shards
_AXES = {"hidden": "LSC", "ranks": "LEHS", "replay": "LHS", "answer": "LHS", "writes": "LHS"}


@torch.no_grad()
def capture(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, experts: Sequence[Expert]
) -> dict[str, Tensor]:
    """
    What the routers learn from one prompt; of the L layers with full attention alone.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
        For the words that ask for the repetition.
    prompt : Prompt
        Its context is judged; its question and answer show what is attended to in earnest.
    experts : sequence of Expert
        Those whose scores are recorded.

    Returns
    -------
    dict
        ``hidden`` (L, S, C) float16, inputs of the attention layers; ``ranks`` (L, E, H, S) float16, each expert's
        ranks within the head; ``replay`` (L, H, S) float16, log of the largest attention that a repetition of the
        context pays (KVzip, arXiv 2505.23416), minus infinity in the template's prefix (or
        ``<bos>``), which is not repeated;
        ``answer`` the same of the real question and answer; ``writes`` (L, H, S) float16, log of what the value adds
        to the residual stream, ‖W_O v‖ of the largest of the head's query heads, over the stream's norm there (mean of
        the logs of all tokens).
    """
    hidden, ranks, writes, stream = [], [], [], []
    cache = DynamicCache()

    def record_stream(module: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        residual = args[0] if args else kwargs["hidden_states"]
        stream.append(residual.float().norm(dim=-1).log().mean())

    def record(module: Attention, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]) -> None:
        layer = cache.layers[module.layer_idx]
        call = LayerCall(module, kwargs["hidden_states"], layer.keys, layer.values, None, kwargs)
        hidden.append(call.hidden_states[0].half())
        ranks.append(torch.stack([rank_within_head(expert.score(call, 0.5))[0].half() for expert in experts]))
        writes.append((written_norm(module, layer.values)[0].float().log() - stream[-1]).half())

    presses = [expert.scorer for expert in experts if hasattr(expert.scorer, "post_init_from_model")]
    layers = full_attention_layers(model)
    with prepared(model, presses), ExitStack() as hooks:
        for layer in (language_model(model).layers[layer_idx] for layer_idx in layers):
            hooks.callback(layer.register_forward_pre_hook(record_stream, with_kwargs=True).remove)
            hooks.callback(layer.self_attn.register_forward_hook(record, with_kwargs=True).remove)
        model.model(input_ids=prompt.context.to(model.device), past_key_values=cache)
    replay = ReplayScores().of(model, tokenizer, prompt.context.to(model.device), cache, prompt.n_prefix)
    peak = ask_full(model, cache, prompt).peak
    return {
        "hidden": torch.stack(hidden).cpu(),
        "ranks": torch.stack(ranks).cpu(),
        "replay": replay[layers].log().half().cpu(),
        "answer": peak.log().half().cpu(),
        "writes": torch.stack(writes).cpu(),
    }


def written_norm(module: Attention, values: Tensor) -> Tensor:
    """‖W_O v‖, what a value (B, H, S, D) writes into the residual stream: (B, H, S), largest of its query heads."""
    head_dim, n_heads = values.shape[-1], values.shape[1]
    by_head = module.o_proj.weight.unflatten(1, (n_heads, -1, head_dim))  # (C, H, G, D)
    norms = [
        torch.einsum("bsd,cgd->bgsc", values[:, head], by_head[:, head]).norm(dim=-1).amax(1) for head in range(n_heads)
    ]
    return torch.stack(norms, 1)


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
        Say what the shards are of, or see that those which are there will do; the experts that they hold.

        Parameters
        ----------
        model : dict
            Fingerprint.
        experts : sequence of str
            Those that are needed; shards that hold more will do.
        seed : int
            Of the prompts.

        Raises
        ------
        SettingError
            If the directory holds shards of another model or seed, or of fewer experts.
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
        """
        What all these prompts hold of one of the layers that were captured; nothing of the others is read.

        Raises
        ------
        SettingError
            If a file is no shard, or of other sizes than the first.
        """
        prompts: list[dict[str, Tensor]] = []
        common: dict[str, int] = {}
        for name in names:
            with _open_shard(name) as (shard, sizes):
                common = common or {axis: sizes[axis] for axis in "LCHE"}
                _check_sizes(sizes, common)
                prompts.append({key: shard.get_slice(key)[number] for key in _AXES})
                for key, tensor in prompts[-1].items():  # logarithms may be those of zero
                    check_finite(tensor if key in ("hidden", "ranks") else tensor.clamp(min=-1e4), key)
        return prompts

    def prompt(self, name: Path) -> dict[str, Tensor]:
        """
        All that was captured of one prompt, all layers.

        Raises
        ------
        SettingError
            If the file is no shard.
        """
        with _open_shard(name) as (shard, _):
            captured: dict[str, Tensor] = {key: shard.get_tensor(key) for key in _AXES}
            for key in ("hidden", "ranks"):
                check_finite(captured[key], key)
        return captured

    def check(self, name: Path, sizes: dict[str, int]) -> None:
        """Raise SettingError unless a shard has these sizes: L, C, H of the model and E experts."""
        with _open_shard(name) as (_, found):
            _check_sizes(found, sizes)


@contextmanager
def _open_shard(path: Path) -> Iterator[tuple[Any, dict[str, int]]]:
    """A shard, open, and the sizes of its axes; what is wrong with it while it is open is a SettingError."""
    try:
        with open_tensors(path) as shard:
            yield shard, _sizes(read_shapes(shard))
    except (OSError, ValueError) as error:
        raise SettingError(
            "shards", str(path), "a shard that `train` wrote", f"{error}. Delete it; it is captured again."
        ) from error


def _check_sizes(sizes: dict[str, int], expected: dict[str, int]) -> None:
    if any(sizes[axis] != size for axis, size in expected.items()):
        raise ValueError(f"sizes {sizes}, expected {expected}")


def _sizes(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Axis -> its size, of a shard's tensors; raises ValueError where they are none of a shard."""
    if shapes.keys() != _AXES.keys() or any(len(shapes[name]) != len(axes) for name, axes in _AXES.items()):
        raise ValueError(f"tensors {sorted(shapes)[:8]}, expected {sorted(_AXES)}")
    found = {(axis, size) for name, axes in _AXES.items() for axis, size in zip(axes, shapes[name], strict=True)}
    sizes = dict(found)
    if len(sizes) != len(found) or not all(sizes.values()):
        raise ValueError("tensors that do not belong together")
    return sizes
