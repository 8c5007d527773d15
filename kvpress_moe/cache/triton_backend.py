"""
Attention over a RaggedLayer by two Triton kernels, for CUDA devices.

The first kernel computes tiles of equal work, the second merges the tiles of each head. This is split-KV decoding
(Flash-Decoding, Dao et al. 2023; softmax over parts as in FlashAttention, arXiv 2205.14135) for heads of different
lengths. For example, a head of 9,000 pairs becomes 36 tiles of 256 pairs, and a head of 500 pairs becomes two. So no
program waits for the longest head. The kept pairs are neither padded nor copied.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from kvpress_moe.cache.ragged_pairs import RaggedPairs
from kvpress_moe.cache.triton_kernels import attend_tiles, merge_tiles
from kvpress_moe.errors import UnsupportedInputError

SMALLEST_TILE = 128  # pairs; a program with fewer takes longer to start than to compute
PROGRAMS = 512  # wanted number of tiles: about four for each multiprocessor of a large GPU
BLOCK_BYTES = 2**14  # a block of keys; with the block of values and what is loaded ahead, about four times that


def tile_size_for(n_pairs: int, longest: int, row_blocks: int) -> int:
    """
    Number of pairs of a tile, a power of two. It is chosen so that about ``PROGRAMS`` programs share the work.

    Parameters
    ----------
    n_pairs : int
        Number of kept and new pairs, of all heads.
    longest : int
        Largest number of kept pairs of a head, or the number of new tokens if that is larger.
    row_blocks : int
        Number of blocks of a head's queries.
    """
    wanted = -(-n_pairs * row_blocks // PROGRAMS)
    size: int = max(SMALLEST_TILE, min(triton.next_power_of_2(wanted), triton.next_power_of_2(longest)))
    return size


def blocks_for(n_rows: int, head_dim: int, element_size: int) -> tuple[int, int, int]:
    """
    Number of dimensions, queries and pairs of a block. They are powers of two, at least 16, which tensor cores need.

    float32 is computed without tensor cores, in registers. Larger blocks would not fit into the registers.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    most = 16 if element_size == 4 else min(64, max(16, BLOCK_BYTES // (block_d * element_size)))
    return block_d, min(most, max(16, triton.next_power_of_2(n_rows))), most


def check(query: Tensor, layer: RaggedPairs) -> None:
    """Raise UnsupportedInputError for inputs that the kernels cannot serve."""
    interpreted = isinstance(attend_tiles, InterpretedFunction)
    served = (torch.float16, torch.float32) if interpreted else (torch.float16, torch.bfloat16, torch.float32)
    remedy = "Call"
    if query.device.type != "cuda" and not interpreted:
        got, expected = f"tensors on {query.device}", "a CUDA device"
    elif not interpreted and torch.cuda.get_device_capability(query.device) < (8, 0):
        got, expected = f"{torch.cuda.get_device_name(query.device)}", "a GPU of compute capability 8.0 or higher"
    elif query.dtype not in served:
        got, expected = f"{query.dtype}", f"one of {', '.join(map(str, served))}"
    elif query.shape[-1] > 256:
        got, expected = f"heads of {query.shape[-1]} dimensions", "at most 256"
    elif {(t.device, t.dtype) for t in layer.tensors} != {(query.device, query.dtype)}:
        got = (
            f"a query of {query.dtype} on {query.device}, pairs of {layer.flat_keys.dtype} on {layer.flat_keys.device}"
        )
        expected, remedy = "the same of both", "Bring the cache to the model's device and dtype, or call"
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (query, *layer.tensors)):
        got, expected = "queries, keys or values that require a gradient", "none"
        remedy = "Decode under torch.no_grad(), or call"
    else:
        return
    raise UnsupportedInputError(
        f"ragged attention 'triton': got {got}, expected {expected}. {remedy} use_ragged_attention('torch')."
    )


def triton_attention(query: Tensor, layer: RaggedPairs, scaling: float, cap: float | None = None) -> Tensor:
    """
    Computes what :func:`kvpress_moe.cache.torch_backend.torch_attention` computes, in two kernels.

    The result is deterministic, because no atomic operation is used. Besides the output, memory holds float32 partial
    results: D numbers for each tile of a head and each of the head's G·Q queries. A long question has few tiles, about
    two per head. At 32k tokens, 32 heads of 128 dimensions and 8 KV heads this takes a gigabyte for the current layer.

    Raises
    ------
    UnsupportedInputError
        For a device that is not CUDA (compute capability 8.0 or higher), for dtypes other than float16, bfloat16 and
        float32, for mixed dtypes, for heads of more than 256 dimensions, or if anything requires a gradient.
    """
    check(query, layer)
    query = query if query.stride(-1) == 1 else query.contiguous()
    n_batch, num_heads, q_len, head_dim = query.shape
    n_kv_heads, n_new = layer.new_keys.shape[1:3]
    group = num_heads // n_kv_heads
    n_rows = group * q_len
    block_d, block_rows, block_pairs = blocks_for(n_rows, head_dim, query.element_size())
    row_blocks = triton.cdiv(n_rows, block_rows)
    n_pairs = len(layer.flat_keys) + n_batch * n_kv_heads * n_new
    tile_size = tile_size_for(n_pairs, max(n_new, *map(max, layer.lengths)), row_blocks)
    tiling = layer.tiling(tile_size)
    n_tiles, new_tiles_per_head = len(tiling.tiles), triton.cdiv(n_new, tile_size)
    n_all = n_tiles + n_batch * n_kv_heads * new_tiles_per_head
    partial = query.new_empty(n_all, n_rows, head_dim, dtype=torch.float32)
    weights = query.new_empty(n_all, n_rows, dtype=torch.float32)
    output = query.new_empty(n_batch, q_len, num_heads, head_dim)
    strides = (*query.stride()[:3], *layer.new_keys.stride()[:3], *layer.new_values.stride()[:3])
    shape = {"N_HEADS": n_kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": block_d}
    with torch.cuda.device_of(query):  # Triton launches on the current device, even if the tensors are on another
        attend_tiles[(n_all, row_blocks)](
            query,
            *layer.tensors,
            tiling.tiles,
            partial,
            weights,
            n_tiles,
            new_tiles_per_head,
            n_new,
            q_len,
            tile_size,
            scaling,
            cap or 0.0,
            *strides,
            **shape,
            CAPPED=cap is not None,
            BLOCK_ROWS=block_rows,
            BLOCK_PAIRS=block_pairs,
        )
        merge_tiles[(n_rows, n_batch * n_kv_heads)](
            partial,
            weights,
            tiling.first_tiles,
            output,
            n_tiles,
            new_tiles_per_head,
            q_len,
            *output.stride()[:3],
            **shape,
            BLOCK_TILES=16,
        )
    return output
