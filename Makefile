# Every target installs what it needs. Only `deploy` requires an AWS account. `make` without a target lists all targets.

# To use another interpreter: make PYTHON=python3.13 test
PYTHON ?= python3
UV ?= uv

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export SAM_CLI_TELEMETRY := 0
# Some shells and container images set this. Without bytecode, each process of the tests compiles 450 modules again, and
# each start of the SAM CLI or checkov compiles all that it imports: .venv-sam is installed without bytecode.
unexport PYTHONDONTWRITEBYTECODE

# A stamp's name contains a checksum of its inputs, so a changed lock file creates a new environment and an unchanged one
# does not, regardless of file times.
sum = $(shell cat $(1) 2>/dev/null | cksum | cut -d ' ' -f 1)
DEV_PACKAGES := .venv/packages-$(call sum,requirements-dev.txt)
DEV := .venv/ready-$(call sum,requirements-dev.txt pyproject.toml)
SAM := .venv-sam/ready-$(call sum,requirements-sam.txt)
# Other versions of Anthropic's SDKs, each in its own environment.
SDK1 := .venv-sdk1/ready-$(call sum,requirements-sdk1.txt)
NPM := $(shell command -v npm 2>/dev/null)
TYPESCRIPT := $(if $(NPM),$(foreach sdk,0 1,\
	tests/sdk/typescript-$(sdk)/node_modules/ready-$(call sum,tests/sdk/typescript-$(sdk)/package-lock.json)))

.DEFAULT_GOAL := help
.PHONY: help setup demo check lint types template security test unit integration acceptance record-calls simulate \
	coverage chaos bench-limits bench-backlog bench-lanes bench-neighbors build deploy local lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: $(DEV) ## install the development environment, with the `sluice` command in .venv/bin

demo: $(DEV) ## run the whole system on this machine: submit jobs, watch their progress, see the cost
	@.venv/bin/python -m scripts.demo

# Side by side: each of them uses one core.
check: $(DEV) $(SAM) ## lint, types and template, without running the code
	@$(MAKE) --no-print-directory --jobs lint types template security

lint: $(DEV)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: $(DEV)
	.venv/bin/mypy

# Linters cannot inspect what SAM expands (event source mappings, policies), so the expanded template is
# linted as well; tests/unit/test_template.py verifies what no linter checks.
template: $(DEV)
	@mkdir -p .aws-sam
	.venv/bin/python -m tests.expanded_template >.aws-sam/expanded.json
	.venv/bin/cfn-lint template.yaml .aws-sam/expanded.json

security: $(SAM)
	.venv-sam/bin/checkov --config-file .checkov.yaml --file template.yaml

# More processes than cores, because tests spend much of their time waiting. The tests of a file share a stack, and so a
# process. Files run in order: tests/conftest.py puts the longest ones first.
WORKERS_OF_TESTS ?= 4
IN_PARALLEL := --numprocesses $(WORKERS_OF_TESTS) --dist loadfile --no-loadscope-reorder

test: check $(SDK1) $(TYPESCRIPT) ## all checks and tests; CI runs the same
	.venv/bin/pytest $(IN_PARALLEL)

unit: $(DEV) ## test rules and use cases, with fakes
	.venv/bin/pytest --numprocesses auto --dist loadfile tests/unit

integration: $(DEV) ## test one integration point each, with the emulator and the simulator
	.venv/bin/pytest $(IN_PARALLEL) tests/integration

acceptance: $(DEV) $(SAM) $(SDK1) $(TYPESCRIPT) ## test the documented behavior, from outside
	.venv/bin/pytest $(IN_PARALLEL) tests/acceptance

record-calls: $(DEV) $(SAM) $(SDK1) $(TYPESCRIPT) ## record the AWS calls of each function, after a change to them
	.venv/bin/pytest $(IN_PARALLEL) tests/integration tests/acceptance --record-calls

SEEDS ?= 20000
FIRST_SEED ?= 1

simulate: $(DEV) ## run many seeded simulations: make simulate SEEDS=200000 FIRST_SEED=1
	.venv/bin/python -m tests.simulation --seeds $(SEEDS) --first-seed $(FIRST_SEED)

coverage: $(DEV) ## run the unit tests and measure the coverage of the domain
	.venv/bin/pytest tests/unit --cov

chaos: $(DEV) ## kill, restart, throttle and overload the local stack: about 15 minutes
	@calls=$$(mktemp -d) && SLUICE_RECORD_CALLS=$$calls .venv/bin/python -m bench.chaos && \
		.venv/bin/python -m tests.aws_calls $$calls

WORKERS ?= 4

bench-limits: $(DEV) ## compare Sluice, through both doors, with other clients: two hours
	.venv/bin/python -m bench.limits --workers $(WORKERS) --write docs/bench.md --svg docs/limits.svg

bench-backlog: $(DEV) ## simulate 100,000 jobs far above the limit, in virtual time: some minutes
	.venv/bin/python -m bench.limits.backlog

bench-lanes: $(DEV) ## play weeks of files with deadlines on both lanes, in virtual time: a minute or two
	.venv/bin/python -m bench.lanes

bench-neighbors: $(DEV) ## measure a quiet tenant beside attacks and accidents: about an hour
	.venv/bin/python -m bench.neighbors

build: $(SAM) ## build the Lambda packages in .aws-sam/build
	PYTHON=$(CURDIR)/.venv-sam/bin/python .venv-sam/bin/sam build

deploy: build ## deploy to AWS, with your credentials and samconfig.toml
	.venv-sam/bin/sam deploy

local: $(DEV) ## run the whole system on this machine until Ctrl-C
	@.venv/bin/sluice local up

# The layer's lock file is only for Lambda (arm64, Python 3.13): its markers must not depend on the machine that builds it.
lock: ## update the lock files from the .in files (requires uv)
	$(lock_one) --python-version 3.13 --python-platform aarch64-manylinux_2_28 --only-binary :all: \
		layers/sluice/requirements.in -o layers/sluice/requirements.txt
	$(lock_one) --python-version 3.11 --universal requirements-dev.in -o requirements-dev.txt
	$(lock_one) --python-version 3.11 --universal requirements-sdk1.in -o requirements-sdk1.txt
	$(lock_one) --python-version 3.11 --universal --override requirements-sam.overrides \
		requirements-sam.in -o requirements-sam.txt

lock_one = $(UV) pip compile --quiet --no-python-downloads --generate-hashes --no-emit-index-url \
	--no-header

clean: ## delete everything that these targets created
	rm -rf .venv .venv-sam .venv-sdk1 .venv-litellm tests/sdk/*/node_modules .aws-sam .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Environments. --clear removes packages that are no longer in the lock file.

define new_environment
@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
	"Sluice needs Python 3.11, 3.12 or 3.13; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.13" % v)'
@echo "Setting up $(1) (once per lock, about a minute)"
@$(PYTHON) -m venv --clear $(1)
endef

# --no-deps: the lock file is complete, and older versions of pip treat `coverage[toml]` as a separate package and
# reject its newest release, which has no hash here.
$(DEV_PACKAGES):
	$(call new_environment,.venv)
	@.venv/bin/python -m pip install --quiet --no-deps --require-hashes -r requirements-dev.txt
	@touch $@

$(DEV): $(DEV_PACKAGES)
	@.venv/bin/python -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@

# --no-deps: the lock file is complete, and deliberately violates one pin (requirements-sam.overrides gives the reason).
# --no-compile: half of the modules are never imported; Python compiles the others on import.
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
