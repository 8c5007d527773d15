"""What is told of a compressed document: its full size, what was kept, and how long it took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from kvpress_moe.files import is_number
from kvpress_moe.model.layers import language_model
from kvpress_moe.press.moe_router_press import MoERouterPress


@dataclass(frozen=True)
class DocumentReport:
    """
    What is known of a document after it was compressed.

    Attributes
    ----------
    full_bytes : int
        Bytes of its cache in 16 bits, uncompressed.
    read_seconds : float
        Time that reading and compressing took, without the answers in between.
    kept : dict of str -> float
        Share of the pairs that each strategy got, ``"evict"`` among them. Empty if nothing was compressed.
    max_kl, expected_kl : float or None
        The bound that was asked for, and the estimate (nats).
    is_promised : bool or None
        Whether the bound is promised. It is not if the text is unlike those of the calibration, or the budget too
        small.
    """

    full_bytes: int
    read_seconds: float
    kept: dict[str, float] = field(default_factory=dict)
    max_kl: float | None = None
    expected_kl: float | None = None
    is_promised: bool | None = None

    @classmethod
    def from_card(cls, card: Mapping[str, Any] | None) -> DocumentReport | None:
        """
        A report from what a document's card says.

        Raises
        ------
        KeyError, TypeError, ValueError
            If a field is missing or wrong.
        """
        if card is None:
            return None
        report = cls(**{name: card[name] for name in cls.__dataclass_fields__})
        if not isinstance(report.kept, dict):
            raise ValueError("kept has a wrong type")
        numbers = [report.full_bytes, report.read_seconds, *report.kept.values()]
        numbers += [number for number in (report.max_kl, report.expected_kl) if number is not None]
        if not all(map(is_number, numbers)) or report.is_promised not in (None, True, False):
            raise ValueError("a field has a wrong type")
        return report


def report_of(
    model: PreTrainedModel, n_tokens: int, press: MoERouterPress | None, read_seconds: float
) -> DocumentReport:
    """
    The report on a prompt of ``n_tokens`` tokens.

    ``press`` has just compressed it, and counted nothing else. None: it was not compressed.
    """
    config = model.config.get_text_config(decoder=True)
    layers = language_model(model).layers
    elements = sum(2 * config.num_key_value_heads * layer.self_attn.head_dim for layer in layers)
    stats: dict[str, Any] = {} if press is None else press.get_stats()
    pairs: Counter[str] = Counter()
    for layer in stats.get("layer_stats", {}).values():
        pairs.update({name: one["pairs"] for name, one in layer.get("strategy_stats", {}).items()})
    kept = {name: n_pairs / pairs.total() for name, n_pairs in pairs.items() if n_pairs}
    promise = stats.get("promises", [None])[-1]
    found = {}
    if promise is not None:
        found = {name: promise[name] for name in ("max_kl", "expected_kl")}
        found["is_promised"] = promise["is_enough"] and not promise["is_unlike"]
    return DocumentReport(2 * elements * n_tokens, round(read_seconds, 3), kept, **found)
