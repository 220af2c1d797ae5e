"""Tiles of matrix products, and the architectures that their tables tell apart."""

import os
from functools import cache

import torch
import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as for Triton, when its kernels are imported

# The largest that compile without spills for sm_80, sm_90 and sm_100 (tests/support/aot.py prints registers and shared
# memory). Those of 128 × 256 take 197 KB of shared memory, which sm_120 does not have. IEEE float32 has no tensor
# cores: small tiles, and none with fewer than 16 terms, which Triton 3.6 refuses. Unless told how many registers there
# are, ptxas stops at 80 and spills.
MAX_REGISTERS = 128
TILES_16_BIT = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
TILES_16_BIT_WIDE = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
TILES_16_BIT_FEW_ROWS = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
TILES_TF32 = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
TILES_FLOAT32 = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 3, "maxnreg": MAX_REGISTERS}


def architecture() -> int:
    """80, 90 or 100: which kind of matrix instructions there is."""
    if INTERPRETED:
        return 90
    active = triton.runtime.driver.active
    return _architecture(active, active.get_current_device())


@cache
def _architecture(driver: object, device: int) -> int:
    """Of a device, which is the current one."""
    arch = driver.get_current_target().arch  # type: ignore[attr-defined]
    return 90 if arch == 90 else 100 if 100 <= arch < 120 else 80


def precision() -> str:
    """How float32 is multiplied: as float32, unless torch was told that TF32 will do."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def product_tiles(dtype: torch.dtype, *, is_plain: bool = False, has_few_rows: bool = False) -> dict[str, int]:
    """Tiles of a product: BLOCK_M, BLOCK_N, BLOCK_K and launch options.

    `is_plain`: each tile is stored as it is; with anything else to be read or computed the wide ones spill.
    """
    if dtype == torch.float32:
        return TILES_TF32 if precision() == "tf32" else TILES_FLOAT32
    if has_few_rows:
        return TILES_16_BIT_FEW_ROWS
    return TILES_16_BIT_WIDE if is_plain and architecture() != 80 else TILES_16_BIT
