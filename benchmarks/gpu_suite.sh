#!/usr/bin/env bash
# On a machine with a GPU: build, run the tests that need it, then the benchmarks, within ten minutes.
#   OUT=folder bash benchmarks/gpu_suite.sh              log, results.json and report into $OUT
#   OUT=folder bash benchmarks/gpu_suite.sh profile OP   Nsight Compute on one op's cases
# To keep a result: copy $OUT/report/results.json to benchmarks/results/<gpu>-<date>.json and commit it.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_out}
mkdir -p "$OUT"
python3 .ci/bootstrap.py >"$OUT/setup.log" 2>&1 || { tail -n 30 "$OUT/setup.log"; exit 1; }
RUN=".venv/bin/python -P -m"
if [ "${1:-}" = profile ]; then
  ncu --set full --target-processes all -o "$OUT/$2" -f $RUN mmlm_fast.cli report --ops "$2" --seconds 0.05 --quiet --out "$OUT/profile"
  exit
fi
$RUN mmlm_fast.cli doctor | tee "$OUT/doctor.txt"
status=0
# Kernel tests run on the device there, not in the interpreter; the slow and ahead-of-time ones are not about the GPU.
timeout 240 $RUN pytest -q -m "not slow and not aot" tests/test_interval_attention.py tests/test_concat_linear.py tests/test_fuse_modalities.py tests/test_add_norm.py tests/test_glu.py tests/test_gated_add.py tests/test_qk_norm_rope.py tests/test_merge_embeddings.py tests/test_norm_pixel_shuffle.py tests/test_patch_embed.py tests/test_linear_cross_entropy.py tests/test_clip_loss.py tests/test_siglip_loss.py tests/test_audio_log_mel.py tests/test_audio_cuda.py tests/test_models.py 2>&1 | tee "$OUT/tests.log" | tail -n 30
[ "${PIPESTATUS[0]}" -eq 0 ] || status=1
timeout 300 $RUN mmlm_fast.cli report --device cuda --ops interval_attention linear_cross_entropy clip_loss siglip_loss add_norm glu gated_add qk_norm_rope merge_embeddings norm_pixel_shuffle patch_embed log_mel concat_linear fuse_modalities model --out "$OUT/report" 2>&1 | tee "$OUT/report.log" | tail -n 20
[ "${PIPESTATUS[0]}" -eq 0 ] || status=1
exit $status
