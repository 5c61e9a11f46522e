# Every target sets up what it needs: Python 3.11+, make and a package registry are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
# faiss has one build for CUDA machines and one for the others.
FAISS := $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)
# Python compiles what it imports; compiling all that is installed costs more.
PIP_INSTALL := $(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint requirements.lock
export PATH := $(BIN):$(PATH)
# Without its caches every process compiles its libraries anew: 21 s instead of 9 until a worker of jobs/embed.py begins.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo serve test test-all coverage lint format lock bench-distill bench-train bench-encode bench-embed-job bench-serve bench-evaluate bench-mine bench-mine-scale bench-exact-search bench-gpu-lists bench-corpus bench-overheads faults churn clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.demo ## compress and distil multilingual-e5-small, 4-bit, on a local Ray cluster: artifacts/demo/
	cluster/local.sh python jobs/distill.py

serve: $(VENV)/.serve | artifacts/demo/student ## the full and the compressed model on http://127.0.0.1:8000, until Ctrl-C
	cluster/local.sh serve run cluster/serve.yaml

artifacts/demo/student:
	$(MAKE) demo

# Jobs on clusters in this process and below it run two at a time; what starts a cluster by itself has the machine alone.
test: $(VENV)/.dev ## the tests
	$(BIN)/python -m pytest $(SLOW) $(COVERAGE) -m "not ray" --numprocesses=2 --dist=loadscope
	$(BIN)/python -m pytest $(SLOW) $(COVERAGE) -m ray --numprocesses=2 --dist=loadfile tests/jobs
	$(BIN)/python -m pytest $(SLOW) $(COVERAGE) -m ray tests/cluster tests/serve

test-all: SLOW := --run-slow
test-all: test ## the tests, slow ones included; make faults and make churn are apart

coverage: COVERAGE := --cov --cov-append --cov-report=
coverage: test ## the tests, and which lines and branches they pass through
	$(BIN)/coverage report --skip-covered

lint: $(VENV)/.dev ## formatting, lint, types and the floors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## put the code in form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-distill: $(VENV)/.dev ## embedlib's training step against sentence-transformers' trainer
	$(BIN)/python benchmarks/distill.py $(BENCH)

bench-train: $(VENV)/.dev ## embedlib's contrastive step against sentence-transformers' trainer
	$(BIN)/python -m benchmarks.train $(BENCH)

bench-encode: $(VENV)/.dev ## embedlib's encoder against SentenceTransformer.encode and a 4-bit engine
	$(BIN)/python benchmarks/encode.py $(BENCH)

bench-embed-job: $(VENV)/.dev ## the embedding job against its bare encoder, and its memory by rows
	$(BIN)/python benchmarks/embed_job.py $(BENCH)

bench-serve: $(VENV)/.dev | artifacts/demo/student ## the endpoint against other servers of the same model
	$(BIN)/python -m benchmarks.serve --student artifacts/demo/student $(BENCH)

bench-evaluate: $(VENV)/.dev ## scoring a model against mteb, task by task
	$(BIN)/python -m benchmarks.evaluate $(BENCH)

bench-mine: $(VENV)/.dev ## mining against sentence-transformers' miner
	$(BIN)/python -m benchmarks.mine $(BENCH)

bench-mine-scale: $(VENV)/.dev ## mining a large corpus: memory under two settings, time a query by rows
	$(BIN)/python -m benchmarks.mine_scale $(BENCH)

bench-exact-search: $(VENV)/.dev ## exact search on a GPU against FAISS's
	$(BIN)/python -m benchmarks.exact_search $(BENCH)

bench-gpu-lists: $(VENV)/.dev ## inverted lists on a GPU against CPUs and exact search
	$(BIN)/python -m benchmarks.gpu_lists $(BENCH)

bench-corpus: $(VENV)/.dev ## building a corpus: rows counted, time and memory by rows, polars, groupby
	$(BIN)/python -m benchmarks.corpus $(BENCH)

bench-overheads: $(VENV)/.dev ## what Ray asks for itself by the number of workers, and what that leaves of many GPUs
	$(BIN)/python -m benchmarks.overheads $(BENCH)

# For a report of all pairs of job and fault, more than twice each: make faults FAULTS="--trials 100 --seed 0 -n 2".
FAULTS ?= --trials 20
faults: $(VENV)/.dev ## kill workers, nodes, GCS and drivers, fill disks, cut links: artifacts/faults.json
	$(BIN)/python -m pytest tests/faults --report artifacts/faults.json $(FAULTS)

churn: $(VENV)/.dev ## a whole recipe on three nodes, of which one is killed and one joins every 30 s
	$(BIN)/python -m pytest --run-slow tests/faults/test_churn.py

lock: $(VENV)/.dev ## write the versions in use to requirements.lock
	$(BIN)/pip freeze --exclude-editable --disable-pip-version-check | sed -E 's/^(torch==[^+]+)\+.*/\1/' > requirements.lock

clean: ## remove the virtual environment and what jobs made
	rm -rf $(VENV) artifacts

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python requirements.lock pyproject.toml
	$(PIP_INSTALL) --editable ".[$(FAISS),demo]"
	@touch $@

$(VENV)/.serve: $(VENV)/bin/python requirements.lock pyproject.toml
	$(PIP_INSTALL) --editable ".[$(FAISS),openvino,serve]"
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python requirements.lock pyproject.toml
	$(PIP_INSTALL) --editable ".[$(FAISS),demo,dev]"
	@touch $@
