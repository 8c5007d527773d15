"""RaggedPairs: keys and values of heads of different lengths in flat tensors, and tables made from the lengths."""

from __future__ import annotations

from itertools import chain, groupby

import torch
from torch import Tensor

from kvpress_moe.cache.tiling import Tiling

# B = batch, H = KV heads, S = tokens of the prompt, T = later tokens, D = head dim, N = kept pairs of all heads


class RaggedPairs:
    """
    The pairs of one layer, as attention uses them.

    The prompt's pairs are in one flat tensor of keys and one of values, row by row and head by head. Later tokens are
    dense, because no head evicts them.

    Attributes
    ----------
    flat_keys, flat_values : Tensor, shape (N, D)
    lengths : list of lists of int
        Number of pairs of each head, (B, H). The sum is N.
    new_keys, new_values : Tensor, shape (B, H, T, D)
    """

    flat_keys: Tensor
    flat_values: Tensor
    lengths: list[list[int]]
    new_keys: Tensor
    new_values: Tensor
    _runs: list[tuple[Tensor, Tensor]] | None
    _tilings: dict[int, Tiling]

    def _hold(self, flat_keys: Tensor, flat_values: Tensor, lengths: list[list[int]]) -> None:
        self.lengths = lengths
        self.flat_keys, self.flat_values = flat_keys, flat_values
        self._forget_derived()
        empty = (len(lengths), len(lengths[0]), 0)
        self.new_keys = flat_keys.new_empty(*empty, flat_keys.shape[-1])
        self.new_values = flat_values.new_empty(*empty, flat_values.shape[-1])

    def heads(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Keys and values of the prompt's kept pairs, by row and head: views of shape (pairs, D)."""
        flat_lengths = [length for heads in self.lengths for length in heads]
        pairs = list(zip(self.flat_keys.split(flat_lengths), self.flat_values.split(flat_lengths), strict=True))
        n_heads = len(self.lengths[0])
        return [pairs[row * n_heads : (row + 1) * n_heads] for row in range(len(self.lengths))]

    def runs(self) -> list[tuple[Tensor, Tensor]]:
        """For each run of R neighbouring heads of equal length, in order: views (R, pairs, D) of keys and values."""
        if self._runs is None:  # stored, because each decoding step needs it and the loop is slow
            lengths = [(length, len(list(run))) for length, run in groupby(chain.from_iterable(self.lengths))]
            flat_lengths = [length * n_heads for length, n_heads in lengths]
            keys, values = self.flat_keys.split(flat_lengths), self.flat_values.split(flat_lengths)
            self._runs = [
                (k.view(n_heads, length, k.shape[-1]), v.view(n_heads, length, v.shape[-1]))
                for k, v, (length, n_heads) in zip(keys, values, lengths, strict=True)
            ]
        return self._runs

    def tiling(self, tile_size: int) -> Tiling:
        """The heads cut into tiles of at most ``tile_size`` pairs, on the layer's device."""
        if tile_size not in self._tilings:
            self._tilings[tile_size] = Tiling.of(self.lengths, tile_size, self.flat_keys.device)
        return self._tilings[tile_size]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and values of the prompt's pairs (N, D), and of the later tokens (B, H, T, D)."""
        return self.flat_keys, self.flat_values, self.new_keys, self.new_values

    @property
    def whole_tensors(self) -> tuple[Tensor, ...]:
        """Those tensors that are in the model's type."""
        return self.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values. Tables made from the lengths (12 bytes for 128 pairs or more) are not counted."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def _select(self, rows: list[int]) -> None:
        self._forget_derived()
        per_row = [sum(heads) for heads in self.lengths]
        keys, values = self.flat_keys.split(per_row), self.flat_values.split(per_row)
        self.flat_keys = torch.cat([keys[row] for row in rows])
        self.flat_values = torch.cat([values[row] for row in rows])
        self.lengths = [list(self.lengths[row]) for row in rows]
        index = torch.tensor(rows, device=self.new_keys.device)
        self.new_keys, self.new_values = self.new_keys[index], self.new_values[index]

    def _forget_derived(self) -> None:
        self._runs = None
        self._tilings = {}
