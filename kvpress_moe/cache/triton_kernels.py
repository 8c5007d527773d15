"""The Triton kernels behind :mod:`kvpress_moe.cache.triton_backend`, which launches them."""

import triton
import triton.language as tl

# B = batch, H = KV heads, G = query heads per KV head, Q = queries, T = later tokens, N = kept pairs, D = head dim


@triton.jit(do_not_specialize=["n_tiles", "new_tiles_per_head", "n_new"])  # one compiled kernel serves all values
def attend_tiles(
    query,  # (B, H·G, Q, D)
    flat_keys,  # (N, D)
    flat_values,
    new_keys,  # (B, H, T, D)
    new_values,
    tiles,  # (n_tiles, 3): head (row · H + head), first pair, the pair after the last
    partial,  # (all tiles, G·Q, D), float32
    weights,  # (all tiles, G·Q), float32: log2 of the tile's sum of exponentials
    n_tiles,
    new_tiles_per_head,
    n_new,
    q_len,
    tile_size,
    scaling,
    cap,
    query_row,
    query_head,
    query_token,
    key_row,
    key_head,
    key_token,
    value_row,
    value_head,
    value_token,
    N_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """Attention of a block of a head's G·Q queries over one tile of its pairs. Tiles of new tokens come last."""
    tile = tl.program_id(0)
    n_rows = GROUP * q_len
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_D)
    in_query = rows[:, None] < n_rows
    in_dims = dims < HEAD_DIM

    is_new = tile >= n_tiles
    if is_new:
        head = (tile - n_tiles) // new_tiles_per_head
        start = ((tile - n_tiles) % new_tiles_per_head) * tile_size
        end = tl.minimum(start + tile_size, n_new)
        row, kv_head = (head // N_HEADS).to(tl.int64), (head % N_HEADS).to(tl.int64)
        keys = new_keys + row * key_row + kv_head * key_head
        values = new_values + row * value_row + kv_head * value_head
        key_stride, value_stride = key_token, value_token
        last_seen = n_new - q_len + rows % q_len  # a query sees tokens up to itself
        end = tl.minimum(end, tl.max(tl.where(rows < n_rows, last_seen, 0), 0) + 1)  # no query of the block sees more
    else:
        head = tl.load(tiles + 3 * tile)
        start = tl.load(tiles + 3 * tile + 1)
        end = tl.load(tiles + 3 * tile + 2)
        keys, values = flat_keys, flat_values
        key_stride, value_stride = HEAD_DIM, HEAD_DIM
        last_seen = tl.full((BLOCK_ROWS,), 2147483647, tl.int32)  # a query sees the whole prompt

    query_heads = (head % N_HEADS) * GROUP + rows // q_len
    at = (
        (head // N_HEADS).to(tl.int64) * query_row
        + query_heads.to(tl.int64) * query_head
        + (rows % q_len).to(tl.int64) * query_token
    )
    asked = tl.load(query + at[:, None] + dims[None, :], mask=in_query & in_dims[None, :], other=0.0)

    highest = tl.full((BLOCK_ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    summed = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for first in range(start, end, BLOCK_PAIRS):
        pairs = first + tl.arange(0, BLOCK_PAIRS)
        there = pairs < end
        key_at = pairs[None, :].to(tl.int64) * key_stride + dims[:, None]
        key = tl.load(keys + key_at, mask=there[None, :] & in_dims[:, None], other=0.0)
        logits = tl.dot(asked, key, input_precision="ieee") * scaling
        if CAPPED:
            logits = cap * (2 * tl.sigmoid(2 * logits / cap) - 1)  # tanh
        seen = there[None, :] & (pairs[None, :] <= last_seen[:, None])
        logits = tl.where(seen, logits * 1.4426950408889634, -float("inf"))
        now_highest = tl.maximum(highest, tl.max(logits, 1))
        base = tl.where(now_highest == -float("inf"), 0.0, now_highest)  # rows that see nothing yet
        shares = tl.exp2(logits - base[:, None])
        kept_before = tl.exp2(highest - base)
        value_at = pairs[:, None].to(tl.int64) * value_stride + dims[None, :]
        value = tl.load(values + value_at, mask=there[:, None] & in_dims[None, :], other=0.0)
        total = total * kept_before + tl.sum(shares, 1)
        summed = summed * kept_before[:, None] + tl.dot(shares.to(value.dtype), value, input_precision="ieee")
        highest = now_highest

    divisor = tl.where(total == 0.0, 1.0, total)
    out_at = tile.to(tl.int64) * n_rows + rows
    in_out = in_query & in_dims[None, :]
    tl.store(partial + out_at[:, None] * HEAD_DIM + dims[None, :], summed / divisor[:, None], mask=in_out)
    tl.store(weights + out_at, highest + tl.log2(divisor), mask=rows < n_rows)


@triton.jit(do_not_specialize=["n_tiles", "new_tiles_per_head"])
def merge_tiles(
    partial,
    weights,
    first_tiles,  # (B·H + 1): a head's tiles are those from its own entry up to the next
    output,  # (B, Q, H·G, D)
    n_tiles,
    new_tiles_per_head,
    q_len,
    output_row,
    output_token,
    output_head,
    N_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """The output of one query: the mean of its head's tiles, weighted by their sums of exponentials."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    first = tl.load(first_tiles + head)
    n_kept_tiles = tl.load(first_tiles + head + 1) - first
    n_all = n_kept_tiles + new_tiles_per_head
    highest = -float("inf")
    total = 0.0
    summed = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, n_all, BLOCK_TILES):
        own = start + tl.arange(0, BLOCK_TILES)
        new = n_tiles + head * new_tiles_per_head + own - n_kept_tiles
        at = tl.where(own < n_kept_tiles, first + own, new).to(tl.int64) * (GROUP * q_len) + row
        logs = tl.load(weights + at, mask=own < n_all, other=-float("inf"))
        now_highest = tl.maximum(highest, tl.max(logs, 0))
        base = tl.where(now_highest == -float("inf"), 0.0, now_highest)
        shares = tl.exp2(logs - base)
        kept_before = tl.exp2(highest - base)
        inside = (own < n_all)[:, None] & (dims < HEAD_DIM)[None, :]
        parts = tl.load(partial + at[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0)
        total = total * kept_before + tl.sum(shares, 0)
        summed = summed * kept_before + tl.sum(shares[:, None] * parts, 0)
        highest = now_highest
    query_head = (head % N_HEADS) * GROUP + row // q_len
    at = (head // N_HEADS).to(tl.int64) * output_row + (row % q_len).to(tl.int64) * output_token
    at += query_head * output_head
    tl.store(output + at + dims, (summed / total).to(output.dtype.element_ty), mask=dims < HEAD_DIM)
