"""Routers on disk: a safetensors file, and a JSON file with configuration, fingerprint and versions."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kvpress_moe.codes.transform_files import FILE as TRANSFORMS
from kvpress_moe.codes.transform_files import read_transforms, writer
from kvpress_moe.errors import CheckpointError, SettingError
from kvpress_moe.files import MAX_JSON, fill, is_text, open_tensors, read_json, read_shapes, write_together
from kvpress_moe.model.fingerprint import check_form
from kvpress_moe.routers import RouterConfig, Routers
from kvpress_moe.routers.promise import Promise

WEIGHTS = "routers.safetensors"
CONFIG = "routers.json"
PROMISES = "promises.json"


def save_routers(
    routers: Routers,
    directory: str | Path,
    metrics: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """
    Write routers to a directory. It is created if it does not exist.

    Parameters
    ----------
    routers : Routers
    directory : path
        ``routers.safetensors`` and ``routers.json`` are written into it, ``key_transforms.safetensors`` if the routers
        have key transforms, and ``promises.json`` if they were calibrated.
    metrics : dict, optional
        Anything that should be kept with the weights.
    dtype : torch.dtype, default=torch.float32
        Type of the weights in the file. They become float32 again when they are loaded.

    Returns
    -------
    Path
        The directory.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    card = {
        "config": routers.config.as_dict(),
        "fingerprint": routers.fingerprint,
        "metrics": metrics or {},
        "versions": {name: version(name) for name in ("kvpress-moe", "kvpress", "torch", "transformers")},
    }
    weights = {name: tensor.to(dtype).contiguous().cpu() for name, tensor in routers.state_dict().items()}
    text = json.dumps(card, indent=1)
    files = {
        directory / WEIGHTS: lambda path: save_file(weights, path),
        directory / CONFIG: lambda path: path.write_text(text),
    }
    if routers.key_transforms:
        files[directory / TRANSFORMS] = writer(routers.key_transforms)
    if routers.promises:
        files[directory / PROMISES] = _promise_writer(routers.promises)
    write_together(files)
    for left in {directory / TRANSFORMS, directory / PROMISES} - files.keys():
        left.unlink(missing_ok=True)  # of routers that were replaced
    return directory


def save_promises(promises: Mapping[str, Promise], source: Path, directory: Path) -> None:
    """
    Write promises beside the routers that they belong to.

    Parameters
    ----------
    promises : mapping of str -> Promise
    source : Path
        Directory of the routers. Its files are copied if ``directory`` is another one.
    directory : Path
    """
    directory.mkdir(parents=True, exist_ok=True)
    files: dict[Path, Any] = {}
    if directory.resolve() != source.resolve():
        held = [name for name in (WEIGHTS, CONFIG, TRANSFORMS) if (source / name).exists()]
        files = {directory / name: partial(shutil.copyfile, source / name) for name in held}
    files[directory / PROMISES] = _promise_writer(promises)
    write_together(files)
    if len(files) > 1 and directory / TRANSFORMS not in files:
        (directory / TRANSFORMS).unlink(missing_ok=True)  # of routers that were replaced


def _promise_writer(promises: Mapping[str, Promise]) -> Any:
    text = json.dumps({name: promise.as_dict() for name, promise in promises.items()}, separators=(",", ":"))
    if len(text) > MAX_JSON:
        raise SettingError("prompts", len(text), f"promises of at most {MAX_JSON} characters", "Take fewer prompts.")
    return lambda path: path.write_text(text)


def weights_hash(routers: Routers) -> str:
    """
    SHA-256 of routers' weights and key transforms, in float16.

    Running averages do not count. Routers that were saved in float16 and loaded again have the same hash.
    """
    found = hashlib.sha256()
    for name, weight in routers.named_parameters():
        found.update(name.encode() + weight.detach().half().cpu().numpy().tobytes())
    for layer_idx, transform in sorted((routers.key_transforms or {}).items()):
        found.update(str(layer_idx).encode() + transform.synthesis.cpu().numpy().tobytes())
    return found.hexdigest()


def directory_at(source: str | Path) -> Path:
    """The directory of saved routers: itself, or where a repository of the hub was downloaded to."""
    return Path(source) if Path(source).is_dir() else _download(str(source))


def push_routers(routers: Routers, repo_id: str, private: bool, metrics: dict[str, Any] | None = None) -> str:
    """Upload routers to a repository of the Hugging Face hub, created if needed. Returns the repository's address."""
    from huggingface_hub import HfApi

    api = HfApi()
    with tempfile.TemporaryDirectory() as directory:
        save_routers(routers, directory, metrics)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message="Routers for MoERouterPress")
    return str(address)


def load_routers(source: str | Path) -> Routers:
    """
    Read routers from a directory, or from a repository of the Hugging Face hub.

    Parameters
    ----------
    source : path or str
        A directory written by :func:`save_routers`, or a hub id such as ``"user/name"``.

    Raises
    ------
    CheckpointError
        If there are no routers, if the files are broken, or if the weights are not finite. No memory is allocated for
        sizes that the files only declare.
    """
    directory = directory_at(source)
    try:
        card = read_json(directory / CONFIG)
        config = RouterConfig.from_dict(card["config"])
        saved = card["fingerprint"]
        if saved is not None:
            check_form(saved)
        with open_tensors(directory / WEIGHTS) as tensors:
            held = sum(map(math.prod, read_shapes(tensors).values()))
            if held != config.num_layers * config.num_weights:  # checked before memory of this size is allocated
                raise ValueError(f"{WEIGHTS} holds {held} weights, {CONFIG} describes another number")
            routers = Routers(config, saved)
            fill(routers, tensors)
        if (directory / TRANSFORMS).exists():
            routers.key_transforms = read_transforms(
                directory / TRANSFORMS, config.num_layers, config.num_heads or None
            )
        if (directory / PROMISES).exists():
            routers.promises = _read_promises(directory / PROMISES, config)
            own = weights_hash(routers)
            if any(promise.about["routers"] != own for promise in routers.promises.values()):
                raise ValueError(f"{PROMISES} is of other weights or key transforms. Calibrate again, or delete it")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"router: {source} cannot be read ({type(error).__name__}: {error}), expected {WEIGHTS} and {CONFIG} as "
            f"written by save_routers, and {PROMISES} as written by calibrate. Save them again."
        ) from error
    return routers


def _read_promises(path: Path, config: RouterConfig) -> dict[str, Promise]:
    """The promises in a file. They read a feature of each KV head in the layers that are compressed."""
    saved = read_json(path)
    if not isinstance(saved, dict) or not all(map(is_text, saved)):
        raise ValueError(f"{PROMISES}: expected promises by name")
    found = {}
    for name, promise in saved.items():
        n_features = len(promise["mean"])
        if not 1 < n_features <= 1 + config.num_layers * config.num_heads:
            raise ValueError(f"{PROMISES}: {n_features} features")
        found[name] = Promise.from_dict(promise, n_features)
    return found


@cache
def read_fingerprint(directory: Path) -> dict[str, Any]:
    """Fingerprint of the model that the routers in a directory belong to."""
    return check_form(read_json(directory / CONFIG)["fingerprint"])


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=[WEIGHTS, CONFIG, TRANSFORMS, PROMISES]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"router: {repo_id!r} is no directory here and could not be loaded from the hub ({type(error).__name__}). "
            "Check the path, or the hub id and the network."
        ) from error
