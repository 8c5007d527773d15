"""PackedPairs: the pairs of one layer as codes, each with the precision that was chosen for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpress_moe.cache.ragged_pairs import RaggedPairs
from kvpress_moe.cache.tier import Tier, TierTable
from kvpress_moe.cache.tiling import PackedTiling
from kvpress_moe.codes.exact import exact
from kvpress_moe.codes.key_transform import KeyBasis
from kvpress_moe.codes.rotation import rotation
from kvpress_moe.codes.transform_codes import TransformCodes
from kvpress_moe.codes.whole_vectors import WholeVectors
from kvpress_moe.errors import UnsupportedInputError

# B = batch, H = KV heads, S = tokens of the prompt, T = later tokens, D = head dim


class PackedPairs(RaggedPairs):
    """
    The pairs of one layer, as attention uses them, bit-packed by precision.

    Attributes
    ----------
    tiers : list of Tier
        The prompt's pairs, those of one precision together. Attention does not depend on their order.
    basis : KeyBasis or None
        Basis of keys that are transform codes. It belongs to the routers and is shared by all caches.
    lengths : list of lists of int
        Number of pairs of each head, (B, H).
    new_keys, new_values : Tensor, shape (B, H, T, D)
        Later tokens, as the model wrote them.
    """

    tiers: list[Tier]
    basis: KeyBasis | None
    _packed_tilings: dict[int, PackedTiling]
    _table: TierTable | None

    def _hold_tiers(
        self,
        tiers: Sequence[Tier],
        basis: KeyBasis | None,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.tiers, self.basis = list(tiers), basis
        self.lengths = [
            [sum(lengths) for lengths in zip(*of_row, strict=True)]
            for of_row in zip(*(tier.lengths for tier in tiers), strict=True)
        ]
        self._forget_derived()
        self.new_keys = torch.empty(len(self.lengths), len(self.lengths[0]), 0, head_dim, dtype=dtype, device=device)
        self.new_values = self.new_keys.clone()

    @property
    def flat_keys(self) -> Tensor:  # type: ignore[override]
        raise UnsupportedInputError(
            "layer: got a PackedLayer, whose pairs are codes, expected a RaggedLayer. heads() decodes them."
        )

    flat_values = flat_keys

    def heads(self) -> list[list[tuple[Tensor, Tensor]]]:
        """
        Decoded keys and values of the prompt's pairs, by row and head: shape (pairs, D), in the layer's type.

        The pairs of a head are in the order of the tiers. This is a dense copy of the layer, for tests and for
        gradients.
        """
        n_heads, dtype = len(self.lengths[0]), self.new_keys.dtype
        parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(len(self.lengths) * n_heads)]
        for tier in self.tiers:
            starts = tier.starts()
            for index, (of_head, start, stop) in enumerate(zip(parts, starts, starts[1:])):  # noqa: B905
                pair = (self._decoded(vectors, index % n_heads, start, stop) for vectors in (tier.keys, tier.values))
                of_head.append(tuple(vectors.to(dtype) for vectors in pair))  # type: ignore[arg-type]
        pairs = [(torch.cat([k for k, _ in of_head]), torch.cat([v for _, v in of_head])) for of_head in parts]
        return [pairs[row * n_heads : (row + 1) * n_heads] for row in range(len(self.lengths))]

    def _decoded(self, vectors: object, head: int, start: int, stop: int) -> Tensor:
        """Vectors (n, D) of one head, float32."""
        if isinstance(vectors, TransformCodes):
            assert self.basis is not None
            return self.basis.restore(vectors, head, start, stop)
        decoded: Tensor = vectors.decode(start, stop)  # type: ignore[attr-defined]
        turned = vectors.kind == "rotated"  # type: ignore[attr-defined]
        return decoded @ rotation(decoded.shape[-1], decoded.device).T if turned else decoded

    def runs(self) -> list[tuple[Tensor, Tensor]]:
        """Each head as a run of its own, decoded: see :meth:`heads`."""
        return [(keys[None], values[None]) for row in self.heads() for keys, values in row]

    @property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        """All tensors of the layer, without those of the basis."""
        coded = [t for tier in self.tiers for v in (tier.keys, tier.values) for t in v.tensors.values()]
        return (*coded, self.new_keys, self.new_values)

    @property
    def whole_tensors(self) -> tuple[Tensor, ...]:
        """The later tokens, and those keys and values that are not coded."""
        vectors = [v for tier in self.tiers for v in (tier.keys, tier.values) if isinstance(v, WholeVectors)]
        return (*(v.vectors for v in vectors), self.new_keys, self.new_values)

    def packed_tiling(self, tile_size: int) -> PackedTiling:
        """The heads of all tiers cut into tiles of at most ``tile_size`` pairs, on the layer's device."""
        if tile_size not in self._packed_tilings:
            lengths = [tier.lengths for tier in self.tiers]
            self._packed_tilings[tile_size] = PackedTiling.of(lengths, tile_size, self.new_keys.device)
        return self._packed_tilings[tile_size]

    @property
    def table(self) -> TierTable:
        """Where the pairs of all heads are."""
        if self._table is None:
            self._table = TierTable.of(self.tiers)
        return self._table

    @property
    def width(self) -> int:
        """How many numbers attention needs for each query: a logit for each pair, or one for each position."""
        n_positions = self.basis.n_positions if self.basis is not None and self.has_transform_codes else 0
        return max(self.table.longest, n_positions)

    @property
    def has_transform_codes(self) -> bool:
        """Whether keys of a tier are transform codes. Then there is a basis."""
        return any(isinstance(tier.keys, TransformCodes) for tier in self.tiers)

    def _forget_derived(self) -> None:
        super()._forget_derived()
        self._packed_tilings = {}
        self._table = None

    @property
    def nbytes(self) -> int:
        """
        Bytes of codes, with their scales, positions and tables of lengths, and of the later tokens.

        The basis is not counted, because it belongs to the routers, as the model's weights belong to the model.
        """
        return sum(tier.nbytes for tier in self.tiers) + self.new_keys.nbytes + self.new_values.nbytes

    def _select(self, rows: list[int]) -> None:
        self._forget_derived()
        with exact(self.new_keys.device):
            self.tiers = [tier.select(rows) for tier in self.tiers]
        self.lengths = [list(self.lengths[row]) for row in rows]
        index = torch.tensor(rows, device=self.new_keys.device)
        self.new_keys, self.new_values = self.new_keys[index], self.new_values[index]
