"""The Triton kernel behind :mod:`kvpress_moe.cache.packed_triton_backend`: attention over codes."""

import triton
import triton.language as tl

# B = batch, H = KV heads, G = query heads per KV head, Q = queries, N = pairs of a tier, D = head dim
# C = channels of a key that have bits: fewer than D in transform codes of 2 bits


@triton.jit
def read_numbers(packed, layout, pairs, there, channels, n_channels, n_pairs, PLANES: tl.constexpr):
    """Numbers of pairs and channels, in the shape that both broadcast to. ``layout``: see ``codes/bit_layout.py``."""
    inside = channels < n_channels
    numbers = tl.zeros_like(pairs) + tl.zeros_like(channels)
    for plane in tl.static_range(PLANES):
        table = layout + plane * 4 * n_channels + channels
        byte = tl.load(table, mask=inside, other=0)
        shift = tl.load(table + n_channels, mask=inside, other=0)
        mask = tl.load(table + 2 * n_channels, mask=inside, other=0)
        weight = tl.load(table + 3 * n_channels, mask=inside, other=0)
        read = tl.load(packed + byte.to(tl.int64) * n_pairs + pairs, mask=inside & there, other=0)
        numbers += ((read.to(tl.int32) >> shift) & mask) * weight
    return numbers


@triton.jit
def read_scales(scales, pairs, there):
    """Reach or gain from their bytes, see ``codes/scale_bytes.py``."""
    stored = tl.load(scales + pairs, mask=there, other=0).to(tl.float32)
    return tl.exp2(stored / 12.0 - 10.0)


@triton.jit(
    do_not_specialize=["n_rows", "first_row", "end_row", "n_positions", "key_middle", "value_middle"]
)  # one compiled kernel serves all
def attend_codes(
    asked,  # (B·H, G·Q, C): scaled queries in the basis of the keys
    constants,  # (B·H, G·Q), float32: the part of a logit that does not depend on numbers
    mean_logits,  # (B·H, rows, n_positions), float32, of the rows from first_row on; only with MEANS
    keys,  # (key bytes, N), uint8; or (N, D), whole
    key_scales,  # (N,), uint8: reach or gain, see codes/scale_bytes.py
    positions,  # (N,), int16 (which stands for 0 to 65,535) or int32; only with MEANS
    key_layout,
    values,  # (value bytes, N), uint8; or (N, D), whole
    value_scales,  # (N,), uint8
    value_layout,
    tiles,  # (n_tiles, 4): head (row · H + head), first pair, the pair after the last, place among all tiles
    partial,  # (all tiles, G·Q, D), float32
    weights,  # (all tiles, G·Q), float32: log2 of the tile's sum of exponentials
    n_pairs,
    n_rows,
    first_row,
    end_row,
    n_positions,
    cap,
    key_middle,  # a reach divided by the middle is a scale; 1 for gains
    value_middle,
    CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEY_PLANES: tl.constexpr,  # 0: the keys are whole
    VALUE_PLANES: tl.constexpr,  # 0: the values are whole
    MEANS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """
    Attention of a block of a head's G·Q queries over one tile of pairs of one precision.

    Where values are coded, the output stays rotated: another matrix would not fit into shared memory.
    """
    tile = tl.program_id(0)
    rows = first_row + tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_query = rows[:, None] < end_row
    dims = tl.arange(0, BLOCK_D)
    in_dims = dims < HEAD_DIM
    channels = tl.arange(0, BLOCK_C)
    head = tl.load(tiles + 4 * tile).to(tl.int64)
    start = tl.load(tiles + 4 * tile + 1)
    end = tl.load(tiles + 4 * tile + 2)
    place = tl.load(tiles + 4 * tile + 3).to(tl.int64)

    at = (head * n_rows + rows[:, None]) * CHANNELS + channels[None, :]
    query = tl.load(asked + at, mask=in_query & (channels < CHANNELS)[None, :], other=0.0)
    constant = tl.load(constants + head * n_rows + rows, mask=rows < end_row, other=0.0)
    mean_row = mean_logits + (head * (end_row - first_row) + rows[:, None] - first_row) * n_positions

    highest = tl.full((BLOCK_ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    summed = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for first in range(start, end, BLOCK_PAIRS):
        pairs = first + tl.arange(0, BLOCK_PAIRS)
        there = pairs < end
        if KEY_PLANES == 0:
            key_at = pairs[None, :].to(tl.int64) * CHANNELS + channels[:, None]
            key = tl.load(keys + key_at, mask=there[None, :] & (channels < CHANNELS)[:, None], other=0.0)
        else:
            key = read_numbers(
                keys, key_layout, pairs[None, :], there[None, :], channels[:, None], CHANNELS, n_pairs, KEY_PLANES
            ).to(query.dtype)
        logits = tl.dot(query, key, input_precision="ieee")
        if KEY_PLANES > 0:
            logits = (logits + constant[:, None]) * (read_scales(key_scales, pairs, there) / key_middle)[None, :]
        if MEANS:
            position = tl.load(positions + pairs, mask=there, other=0).to(tl.int32)
            if positions.dtype.element_ty == tl.int16:
                position = position & 0xFFFF
            logits += tl.load(mean_row + position[None, :], mask=in_query & there[None, :], other=0.0)
        if CAPPED:
            logits = cap * (2 * tl.sigmoid(2 * logits / cap) - 1)  # tanh
        logits = tl.where(there[None, :], logits * 1.4426950408889634, -float("inf"))
        now_highest = tl.maximum(highest, tl.max(logits, 1))
        shares = tl.exp2(logits - now_highest[:, None])
        kept_before = tl.exp2(highest - now_highest)
        if VALUE_PLANES == 0:
            value_at = pairs[:, None].to(tl.int64) * HEAD_DIM + dims[None, :]
            value = tl.load(values + value_at, mask=there[:, None] & in_dims[None, :], other=0.0)
        else:
            numbers = read_numbers(
                values, value_layout, pairs[:, None], there[:, None], dims[None, :], HEAD_DIM, n_pairs, VALUE_PLANES
            ).to(tl.float32)
            scale = read_scales(value_scales, pairs, there) / value_middle
            value = ((numbers - value_middle) * scale[:, None]).to(query.dtype)
        total = total * kept_before + tl.sum(shares, 1)
        summed = summed * kept_before[:, None] + tl.dot(shares.to(value.dtype), value, input_precision="ieee")
        highest = now_highest

    out_at = place * n_rows + rows
    in_out = in_query & in_dims[None, :]
    tl.store(partial + out_at[:, None] * HEAD_DIM + dims[None, :], summed / total[:, None], mask=in_out)
    tl.store(weights + out_at, highest + tl.log2(total), mask=rows < end_row)
