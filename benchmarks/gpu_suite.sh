#!/usr/bin/env bash
# On a machine with a GPU, within eight minutes: does everything run there, how fast, what must be mended.
#   OUT=folder bash benchmarks/gpu_suite.sh                      all stages; facts in $OUT/facts.jsonl as they are known
#   OUT=folder bash benchmarks/gpu_suite.sh --stages check --ops glu        some of them (--help lists the options)
#   OUT=folder bash benchmarks/gpu_suite.sh profile OP           Nsight Compute on four launches of one op
# Nothing is set up there: `make gpu-carry` has put what the machine lacks into .whl/. See benchmarks/GPU.md.
set -uo pipefail
cd "$(dirname "$0")/.."
digest() { find "$@" -type f ! -name '*.so' ! -path '*/__pycache__/*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1; }
if [ "${1:-}" = digest ]; then # of what the native core is built from, and of all that is run
  digest csrc setup.py
  digest csrc setup.py kernels mmlm_fast benchmarks
  exit
fi
if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
  sed -n '2,6s/^# //p' "$0"
  echo "--stages STAGE…  of probe check time tests candidates inspect    --ops OP…   --checks OP… (of check alone)   --seconds N (470)   --width N (12)"
  echo "--tests WORDS (pytest's -k)   --cases WORDS (regular expression, of time alone)   --job-seconds N   PYTHON=… names the Python to take (python3)"
  exit
fi
OUT=$(realpath -m "${OUT:-gpu_out}")
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
export MMLM_GPU_START=${MMLM_GPU_START:-$(date +%s.%N)}
export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} CUBLAS_WORKSPACE_CONFIG=:4096:8 HF_HUB_OFFLINE=1
WORK=$(mktemp -d)
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$WORK/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$WORK/inductor}
# The commit is carried: that machine may have no git, or one that knows an older commit. It is told apart where the tree
# has changed since.
if [ -z "${MMLM_COMMIT:-}" ]; then
  if [ "$(digest csrc setup.py kernels mmlm_fast benchmarks)" = "$(cat .whl/tree.sha256 2>/dev/null)" ]; then
    MMLM_COMMIT=$(cat .whl/commit)
  else
    MMLM_COMMIT=$(git describe --always --dirty --exclude='*' 2>/dev/null || echo "$(cat .whl/commit 2>/dev/null || echo unknown)-changed")
  fi
fi
export MMLM_COMMIT

# The package: its native core from the carried wheel, its Python from this tree, which may be newer.
site=$WORK/site
mkdir -p "$site"
for wheel in .whl/*.whl; do # one by one: a peer that does not install must not cost the native core
  [ -e "$wheel" ] || continue
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --target "$site" "$wheel" >>"$OUT/build.log" 2>&1 || echo "does not install here: $wheel"
done
for pair in mmlm_fast:mmlm_fast kernels:mmlm_kernels benchmarks:mmlm_benchmarks; do
  mkdir -p "$site/${pair#*:}"
  (cd "${pair%%:*}" && tar cf - --exclude='*.so' --exclude=__pycache__ .) | tar xf - -C "$site/${pair#*:}"
done
export PYTHONPATH=$site
if [ "$(cat .whl/csrc.sha256 2>/dev/null)" != "$(digest csrc setup.py)" ] || ! "$PYTHON" -c 'import mmlm_fast._C' 2>>"$OUT/build.log"; then
  echo "the native core is not the carried one: building it for this card"
  MMLM_FAST_CUDA_ARCHS=${MMLM_FAST_CUDA_ARCHS:-90} timeout 90 "$PYTHON" setup.py -q build_ext --build-lib "$WORK/lib" --build-temp "$WORK/build" \
    >>"$OUT/build.log" 2>&1 && cp "$WORK"/lib/mmlm_fast/_C*.so "$site/mmlm_fast/" || tail -n 5 "$OUT/build.log"
fi

if [ "${1:-}" = profile ]; then
  set -- --stages inspect --ops "${2:?usage: gpu_suite.sh profile OP}"
fi
"$PYTHON" -P -m mmlm_benchmarks.gpu.suite --out "$OUT" --logs "$WORK/logs" "$@" 2>&1 | tee "$OUT/suite.log"
status=${PIPESTATUS[0]}
# Few files, with plain names: what comes back from a lent machine is counted. The ends of bad jobs' logs are facts.
tar czf "$OUT/logs.tar.gz" -C "$WORK" logs 2>/dev/null
rm -rf "$WORK"
exit "$status"
