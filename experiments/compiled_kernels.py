"""
Compile the Triton kernels of ragged and packed attention for GPUs that need not be present, and print what they need.

    python -m experiments.compiled_kernels                      capabilities 8.0, 8.6, 9.0; all dtypes and head sizes
    python -m experiments.compiled_kernels --capabilities 90 --dtypes bf16 --head-dims 128 --kernels packed

Needs kvpress-moe[triton], which includes NVIDIA's assembler, but no GPU. For every kernel it prints the registers per
thread, the bytes spilled to local memory, the shared memory (and the most that a program gets), and how often two
instructions occur: asynchronous copies of 16 bytes, and products on tensor cores. It ends with an error if a kernel
does not fit. It does not show how fast a kernel is, or whether the compiled kernel gives the interpreter's results.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvpress_moe.cache.packed_triton_backend import block_of_codes
from kvpress_moe.cache.packed_triton_kernels import attend_codes
from kvpress_moe.cache.triton_backend import blocks_for
from kvpress_moe.cache.triton_kernels import attend_tiles, merge_tiles
from kvpress_moe.codes.bit_layout import bit_layout
from kvpress_moe.codes.precision import WHOLE
from kvpress_moe.codes.transform_codes import profile

SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # most that a program gets, by compute capability
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TENSORS = ("query", "flat_keys", "flat_values", "new_keys", "new_values", "output", "asked")
TYPES = {
    "tiles": "*i32",
    "first_tiles": "*i32",
    "partial": "*fp32",
    "weights": "*fp32",
    "scaling": "fp32",
    "cap": "fp32",
    "mean_logits": "*fp32",
    "constants": "*fp32",
    "positions": "*i16",
    **dict.fromkeys(("keys", "values"), "*u8"),
    **dict.fromkeys(("key_scales", "value_scales"), "*u8"),
    **dict.fromkeys(("key_middle", "value_middle"), "fp32"),
    **dict.fromkeys(("key_layout", "value_layout"), "*i32"),
}
STRIDES = [f"{of}_{along}" for of in ("query", "key", "value", "output") for along in ("row", "head", "token")]


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel needs."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    wide_copies: int
    tensor_core_products: int


def compiled(kernel: Any, dtype: str, constants: dict[str, Any], capability: int) -> Compiled:
    """Compile a kernel for one kind of GPU. Pointers, strides and tiles are multiples of 16, as in real caches."""
    names = kernel.arg_names
    types = TYPES | dict.fromkeys(TENSORS, f"*{dtype}")
    if constants.get("KEY_PLANES") == 0:
        types |= dict.fromkeys(("keys", "values"), f"*{dtype}")
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in (*STRIDES, "tile_size")]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    usage = resource_usage(made.asm["cubin"])
    assembly = made.asm["ptx"]
    return Compiled(
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        made.metadata.shared,
        len(re.findall(r"cp\.async\.cg", assembly)),
        len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", assembly)),
    )


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of a binary, as the assembler's own tool reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", printed)}


def variants(dtype: str, head_dim: int, kinds: list[str]) -> list[tuple[str, Any, dict[str, Any]]]:
    """The kernels as attention launches them: one new token, a question, a question with a soft cap."""
    shape = {"N_HEADS": 8, "GROUP": 4, "HEAD_DIM": head_dim}
    found = []
    for what, n_rows, capped in (("one token", 4, False), ("question", 400, False), ("question, capped", 400, True)):
        block_d, block_rows, block_pairs = blocks_for(n_rows, head_dim, DTYPES[dtype].itemsize)
        blocks = {"BLOCK_D": block_d, "BLOCK_ROWS": block_rows, "BLOCK_PAIRS": block_pairs, "CAPPED": capped}
        alone = {"q_len": 1} if n_rows == shape["GROUP"] else {}  # Triton makes a constant of an argument that is 1
        if "ragged" in kinds:
            found.append((what, attend_tiles, shape | blocks | alone))
        if not capped and "ragged" in kinds:
            merging = shape | {"BLOCK_D": block_d, "BLOCK_TILES": 16} | alone
            found.append((f"{what}, merge", merge_tiles, merging))
        for transformed, key_bits, value_bits in ("packed" in kinds) * (
            (False, 8, 4),
            (False, 3, 3),
            (False, 16, 16),
            (True, 2, 2),
            (True, 4, 4),
        ):
            kind = "transformed" if transformed else "whole" if key_bits == WHOLE else "rotated"
            name = f"{what}, K{key_bits}V{value_bits} {kind}"
            groups = profile(head_dim, key_bits) if transformed else ((head_dim, key_bits),)
            cpu, whole = torch.device("cpu"), key_bits == WHOLE
            codes = {
                "CHANNELS": sum(channels for channels, _ in groups),
                "KEY_PLANES": 0 if whole else len(bit_layout(groups, cpu)),
                "VALUE_PLANES": 0 if whole else len(bit_layout(((head_dim, value_bits),), cpu)),
                "MEANS": transformed,
                "BLOCK_C": max(16, triton.next_power_of_2(sum(channels for channels, _ in groups))),
            }
            blocks["BLOCK_PAIRS"] = block_of_codes(block_d)
            found.append((name, attend_codes, {"HEAD_DIM": head_dim} | blocks | codes))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", nargs="+", type=int, choices=list(SHARED_MEMORY), default=list(SHARED_MEMORY))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--kernels", nargs="+", choices=["ragged", "packed"], default=["ragged", "packed"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 96, 128, 256])
    arguments = parser.parse_args()
    print(f"triton {version('triton')}\n")
    print(
        "| capability | dtype | head size | kernel | registers | spilled | shared (most) | 16-byte copies | products |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    too_large = []
    for capability in arguments.capabilities:
        for dtype in arguments.dtypes:
            for head_dim in arguments.head_dims:
                for what, kernel, constants in variants(dtype, head_dim, arguments.kernels):
                    found = compiled(kernel, dtype, constants, capability)
                    name = f"{capability / 10} | {dtype} | {head_dim} | {what}"
                    print(
                        f"| {name} | {found.registers} | {found.spilled_bytes} | {found.shared_bytes // 1024} KiB "
                        f"({SHARED_MEMORY[capability] // 1024}) | {found.wide_copies} | {found.tensor_core_products} |",
                        flush=True,
                    )
                    if found.shared_bytes > SHARED_MEMORY[capability]:
                        too_large.append(name)
    if too_large:
        sys.exit("More shared memory than the GPU has: " + "; ".join(too_large))


if __name__ == "__main__":
    main()
