# `make demo` and `make test` need nothing before them: both make .venv/ first, once.
.DEFAULT_GOAL := help
.PHONY: help setup environment demo test bench check clean

unexport PYTHONPATH
python := .venv/bin/python
pip    := $(python) -m pip --disable-pip-version-check install -qq --no-input --no-deps
torch   = $(shell sed -n 's/^torch==/torch==/p' requirements/cpu.txt)

# The first Python that will do and can make environments (Debian: package python3-venv).
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	2>/dev/null && echo $$p && break; done)

# .venv/.complete is written last: where the environment stands, and what it was made from.
stamp = printf '%s\n' "$(CURDIR)" "$$(cat requirements/cpu.txt pyproject.toml | sha256sum)"
fresh = $(python) -c '' 2>/dev/null && $(stamp) | cmp -s - .venv/.complete

help:   ## this list
	@sed -n 's/^\([a-z%-]*\):.*## /  make \1	/p' Makefile

setup:  ## make .venv/ from requirements/cpu.txt, or bring it up to date
	@{ $(fresh); } || $(MAKE) --no-print-directory environment

# A finished environment of another lock is brought up to date; anything else (interrupted, moved,
# its Python gone) is made anew.
environment:
	@test ! -L .venv || { echo ".venv is a link: its own environment would be overwritten; remove it"; exit 1; }
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 with its venv module is needed"; exit 1; }
	@if $(python) -m pip --version >/dev/null 2>&1 && grep -qsxF "$(CURDIR)" .venv/.complete; \
	then echo "setup: bringing .venv/ up to date"; rm .venv/.complete; \
	else echo "setup: new .venv/ by $(PYTHON)"; $(PYTHON) -m venv --clear .venv; fi
	@echo "setup: $(torch)"
	@$(pip) '$(torch)' 2>/dev/null || $(pip) '$(torch)' --index-url https://download.pytorch.org/whl/cpu
	@echo "setup: the other packages of requirements/cpu.txt (4 GB on disk, some minutes)"
	@$(pip) -r requirements/cpu.txt
	@$(pip) --no-build-isolation -e .
	@$(stamp) > .venv/.complete
	@echo "setup: done"

demo: setup  ## the whole pipeline on the embedded model, into runs/demo
	$(python) pavlov.py demo --out runs/demo

test: setup  ## the tests (those marked slow: pytest -m slow)
	$(python) -m pytest

prove-%: setup  ## the long proofs of an area (foundation, reward, algorithms, sft, labelling, serving), resumable; writes docs/proofs/
	$(python) -m tests.proofs.$*

bench: setup  ## speed, as ratios: benchmarks/ (after make demo, whose models are served)
	$(python) -m benchmarks.packing
	$(python) -m benchmarks.serving

check: setup  ## lint, format and types
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

clean:  ## remove .venv/, caches and build leftovers; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
