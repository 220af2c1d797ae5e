"""Compile every kernel, at every configuration its launchers ship, for one architecture; no GPU needed.

    python tests/support/aot.py 90                    # every op, at the configurations that need most
    python tests/support/aot.py 90 all                # every head size and option as well
    python tests/support/aot.py 90 concat_linear glu  # these ops
    python tests/support/aot.py 90 --table            # what CI runs: compile what changed, read the rest of aot_tables/
    python tests/support/aot.py 90 all --write        # compile, and write the table

The launchers run on CPU tensors with Triton's launch replaced by a compilation for the target, so what is checked is
what would be launched. Prints registers, stack, spills and shared memory; exits 1 on a kernel that does not compile, on
a spill or on too much memory. A table holds what was found under one version of Triton, with a fingerprint of each op's
sources; one op is compiled all the same, and must give what its table says.
"""

import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch.utils import _pytree as pytree
from triton.runtime.jit import JITFunction

from mmlm_benchmarks.no_gpu import NoGpu

TESTS = Path(__file__).resolve().parents[1]
TABLES = TESTS / "aot_tables"
SHARED_MEMORY_LIMIT_KIB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
KINDS_OF_INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "cp.async")
CHECKED = "gated_add"  # compiled even where the table has it: few binaries, quick
label = ""  # of what is being compiled, for the table
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def concat_linear(dtype):
    from mmlm_kernels.concat_linear import concat_linear_fwd

    for rows in (1, 256):  # both tile tables
        inputs = [torch.empty(2, rows, 128, dtype=dtype), torch.empty(2, 1, 64, dtype=dtype)]
        weight, bias = torch.empty(256, 192, dtype=dtype), torch.empty(256, dtype=dtype)
        for activation in ("none", "relu", "gelu", "gelu_tanh", "silu") if dtype == DTYPES[0] else ("none", "gelu"):
            for tf32 in (False, True) if dtype == torch.float32 else (False,):
                torch.backends.cuda.matmul.allow_tf32 = tf32
                concat_linear_fwd(inputs, weight, bias, activation, True)


def fuse_modalities(dtype):
    from mmlm_kernels.fuse_modalities import fuse_modalities_bwd, fuse_modalities_fwd, gated_mix_bwd, gated_mix_fwd

    for size, present in ((4096, False), (1000, True)):
        features = [torch.empty(2, 32, size, dtype=dtype), torch.empty(2, 1, size, dtype=dtype)] * 2
        there = torch.ones(2, 32, 4, dtype=torch.bool) if present else None
        for mode, weight in (("mean", None), ("weighted", 4), ("attention", size)):
            weight = None if weight is None else torch.empty(weight, dtype=dtype)
            out, weights = fuse_modalities_fwd(features, mode, weight, there)
            fuse_modalities_bwd(out, features, weight, weights, there, mode)
        a = features[0]
        there = there[..., :2].contiguous() if present else None
        gated_mix_fwd(a, a, a, there)
        gated_mix_bwd(a, a, a, a, there)


def add_norm(dtype):
    from mmlm_kernels.add_norm import add_norm_bwd, add_norm_fwd

    for size, is_layer in ((4096, False), (1152, True), (8192, False)):
        x, weight = torch.empty(8, 64, size, dtype=dtype), torch.empty(size, dtype=dtype)
        bias = weight if is_layer else None
        add_norm_fwd(x, x, weight, bias, is_layer, 1e-6, 0.0)
        add_norm_bwd(x, x, x, weight, dtype if is_layer else None, is_layer, 1e-6, 0.0)
    add_norm_fwd(x, None, weight, None, False, 1e-6, 1.0)
    add_norm_bwd(x, None, x, weight, None, False, 1e-6, 1.0)


def formed(dtype):
    from mmlm_kernels.formed import scale_gradient_

    scale_gradient_(torch.empty(512, 64, dtype=dtype), torch.empty(()))


def glu(dtype):
    from mmlm_kernels.glu import ACTIVATIONS, glu_bwd, glu_fwd

    x, bias = torch.empty(512, 4096, dtype=dtype), torch.empty(4096, dtype=dtype)
    for activation in ACTIVATIONS if dtype == DTYPES[0] else ("silu",):
        glu_fwd(x, x, None, activation)
        glu_bwd(x, x, x, None, activation, False)
    glu_fwd(x, None, bias, "gelu")
    glu_bwd(x, x, None, bias, "gelu", False)


def gated_add(dtype):
    from mmlm_kernels.gated_add import gated_add_bwd, gated_add_fwd

    x, gate = torch.empty(512, 4096, dtype=dtype), torch.empty(1, dtype=dtype)
    for keep in (None, torch.ones(512, dtype=torch.bool)):
        gated_add_fwd(x, x, gate, keep)
        gated_add_bwd(x, x, gate, keep)


def qk_norm_rope(dtype):
    from mmlm_kernels.qk_norm_rope import qk_norm_rope_bwd, qk_norm_rope_fwd

    # heads of 128 and 80; a quarter of a head rotating; neighbours as pairs
    for size, half, norm, interleaved in ((128, 64, True, False), (80, 40, False, False), (96, 12, True, True)):
        q, k = torch.empty(2, 64, 32, size, dtype=dtype), torch.empty(2, 64, 8, size, dtype=dtype)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        table, weight = torch.empty(1, 64, half), torch.empty(size, dtype=dtype) if norm else None
        out, out_key = qk_norm_rope_fwd(q, k, table, table, weight, weight, 1e-6, 0.0, interleaved)
        qk_norm_rope_bwd(out, out_key, q, k, table, table, weight, weight, 1e-6, 0.0, interleaved)


def merge_embeddings(dtype):
    from mmlm_kernels.merge_embeddings import merge_embeddings_bwd, merge_embeddings_fwd, merge_embeddings_sources

    source, rows = torch.zeros(64, dtype=torch.int64), torch.empty(16, 4096, dtype=dtype)
    for mode in ("embed", "replace", "add"):
        merge_embeddings_fwd(source, torch.empty(64, 4096, dtype=dtype), [rows, rows], mode, 1.0)
    merge_embeddings_bwd(torch.empty(64, 4096, dtype=dtype), source, [16, 16])
    merge_embeddings_sources(source, [7, 9], [16, 16], 64)


def norm_pixel_shuffle(dtype):
    from mmlm_kernels.norm_pixel_shuffle import norm_pixel_shuffle_bwd, norm_pixel_shuffle_fwd

    x, index = torch.empty(1024, 1024, dtype=dtype), torch.arange(1024).view(-1, 4)
    cases = (("none", False, False), ("none", False, True), ("before", True, False), ("after", True, False))
    for norm_at, is_layer, channels_first in (*cases, ("before", False, True)):
        weight = None if norm_at == "none" else torch.empty(4096 if norm_at == "after" else 1024, dtype=dtype)
        options = (norm_at, is_layer, channels_first, 1e-6)
        out = norm_pixel_shuffle_fwd(x, index, weight, weight, *options)
        norm_pixel_shuffle_bwd(out, x, index, weight, None if weight is None else dtype, *options)


def patch_embed(dtype):
    from mmlm_kernels.patch_embed import patchify

    pixels = torch.zeros(2, 3, 56, 56, dtype=torch.uint8)
    patchify(pixels, [1.0] * 3, [0.0] * 3, 14, 2, 2, dtype)
    patchify(pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), [1.0] * 3, [0.0] * 3, 14, 1, 1, dtype)


HEAD_SIZES = (64, 72, 80, 88, 96, 104, 128, 192, 256, 320, 512)


def interval_attention(dtype, every=False):
    """Forward, backward, and decoding; every head size and option with `every`, else the ones that need most."""
    from mmlm_kernels.interval_attention import interval_attention_bwd, interval_attention_fwd

    def compile_one(size, kv_len=512, q_len=512, masked=True, softcap=0.0, sinks=False, backward=True, group=4):
        global label
        decoding = ", decoding" if q_len == 1 else ""
        shared = ", heads shared out" if q_len > 512 else ""
        extra = f"{shared}{'' if masked else ', no mask'}{', cap and sinks' if sinks and softcap else ''}{decoding}"
        label = f"interval_attention {str(dtype).removeprefix('torch.')} {size}{extra}"
        q = torch.empty(2, 8, q_len, size, dtype=dtype)
        k = torch.empty(2, 8 // group, kv_len, size, dtype=dtype)
        bounds = torch.empty(1, q_len, dtype=torch.int32) if masked else None
        sinks = torch.empty(8) if sinks else None
        out, *statistics = interval_attention_fwd(q, k, k, bounds, bounds, sinks, 0.1, softcap)
        if backward:
            interval_attention_bwd(out, None, q, k, k, bounds, bounds, out, *statistics, 0.1, softcap)

    quick = {torch.bfloat16: (80, 104, 256), torch.float16: (), torch.float32: (64,)}[dtype]
    sizes = [size for size in HEAD_SIZES if size <= (128 if dtype == torch.float32 else 512)] if every else quick
    for size in sizes:
        compile_one(size)
    for size in sizes if every else sizes[1:2]:
        compile_one(size, q_len=1024, kv_len=1024)
    if dtype == torch.bfloat16:
        compile_one(128, q_len=1, kv_len=4096, backward=False)
    if not every:
        return
    for size in sizes:
        compile_one(size, q_len=1, kv_len=4096, backward=False, sinks=True)
        if dtype == torch.bfloat16:
            compile_one(size, masked=False)
    if dtype == torch.bfloat16:
        for size in (64, 128, 256):
            compile_one(size, softcap=50.0, sinks=True)
        for size in (72, 128):
            compile_one(size, group=1)


KINDS = ("diagonal", "ids", "weights")


def positives(kind, rows, columns, dtype):
    ids = torch.zeros(rows, dtype=torch.int64), torch.zeros(columns, dtype=torch.int64)
    weights = torch.empty(rows, columns, dtype=dtype)
    return kind, 1, *(ids if kind == 1 else (None, None)), weights if kind == 2 else None


def clip_loss(dtype):
    from mmlm_kernels.clip_loss import clip_loss_gradients, clip_loss_statistics

    dots, scale, sums = torch.empty(512, 528, dtype=dtype)[:, :512], torch.empty(()), torch.empty(2).double()
    running, sides = [torch.empty(4, 512) for _ in range(2)], [torch.empty(3, 512) for _ in range(2)]
    for kind in range(len(KINDS)):
        clip_loss_statistics(dots, scale, *running, *positives(kind, 512, 512, dtype))
        clip_loss_gradients(dots, scale, *sides, sums, *positives(kind, 512, 512, dtype))


def siglip_loss(dtype):
    from mmlm_kernels.siglip_loss import siglip_loss_pairs

    dots, one, sums = torch.empty(512, 528, dtype=dtype)[:, :512], torch.empty(()), torch.empty(3).double()
    for kind in range(len(KINDS)):
        for gradients in (True, False) if kind == 0 else (True,):
            siglip_loss_pairs(dots, one, one, gradients, sums, *positives(kind, 512, 512, dtype))


def linear_cross_entropy(dtype):
    from mmlm_kernels.linear_cross_entropy import linear_cross_entropy_fwd

    x, weight, bias = (torch.empty(n, dtype=dtype) for n in ((256, 128), (32000, 128), (32000,)))
    y, ignored, one = torch.zeros(256, dtype=torch.int64), torch.zeros(256, dtype=torch.bool), torch.empty(())
    for tf32 in (False, True) if dtype == torch.float32 else (False,):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        plain, all_options = [1.0, 0.0, 0.0, 0.0], [1.0, 30.0, 0.1, 1e-4]
        linear_cross_entropy_fwd(x, weight, None, y, ignored, None, one, plain, [True] * 3, 2**30)
        linear_cross_entropy_fwd(x, weight, bias, y, ignored, one.expand(256), one, all_options, [True] * 3, 2**30)
        linear_cross_entropy_fwd(x, weight, bias, y, ignored, None, one, plain, [False] * 3, 2**30)


MEMORY_BOUND = [
    add_norm,
    clip_loss,
    formed,
    gated_add,
    glu,
    merge_embeddings,
    norm_pixel_shuffle,
    patch_embed,
    qk_norm_rope,
    siglip_loss,
]
CASES = [
    add_norm,
    clip_loss,
    concat_linear,
    formed,
    fuse_modalities,
    gated_add,
    glu,
    interval_attention,
    linear_cross_entropy,
    merge_embeddings,
    norm_pixel_shuffle,
    patch_embed,
    qk_norm_rope,
    siglip_loss,
]


class OfCases:
    """An op for which nothing is written here: what is timed of it, forward and backward, at its tiny sizes."""

    def __init__(self, op: str) -> None:
        self.__name__ = op

    def __call__(self, dtype):
        from mmlm_benchmarks.ops import examples
        from mmlm_fast.ops import paths

        paths._switch.path = paths.KERNEL  # `forced` asks for a device or the interpreter
        try:
            for example in examples(self.__name__):
                call, floats = example.of_floats(dtype)
                outs = pytree.tree_leaves(call(*(x.requires_grad_() for x in floats)))
                torch.autograd.grad(outs, floats, outs, allow_unused=True)
        finally:
            paths._switch.path = None

    def source(self) -> str:
        text = (TESTS.parent / f"benchmarks/ops/{self.__name__}.py").read_text()
        return f"{text}\nimport mmlm_kernels.{self.__name__}"


NAMED = {case.__name__ for case in CASES}
CASES += [OfCases(p.stem) for p in sorted((TESTS.parent / "benchmarks/ops").glob("[a-z]*.py")) if p.stem not in NAMED]


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(re.search(rf"{key}:(\d+)", text).group(1)) for key in ("REG", "STACK", "LOCAL")}


def row_of(name: str, kernel) -> list:
    """Name, registers, stack, spilled bytes, shared memory, warps, kinds of instructions."""
    used, ptx = resources(kernel.asm["cubin"]), kernel.asm["ptx"]
    kinds = " ".join(kind for kind in KINDS_OF_INSTRUCTIONS if kind in ptx)
    memory = kernel.metadata.shared
    return [name, used["REG"], used["STACK"], used["LOCAL"], memory, kernel.metadata.num_warps, kinds]


def compile_op(case, every: bool) -> tuple[list[list], list[str]]:
    """Rows of what compiled, and messages of what did not."""
    global label
    rows, failed, launch = {}, {}, JITFunction.run

    def compile_instead(self, *args, grid, warmup, **kwargs):
        name = f"{label} {self.__name__}"
        try:
            kernel = launch(self, *args, grid=grid, warmup=True, enable_fp_fusion=True, **kwargs)
        except Exception as error:  # of any kind: the others are compiled all the same
            while error.__cause__ is not None:
                error = error.__cause__
            blocks = {key: value for key, value in kwargs.items() if key.startswith("BLOCK") or key in ("M", "N")}
            failed[f"{name} {blocks}: {str(error).strip().splitlines()[-1][:200]}"] = None
        else:
            if kernel.hash not in rows:
                rows[kernel.hash] = row_of(name, kernel)

    JITFunction.run = compile_instead
    try:
        for dtype in DTYPES:
            if dtype != torch.bfloat16 and not every and case in MEMORY_BOUND:
                continue  # one kernel for all: what is loaded and stored differs
            label = f"{case.__name__} {str(dtype).removeprefix('torch.')}"
            try:
                case(dtype, every=True) if every and case is interval_attention else case(dtype)
            except Exception as error:  # of a launcher
                failed[f"{label}: {error!r}"] = None
    finally:
        JITFunction.run = launch
    return list(rows.values()), list(failed)


# ---- what determines an op's binaries ------------------------------------------------------------------------------


def _kernel_modules(name: str, seen: set[str]) -> set[str]:
    """Files of kernels/ that a text imports, and those that they import."""
    for module in re.findall(r"mmlm_kernels[.\s]+(?:import\s+)?(\w+)", name):
        if module not in seen:
            seen.add(module)
            _kernel_modules((TESTS.parent / "kernels" / f"{module}.py").read_text(), seen)
    return seen


def _case_source(thing, seen: set[str]) -> str:
    """A case, and what of this file it uses."""
    source = inspect.getsource(thing)
    for name in sorted(set(re.findall(r"\w+", source)) & set(globals()) - seen - {"label"}):
        seen.add(name)
        value = globals()[name]
        if isinstance(value, types.FunctionType):
            source += _case_source(value, seen)
        elif not isinstance(value, types.ModuleType):
            source += f"{name} = {value!r}\n"
    return source


def fingerprint(case, every: bool) -> str:
    source = case.source() if isinstance(case, OfCases) else _case_source(case, set())
    digest = hashlib.sha256(f"{triton.__version__} {every} {KINDS_OF_INSTRUCTIONS}\n{source}".encode())
    for module in sorted(_kernel_modules(source, set())):
        digest.update((TESTS.parent / "kernels" / f"{module}.py").read_bytes())
    return digest.hexdigest()[:16]


def table_path(arch: int, every: bool) -> Path:
    return TABLES / f"triton-{triton.__version__}-sm_{arch}{'-all' if every else ''}.json"


def write_table(path: Path, ops: dict) -> None:
    """One line a kernel, so that a change reads as one."""
    path.parent.mkdir(exist_ok=True)
    lines = []
    for name, op in sorted(ops.items()):
        rows = ",\n".join(f"  {json.dumps(row)}" for row in op["kernels"])
        lines.append(f'"{name}": {{"fingerprint": "{op["fingerprint"]}", "kernels": [\n{rows}\n]}}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> int:
    arch, options = int(sys.argv[1]), sys.argv[2:]
    every, use_table, write = (option in options for option in ("all", "--table", "--write"))
    wanted = [option for option in options if option != "all" and not option.startswith("-")]
    triton.runtime.driver.set_active(NoGpu(arch))
    start, path = time.perf_counter(), table_path(arch, every)
    table = json.loads(path.read_text()) if path.exists() and (use_table or write) else {}
    failures, compiled, total, ops = [], 0, 0, dict(table) if write and wanted else {}
    print(f"{'sm_' + str(arch):<72}{'regs':>5}{'stack':>6}{'spill':>6}{'shared':>8}{'warps':>6}  instructions")
    for case in CASES:
        name, key = case.__name__, fingerprint(case, every)
        if wanted and name not in wanted:
            continue
        known = table[name]["kernels"] if use_table and table.get(name, {}).get("fingerprint") == key else None
        rows, failed = compile_op(case, every) if known is None or name == CHECKED else (known, [])
        compiled += len(rows) if rows is not known else 0
        if known is not None and rows != known and json.loads(json.dumps(rows)) != known:
            failed = [*failed, f"{name}: {path.name} does not give what is compiled here; make it anew with --write"]
        ops[name] = {"fingerprint": key, "kernels": rows}
        total += len(rows)
        failures += failed
        for row in rows:
            bad = row[2] > 0 or row[3] > 0 or row[4] > SHARED_MEMORY_LIMIT_KIB[arch] * 1024
            failures += [f"{row[0]}: over a limit"] * bad
            print("{:<72}{:>5}{:>6}{:>6}{:>8}{:>6}  {}".format(*row), "FAIL" if bad else "", flush=True)
    seconds = time.perf_counter() - start
    print(
        f"{total} binaries, {compiled} compiled, {len(failures)} failures, {seconds:.0f} s, triton {triton.__version__}"
    )
    print("\n".join(failures))
    if write and not failures:
        write_table(path, ops)
    return int(bool(failures) or not total)


if __name__ == "__main__":
    sys.exit(main())
