# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt
BENCHMARKS := accuracy cohort_speed round_profile other_engines gpu_rounds fedfnn_convergence \
    fedfnn_sensitivity fedfnn_streaming fedfnn_cost hetefedrec_sizes fellrec_balance fellrec_split \
    scale faults attacks compression privacy reliability

.PHONY: demo test lint types unit smoke docs clean

demo: $(VENV)/.demo          ## install, then compare the methods on built-in data
	$(BIN)/python -m fedrecsk

test: lint types unit smoke  ## install with the development tools, then check everything

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev           # one torch thread a worker: small tensors are slower on many
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/pytest -n 2

smoke: $(VENV)/.dev          # every benchmark runs and writes its JSON; numbers mean nothing here
	@printf '%s\n' $(BENCHMARKS) | xargs -P 2 -I NAME sh -c ' \
	    OMP_NUM_THREADS=1 $(BIN)/python benchmarks/NAME.py --quick --out $(VENV)/NAME.json \
	        > $(VENV)/NAME.log 2>&1; \
	    code=$$?; echo "benchmarks/NAME.py --quick"; cat $(VENV)/NAME.log; exit $$code'

docs: $(VENV)/.dev           ## API reference as HTML in build/docs
	$(PIP) -e ".[docs]"
	$(BIN)/pdoc --docformat numpy --output-directory build/docs fedrecsk

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache

# torch first and pinned: a range would let pip replace it while it installs the rest.
$(VENV)/.torch: .ci/constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or later is needed; set PYTHON=')"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[dev]"
	@touch $@
