# Every target works on a fresh machine with Python 3.11 or 3.12 (with venv), git and make.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
RUN := $(BIN)/python -m cv_platform.cli
UV_VERSION := 0.13.9

.PHONY: help setup demo test run up down status check format lock schema bench prove-cifar

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: .venv/.ready ## Install everything into .venv (done by the others when needed).

.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in {(3, 11), (3, 12)} else f"Expected Python 3.11 or 3.12. Received: {v[0]}.{v[1]}. Install one, or name it: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip sync --quiet --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

demo: setup ## Digits from data to served predictions and a drift report on shifted images; ends.
	@$(RUN) demo

test: setup ## Run all the tests.
	$(BIN)/python -m pytest

run: setup ## One config, one command: make run CONFIG=configs/digits.yaml
	@test -n "$(CONFIG)" || { echo "Expected CONFIG=configs/….yaml. Received: nothing."; exit 2; }
	@$(RUN) run $(CONFIG)

up: setup ## Start Dagster 3001, MLflow 5050, Evidently 8000 and the service 4242, and stay.
	@$(RUN) up

down: setup ## Stop what `make up` started.
	@$(RUN) down

status: setup ## Show the processes of `make up`.
	@$(RUN) status

check: setup ## ruff, pyright, import-linter, deptry, generated files.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(RUN) schema | diff configs/schema.json -
	$(BIN)/dagster definitions validate -w workspace.yaml

format: setup ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: setup ## Write configs/schema.json anew.
	$(RUN) schema --write configs/schema.json

lock: setup ## Compile requirements.lock anew (needs the network).
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
	  --no-header --group dev pyproject.toml -o requirements.lock

bench: setup ## Benchmarks against the original's way; each prints ratios.
	$(BIN)/python -m benchmarks

prove-cifar: setup ## The same graph on CIFAR images: make prove-cifar ARCHIVE=cifar10.tar.gz
	@test -n "$(ARCHIVE)" || { echo "Expected ARCHIVE=a .tar.gz of CIFAR-10 images. Received: nothing."; exit 2; }
	$(BIN)/python -m benchmarks.prove_cifar $(ARCHIVE)
