"""Key transforms on disk, beside the routers that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kvpress_moe.codes.key_transform import KeyTransform
from kvpress_moe.errors import CheckpointError
from kvpress_moe.files import check_shapes, check_tensor_finite, open_tensors, read_shapes

FILE = "key_transforms.safetensors"
_NAMES = ("mean", "synthesis", "deviation")


def writer(transforms: Mapping[int, KeyTransform]) -> Any:
    """A function that writes key transforms to a path."""
    tensors: dict[str, Tensor] = {
        f"{layer_idx}.{name}": getattr(transform, name).contiguous().cpu()
        for layer_idx, transform in transforms.items()
        for name in _NAMES
    }
    return lambda path: save_file(tensors, path)


def read_transforms(path: Path, num_layers: int, num_heads: int | None = None) -> dict[int, KeyTransform]:
    """
    Read key transforms, by layer.

    Parameters
    ----------
    path : Path
    num_layers : int
        Number of layers of the model.
    num_heads : int, optional
        Number of KV heads of the model, if it is known.

    Raises
    ------
    CheckpointError
        If the file cannot be read, or holds something else.
    """
    try:
        with open_tensors(path) as file:
            shapes = read_shapes(file)
            layers = sorted({int(name.partition(".")[0]) for name in shapes})
            if not layers or not all(0 <= layer_idx < num_layers for layer_idx in layers):
                raise ValueError("no layers, or layers that the model does not have")
            n_heads, head_dim = shapes[f"{layers[0]}.mean"]
            if num_heads is not None and n_heads != num_heads:
                raise ValueError(f"{n_heads} heads, expected {num_heads}")
            of_layer = {
                "mean": (n_heads, head_dim),
                "synthesis": (n_heads, head_dim, head_dim),
                "deviation": (n_heads, head_dim),
            }
            check_shapes(shapes, {f"{layer_idx}.{name}": of_layer[name] for layer_idx in layers for name in _NAMES})
            read = {}
            for layer_idx in layers:
                tensors = {name: file.get_tensor(f"{layer_idx}.{name}").clone() for name in _NAMES}
                for name, tensor in tensors.items():
                    if tensor.dtype != torch.float16:
                        raise ValueError(f"{name} of {tensor.dtype}, expected float16")
                    check_tensor_finite(tensor, name)
                read[layer_idx] = KeyTransform(**tensors)
                if not bool(read[layer_idx].analysis.isfinite().all()):
                    raise ValueError(f"the basis of layer {layer_idx} has no inverse")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"router: {path} cannot be read ({type(error).__name__}: {error}), expected key transforms as written by "
            "save_routers. Save the routers again."
        ) from error
    return read
