# make demo   set up, then the whole pipeline on made-up cells (H5AD=file.h5ad LABELS=cell_type for your own)
# make perturbation-demo   the same on a made-up perturbation screen whose true effects are known
# make test   set up, then every test that needs neither a GPU nor, marked slow, a machine of its own
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOB ?= jobs/demo.yaml
SETTINGS ?=

# uv does not read pip's variables; hand it what the user gave to pip (spaces there, commas here).
comma := ,
empty :=
space := $(empty) $(empty)
ifdef PIP_FIND_LINKS
UV_ENV += UV_FIND_LINKS="$(subst $(space),$(comma),$(strip $(PIP_FIND_LINKS)))"
endif
ifdef PIP_INDEX_URL
UV_ENV += UV_DEFAULT_INDEX="$(or $(UV_DEFAULT_INDEX),$(PIP_INDEX_URL))"
endif

ifdef H5AD
# Your own cells: a pipeline named after the file, so that several live side by side.
NAME ?= $(shell basename "$(H5AD)" .h5ad | tr -c 'A-Za-z0-9._\n-' '-')
JOB := jobs/demo_h5ad.yaml
SETTINGS += name='$(NAME)' 'ingest.source={type: h5ad, path: "$(abspath $(H5AD))"}'
endif
ifdef LABELS
SETTINGS += 'ingest.labels=[$(LABELS)]'
endif

# Packages are compiled as they are installed: where PYTHONDONTWRITEBYTECODE is set, as in many images, every process would
# compile all that it imports, a training worker's start two and a half times as long (benchmarks/worker_start.py).
.PHONY: venv demo perturbation-demo test lint ui docs wheel chaos soak fuzz audit quality gpu clean
venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
	  { echo "the pins of constraints.txt are for Python 3.11 or 3.12, and $(PYTHON) is not;" \
	    "say which with: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	@# The name of this distribution up to 0.2, and upstream's: both ship a package of the name `scldm`.
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip uninstall --quiet scldm && rm -rf scldm.egg-info
	$(UV_ENV) VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: venv
	$(BIN)/scldm run $(JOB) $(SETTINGS)

perturbation-demo: venv
	$(BIN)/scldm run jobs/perturbation_demo.yaml

# Two sides at the same time: tests that start processes of their own, which wait as long as they compute, and all others.
# The output of the former comes when both have ended. A side without any test (5), as with PYTEST_ARGS=FILE, is no failure.
PROCESSES := multiprocess or integration or chaos
test: venv
	@mkdir -p build; trap 'kill $$other; exit 130' INT TERM; \
	$(BIN)/python -m pytest -m "($(PROCESSES)) and not gpu and not slow" $(PYTEST_ARGS) > build/test_processes.txt 2>&1 & other=$$!; \
	$(BIN)/python -m pytest -m "not ($(PROCESSES)) and not gpu and not slow" $(PYTEST_ARGS); code=$$?; \
	wait $$other; second=$$?; cat build/test_processes.txt; \
	[ $$code -ne 5 ] || [ $$second -eq 5 ] || code=0; [ $$second -eq 0 ] || [ $$second -eq 5 ] || code=$$second; exit $$code

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: venv
	$(BIN)/mlflow ui --backend-store-uri sqlite:///$(or $(OUTPUT),runs)/mlflow.db --host 127.0.0.1 --port $(or $(PORT),5000)

# The pages need the model's own libraries, for its docstrings; Sphinx is added to the same environment.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build
	@echo docs/_build/index.html

$(VENV)/.docs: $(VENV)/.installed
	$(UV_ENV) VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode --constraint constraints.txt --editable '.[docs]'
	@touch $@

# Built, then installed in an environment of its own and asked to work.
wheel: venv
	rm -rf dist
	$(UV_ENV) $(BIN)/uv build --quiet --wheel --python $(BIN)/python --out-dir dist
	$(BIN)/python -m pytest -m slow tests/unit/repository/test_wheel.py $(PYTEST_ARGS)

# Every row of the fault matrix, then its table; TABLE=docs/reliability.md writes it there.
RECORDS ?= build/chaos
chaos: venv
	rm -rf "$(RECORDS)"
	code=0; SCLDM_RECORDS="$(abspath $(RECORDS))" $(BIN)/python -m pytest -m "(chaos or row) and not gpu" $(PYTEST_ARGS) \
	  || code=$$?; $(BIN)/python tests/chaos/matrix.py "$(RECORDS)" $(if $(TABLE),--write $(TABLE)); exit $$code

# Training under a random killer and an MLflow that comes and goes; the seed is printed, SEED=7 takes one.
soak: venv
	$(BIN)/python tests/chaos/soak.py --minutes $(or $(MINUTES),30) $(if $(SEED),--seed $(SEED)) --json build/soak.json

# Coverage-guided, of what reads strangers' files (tests/fuzz); the fuzzer is added to the same environment. Linux.
fuzz: $(VENV)/.fuzz
	$(BIN)/python tests/fuzz/fuzz.py all --minutes $(or $(MINUTES),10) --out $(or $(OUT),.fuzz)

$(VENV)/.fuzz: $(VENV)/.installed
	$(UV_ENV) VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode --constraint constraints.txt --editable '.[fuzz]'
	@touch $@

# Known holes of the pinned versions. Without a network it says that it was skipped, and is no failure.
audit: $(VENV)/.audit
	$(BIN)/python tests/audit.py constraints.txt

$(VENV)/.audit: $(VENV)/.installed
	$(UV_ENV) VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode --constraint constraints.txt --editable '.[audit]'
	@touch $@

# scVI wants other versions of numpy and torch than we do: an environment of its own, used by this target alone.
quality: venv .venv-scvi/.installed
	$(BIN)/python benchmarks/quality.py --json benchmarks/results/quality.json

.venv-scvi/.installed: benchmarks/scvi_requirements.txt
	$(PYTHON) -m venv .venv-scvi
	$(UV_ENV) VIRTUAL_ENV=.venv-scvi $(BIN)/uv pip install --quiet --requirement benchmarks/scvi_requirements.txt
	@touch $@

# Everything that a machine with GPUs must confirm or measure, into benchmarks/results/gpu.json; REHEARSE=1: tiny, on the CPU.
gpu: venv
	$(BIN)/python benchmarks/gpu_bench.py --minutes $(or $(MINUTES),12) $(if $(REHEARSE),--rehearse)

clean:
	rm -rf $(VENV) build dist *.egg-info
