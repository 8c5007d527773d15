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
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvpress_moe.cache.packed_attention import (
    TORCH,
    Bases,
    Products,
    Segment,
    packed_attention,
    packed_attention_together,
)
from kvpress_moe.cache.packed_pairs import PackedPairs
from kvpress_moe.cache.ragged_pairs import RaggedPairs
from kvpress_moe.cache.tier import Tier, Vectors
from kvpress_moe.cache.torch_backend import torch_attention
from kvpress_moe.codes.bit_packing import Groups, planes
from kvpress_moe.codes.scale_bytes import from_bytes
from kvpress_moe.codes.transform_codes import TransformCodes, middles, steps
from kvpress_moe.codes.vector_codes import middle_of
from kvpress_moe.codes.whole_vectors import WholeVectors
from kvpress_moe.errors import SettingError, UnsupportedInputError
from kvpress_moe.model.loading import cache_directory

FEW_QUERIES = 256  # of a KV head; for many more, PyTorch's matrix products are as fast
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
    """The same with the C library, all segments in one call. Whole vectors in half precision are left to PyTorch."""

    def key_logits(self, segments: Sequence[Segment], bases: Bases, logits: Tensor) -> None:
        of_segments, prepared = _c_segments(segments, "keys")
        failed = library().key_logits(
            of_segments,
            len(segments),
            _pointer(bases.queries),
            _pointer(bases.turned),
            _pointer(bases.coefficients),
            _pointer(bases.means),
            0 if bases.means is None else bases.means.shape[-1],
            *bases.queries.shape[1:],
            _pointer(logits),
            logits.shape[-1],
        )
        if failed:
            raise MemoryError("attention over codes: no memory for the table of tasks.")
        for segment, number in _left_out(segments, prepared):
            self.tier_logits(segment, number, bases, logits[segment.rows])

    def value_sums(self, segments: Sequence[Segment], weights: Tensor, whole: Tensor, rotated: Tensor) -> None:
        of_segments, prepared = _c_segments(segments, "values")
        failed = library().value_sums(
            of_segments,
            len(segments),
            _pointer(weights),
            weights.shape[-1],
            *rotated.shape[1:],
            _pointer(whole),
            _pointer(rotated),
        )
        if failed:
            raise MemoryError("attention over codes: no memory for partial sums.")
        for segment, number in _left_out(segments, prepared):
            self.tier_sums(segment, number, *(tensor[segment.rows] for tensor in (weights, whole, rotated)))


COMPILED = CompiledProducts()


def _left_out(segments: Sequence[Segment], prepared: Sequence[_Prepared]) -> list[tuple[Segment, int]]:
    """Segments with their tiers whose keys or values the library does not read."""
    return [(segment, n) for segment, one in zip(segments, prepared, strict=True) for n in one.left_out]


def _is_read(vectors: Vectors) -> bool:
    if not isinstance(vectors, WholeVectors):
        return True
    return vectors.vectors.dtype == torch.float32 and vectors.vectors.is_contiguous()


class _Tier(ctypes.Structure):
    """``Tier`` of the C library."""

    _fields_ = (
        ("whole", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("n_pairs", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("planes", "channels", "weights", "zeros", "starts", "offsets")),
        *((name, ctypes.c_void_p) for name in ("scales", "table", "positions")),
        *((name, ctypes.c_int32) for name in ("n_planes", "n_channels", "position_bytes")),
    )


class _Segment(ctypes.Structure):
    """``Segment`` of the C library."""

    _fields_ = (
        ("tiers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n_tiers", "first", "end", "row")),
    )


@dataclass(frozen=True)
class _Prepared:
    """
    Keys or values of a layer, ready for the C library.

    Attributes
    ----------
    tiers : array of _Tier
        Those that the library reads.
    left_out : list of int
        Numbers of the others.
    rest : list of Tier
        All tiers but the first one.
    addresses : tuple of int
        Of all tensors. Shared memory moves tensors in place.
    held : tuple
        What the array points to.
    """

    tiers: Any
    left_out: list[int]
    rest: list[Tier]
    addresses: tuple[int, ...]
    held: tuple[Any, ...]


#: First tier of a layer -> its keys and its values. Codes never change, and copies of a layer share its tiers.
_PREPARED: WeakKeyDictionary[Tier, dict[str, _Prepared]] = WeakKeyDictionary()


def _c_segments(segments: Sequence[Segment], which: str) -> tuple[Any, list[_Prepared]]:
    """Segments for the C library, and what has to live as long as they are used."""
    prepared = [_prepare(segment.layer, which) for segment in segments]
    rows = [
        _Segment(
            ctypes.addressof(one.tiers), len(one.tiers), segment.heads.start, segment.heads.stop, segment.rows.start
        )
        for segment, one in zip(segments, prepared, strict=True)
    ]
    return (_Segment * len(rows))(*rows), prepared


def _prepare(layer: PackedPairs, which: str) -> _Prepared:
    first, *rest = layer.tiers
    of_tiers: list[Vectors] = [getattr(tier, which) for tier in layer.tiers]
    addresses = tuple(tensor.data_ptr() for vectors in of_tiers for tensor in vectors.tensors.values())
    known = _PREPARED.setdefault(first, {})
    found = known.get(which)
    if found is None or found.addresses != addresses or found.rest != rest:
        parts = zip(of_tiers, layer.table.starts, layer.table.offsets, strict=True)
        made = [_c_tier(*part) for part in parts if _is_read(part[0])]
        left_out = [number for number, vectors in enumerate(of_tiers) if not _is_read(vectors)]
        tiers = (_Tier * len(made))(*(tier for tier, _ in made))
        # of_tiers: no tensor may be freed while the addresses are compared with others
        held = (of_tiers, *(arrays for _, arrays in made))
        known[which] = found = _Prepared(tiers, left_out, rest, addresses, held)
    return found


def _c_tier(codes: Vectors, starts: Sequence[int], offsets: Sequence[int]) -> tuple[_Tier, Any]:
    """A tier for the C library, and the arrays that it points to, beside the tensors of the codes."""
    held = ((ctypes.c_int64 * len(starts))(*starts), (ctypes.c_int64 * len(offsets))(*offsets))
    of_heads = {"starts": ctypes.addressof(held[0]), "offsets": ctypes.addressof(held[1])}
    if not all(tensor.is_contiguous() for tensor in codes.tensors.values()):
        raise UnsupportedInputError("packed attention 'compiled': got codes that are not contiguous in memory.")
    if isinstance(codes, WholeVectors):
        return _Tier(whole=codes.vectors.data_ptr(), **of_heads), held
    position: Tensor | None = None
    if isinstance(codes, TransformCodes):
        scales, position, head_dim = codes.gain, codes.position, codes.head_dim
    else:
        scales, head_dim = codes.reach, None
    tables = _tables(codes.groups, codes.bits, head_dim)
    names = ("planes", "channels", "weights", "zeros", "table")
    tier = _Tier(
        packed=codes.packed.data_ptr(),
        n_pairs=codes.packed.shape[1],
        scales=scales.data_ptr(),
        positions=None if position is None else position.data_ptr(),
        n_planes=len(tables[0]) // 4,
        n_channels=len(tables[3]),
        position_bytes=0 if position is None else position.itemsize,
        **{name: ctypes.addressof(table) for name, table in zip(names, tables, strict=True)},
        **of_heads,
    )
    return tier, (held, tables)


@cache
def _tables(groups: Groups, bits: int, head_dim: int | None) -> tuple[Any, ...]:
    """
    Planes, their channels and weights, zeros of the channels, and what each scale byte stands for.

    ``head_dim`` is that of transform codes, None for vector codes.
    """
    numbers = from_bytes(torch.arange(256))
    if head_dim is not None:
        steps_of, middles_of = steps(head_dim, bits).tolist(), middles(head_dim, bits).tolist()
    else:
        ((n_channels, _),) = groups
        middle = middle_of(bits)
        steps_of, middles_of, numbers = [1.0] * n_channels, [middle] * n_channels, numbers / middle
    of_planes: list[int] = []
    channels: list[int] = []
    weights: list[float] = []
    for plane in planes(groups):
        of_planes += [plane.width, plane.bytes.start, plane.bytes.stop - plane.bytes.start, len(channels)]
        channels += plane.channels
        weights += [float(2**below) for below in plane.below]
    weights = [weight * steps_of[channel] for weight, channel in zip(weights, channels, strict=True)]
    zeros = [step * middle for step, middle in zip(steps_of, middles_of, strict=True)]
    return (
        (ctypes.c_int32 * len(of_planes))(*of_planes),
        (ctypes.c_int32 * len(channels))(*channels),
        (ctypes.c_float * len(weights))(*weights),
        (ctypes.c_float * len(zeros))(*zeros),
        (ctypes.c_float * 256)(*numbers.tolist()),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise UnsupportedInputError(
            f"packed attention 'compiled': got a tensor of {tensor.dtype} on {tensor.device}, expected contiguous "
            "float32 on the CPU. Call use_ragged_attention('torch')."
        )
    return tensor.data_ptr()


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
    loaded.key_logits.argtypes = [
        *(pointer, count, pointer, pointer, pointer, pointer, count, number, number, pointer, count),
    ]
    loaded.value_sums.argtypes = [pointer, count, pointer, count, number, number, pointer, pointer]
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
