"""
Products with codes by a small C library, which the machine's own compiler builds once, in about a second.

It reads bits, converts and multiplies in one pass, so nothing decoded goes to memory. For a few queries, that is when
tokens are generated, this takes much less time than PyTorch's operations.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvpress_moe.cache.packed_attention import TORCH, Products, packed_attention, packed_attention_together
from kvpress_moe.cache.packed_pairs import PackedPairs
from kvpress_moe.cache.ragged_pairs import RaggedPairs
from kvpress_moe.cache.tier import Vectors
from kvpress_moe.cache.torch_backend import torch_attention
from kvpress_moe.codes.bit_packing import Groups, planes
from kvpress_moe.codes.scale_bytes import from_bytes
from kvpress_moe.codes.transform_codes import TransformCodes
from kvpress_moe.codes.vector_codes import VectorCodes
from kvpress_moe.errors import SettingError, UnsupportedInputError
from kvpress_moe.model.loading import cache_directory

FEW_QUERIES = 32  # of a KV head; for more, PyTorch's matrix products are faster
# -ffast-math would change the arithmetic of the whole process when the library is loaded
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")


def compiled_attention(query: Tensor, layer: RaggedPairs, scaling: float, cap: float | None = None) -> Tensor:
    """Attention over a ragged layer. Nothing is gained there, so this is plain PyTorch."""
    return torch_attention(query, layer, scaling, cap)


def compiled_packed_attention(query: Tensor, layer: PackedPairs, scaling: float, cap: float | None = None) -> Tensor:
    """
    Computes what :func:`kvpress_moe.cache.packed_attention.packed_attention` computes, with the C library.

    Raises
    ------
    UnsupportedInputError
        If the tensors are not on the CPU.
    """
    _check_device(query)
    n_rows = query.shape[1] // layer.new_keys.shape[1] * query.shape[2]
    return packed_attention(query, layer, scaling, cap, COMPILED if n_rows <= FEW_QUERIES else TORCH)


def compiled_packed_attention_together(
    query: Tensor, layers: Sequence[PackedPairs], scaling: float, cap: float | None = None
) -> Tensor:
    """Computes what :func:`kvpress_moe.cache.packed_attention.packed_attention_together` computes, with the library."""
    _check_device(query)
    return packed_attention_together(query, layers, scaling, cap, COMPILED)


def _check_device(query: Tensor) -> None:
    if query.device.type != "cpu":
        raise UnsupportedInputError(
            f"packed attention 'compiled': got tensors on {query.device}, expected the CPU. Call "
            "use_ragged_attention('torch')."
        )


class CompiledProducts(Products):
    """The same with the C library. Whole vectors are left to PyTorch."""

    def key_logits(
        self,
        keys: Vectors,
        starts: Sequence[int],
        asked: Tensor,
        constants: Tensor,
        means: Tensor | None,
        offsets: Sequence[int],
        logits: Tensor,
    ) -> None:
        if not isinstance(keys, (VectorCodes, TransformCodes)):
            return super().key_logits(keys, starts, asked, constants, means, offsets, logits)
        asked, constants = asked.contiguous(), constants.contiguous()
        failed = library().key_logits(
            *arguments_of(keys, starts),
            (ctypes.c_int64 * len(offsets))(*offsets),
            _pointer(asked),
            asked.shape[1],
            asked.shape[2],
            _pointer(constants),
            _pointer(means if isinstance(keys, TransformCodes) else None),
            0 if means is None else means.shape[-1],
            _pointer(logits),
            logits.shape[-1],
        )
        if failed:
            raise MemoryError("attention over codes: no memory for the table of tasks.")
        return None

    def value_sums(
        self,
        values: Vectors,
        starts: Sequence[int],
        weights: Tensor,
        offsets: Sequence[int],
        whole: Tensor,
        rotated: Tensor,
        zeros: Tensor,
    ) -> None:
        if not isinstance(values, VectorCodes):
            return super().value_sums(values, starts, weights, offsets, whole, rotated, zeros)
        failed = library().value_sums(
            *arguments_of(values, starts),
            (ctypes.c_int64 * len(offsets))(*offsets),
            _pointer(weights),
            weights.shape[-1],
            weights.shape[1],
            rotated.shape[-1],
            _pointer(rotated),
            _pointer(zeros),
        )
        if failed:
            raise MemoryError("attention over codes: no memory for partial sums.")
        return None


COMPILED = CompiledProducts()


#: Codes -> their first arguments, by the heads that are asked for and by the place in memory, which shared memory
#: changes. The codes themselves never change, so this is done once.
_ARGUMENTS: WeakKeyDictionary[Any, dict[tuple[int, ...], tuple[Any, ...]]] = WeakKeyDictionary()


def arguments_of(codes: VectorCodes | TransformCodes, starts: Sequence[int]) -> tuple[Any, ...]:
    """The first arguments of both functions: the codes of some heads of a tier, as the C library reads them."""
    of_codes = _ARGUMENTS.setdefault(codes, {})
    key = (*starts, *(tensor.data_ptr() for tensor in codes.tensors.values()))
    if key not in of_codes:
        of_codes[key] = _arguments(codes, starts)
    return of_codes[key]


def _arguments(codes: VectorCodes | TransformCodes, starts: Sequence[int]) -> tuple[Any, ...]:
    packed, first = codes.packed, starts[0]
    position = codes.position if isinstance(codes, TransformCodes) else None
    scales = codes.gain if isinstance(codes, TransformCodes) else codes.reach
    if not all(tensor is None or tensor.is_contiguous() for tensor in (packed, scales, position)):
        raise UnsupportedInputError("packed attention 'compiled': got codes that are not contiguous in memory.")
    middle = 0.0 if isinstance(codes, TransformCodes) else codes.middle
    return (
        ctypes.c_void_p(packed.data_ptr() + first),
        packed.shape[1],
        *_table(codes.groups),
        len(starts) - 1,
        (ctypes.c_int64 * len(starts))(*(start - first for start in starts)),
        ctypes.c_void_p(scales.data_ptr() + first),
        _numbers_of_bytes(middle or 1.0),
        middle,
        ctypes.c_void_p(None if position is None else position.data_ptr() + first * position.itemsize),
        0 if position is None else position.itemsize,
    )


@cache
def _numbers_of_bytes(divided_by: float) -> Any:
    """What each scale byte stands for."""
    numbers = (from_bytes(torch.arange(256)) / divided_by).tolist()
    return (ctypes.c_float * 256)(*numbers)


@cache
def _table(groups: Groups) -> tuple[int, Any, Any, Any]:
    """Planes and their channels, as the C library reads them."""
    found = planes(groups)
    of_planes: list[int] = []
    channels: list[int] = []
    weights: list[float] = []
    for plane in found:
        of_planes += [plane.width, plane.bytes.start, plane.bytes.stop - plane.bytes.start, len(channels)]
        channels += plane.channels
        weights += [float(2**below) for below in plane.below]
    return (
        len(found),
        (ctypes.c_int32 * len(of_planes))(*of_planes),
        (ctypes.c_int32 * len(channels))(*channels),
        (ctypes.c_float * len(weights))(*weights),
    )


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def find_compiler() -> str | None:
    """The C compiler: that of the environment variable CC, else cc, gcc or clang. None if there is none."""
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


@cache
def library() -> ctypes.CDLL:
    """
    The C library. It is built on the first call and kept in the cache directory of this package.

    Raises
    ------
    SettingError
        If there is no C compiler, if it fails, or if the cache directory cannot be written.
    """
    compiler = find_compiler()
    if compiler is None:
        raise _not_built("No compiler was found under the names cc, gcc and clang. Install one.")
    source = files("kvpress_moe.cache").joinpath("code_products.c").read_text(encoding="utf-8")
    try:
        target = subprocess.run(  # names the compiler, and what -march=native means on this processor
            [compiler, *_FLAGS, "-E", "-v", "-x", "c", os.devnull], capture_output=True, text=True, check=True
        ).stderr
        digest = hashlib.sha256("\0".join((source, target, *_FLAGS)).encode()).hexdigest()[:16]
        path = cache_directory() / f"code_products-{digest}.so"
        if not path.exists():
            _build(compiler, source, path)
        loaded = ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        raise _not_built(f"{compiler} says: {' '.join(str(error.stderr).split())[:300]}.") from error
    except OSError as error:
        raise _not_built(f"{error}. Name another cache directory with KVPRESS_MOE_CACHE.") from error
    pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    of_code: list[Any] = [
        *(pointer, count, number, pointer, pointer, pointer, number, pointer),
        *(pointer, pointer, ctypes.c_float, pointer, number, pointer),
    ]
    loaded.key_logits.argtypes = [*of_code, *(pointer, number, number, pointer, pointer, count, pointer, count)]
    loaded.value_sums.argtypes = [*of_code, pointer, count, number, number, pointer, pointer]
    return loaded


def _build(compiler: str, source: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        made, text = Path(directory) / path.name, Path(directory) / "code_products.c"
        text.write_text(source, encoding="utf-8")
        command = [compiler, *_FLAGS, "-shared", "-fPIC", str(text), "-o", str(made)]
        if subprocess.run([*command, "-fopenmp"], capture_output=True, check=False).returncode:
            subprocess.run(command, capture_output=True, text=True, check=True)  # one thread, without OpenMP
        os.replace(made, path)  # another process may have built it meanwhile; both are the same


def _not_built(reason: str) -> SettingError:
    return SettingError(
        "attention", "compiled", "a C compiler and a cache directory that can be written", f"{reason} Or use 'torch'."
    )
