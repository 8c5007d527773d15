"""Packer: the part of the press that gives every pair a precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvpress_moe.budget.cross_layer import Observation
from kvpress_moe.budget.shared_bytes import ByteBudget, SharedBytes
from kvpress_moe.cache.tier import TABLE_BYTES
from kvpress_moe.codes.precision import WHOLE, Precision, menu_of
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.press.exclusive_use import is_in_use
from kvpress_moe.press.feedback import Feedback
from kvpress_moe.press.packing import Menu, PackedPart, cost_of_strategies, key_basis, pack_shared, positions_of
from kvpress_moe.press.promised_budget import ELEMENT_SIZE, pair_sizes
from kvpress_moe.press.promising import Promising
from kvpress_moe.press.session import Session
from kvpress_moe.routers import Routers, Routing


class Packer(Promising):
    """What a press does if ``precision`` is set. The press itself declares the settings."""

    compression_ratio: float | None
    precision: Any
    min_share: float
    _routers: Routers | None
    _session: Session
    _feedback: Feedback
    _shared_bytes: SharedBytes
    record: Any

    @property
    def scope(self) -> str:
        """Which heads share the budget; the press itself knows."""
        raise NotImplementedError

    @property
    def menu(self) -> tuple[Precision, ...]:
        """The precisions that pairs may be stored with. Empty if pairs stay as the model wrote them."""
        transformed = self._routers is not None and bool(self._routers.key_transforms)
        return () if self.precision is None else menu_of(self.precision, transformed)

    @property
    def _keeps_everything(self) -> bool:
        """Whether no pair has to change: the whole cache fits into the budget, as the model wrote it."""
        return self.compression_ratio == 0 and (self.precision is None or Precision(WHOLE, WHOLE) in self.menu)

    def record_strategies(self, layer_idx: int, menu: Menu, part: PackedPart, element_size: int) -> None:
        """Note which strategies the pairs of a layer got. Numbers of the cache take ``element_size`` bytes."""
        nbytes = menu.nbytes_in(element_size)
        self._feedback.stats.add_strategies(
            layer_idx, menu.precisions, nbytes, part.strategies, part.costs, part.observation.mass
        )

    def _pack(
        self,
        call: LayerCall,
        rows: Sequence[LayerCall],
        routed: Sequence[Routing],
        scores: Sequence[Tensor],
        observed: Sequence[Observation],
        n_kept: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Byte budget: pairs compete for bytes. Once it is decided, the layers of the cache become packed."""
        starts = self._session.text_starts
        positions = positions_of(call, starts)
        basis = key_basis(call, call.layer_idx, self._routers, positions)
        promises = self.max_kl is not None  # what was calibrated are the strategies in a 16-bit cache
        element_size = ELEMENT_SIZE if promises else call.keys.element_size()
        menu = Menu.of(self.menu, call.keys.shape[-1], element_size, basis)
        costs = []
        for number, (row, routing, score) in enumerate(zip(rows, routed, scores, strict=True)):
            own = positions if starts is None else positions[min(number, len(positions) - 1)][None, starts[number] :]
            costs.append(cost_of_strategies(row, routing, score, menu, basis, own))

        def plan(part: int, pooled: Tensor) -> ByteBudget:
            k_len, kept = rows[part].k_len, n_kept[part]
            keep = kept / k_len if self.compression_ratio is None else 1 - self.compression_ratio
            if promises:
                smallest = int(menu.nbytes[1]) + TABLE_BYTES * len(menu.precisions)
                keep = self._promised_share(pooled[:, 0], pair_sizes(menu, menu.head_dim), smallest, menu.has_whole)
                kept = int(keep * k_len)
            return menu.plan(k_len, keep, 1 if self.scope == "uniform" else kept * self.min_share)

        for layer_idx, parts in pack_shared(
            self._shared_bytes,
            call,
            costs,
            observed,
            menu,
            plan,
            self.scope,
            basis,
            positions,
            inside_wrapper=not is_in_use(self),
        ):
            for part in parts:
                self.record(layer_idx, part.observation, part.strategies > 0)
                self.record_strategies(layer_idx, menu, part, call.keys.element_size())
        return call.keys, call.values  # kvpress's hook stores them in the old layer object, which is no longer in use
