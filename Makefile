# Everything sets itself up: a virtual environment of its own, pinned by constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NATIVE := CMakeLists.txt $(shell find src/bitstrata/kernels/cpu/native -name '*.cpp' -o -name '*.h')

# The packages of the build are pinned as well. pip reads the first of these for them up to version 25.2, the second from then on.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
# A user's `pip install` goes on without the kernels when they cannot be built; here that is an error, unless there is no compiler at all.
export BITSTRATA_REQUIRE_NATIVE ?= $(if $(shell command -v $(CXX)),1,0)

.PHONY: demo test test-slow test-browser test-eval test-clients test-exchange test-vllm fuzz speed gpu-report check lint types format docs wheel wheels sanitize cross clean

demo: $(READY)  ## the main job on the bundled model, offline
	$(BIN)/bitstrata demo

# A process for each core; a file's tests stay together because they share what they set up.
PYTEST := $(BIN)/python -m pytest -q
PARALLEL := --numprocesses=logical --dist=loadfile

test: $(READY)  ## the test suite: the same cases at every run
	$(PYTEST) $(PARALLEL)

test-slow: $(READY)  ## what takes long: the README's commands, more architectures, kills at every moment
	$(PYTEST) $(PARALLEL) -m slow

test-browser: $(READY)  ## the playground in Chromium
	$(PYTEST) -m browser

test-eval: $(READY)  ## tasks of lm-evaluation-harness, in an environment on top of this one
	@reason=$$(PYTHON="$(PYTHON)" tools/environment_on_top.sh $(VENV)-eval $(VENV) "lm-eval[hf]"); code=$$?; \
	if [ $$code = 3 ]; then echo "test-eval is skipped: $$reason"; exit 0; fi; [ $$code = 0 ] && \
	HF_HUB_OFFLINE=1 $(VENV)-eval/bin/python -m pytest -q -m lm_eval tests/evaluation

CLIENTS := openai anthropic litellm langchain-openai "lm-eval[api]"
test-clients: $(READY)  ## the clients that people use, against `bitstrata serve`, in an environment on top of this one
	@reason=$$(PYTHON="$(PYTHON)" tools/environment_on_top.sh $(VENV)-clients $(VENV) $(CLIENTS)); code=$$?; \
	if [ $$code = 3 ]; then echo "test-clients is skipped: $$reason"; exit 0; fi; [ $$code = 0 ] && \
	HF_HUB_OFFLINE=1 $(VENV)-clients/bin/python -m pytest -q -m clients tests/clients

PEERS := gguf llama-cpp-python
test-exchange: $(READY)  ## exported GGUF files in llama.cpp, which is compiled, in an environment on top of this one
	@reason=$$(PYTHON="$(PYTHON)" tools/environment_on_top.sh $(VENV)-exchange $(VENV) $(PEERS)); code=$$?; \
	if [ $$code = 3 ]; then echo "test-exchange is skipped: $$reason"; exit 0; fi; [ $$code = 0 ] && \
	HF_HUB_OFFLINE=1 $(VENV)-exchange/bin/python -m pytest -q tests/exchange/test_llama_cpp.py

# vLLM needs another torch and transformers than we test with otherwise, hence an environment of its own.
test-vllm: $(READY)  ## the vLLM plugin, over HTTP: servers with one worker and with two
	@reason=$$(PYTHON="$(PYTHON)" tools/vllm_environment.sh $(VENV)-vllm); code=$$?; \
	if [ $$code = 3 ]; then echo "test-vllm is skipped: $$reason"; exit 0; fi; [ $$code = 0 ] && \
	$(VENV)-vllm/bin/python -m pytest -q -m vllm tests/integrations

speed: $(READY)  ## one shape against the bandwidth of memory; nothing else should run meanwhile
	$(PYTEST) -m speed

fuzz: SEED := $(or $(TEST_SEED),$(shell date +%s))
fuzz: $(READY)  ## other random cases and more of them, of a new seed or of TEST_SEED
	@echo "TEST_SEED=$(SEED)"
	TEST_SEED=$(SEED) $(PYTEST) $(PARALLEL) -m "(random or fuzz) and not speed" --hypothesis-seed=$(SEED)

# No environment is made: the machine has torch for CUDA and Triton, and this takes its Python.
gpu-report:  ## all that a GPU is asked, in eight minutes at most: build/gpu-report.json
	$(PYTHON) benchmarks/gpu_report.py

check: $(READY)  ## what must be clean before a commit: .pre-commit-config.yaml, on all files
	VENV="$(VENV)" PRE_COMMIT_HOME="$(abspath $(VENV))/pre-commit" $(BIN)/pre-commit run --all-files

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## the site in build/site; a page, link or anchor that is not there is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

wheel: $(READY)  ## build dist/bitstrata-*.whl
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .

sanitize: $(READY)  ## the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
	rm -rf build/sanitize
	CXX="$(CXX)" $(BIN)/python -m pip install --quiet --no-deps --target build/sanitize \
	  --config-settings cmake.define.BITSTRATA_SANITIZE=ON --config-settings install.strip=false .
	$(SANITIZED) -c "from bitstrata.kernels.cpu import _native; print(_native.__file__)" | grep /build/sanitize/
	$(SANITIZED) -m pytest -q --capture=sys tests/kernels

# PYTHONPATH comes before the editable install. The sanitizers must be the first libraries of the process, and need the C++ library there to
# follow exceptions. Python never frees everything, hence no leak reports; --capture=sys lets a report out of the dying process.
SANITIZED = PYTHONPATH="$(CURDIR)/build/sanitize" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  LD_PRELOAD="$(foreach library,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(library).so))" $(BIN)/python

# -I: the build's environment hides this one's packages from its own Python.
cross: $(READY)  ## build the extension for 64-bit Arm, and run its kernels in an emulated processor
	$(BIN)/python -c "import ziglang, unicorn" 2> /dev/null || $(BIN)/python -m pip install --quiet --editable ".[cross]"
	rm -rf build/cross
	mkdir -p build/cross
	CXX="$(abspath $(BIN))/python -I -m ziglang c++ -target aarch64-linux-gnu" BITSTRATA_REQUIRE_NATIVE=1 \
	  ZIG_GLOBAL_CACHE_DIR="$(CURDIR)/build/zig" ZIG_LOCAL_CACHE_DIR="$(CURDIR)/build/zig" \
	  $(BIN)/python -m pip install --verbose --no-deps --target build/cross \
	  --config-settings cmake.define.CMAKE_SYSTEM_NAME=Linux --config-settings cmake.define.CMAKE_SYSTEM_PROCESSOR=aarch64 \
	  --config-settings cmake.define.BITSTRATA_NEON_FLAGS=-mcpu=generic+v8_2a+dotprod+fullfp16 \
	  . > build/cross/log.txt 2>&1 || (tail -n 60 build/cross/log.txt; exit 1)
	grep -E "warning:|bitstrata: .* kernels" build/cross/log.txt
	grep -q "bitstrata: neon kernels" build/cross/log.txt
	$(BIN)/python tools/neon/emulate.py

# A release's are made on machines of each platform (docs/guides/installing.md).
PYTHONS ?= python3.11 python3.12
wheels: $(READY)  ## wheels for Linux, on x86-64 and 64-bit Arm, with glibc of 2018: dist/
	$(BIN)/python -c "import ziglang, abi3audit" 2> /dev/null || $(BIN)/python -m pip install --quiet --editable ".[cross]"
	rm -rf dist
	tools/wheels.sh $(VENV) $(PYTHONS)

$(READY): pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) $(VENV)-vllm $(VENV)-eval $(VENV)-clients $(VENV)-exchange dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f src/bitstrata/kernels/cpu/_native.*.so
