# make demo   install, then the whole pipeline on a generated dataset (two CPU cores, under ten minutes)
# make test   install, then the tests
# make lint   what CI checks besides

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/installed
	DATASET=shapes ./runners/0-setup.sh
	DATASET=shapes ./runners/1-csrm.sh
	DATASET=shapes ./runners/3-sam-refinement.sh
	DATASET=shapes ./runners/4-segmentation.sh

test: .venv/installed-dev
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# tarfile's data filter: 3.10.12, 3.11.4
.venv/bin/python:
	@$(PYTHON) -c "import sys, tarfile; sys.exit(sys.version_info < (3, 10) or not hasattr(tarfile, 'data_filter'))" 2>/dev/null || \
	  { echo "$(PYTHON): no Python 3.10.12, 3.11.4 or newer. Install one, and name it: export PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 2; }

.venv/installed: requirements.txt | .venv/bin/python
	runners/install.sh requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	runners/install.sh requirements-dev.txt
	touch $@

clean:
	rm -rf .venv experiments
