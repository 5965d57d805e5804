# Set-up needs Python 3.11 or newer, nothing else; `make help` lists the targets.
# The environment lives in .venv; it is installed again only when pyproject.toml or constraints.txt changes.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/medfl-ray
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check --no-input install -c constraints.txt
PACKAGES := medfl_ray actors serve tune

.DEFAULT_GOAL := help
.PHONY: help install demo test coverage test-ci test-long lint orthanc prometheus format ci reference docs wheel lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed-dev ## Make .venv and install the project with its development tools

demo: $(VENV)/.installed-dev ## Run the main job on synthetic data (under 5 minutes on 2 cores) and write a report
	$(RUN) run configs/demo.yaml

# Two processes, each with tests that lie beside each other, so that what a file prepares is prepared once.
SIDE_BY_SIDE := -n 2 --dist worksteal

test: $(VENV)/.installed-dev ## Run the tests, slow ones apart
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

coverage: $(VENV)/.installed-dev ## Run the same tests and check how much of the code they reach
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) --cov --cov-report=term:skip-covered

test-ci: $(VENV)/.installed-dev ## Run the slow tests: kills, planted bugs, real processes
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "ci and not long"

test-long: $(VENV)/.installed-dev ## Run the tests of minutes each, before a release: make ci has no time for them
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m long

lint: $(VENV)/.installed-dev ## Check style, types and the directions of import
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES)
	$(BIN)/lint-imports

orthanc: ## Install the PACS of the tests, as root on Debian or Ubuntu; its test is skipped where this cannot be
	@command -v Orthanc /usr/sbin/Orthanc >/dev/null && test -n "$$(ls /usr/lib/orthanc/libOrthancDicomWeb.so* 2>/dev/null)" || \
		{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
		  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends orthanc orthanc-dicomweb >/dev/null; } || \
		echo "make: Orthanc cannot be installed here; tests/serve/test_orthanc.py is skipped" >&2

# The package starts a server on all addresses, which nobody has asked for: the tests start their own on loopback.
prometheus: ## Install Prometheus for the tests, as root on Debian or Ubuntu; they are skipped where this cannot be
	@command -v prometheus >/dev/null && command -v promtool >/dev/null || \
		{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
		  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus >/dev/null && \
		  { service prometheus stop; systemctl disable --quiet prometheus; true; } >/dev/null 2>&1; } || \
		echo "make: Prometheus cannot be installed here; the tests that load our configuration into it are skipped" >&2

format: $(VENV)/.installed-dev ## Format the code and repair what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ci: lint coverage test-ci ## Everything that must pass: lint, the tests with their coverage, the slow tests

reference: $(VENV)/.installed-dev ## Write docs/reference/ from the configuration's schema and the commands
	$(BIN)/python docs/gen_reference.py

docs: $(VENV)/.installed-docs reference ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

wheel: $(VENV)/.installed-dev ## Build the wheel that clusters and images install, into dist/
	rm -f dist/medfl_ray-*.whl
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-deps -w dist .

lock: $(VENV)/.installed-docs ## Write constraints.txt from the installed environment
	{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | \
	  awk '/^#| @ / { next } { sub(/\+[a-z0-9.]+$$/, ""); print } sub(/^onnxruntime-gpu/, "onnxruntime")'; } > $(VENV)/constraints.new
	mv $(VENV)/constraints.new constraints.txt

clean: ## Remove the environment, caches and built pages; runs/ stays
	rm -rf $(VENV) site dist build htmlcov .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(PACKAGES) tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer was found; install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }

# The stamps lie inside .venv, so that removing the folder is enough to start afresh.
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@
