"""Codes: bits are packed without loss, vectors come back within the error of their levels, and bad input is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpress_moe.codes.bit_packing import PLANES, pack, packed_size, unpack
from kvpress_moe.codes.distortion import distortions
from kvpress_moe.codes.key_transform import KeyBasis, KeyTransform
from kvpress_moe.codes.precision import MIXED, Precision, menu_of
from kvpress_moe.codes.rotary import Rotary
from kvpress_moe.codes.rotation import rotation
from kvpress_moe.codes.scale_bytes import LOWEST, STEPS, from_bytes, to_bytes
from kvpress_moe.codes.transform_codes import (
    TRANSFORM_BITS,
    encode_coefficients,
    key_bytes,
    middles,
    profile,
    steps,
    weighted_errors,
)
from kvpress_moe.codes.vector_codes import BITS, encode, relative_error, vector_bytes
from kvpress_moe.errors import NotFiniteError, SettingError, UnsupportedInputError, UnsupportedModelError
from kvpress_moe.model.attention import apply_rope

HEAD_DIMS = (64, 72, 80, 96, 128, 256)


def naive_bits(numbers, groups) -> list[list[int]]:
    """For each vector and channel its number, read bit by bit from where ``Plane`` says that they lie."""
    found = []
    for row in pack(numbers, groups).T.tolist():
        value, first_byte = [0] * len(numbers), 0
        for width in (8, 4, 2, 1):
            with_plane, first = [], 0
            for channels, bits in groups:
                if width in PLANES[bits]:
                    below = bits - 1 if width == 1 else bits - 2 if width == 2 and bits == 6 else 0
                    with_plane += [(channel, below) for channel in range(first, first + channels)]
                first += channels
            size = len(with_plane) * width // 8
            for number, (channel, below) in enumerate(with_plane):
                part, byte = divmod(number, size)
                value[channel] += (row[first_byte + byte] >> (part * width) & (2**width - 1)) << below
            first_byte += size
        found.append(value)
    return found


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", PLANES)
def test_packed_numbers_come_back_and_lie_where_the_description_says(bits, head_dim):
    for groups in [((head_dim, bits),)] + [profile(head_dim, bits)] * (bits in TRANSFORM_BITS):
        parts = [torch.randint(0, 2**own, (channels, 7), dtype=torch.uint8) for channels, own in groups]
        numbers = torch.cat(parts)
        packed = pack(numbers, groups)
        assert packed.shape == (packed_size(head_dim, bits), 7)
        assert packed.dtype == torch.uint8
        assert torch.equal(unpack(packed, groups), numbers.float())
        assert naive_bits(numbers, groups) == numbers.T.tolist()


def test_a_head_dim_that_fills_no_whole_bytes_is_refused():
    with pytest.raises(UnsupportedModelError, match="head_dim: got 36, expected a multiple of 8.*precision"):
        packed_size(36, 4)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_rotation_is_orthogonal_and_spreads_one_channel_over_all(head_dim):
    turn = rotation(head_dim)
    assert torch.allclose(turn @ turn.T, torch.eye(head_dim), atol=1e-5)
    assert turn.abs().max() <= math.sqrt(2 / head_dim) * math.sqrt(head_dim & -head_dim) or head_dim & (head_dim - 1)


def naive_codes(vectors: list[list[float]], bits: int) -> list[list[float]]:
    """Rotated vectors after coding and decoding, channel by channel, with one byte for the scale of each vector."""
    middle = (2**bits - 1) / 2

    def decoded(vector: list[float], scale: float) -> list[float]:
        numbers = [min(2**bits - 1, max(0, round(x / scale + middle))) for x in vector]
        return [scale * (number - middle) for number in numbers]

    def error(vector: list[float], scale: float) -> float:
        return sum((x - y) ** 2 for x, y in zip(vector, decoded(vector, scale), strict=True))

    parts = {2: (1.0, 0.75, 0.58), 3: (1.0, 0.8), 4: (1.0, 0.92)}.get(bits, (1.0,))
    coded = []
    for vector in vectors:
        largest = max(map(abs, vector)) / middle
        best = min((largest * part for part in parts), key=lambda scale: error(vector, scale))
        step = max(0, math.ceil((math.log2(best * middle) + 10) * 12 - 1e-3))
        coded.append(decoded(vector, 2 ** (step / 12 - 10) / middle))
    return coded


@pytest.mark.parametrize("bits", BITS)
def test_a_code_is_what_a_naive_loop_computes(bits):
    vectors = torch.randn(7, 64) * torch.tensor([1.0, 3.0, 0.2, 1.0, 1.0, 1e-3, 5.0])[:, None]
    codes = encode(vectors, bits)
    expected = torch.tensor(naive_codes((vectors @ rotation(64)).tolist(), bits))
    difference = (codes.decode() - expected).abs()
    assert (difference > 1e-5).float().mean() < 0.01  # a number in the middle of two levels may go either way
    assert (difference <= 1.01 * codes.scales()[:, None]).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_the_expected_one(bits, head_dim):
    """Within an eighth. If the levels cover the whole range, no channel is off by more than half a step."""
    vectors = torch.randn(2000, head_dim)
    rotated = vectors @ rotation(head_dim)
    codes = encode(vectors, bits)
    reach = rotated.abs().amax(-1).square()
    error = (codes.decode() - rotated).square().mean(-1)
    assert (error / reach).mean() == pytest.approx(relative_error(bits), rel=0.13)
    assert codes.nbytes == 2000 * vector_bytes(head_dim, bits)
    if bits > 4:
        assert ((codes.decode() - rotated).abs() <= 0.501 * codes.scales()[:, None]).all()


@pytest.mark.parametrize("bits", BITS)
def test_constant_zero_and_tiny_vectors_come_back(bits):
    """Vectors whose channels are alike are coded as well as others. What is tiny beside the others becomes tiny."""
    vectors = torch.stack([torch.zeros(64), torch.full((64,), 3.0), torch.full((64,), 1e-40), torch.full((64,), -2.5)])
    back = encode(vectors, bits).decode() @ rotation(64).T
    expected = {2: 0.45, 3: 0.25, 4: 0.13}.get(bits, 0.08)
    assert ((back - vectors).norm(dim=-1) <= expected * vectors.norm(dim=-1) + 1e-2).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    vectors = torch.randn(3, 64)
    vectors[1, 5] = bad
    with pytest.raises(NotFiniteError, match="NaN or infinity"):
        encode(vectors, 4)
    with pytest.raises(NotFiniteError, match="NaN or infinity"):
        encode_coefficients(vectors, torch.arange(3), 4, 10)


def test_numbers_beyond_what_a_byte_stands_for_are_refused_and_not_cut_off():
    with pytest.raises(UnsupportedInputError, match="got keys or values with numbers up to 3.*expected at most 2435"):
        encode(torch.full((1, 64), 1000.0), 4)
    with pytest.raises(UnsupportedInputError, match="Leave `precision` at None"):
        encode_coefficients(torch.full((1, 64), 1e6), torch.zeros(1), 4, 10)
    assert encode(torch.empty(0, 64), 2).decode().shape == (0, 64)


@given(st.lists(st.floats(0, 2434, width=32), min_size=1, max_size=40))
def test_numbers_in_bytes_are_rounded_up_by_at_most_a_step(numbers):
    numbers = torch.tensor(numbers)
    stored = to_bytes(numbers)
    back = from_bytes(stored)
    assert stored.dtype == torch.uint8
    assert torch.equal(to_bytes(back), stored)
    assert (back >= numbers * 0.9998).all()
    assert (back <= (numbers * 2 ** (1 / STEPS) * 1.0002).clamp(min=2.0**LOWEST)).all()


def test_rotary_finds_the_angles_of_an_embedding_and_turns_as_it_does():
    angles = 10000.0 ** (-torch.arange(12) / 12)
    positions = torch.arange(50)[:, None] * angles
    cos, sin = (torch.cat((f(positions), f(positions)), -1) for f in (torch.cos, torch.sin))
    rotary = Rotary.of(cos[:2], sin[:2])
    assert rotary.angles == pytest.approx(angles.tolist())
    keys = torch.randn(1, 2, 1, 32).expand(-1, -1, 50, -1)  # the last 8 channels do not turn
    expected = apply_rope(keys, cos[None], sin[None])
    turned = rotary.turn(keys[:, :, :1], torch.arange(50)[None, None], 50)
    assert torch.allclose(turned, expected, atol=1e-5)
    queries = torch.randn(2, 3, 32)
    products = rotary.products(queries, keys[0, :, 0], 50)
    assert torch.allclose(products, queries @ expected[0].mT, atol=1e-4)


def basis_of(n_positions: int, head_dim: int = 64, n_heads: int = 2) -> KeyBasis:
    turned = torch.linalg.qr(torch.randn(n_heads, head_dim, head_dim))[0]
    synthesis = turned * torch.linspace(2, 0.05, head_dim)[:, None]
    mean = 4 * torch.randn(n_heads, head_dim)
    angles = 10000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    transform = KeyTransform(
        mean.half(), synthesis.half(), torch.linspace(2, 0.05, head_dim).expand(n_heads, -1).half()
    )
    return KeyBasis(transform, Rotary(tuple(angles.tolist())), n_positions)


def keys_like(basis: KeyBasis, n_tokens: int) -> torch.Tensor:
    """Keys (1, H, S, D) as the transform expects them."""
    n_heads, head_dim = basis.transform.mean.shape
    rest = torch.randn(1, n_heads, n_tokens, head_dim) @ basis.transform.synthesis.float()
    return rest + basis.rotary.turn(basis.transform.mean[None, :, None], torch.arange(n_tokens)[None, None], n_tokens)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", TRANSFORM_BITS)
def test_transform_codes_take_their_bytes_and_no_coefficient_is_off_by_more_than_half_a_step(bits, head_dim):
    coefficients = torch.randn(500, head_dim)
    codes = encode_coefficients(coefficients, torch.arange(500), bits, 500)
    assert codes.nbytes == 500 * key_bytes(head_dim, bits, 500)
    assert sum(count * of_group for count, of_group in profile(head_dim, bits)) == bits * head_dim
    of_step, back = steps(head_dim, bits), codes.decode() * steps(head_dim, bits)
    off = (back - coefficients[:, : len(of_step)]).abs() / (of_step * codes.gains()[:, None])
    assert off.max() <= 0.505
    measured = weighted_errors(coefficients, TRANSFORM_BITS, torch.ones(head_dim))[bits]
    error = (back - coefficients[:, : len(of_step)]).square().sum(-1)
    error += coefficients[:, len(of_step) :].square().sum(-1)
    assert torch.allclose(measured, error, rtol=0.03)
    assert torch.allclose(codes.numbers().T - middles(head_dim, bits), codes.decode() / codes.gains()[:, None])


def test_keys_that_a_transform_knows_need_about_half_of_the_bits():
    basis = basis_of(300)
    keys = keys_like(basis, 300)
    positions = torch.arange(300)[None]
    coefficients = basis.coefficients(keys, positions)
    errors = {}
    for bits in (2, 3, 4):
        codes = encode_coefficients(coefficients[0, 1], positions[0], bits, 300)
        errors[bits] = (basis.restore(codes, 1) - keys[0, 1]).square().mean()
    turned = rotation(64)
    rotated = (encode(keys[0, 1], 4).decode() @ turned.T - keys[0, 1]).square().mean()
    assert errors[4] < errors[3] < errors[2]
    assert errors[3] < rotated


@pytest.mark.parametrize("n_positions", [100, 2**16, 2**16 + 1])
def test_positions_of_long_prompts_come_back(n_positions):
    positions = torch.tensor([0, 1, n_positions // 2, n_positions - 1])
    codes = encode_coefficients(torch.randn(4, 64), positions, 2, n_positions)
    assert torch.equal(codes.positions(), positions)
    assert codes.nbytes == 4 * key_bytes(64, 2, n_positions)


@pytest.mark.parametrize("with_basis", [False, True])
def test_the_distortion_is_the_error_of_the_code(with_basis):
    """Mean over many pairs, within a fifth: the logit's squared error plus the value's relative squared error."""
    basis = basis_of(400) if with_basis else None
    keys = keys_like(basis_of(400) if basis is None else basis, 400)
    values, queries = torch.randn(1, 2, 400, 64), torch.randn(2, 1000, 64)
    if basis is not None:  # queries for which the deviations of the transform are true
        whitened = torch.linalg.inv(basis.transform.synthesis.float()).mT
        queries = queries * basis.transform.deviation.float()[:, None] @ whitened
    power = queries.square().sum(-1).mean(-1)
    menu = [Precision(4, 3), Precision(8, 4), Precision(3, 4)]
    losses = distortions(keys, values, menu, 0.125, power, basis, torch.arange(400)[None]).total(menu, keys[..., 0])
    for precision, loss in zip(menu, losses, strict=True):
        if basis is not None and precision.key_bits in TRANSFORM_BITS:
            codes = [
                encode_coefficients(
                    basis.coefficients(keys, torch.arange(400)[None])[0, h], torch.arange(400), precision.key_bits, 400
                )
                for h in range(2)
            ]
            back = torch.stack([basis.restore(code, head) for head, code in enumerate(codes)])
        else:
            back = torch.stack([encode(k, precision.key_bits).decode() @ rotation(64).T for k in keys[0]])
        logits = (((back - keys[0]) @ queries.mT) * 0.125).square().mean(-1)
        decoded = torch.stack([encode(v, precision.value_bits).decode() @ rotation(64).T for v in values[0]])
        value = (decoded - values[0]).square().sum(-1) / values[0].square().sum(-1)
        assert loss[0].mean() == pytest.approx((logits + value).mean().item(), rel=0.2)


@pytest.mark.parametrize("size", [1e-4, 3e-4, 1e-2, 0.0])
def test_the_distortion_of_tiny_values_says_that_a_code_would_ruin_them(size):
    values = size * torch.randn(1, 1, 300, 64)
    lost = distortions(torch.randn(1, 1, 300, 64), values, [Precision(8, 2)], 0.125, torch.ones(1)).values[2]
    decoded = encode(values[0, 0], 2).decode() @ rotation(64).T
    true = (decoded - values[0, 0]).square().sum(-1) / values[0, 0].square().sum(-1).clamp(min=1e-12)
    assert (lost > 0).all()
    assert true.mean() < 10 * lost.mean()


def test_a_value_that_is_zero_among_others_is_no_loss():
    values = torch.randn(1, 1, 300, 64)
    values[0, 0, 7] = 0
    lost = distortions(torch.randn(1, 1, 300, 64), values, [Precision(8, 4)], 0.125, torch.ones(1)).values[4]
    assert lost[0, 0, 7] < 1e-3
    assert lost[0, 0, 8] > 1e-3


@pytest.mark.parametrize(
    "wrong", ["best", [], [(7, 4)], [(8, 4), (8, 4)], [8, 4], 8, [(8,)], [(True, 4)], [(8, 4.0)], {"a": 1}]
)
def test_a_wrong_precision_is_refused_with_its_remedy(wrong):
    with pytest.raises(SettingError, match=r"precision: got .*expected .*"):
        menu_of(wrong)


def test_bytes_of_a_pair_in_a_16_bit_cache():
    assert menu_of("mixed") == MIXED
    assert [precision.nbytes(64, 2) for precision in MIXED] == [50, 66, 82, 98, 130, 256]
    assert Precision(2, 2).nbytes(64, 2, basis_of(100)) == 36
    assert Precision(2, 2).nbytes(64, 2, basis_of(2**17)) == 38  # positions of more than two bytes
