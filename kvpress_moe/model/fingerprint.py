"""Which model a router or a cache belongs to: the model's sizes, and a few of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpress_moe.errors import CheckpointError
from kvpress_moe.files import is_number, is_text, is_whole
from kvpress_moe.model.layers import Attention, language_model

_SIZES = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
_N_SAMPLES = 64
_MIN_COSINE = 0.9  # a 4-bit copy or a fine-tune of a model stays above .98; another model is near 0


def sizes(config: Any) -> dict[str, Any]:
    """The model type and the sizes of a text configuration that a router depends on."""
    config = config.get_text_config(decoder=True)
    return {name: getattr(config, name) for name in _SIZES}


def samples(output_projection: Any) -> list[float] | None:
    """64 evenly spaced weights of the first layer's output projection. None if they are quantised or not in memory."""
    if not isinstance(output_projection, Tensor):  # packed weights, as of GPTQ, AWQ, HQQ or torch's int8
        return None
    if not output_projection.is_floating_point() or output_projection.device.type == "meta":
        return None
    flat = output_projection.detach().flatten()
    step = torch.linspace(0, flat.numel() - 1, _N_SAMPLES, device=flat.device).long()
    return flat[step].float().cpu().tolist()


def model_fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """The fingerprint of a loaded model."""
    attention = language_model(model).layers[0].self_attn
    return fingerprint(attention.config, attention)


def fingerprint(config: Any, first_attention: Attention) -> dict[str, Any]:
    """
    What identifies a model, also in another dtype, quantised, or fine-tuned.

    Parameters
    ----------
    config : PretrainedConfig
    first_attention : nn.Module
        Attention module of layer 0.

    Returns
    -------
    dict
        Sizes, and 64 sampled weights (or None if they cannot be read).
    """
    return {**sizes(config), "samples": samples(getattr(first_attention.o_proj, "weight", None))}


def check_form(saved: Any) -> dict[str, Any]:
    """
    Check that a value from a file has the form of a fingerprint, and return it.

    Raises
    ------
    ValueError
        If it does not.
    """
    if not isinstance(saved, dict) or not all(is_text(saved.get(n)) or is_whole(saved.get(n)) for n in _SIZES):
        raise ValueError(f"fingerprint: expected {', '.join(_SIZES)}")
    found = saved.get("samples")
    if found is not None and not (isinstance(found, list) and len(found) == _N_SAMPLES and all(map(is_number, found))):
        raise ValueError(f"fingerprint: expected {_N_SAMPLES} finite samples, or none")
    return saved


def check_fingerprint(
    saved: dict[str, Any], model: dict[str, Any], source: str, what: str = "router", min_cosine: float = _MIN_COSINE
) -> None:
    """
    Raise unless two fingerprints belong to the same model.

    Parameters
    ----------
    saved, model : dict
    source, what : str
        Where the saved fingerprint comes from, and what it was saved with (a router or a cache); for the error message.
    min_cosine : float, default=0.9
        Smallest cosine of the sampled weights. A value closer to 1 also tells fine-tunes and 4-bit copies apart.

    Raises
    ------
    CheckpointError
        The message names the first difference.
    """
    sampled = bool(saved.get("samples") and model["samples"])
    for name in _SIZES:
        if name == "vocab_size" and sampled:
            continue  # resized embeddings leave a model what it is; the weights tell
        if saved.get(name) != model[name]:
            raise CheckpointError(
                f"{what}: {source} was made for a model with {name} = {saved.get(name)!r}, this one has "
                f"{model[name]!r}. Use a {what} of this model."
            )
    if sampled:
        cosine = torch.cosine_similarity(torch.tensor(saved["samples"]), torch.tensor(model["samples"]), dim=0).item()
        if not cosine >= min_cosine:  # NaN counts as different
            raise CheckpointError(
                f"{what}: {source} was made for another model of the same size (its weights agree to a cosine of "
                f"{cosine:.4f}, expected at least {min_cosine}). Use a {what} of this model."
            )
