"""Packed layers on disk: what describes them, their tensors, and the checks of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvpress_moe.cache.packed_layer import PackedLayer
from kvpress_moe.cache.tier import Tier, Vectors
from kvpress_moe.codes.key_transform import KeyBasis, KeyTransform
from kvpress_moe.codes.precision import Precision, menu_of
from kvpress_moe.codes.rotary import Rotary
from kvpress_moe.codes.transform_codes import TRANSFORM_BITS, TransformCodes, position_bytes
from kvpress_moe.codes.vector_codes import VectorCodes
from kvpress_moe.codes.whole_vectors import WholeVectors
from kvpress_moe.files import check_shapes, check_tensor_finite, is_number, is_text, is_whole

#: Layer index and hash -> the key transform that a cache was coded with. Raises CheckpointError if there is none.
FindTransform = Callable[[int, str], KeyTransform]

_KINDS: dict[str, type[Any]] = {"whole": WholeVectors, "rotated": VectorCodes, "transformed": TransformCodes}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def packed_facts(layer: PackedLayer) -> dict[str, Any]:
    """What has to be known of a packed layer beside its tensors, as plain data."""
    basis = layer.basis
    return {
        "kind": "packed",
        "n_read": layer.n_read,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "tiers": [
            {
                "precision": [tier.precision.key_bits, tier.precision.value_bits],
                "keys": tier.keys.kind,
                "values": tier.values.kind,
                "lengths": tier.lengths,
            }
            for tier in layer.tiers
        ],
        "transform": None if basis is None else basis.transform.hash,
        "angles": None if basis is None else list(basis.rotary.angles),
        "n_positions": None if basis is None else basis.n_positions,
    }


def packed_tensors(layer: PackedLayer) -> dict[str, Tensor]:
    """The tensors of a packed layer by name, without those of its basis."""
    named = {"new_keys": layer.new_keys, "new_values": layer.new_values}
    for number, tier in enumerate(layer.tiers):
        for which in ("keys", "values"):
            named |= {f"{number}.{which}.{n}": t for n, t in getattr(tier, which).tensors.items()}
    return named


def check_packed(facts: Mapping[str, Any], tensors: Mapping[str, Tensor], per_pair: tuple[int, int]) -> int:
    """
    A packed layer's batch size.

    Parameters
    ----------
    facts : mapping
        See :func:`packed_facts`; from a file that may be damaged.
    tensors : mapping of str -> Tensor
    per_pair : (int, int)
        Number of KV heads and head dim of the model.

    Raises
    ------
    ValueError, KeyError, TypeError
        If the tensors do not have the shapes and types that the facts and the model need.
    """
    n_heads, head_dim = per_pair
    n_batch, _, n_new, _ = tensors["new_keys"].shape
    if not (n_batch and facts["tiers"] and is_whole(facts["n_read"]) and facts["dtype"] in _DTYPES):
        raise ValueError("a packed layer without rows or tiers, or n_read or dtype of another kind")
    has_basis = facts["transform"] is not None
    if has_basis and not (
        is_text(facts["transform"])
        and is_whole(facts["n_positions"])
        and facts["n_positions"] > 0
        and all(map(is_number, facts["angles"]))
        and 0 < 2 * len(facts["angles"]) <= head_dim
    ):
        raise ValueError("transform, angles or n_positions of another kind")
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("new_keys", "new_values"), (n_batch, n_heads, n_new, head_dim)
    )
    dtypes = dict.fromkeys(expected, _DTYPES[facts["dtype"]])
    for number, tier in enumerate(facts["tiers"]):
        (precision,) = menu_of([tuple(tier["precision"])])
        lengths = tier["lengths"]
        if len(lengths) != n_batch or {len(heads) for heads in lengths} != {n_heads}:
            raise ValueError("lengths of other heads")
        if not all(is_whole(length) and length <= facts["n_read"] for heads in lengths for length in heads):
            raise ValueError("lengths that are no numbers of pairs")
        n_pairs = sum(map(sum, lengths))
        for which, bits in (("keys", precision.key_bits), ("values", precision.value_bits)):
            kind = tier[which]
            if kind not in _KINDS or (kind == "whole") != (bits == 16):
                raise ValueError(f"codes of kind {str(kind)[:40]!r} with {bits} bits")
            if kind == "transformed" and not (which == "keys" and has_basis and bits in TRANSFORM_BITS):
                raise ValueError("transform codes without a transform")
            place = f"{number}.{which}."
            if kind == "whole":
                expected[f"{place}vectors"], dtypes[f"{place}vectors"] = (n_pairs, head_dim), _DTYPES[facts["dtype"]]
                continue
            expected[f"{place}packed"], dtypes[f"{place}packed"] = (head_dim * bits // 8, n_pairs), torch.uint8
            name = "gain" if kind == "transformed" else "reach"
            expected[place + name], dtypes[place + name] = (n_pairs,), torch.uint8
            if kind == "transformed":
                expected[f"{place}position"] = (n_pairs,)
                two = position_bytes(facts["n_positions"]) == 2
                dtypes[f"{place}position"] = torch.int16 if two else torch.int32
    check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected)
    for name, tensor in tensors.items():
        if tensor.dtype != dtypes[name]:
            raise ValueError(f"{name} of {tensor.dtype}, expected {dtypes[name]}")
        if tensor.is_floating_point():
            check_tensor_finite(tensor, name)
        if name.endswith("position") and tensor.numel():
            positions = tensor.long() & 0xFFFF if tensor.dtype == torch.int16 else tensor.long()
            if int(positions.min()) < 0 or int(positions.max()) >= facts["n_positions"]:
                raise ValueError("positions behind the end of the prompt")
    return int(n_batch)


def restore_packed(
    facts: Mapping[str, Any], tensors: Mapping[str, Tensor], layer_idx: int, find: FindTransform, device: torch.device
) -> PackedLayer:
    """A packed layer from what :func:`check_packed` has checked. The tensors must be its own."""
    basis = None
    if facts["transform"] is not None:
        transform = find(layer_idx, facts["transform"]).to(device)
        basis = KeyBasis(transform, Rotary(tuple(map(float, facts["angles"]))), facts["n_positions"])

    def vectors(number: int, which: str, kind: str, bits: int) -> Vectors:
        place = f"{number}.{which}."
        own = {name.removeprefix(place): tensor for name, tensor in tensors.items() if name.startswith(place)}
        made: Vectors = _KINDS[kind](**own) if kind == "whole" else _KINDS[kind](**own, bits=bits)
        return made

    tiers = []
    for number, tier in enumerate(facts["tiers"]):
        precision = Precision(*tier["precision"])
        keys = vectors(number, "keys", tier["keys"], precision.key_bits)
        values = vectors(number, "values", tier["values"], precision.value_bits)
        tiers.append(Tier(precision, keys, values, tier["lengths"]))
    head_dim = tensors["new_keys"].shape[-1]
    layer = PackedLayer(tiers, basis, facts["n_read"], head_dim, _DTYPES[facts["dtype"]], device)
    layer.new_keys, layer.new_values = tensors["new_keys"], tensors["new_values"]
    return layer
