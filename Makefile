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

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	runners/install.sh requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	runners/install.sh requirements-dev.txt
	touch $@

clean:
	rm -rf .venv experiments
