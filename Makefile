.DEFAULT_GOAL := help
.PHONY: help install run up down test test-fast lint bench results clean
PYTHON ?= python3
BIN := .venv/bin
# Commands that DVC starts find `fedcoe` on the PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
STAMP := .venv/.installed
# Three processes on two cores, each with whole files of tests: much of a test is waiting for servers.
PARALLEL := -n 3 --dist loadfile --no-loadscope-reorder
COMPARISONS = $(filter-out attack privacy,$(patsubst results/%/cells,%,$(wildcard results/*/cells)))

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

install: $(STAMP)  ## Make .venv with the tested versions

run: install  ## Fetch the data and reproduce the whole pipeline
	fedcoe fetch
	dvc repro
	@echo "report: reports/index.html"

up: install  ## Start Prefect, MLflow, workers and deployments
	fedcoe up

down: install  ## Stop what `make up` started
	fedcoe down

test: install  ## The whole test suite
	python -m pytest $(PARALLEL)

test-fast: install  ## Tests that take seconds
	python -m pytest $(PARALLEL) -m 'not slow and not browser'

lint: install  ## Formatting, rules, types; known vulnerabilities of dependencies
	ruff format --check .
	ruff check .
	mypy
	python .ci/audit.py

bench: install  ## Measure speed and memory (docs/performance.md); not a test
	python benchmarks/sequential_loop.py
	python benchmarks/method_cost.py
	python benchmarks/scaling.py
	python benchmarks/overhead.py
	test ! -d models || python benchmarks/serving.py

results: install  ## Draw all tables and figures of results/ again from their cells
	for name in $(COMPARISONS); do fedcoe compare --render $$name > /dev/null || exit 1; done
	python benchmarks/attack.py --seeds
	python benchmarks/privacy.py --seeds
	python benchmarks/headline.py

clean:  ## Remove what runs produce; the data stays
	test ! -f .fedcoe/services.json || fedcoe down
	rm -rf models partitions metrics plots reports .fedcoe
