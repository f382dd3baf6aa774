# `make quickstart` and `make test` need Python >= 3.11, git and make; each sets up .venv and a second call reuses it.

VENV ?= .venv
# Extras to install beside what a target needs, for example EXTRAS=gpu or EXTRAS=tpu.
EXTRAS ?=
# Test processes: XLA compiles most of a small program on one core.
WORKERS ?= 2
# Arguments passed on: `make test ARGS="-k mla"`, `make quickstart ARGS="--steps 50"`.
ARGS ?=
# Of `make r1-demo`.
SEED ?= 0

install = @sh scripts/venv.sh $(VENV)

.PHONY: help quickstart r1-demo test lint format notebooks goldens studies
help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

quickstart: ## train a small DeepSeek-V3 on Python's own standard library, from nothing
	$(install) "$(EXTRAS)"
	$(VENV)/bin/deepseek-jax train configs/quickstart.py --run-dir runs/quickstart $(ARGS)

r1-demo: ## R1-Zero's claim in minutes on a CPU, from nothing: make r1-demo SEED=0
	$(install) "$(EXTRAS)"
	JAX_PLATFORMS=cpu $(VENV)/bin/python experiments/r1_zero_small/run.py --seed $(SEED)

test: ## run the tests, on the CPU unless JAX_PLATFORMS says otherwise
	$(install) "test,$(EXTRAS)"
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: ## check style and types
	$(install) "dev,$(EXTRAS)"
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: ## rewrite the sources in the project's style
	$(install) "dev,$(EXTRAS)"
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

notebooks: ## run every notebook from top to bottom
	$(install) "dev,$(EXTRAS)"
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(VENV)/bin/python -m pytest --nbmake --nbmake-timeout 600 -W default notebooks $(ARGS)

studies: ## more cases of some tests, and the experiments again: over an hour; their results are committed
	$(install) "test,$(EXTRAS)"
	$(VENV)/bin/python experiments/published_schedules/run.py
	JAX_PLATFORMS=cpu $(VENV)/bin/python experiments/costs/run.py
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m study
	DEEPSEEK_JAX_KILLS=20 $(VENV)/bin/python -m pytest tests/test_checkpoint_damage.py -k killed
	$(VENV)/bin/python experiments/kill_points/run.py
	$(VENV)/bin/python experiments/pretraining_small/run.py
	JAX_PLATFORMS=cpu $(VENV)/bin/python experiments/r1_zero_small/run.py --study
	JAX_PLATFORMS=cpu $(VENV)/bin/python experiments/hosts/run.py
	JAX_PLATFORMS=cpu $(VENV)/bin/python experiments/mesh_equality/run.py

goldens: ## make tests/golden anew from transformers
	$(install) "parity,$(EXTRAS)"
	$(VENV)/bin/python tests/golden/make_goldens.py
