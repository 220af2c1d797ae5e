"""Names and limits of everything the suite runs, in the order of its value. Imports nothing that could be broken."""

from pathlib import Path

STAGES = ("probe", "check", "time", "tests", "candidates", "inspect")
# Stage -> seconds of the stage, and of one job in it (None: the stage's). What a stage leaves the next ones have; they
# sum to more than there is, as not all of them need theirs.
LIMITS: dict[str, tuple[float, float | None]] = {
    "probe": (60, None),
    "check": (125, 100),
    "time": (170, 120),
    "tests": (125, None),
    "candidates": (60, 30),
    "inspect": (60, None),
}

# Attention has a job for each head size: every size, dtype and grouping is a compilation of seconds.
CHECKS = (
    "attention_128", "attention_64", "attention_256", "attention_80", "attention_72", "attention_88", "attention_96",
    "attention_104", "attention_192", "attention_decode", "attention_decode_wide", "attention_dead", "attention_full",
    "linear_cross_entropy", "clip_loss", "siglip_loss", "merge_embeddings", "qk_norm_rope", "add_norm", "glu",
    "concat_linear", "fuse_modalities", "gated_add", "norm_pixel_shuffle", "patch_embed",
)  # fmt: skip
SYSTEMS = ("audio", "decoding", "language_model", "thin_model")

# Job -> module of its cases, how many of them compile their eager formula, and its seconds, without waiting.
TIMES: dict[str, tuple[str, int, float]] = {
    "interval_attention": ("ops.interval_attention", 99, 110.0),
    "linear_cross_entropy": ("ops.linear_cross_entropy", 1, 25.0),
    "qk_norm_rope": ("ops.qk_norm_rope", 2, 12.0),
    "glu": ("ops.glu", 2, 12.0),
    "add_norm": ("ops.add_norm", 2, 10.0),
    "merge_embeddings": ("ops.merge_embeddings", 2, 12.0),
    "clip_loss": ("ops.clip_loss", 1, 15.0),
    "log_mel": ("audio.log_mel", 0, 10.0),
    "siglip_loss": ("ops.siglip_loss", 1, 15.0),
    "norm_pixel_shuffle": ("ops.norm_pixel_shuffle", 2, 8.0),
    "patch_embed": ("ops.patch_embed", 2, 8.0),
    "gated_add": ("ops.gated_add", 0, 6.0),
    "concat_linear": ("ops.concat_linear", 2, 10.0),
    "fuse_modalities": ("ops.fuse_modalities", 2, 14.0),
}

TEST_FILES = (
    "interval_attention", "linear_cross_entropy", "clip_loss", "siglip_loss", "merge_embeddings", "qk_norm_rope",
    "add_norm", "glu", "gated_add", "concat_linear", "fuse_modalities", "norm_pixel_shuffle", "patch_embed",
    "formed_gradients", "audio_cuda", "audio_log_mel", "models",
)  # fmt: skip

# Ops of which nothing is said above: their cases are checked, timed and tested like all others, last.
OPS = sorted(p.stem for p in (Path(__file__).parents[1] / "ops").glob("[a-z]*.py"))
CHECKS = (*CHECKS, *(op for op in OPS if op not in TEST_FILES))
TIMES |= {op: (f"ops.{op}", 1, 10.0) for op in OPS if op not in TIMES}
TEST_FILES = (*TEST_FILES, *(op for op in OPS if op not in TEST_FILES))

# Attention's kernels and head sizes whose rows of tile tables are tried.
KERNELS = ("fwd", "dkv", "dq")
CANDIDATES = tuple(f"{kernel}_{size}" for size in (128, 256, 64, 80) for kernel in KERNELS)
