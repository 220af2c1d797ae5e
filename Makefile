# make report   set up, run everything on real input, write report/index.html
# make test     set up, lint, run the tests
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
export MMLM_FAST_VENV := $(abspath $(VENV))
BIN    := $(MMLM_FAST_VENV)/bin
# -P: the checkout's folders must not shadow installed packages.
RUN    := $(BIN)/python -P -m
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu')

.PHONY: help env gpu-env gpu-env-test test-versions gpu-carry gpu-rehearsal report test lint format bench baseline aot-tables schemas arrows families sweep mutations wheel sanitize clean
help:
	@sed -n 's/^# make/make/p' Makefile; echo "more: lint format bench baseline aot-tables schemas arrows families sweep mutations wheel sanitize test-versions gpu-env gpu-env-test gpu-carry gpu-rehearsal clean"

env:
	@$(PYTHON) .ci/bootstrap.py

# .venv-gpu: the GPU machine's versions, with mmlm-fast as a wheel; no GPU needed. See .ci/versions.py.
gpu-env:
	@$(PYTHON) .ci/versions.py make gpu

# There: every kernel compiled for sm_90, then the tests that the GPU suite runs and those that depend on versions, on the CPU.
gpu-env-test:
	@$(PYTHON) .ci/versions.py test gpu $(if $(ARGS),-- $(ARGS))

# The oldest versions that pyproject.toml admits, the GPU machine's and the newest, one after the other: tests/versions.md.
test-versions:
	@$(PYTHON) .ci/versions.py test $(SETS) $(if $(ARGS),-- $(ARGS))

# .whl: what the GPU machine lacks and may be carried there: mmlm-fast's wheel, soundfile, Liger. See benchmarks/GPU.md.
gpu-carry: gpu-env
	@$(PYTHON) .ci/gpu_carry.py

# The GPU suite from end to end without a GPU, with an op that crashes, one that hangs, and a kill.
gpu-rehearsal: gpu-carry
	@PYTHONSAFEPATH=1 .venv-gpu/bin/python -P tests/support/gpu_rehearsal.py $(ARGS)

report: env
	@$(RUN) mmlm_fast.cli report $(ARGS)

# The whole suite runs in two processes, a file or class in one of them, without spinning threads that would keep the other's cores
# busy; what ARGS picks runs in one, as on a machine without pytest-xdist.
test: lint
	OMP_WAIT_POLICY=passive PYTHONSAFEPATH=1 $(RUN) pytest -q $(if $(ARGS),$(ARGS),-m "not slow" \
	  $$($(BIN)/python -c 'import importlib.util as u; print("-n 2 --dist loadscope --no-loadscope-reorder" if u.find_spec("xdist") else "")'))

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(RUN) mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The same cases under pytest-benchmark, grouped by op.
bench: env
	$(RUN) pytest benchmarks --benchmark-only --benchmark-group-by=group $(ARGS)

# benchmarks/results/baselines: what `mmlm-fast report --against` compares with on a machine like this one.
baseline: env
	$(RUN) mmlm_fast.cli report --out report/baseline --ops \
	  $$($(BIN)/python -P -c 'from mmlm_benchmarks.report.measure import JOBS; print(*[j for j in JOBS if j not in ("curves", "learning")])')
	$(RUN) mmlm_benchmarks.report.baseline report/baseline/results.json

# tests/aot_tables: registers and spills of every kernel under both Tritons, which the tests take for what has not changed.
aot-tables: env
	for arch in 80 90 100; do for triton in "" "$(MMLM_FAST_VENV)/triton-3.6"; do for all in "" all; do \
	  PYTHONPATH=$$triton $(BIN)/python -P tests/support/aot.py $$arch $$all --write >/dev/null || exit 1; done; done; done

# tests/schemas.txt: with the lines of new ops.
schemas: env
	$(BIN)/python -P tests/test_schemas.py

# What accelerate() replaces in each family of models, under this version of transformers: docs/families.json and its table.
families: env
	@PYTHONPATH=tests $(RUN) support.families --write

# The same of every model class of transformers, from its default configuration: docs/sweep. A quarter of an hour.
sweep: env
	@PYTHONPATH=tests $(RUN) support.sweep --write $(ARGS)

# What imports what, drawn from the imports: CONTRIBUTING holds it.
arrows: env
	@PYTHONPATH=tests $(RUN) support.arrows

# The code broken on purpose, one line of tests/mutations.toml at a time, each in a copy: what no test sees is reported.
mutations: env
	PYTHONPATH=tests $(RUN) support.mutations $(ARGS)

wheel: env
	$(BIN)/pip wheel --no-deps --no-build-isolation -w dist .

# The native core under AddressSanitizer and UndefinedBehaviorSanitizer, over the tests of audio, attention, glue and losses.
SANITIZED = tests/test_isas.py $(filter-out %_extractors.py %_files.py %_real_whisper.py %_robust.py,$(wildcard tests/test_audio_*.py)) \
  $(patsubst mmlm_fast/ops/%.py,tests/test_%.py,$(shell grep -l 'core()' mmlm_fast/ops/[a-z]*.py))
sanitize: env
	rm -rf build/sanitize && mkdir -p build/sanitize
	MMLM_FAST_CUDA=0 MMLM_FAST_WIDE=1 CXXFLAGS="-O1 -fexpensive-optimizations -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
	  LDFLAGS="-fsanitize=address,undefined" $(BIN)/python setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize/temp
	cp build/sanitize/mmlm_fast/_C*.so build/sanitize/_C.so
	MMLM_FAST_SANITIZED=$(abspath build/sanitize/_C.so) LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	  $(RUN) pytest -q $(SANITIZED) -m "not slow" -k "not fork and not compile and not kernel and not transients and not memory_of"

clean:
	rm -rf $(VENV) build dist report *.egg-info mmlm_fast/_C*.so
