"""
Attention over a RaggedLayer by two Triton kernels, for CUDA devices.

The first kernel computes tiles of equal work, the second merges the tiles of each head. This is split-KV decoding
(Flash-Decoding, Dao et al. 2023; softmax over parts as in FlashAttention, arXiv 2205.14135) for heads of different
lengths. For example, a head of 9,000 pairs becomes 36 tiles of 256 pairs, and a head of 500 pairs becomes two. So no
program waits for the longest head. The kept pairs are neither padded nor copied.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    elif {(t.device, t.dtype) for t in layer.whole_tensors} != {(query.device, query.dtype)}:
        other = next(t for t in layer.whole_tensors if (t.device, t.dtype) != (query.device, query.dtype))
        got = f"a query of {query.dtype} on {query.device}, pairs of {other.dtype} on {other.device}"
        expected, remedy = "the same of both", "Bring the cache to the model's device and dtype, or call"
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (query, *layer.whole_tensors)):
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
    work = Work.of(query, layer, scaling, cap)
    tiling = layer.tiling(work.tile_size)
    partial, weights = work.parts(len(tiling.tiles))
    work.attend(layer.flat_keys, layer.flat_values, tiling.tiles, partial, weights)
    return work.merge(tiling.first_tiles, partial, weights)


@dataclass(frozen=True)
class Work:
    """One call of the attention: what both kernels need to know of it."""

    query: Tensor
    layer: RaggedPairs
    scaling: float
    cap: float | None
    tile_size: int
    blocks: tuple[int, int, int]

    @classmethod
    def of(cls, query: Tensor, layer: RaggedPairs, scaling: float, cap: float | None) -> Work:
        query = query if query.stride(-1) == 1 else query.contiguous()
        n_batch, num_heads, q_len, head_dim = query.shape
        n_kv_heads, n_new = layer.new_keys.shape[1:3]
        n_rows = num_heads // n_kv_heads * q_len
        blocks = blocks_for(n_rows, head_dim, query.element_size())
        n_pairs = sum(map(sum, layer.lengths)) + n_batch * n_kv_heads * n_new
        longest = max(n_new, *map(max, layer.lengths))
        return cls(query, layer, scaling, cap, tile_size_for(n_pairs, longest, triton.cdiv(n_rows, blocks[1])), blocks)

    @property
    def n_rows(self) -> int:
        """Number of queries of a KV head."""
        return self.query.shape[1] // self.layer.new_keys.shape[1] * self.query.shape[2]

    @property
    def new_tiles_per_head(self) -> int:
        return -(-self.layer.new_keys.shape[2] // self.tile_size)

    def parts(self, n_tiles: int) -> tuple[Tensor, Tensor]:
        """Memory for the outputs and weights of ``n_tiles`` tiles of kept pairs, and of those of the later tokens."""
        n_heads = self.layer.new_keys.shape[0] * self.layer.new_keys.shape[1]
        n_all = n_tiles + n_heads * self.new_tiles_per_head
        partial = self.query.new_empty(n_all, self.n_rows, self.query.shape[-1], dtype=torch.float32)
        return partial, self.query.new_empty(n_all, self.n_rows, dtype=torch.float32)

    def attend(self, keys: Tensor, values: Tensor, tiles: Tensor, partial: Tensor, weights: Tensor) -> None:
        """Launch the first kernel: tiles of kept pairs (N, D), and after them those of the later tokens."""
        layer = self.layer
        n_new, q_len = layer.new_keys.shape[2], self.query.shape[2]
        _, block_rows, block_pairs = self.blocks
        # Triton launches on the current device, even if the tensors are on another
        with torch.cuda.device_of(self.query):
            attend_tiles[(len(partial), triton.cdiv(self.n_rows, block_rows))](
                self.query,
                keys,
                values,
                layer.new_keys,
                layer.new_values,
                tiles,
                partial,
                weights,
                len(tiles),
                self.new_tiles_per_head,
                n_new,
                q_len,
                self.tile_size,
                self.scaling,
                self.cap or 0.0,
                *self.query.stride()[:3],
                *layer.new_keys.stride()[:3],
                *layer.new_values.stride()[:3],
                **self._shape,
                CAPPED=self.cap is not None,
                BLOCK_ROWS=block_rows,
                BLOCK_PAIRS=block_pairs,
            )

    def merge(self, first_tiles: Tensor, partial: Tensor, weights: Tensor) -> Tensor:
        """Launch the second kernel: the output (B, Q, num_heads, D) from the parts of all tiles."""
        n_batch, num_heads, q_len, head_dim = self.query.shape
        n_kv_heads = self.layer.new_keys.shape[1]
        n_tiles = len(partial) - n_batch * n_kv_heads * self.new_tiles_per_head
        output = self.query.new_empty(n_batch, q_len, num_heads, head_dim)
        with torch.cuda.device_of(self.query):
            merge_tiles[(self.n_rows, n_batch * n_kv_heads)](
                partial,
                weights,
                first_tiles,
                output,
                n_tiles,
                self.new_tiles_per_head,
                q_len,
                *output.stride()[:3],
                **self._shape,
                BLOCK_TILES=16,
            )
        return output

    @property
    def _shape(self) -> dict[str, int]:
        n_kv_heads = self.layer.new_keys.shape[1]
        group, head_dim = self.query.shape[1] // n_kv_heads, self.query.shape[-1]
        return {"N_HEADS": n_kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": self.blocks[0]}
