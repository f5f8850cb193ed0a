# The habits of this project. Every target sets up what it needs; nothing here needs an AWS account
# except `deploy`. `make` alone prints this list.

# Another interpreter is one word away: make PYTHON=python3.13 test
PYTHON ?= python3
UV ?= uv

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export SAM_CLI_TELEMETRY := 0

# A stamp's name holds a checksum of what it was made from, so a changed lock makes a new environment
# and an unchanged one costs nothing, whatever the clock or a checkout says.
sum = $(shell cat $(1) 2>/dev/null | cksum | cut -d ' ' -f 1)
DEV_PACKAGES := .venv/packages-$(call sum,requirements-dev.txt)
DEV := .venv/ready-$(call sum,requirements-dev.txt pyproject.toml)
SAM := .venv-sam/ready-$(call sum,requirements-sam.txt)
# Other generations of Anthropic's SDKs, each where it can have its own dependencies.
SDK1 := .venv-sdk1/ready-$(call sum,requirements-sdk1.txt)
NPM := $(shell command -v npm 2>/dev/null)
TYPESCRIPT := $(if $(NPM),$(foreach sdk,0 1,\
	tests/sdk/typescript-$(sdk)/node_modules/ready-$(call sum,tests/sdk/typescript-$(sdk)/package-lock.json)))

.DEFAULT_GOAL := help
.PHONY: help setup demo check lint types template test unit integration acceptance record-calls simulate \
	coverage chaos bench-limits bench-backlog build deploy local lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: $(DEV) ## the development environment, with the `sluice` command in .venv/bin

demo: $(DEV) ## the whole system on this machine: submit jobs, watch them run, see the bill
	@.venv/bin/python -m scripts.demo

check: lint types template ## everything that can be said without running the code

lint: $(DEV)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: $(DEV)
	.venv/bin/mypy

# Linters cannot look into what SAM expands (queue mappings, policies), so the expanded template is
# linted as well; what no linter knows about is asserted by tests.
template: $(DEV) $(SAM)
	.venv/bin/cfn-lint template.yaml
	@mkdir -p .aws-sam
	.venv/bin/python -m tests.expanded_template >.aws-sam/expanded.json
	.venv/bin/cfn-lint .aws-sam/expanded.json
	.venv-sam/bin/checkov --config-file .checkov.yaml --file template.yaml
	.venv/bin/pytest -q tests/unit/test_template.py tests/unit/test_floors.py

# More processes than cores: much of the time the tests wait. Those of one file share a stack, and so a process. Files go
# in order, because the long ones come first, and not those with the most tests.
WORKERS_OF_TESTS ?= 4
IN_PARALLEL := --numprocesses $(WORKERS_OF_TESTS) --dist loadfile --no-loadscope-reorder

test: check $(SDK1) $(TYPESCRIPT) ## check, then every test: the gate, here and in CI
	.venv/bin/pytest $(IN_PARALLEL)

unit: $(DEV) ## rules and use cases, on fakes
	.venv/bin/pytest tests/unit

integration: $(DEV) ## one seam each, on the emulator and the simulator
	.venv/bin/pytest tests/integration

acceptance: $(DEV) $(SAM) $(SDK1) $(TYPESCRIPT) ## what the README promises, from outside
	.venv/bin/pytest tests/acceptance

record-calls: $(DEV) $(SAM) $(SDK1) $(TYPESCRIPT) ## after a change of AWS calls: which ones functions make, for the tests to compare
	.venv/bin/pytest $(IN_PARALLEL) tests/integration tests/acceptance --record-calls

SEEDS ?= 20000
FIRST_SEED ?= 1

simulate: $(DEV) ## many more stories of the simulation: make simulate SEEDS=200000 FIRST_SEED=1
	.venv/bin/python -m tests.simulation --seeds $(SEEDS) --first-seed $(FIRST_SEED)

coverage: $(DEV) ## unit tests, with the domain's coverage
	.venv/bin/pytest tests/unit --cov

chaos: $(DEV) ## the local stack under kills, restarts, throttling and an outage: about a quarter of an hour
	@calls=$$(mktemp -d) && SLUICE_RECORD_CALLS=$$calls .venv/bin/python -m bench.chaos && \
		.venv/bin/python -m tests.aws_calls $$calls

WORKERS ?= 4

bench-limits: $(DEV) ## Sluice, through both doors, beside other clients: two hours
	.venv/bin/python -m bench.limits --workers $(WORKERS) --write docs/bench.md --svg docs/limits.svg

bench-backlog: $(DEV) ## 100,000 jobs far above the limit, on a virtual clock: some minutes
	.venv/bin/python -m bench.limits.backlog

build: $(SAM) ## what Lambda runs, in .aws-sam/build
	PYTHON=$(CURDIR)/.venv-sam/bin/python .venv-sam/bin/sam build

deploy: build ## into the AWS account your credentials name, as samconfig.toml says
	.venv-sam/bin/sam deploy

local: $(DEV) ## the whole system on this machine, until Ctrl-C
	@.venv/bin/sluice local up

# The layer's lock is for Lambda alone (arm64, Python 3.13): its markers must not depend on who builds.
lock: ## new locks from the .in files (needs uv)
	$(lock_one) --python-version 3.13 --python-platform aarch64-manylinux_2_28 --only-binary :all: \
		layers/sluice/requirements.in -o layers/sluice/requirements.txt
	$(lock_one) --python-version 3.11 --universal requirements-dev.in -o requirements-dev.txt
	$(lock_one) --python-version 3.11 --universal requirements-sdk1.in -o requirements-sdk1.txt
	$(lock_one) --python-version 3.11 --universal --override requirements-sam.overrides \
		requirements-sam.in -o requirements-sam.txt

lock_one = $(UV) pip compile --quiet --no-python-downloads --generate-hashes --no-emit-index-url \
	--no-header

clean: ## everything these targets made
	rm -rf .venv .venv-sam .venv-sdk1 .venv-litellm tests/sdk/*/node_modules .aws-sam .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Environments. --clear, because an environment that only ever grows hides a package the lock dropped.

define new_environment
@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
	"Sluice needs Python 3.11, 3.12 or 3.13; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.13" % v)'
@echo "Setting up $(1) (once per lock, about a minute)"
@$(PYTHON) -m venv --clear $(1)
endef

# --no-deps: the lock is complete, and older pips take `coverage[toml]` for a package of its own and
# refuse its newest release, which has no hash here.
$(DEV_PACKAGES):
	$(call new_environment,.venv)
	@.venv/bin/python -m pip install --quiet --no-deps --require-hashes -r requirements-dev.txt
	@touch $@

$(DEV): $(DEV_PACKAGES)
	@.venv/bin/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

# --no-deps: the lock is complete, and knowingly breaks one pin (requirements-sam.overrides says why).
# --no-compile: half of it is never imported; what is, Python compiles when it is.
$(SAM):
	$(call new_environment,.venv-sam)
	@.venv-sam/bin/python -m pip install --quiet --no-deps --no-compile --require-hashes \
		-r requirements-sam.txt
	@touch $@

$(SDK1):
	$(call new_environment,.venv-sdk1)
	@.venv-sdk1/bin/python -m pip install --quiet --no-deps --require-hashes -r requirements-sdk1.txt
	@touch $@

$(TYPESCRIPT):
	@cd $(dir $(patsubst %/,%,$(dir $@))) && npm ci --silent --ignore-scripts --no-audit --no-fund
	@touch $@
