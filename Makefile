# Set-up, training, tests. `make` alone lists the targets.
#   PYTHON=python3.12 make train      another interpreter (3.10 or newer)
#   make train ARGS="seed=1"          more arguments for the command
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
MANI_SKILL := $(shell sed -n 's/^\(mani_skill==[^ ;]*\).*/\1/p' constraints.txt)
PIP := $(BIN)/python -m pip
export PIP_DISABLE_PIP_VERSION_CHECK := 1
MAKEFLAGS += --no-print-directory

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev train test lint clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

setup: $(VENV)/base.stamp $(VENV)/render.stamp ## create .venv with all a run needs

setup-dev: $(VENV)/dev.stamp $(VENV)/render.stamp ## the same with what tests and lint need

train: setup ## finetune with CrossQ; ARGS="key=value ..." changes the run
	@$(BIN)/python -m embodied_rl.train algorithm.q_head_type=crossq $(ARGS)

# Three processes, a file of tests to each at a time: most tests are a thread that waits for others.
# With STATUS_FILE pytest's own exit status goes there, and its last line stays the last.
test: setup-dev ## run the tests; ARGS="-m unit" selects
	@$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)$(if $(STATUS_FILE),; echo $$? > $(STATUS_FILE))

lint: setup-dev ## ruff and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

clean: ## remove .venv and caches, never runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "PYTHON=$(PYTHON) is not an interpreter on this machine; embodied_rl needs Python 3.10 or newer." >&2; \
	  echo "Install one, or name one: PYTHON=python3.12 make $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1) ($$(command -v $(PYTHON))); embodied_rl needs Python 3.10 or newer." >&2; \
	  echo "Name a newer one: PYTHON=python3.12 make $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  package=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "+ apt-get install $$package"; apt-get update -q; \
	    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $$package; \
	  else \
	    echo "$(PYTHON) cannot create virtual environments: its venv module is not installed. Run:" >&2; \
	    echo "  sudo apt-get update && sudo apt-get install $$package" >&2; exit 1; \
	  fi; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# torch first: it is the largest, and the environment may choose its index (PIP_EXTRA_INDEX_URL).
# Python 3.13 has no wheel of mplib, which ManiSkill requires for its examples alone.
$(VENV)/base.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "== installing $(TORCH) and embodied_rl into $(VENV): some minutes, once"
	@$(PIP) install $(TORCH)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 13))' \
	  || exit 0; $(PIP) install --no-deps $(MANI_SKILL)
	@$(PIP) install -e '.[vla]' -c constraints.txt
	@touch $@

$(VENV)/dev.stamp: $(VENV)/base.stamp
	@$(PIP) install -e '.[dev,vla]' -c constraints.txt
	@touch $@

# A missing driver is told, not fatal here: only what needs the simulator fails, and says so.
$(VENV)/render.stamp: | $(VENV)/base.stamp
	@if $(BIN)/python -m embodied_rl.doctor --fix; then touch $@; else \
	  echo "== going on; whatever needs the missing rows above will fail" >&2; fi
