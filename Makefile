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

.PHONY: help env report test lint format bench peers wheel sanitize clean
help:
	@sed -n 's/^# make/make/p' Makefile; echo "more: lint format bench peers wheel sanitize clean"

env:
	@$(PYTHON) .ci/bootstrap.py

report: env
	@$(RUN) mmlm_fast.cli report $(ARGS)

test: lint
	$(RUN) pytest -q $(if $(ARGS),$(ARGS),-m "not slow")

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

# What the audio benchmarks compare with. torchaudio's wheel does not load beside another torch until its binaries
# are out of the way; its transforms are plain torch and lose nothing.
peers: env
	$(BIN)/pip install -c constraints.txt librosa kaldi-native-fbank scipy openai-whisper
	$(BIN)/pip install --no-deps torchaudio
	$(BIN)/python -c "import torchaudio" 2>/dev/null || for f in $$(find $(MMLM_FAST_VENV)/lib -path '*torchaudio/lib/*.so'); do mv $$f $$f.off; done

wheel: env
	$(BIN)/pip wheel --no-deps --no-build-isolation -w dist .

# The native core under AddressSanitizer and UndefinedBehaviorSanitizer, over the audio tests.
sanitize: env
	rm -rf build/sanitize && mkdir -p build/sanitize
	MMLM_FAST_CUDA=0 CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -g" LDFLAGS="-fsanitize=address,undefined" \
	  $(BIN)/python setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize/temp
	cp build/sanitize/mmlm_fast/_C*.so build/sanitize/_C.so
	MMLM_FAST_SANITIZED=$(abspath build/sanitize/_C.so) LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  $(RUN) pytest -q tests/test_audio_log_mel.py tests/test_audio_whisper.py -k "not fork"

clean:
	rm -rf $(VENV) build dist report *.egg-info mmlm_fast/_C*.so
