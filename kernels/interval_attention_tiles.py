"""Tiles of `interval_attention`: blocks, pieces of a head, warps, stages and registers of each kernel."""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import torch
import triton

from mmlm_kernels.launch import next_power_of_2

OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
SPLIT_ABOVE = 128  # head size

# Padded head size up to which a row holds; M, N, warps, stages. By bytes of a number, and architecture where another
# row than the first architecture's is better: 80 stands for all without wgmma and tcgen05. Chosen so that no main loop
# spills under Triton 3.6 and 3.9, and shared memory stays below 99 KB on 80 (which is sm_120's, too). A warpgroup's
# wgmma takes 64 rows of the row operand: with 8 warps and 64 rows both compute the same. Those of 90 for heads of 64,
# 80, 128 and 256 are the fastest of a handful on an H100 under Triton 3.6 (CONTRIBUTING); others are guesses.
TILES = {
    ("fwd", 2, 80): [(64, 128, 64, 4, 3), (128, 128, 64, 8, 2), (192, 32, 32, 4, 2), (256, 64, 32, 8, 2),
                     (512, 32, 16, 8, 2)],
    ("fwd", 2, 90): [(64, 128, 64, 4, 3), (80, 64, 64, 4, 3), (128, 128, 64, 8, 3), (256, 128, 64, 8, 2),
                     (512, 32, 16, 8, 2)],
    ("fwd", 2, 100): [(64, 128, 64, 4, 3), (128, 128, 64, 8, 2), (256, 64, 32, 8, 2), (512, 32, 16, 8, 2)],
    ("fwd", 4, 80): [(64, 32, 32, 4, 2), (128, 16, 32, 4, 2)],
    ("dkv", 2, 80): [(64, 32, 64, 4, 2), (112, 16, 64, 4, 2), (128, 32, 64, 8, 2), (256, 32, 32, 8, 1),
                     (320, 16, 32, 8, 1), (512, 16, 16, 8, 1)],
    ("dkv", 2, 90): [(64, 64, 64, 4, 3), (80, 64, 64, 4, 2), (96, 64, 128, 8, 2), (112, 32, 128, 8, 2),
                     (128, 64, 128, 8, 2), (320, 16, 32, 8, 1), (512, 16, 16, 8, 1)],
    ("dkv, cap", 2, 90): [(64, 64, 64, 4, 3), (80, 64, 64, 4, 2), (96, 64, 128, 8, 2), (112, 32, 128, 8, 2),
                          (128, 32, 128, 8, 3), (320, 16, 32, 8, 1), (512, 16, 16, 8, 1)],
    ("dk", 2, 90): [(192, 64, 128, 8, 2), (256, 32, 128, 8, 3)],
    ("dv", 2, 90): [(192, 64, 128, 8, 3), (256, 64, 128, 8, 2)],
    ("dkv", 2, 100): [(64, 64, 64, 8, 2), (96, 32, 64, 8, 2), (112, 16, 64, 8, 1), (128, 32, 64, 4, 1),
                      (256, 32, 32, 8, 1), (320, 16, 32, 8, 1), (512, 16, 16, 8, 1)],
    ("dkv", 4, 80): [(64, 32, 32, 8, 1), (128, 16, 16, 8, 1)],
    ("dq", 2, 80): [(64, 64, 64, 4, 2), (112, 64, 32, 8, 2), (128, 64, 32, 4, 2), (256, 32, 32, 8, 1),
                    (512, 16, 16, 8, 1)],
    ("dq", 2, 90): [(112, 64, 64, 4, 2), (128, 128, 64, 8, 3), (256, 128, 32, 8, 3), (512, 16, 16, 8, 1)],
    ("dq", 4, 80): [(64, 32, 32, 4, 1), (128, 16, 32, 8, 1)],
    ("dq", 4, 100): [(64, 32, 32, 8, 1), (128, 16, 32, 8, 1)],
}  # fmt: skip
if not OLD_TRITON:
    TILES["fwd", 2, 90] = [(256, 128, 32, 8, 2) if row[0] == 256 else row for row in TILES["fwd", 2, 90]]
    TILES["dk", 2, 90] = [(256, 32, 128, 8, 2) if row[0] == 256 else row for row in TILES["dk", 2, 90]]
    TILES["dkv", 2, 90] = [(112, 32, 64, 4, 2) if row[0] == 112 else row for row in TILES["dkv", 2, 90]]
    TILES["dkv", 2, 100] = [(112, 32, 64, 8, 2) if row[0] == 112 else row for row in TILES["dkv", 2, 100]]
if OLD_TRITON:  # it needs more registers for mma.sync
    TILES["dkv", 2, 80] = [(64, 16, 64, 4, 2), *TILES["dkv", 2, 80][1:]]
    TILES["dq", 2, 100] = TILES["dq", 2, 80]
    TILES["fwd", 2, 80] = [(64, 128, 64, 4, 2), *TILES["fwd", 2, 80][1:]]


@cache
def pieces(size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Up to three powers of two, each at least 16, whose sum is the head size or little more.

    In float32 one: there pieces spill registers, and a power of two does not.
    """
    if dtype == torch.float32:
        return max(16, next_power_of_2(size)), 0, 0
    rest, widths = -(-max(size, 16) // 16) * 16, []
    while rest and len(widths) < 3:
        power = 1 << (rest.bit_length() - 1)
        if len(widths) == 2 and power < rest:
            power *= 2
        widths.append(power)
        rest -= min(power, rest)
    if len(widths) > 1 and widths[-1] == widths[-2]:  # 64 + 32 + 32 is 64 + 64; and that is 128
        widths = [*widths[:-2], 2 * widths[-1]]
    if len(widths) > 1 and widths[-1] == widths[-2]:
        widths = [*widths[:-2], 2 * widths[-1]]
    return tuple(widths + [0] * (3 - len(widths)))  # type: ignore[return-value]


@cache
def blocks(
    kernel: str, arch: int, dtype: torch.dtype, *head_sizes: int, softcap: bool = False
) -> tuple[int, int, int, int]:
    padded, width = max(sum(pieces(size, dtype)) for size in head_sizes), dtype.itemsize
    # a cap's polynomial takes registers, which some tiles do not have
    keys = [(f"{kernel}, cap", width, arch)] * softcap + [(kernel, width, arch), (kernel, width, 80)]
    rows = next(TILES[key] for key in keys if key in TILES)
    return next((row[1:] for row in rows if padded <= row[0]), rows[-1][1:])


@cache
def kernels_of_keys(arch: int, dtype: torch.dtype, *head_sizes: int) -> tuple[str, ...]:
    """The kernels that make the gradients of keys and values: two where both sums have no room in registers."""
    padded = max(sum(pieces(size, dtype)) for size in head_sizes)
    rows = TILES.get(("dk", dtype.itemsize, arch), [])
    return ("dk", "dv") if any(SPLIT_ABOVE < padded <= row[0] for row in rows) else ("dkv",)


def loads_as_columns(arch: int, stages: int) -> bool:
    """See `_load_rows` of the backward kernels."""
    return stages > 1 if arch == 90 else OLD_TRITON


def registers(is_large: bool) -> dict[str, int]:
    """For some tiles ptxas rather spills than has fewer programs on a multiprocessor, unless it is told a limit."""
    return {"maxnreg": 255} if is_large else {}


@cache
def sizes(head_size: int, value_size: int, dtype: torch.dtype) -> Mapping[str, int]:
    names = ("P1", "P2", "P3", "V1", "V2", "V3")
    values = (*pieces(head_size, dtype), *pieces(value_size, dtype))
    return MappingProxyType({"D": head_size, "DV": value_size, **dict(zip(names, values, strict=True))})
