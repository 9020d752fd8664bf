# From a fresh clone: `make demo` generates text, `make test` runs every check. Both need python3 and make, nothing else.
# PYTHON chooses the interpreter that .venv is made with: make demo PYTHON=python3.12

VENV := .venv
BIN := $(VENV)/bin
PROMPT := Once upon a time

# The first Python on the PATH that Fledge supports; else python3, so that the message can name its version.
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$name -c '$(SUPPORTED)' 2>/dev/null && echo $$name && exit; done; echo python3)

# A stamp is touched when its step has succeeded, so a second `make` does nothing twice.
VENV_STAMP := $(VENV)/.made
INSTALLED := $(VENV)/.installed
DEVELOPING := $(VENV)/.developing
BROWSING := $(VENV)/.browsing
BIOME_STAMP := node_modules/.installed
NATIVE_TESTS := $(wildcard tests/*/test_native_*.py tests/*/test_rounding.py)
NATIVE := $(shell find native -type f)
CPP_FILES := $(filter %.cpp %.h,$(NATIVE))
TIDY_FLAGS := -std=gnu++20 -Inative -DFLEDGE_ISA=portable -DFLEDGE_TABLE=kernels_portable
SOURCES := pyproject.toml $(NATIVE) $(shell find fledge -type f -not -name '*.py[co]')

# Tests must run the code of this checkout, whatever import path the user has set.
unexport PYTHONPATH
unexport PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help demo test check docs fix bench native sanitize

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s%s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## install into .venv and generate text with the bundled model
	$(BIN)/fledge generate "$(PROMPT)" --top-p 0.6 --max-tokens 150

test: check $(BROWSING) ## install for development, check everything, run the tests
	$(BIN)/python -m pytest -n logical

check: $(DEVELOPING) $(BIOME_STAMP) ## formatting, lint and types, without changing a file
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --quiet
	$(call biome,ci --error-on-warnings)
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	@if [ -x $(BIN)/clang-tidy ]; then \
		echo "$(BIN)/clang-tidy (native)"; $(BIN)/clang-tidy --quiet $(filter %.cpp,$(CPP_FILES)) -- $(TIDY_FLAGS); \
	else \
		echo "clang-tidy is not installed: skipped ($(BIN)/pip install 'clang-tidy>=23.1,<23.2')"; \
	fi

docs: $(DEVELOPING) ## build the documentation site with the API reference into build/site
	$(BIN)/mkdocs build

fix: $(DEVELOPING) $(BIOME_STAMP) ## format the code and repair what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(call biome,check --write)
	$(BIN)/clang-format -i $(CPP_FILES)

bench: $(DEVELOPING) ## measure speed on this machine, other software beside it in the same run
	$(BIN)/fledge bench cpu --widths fp32,bf16,int8,int4

# Leak detection is off, because Python and torch intentionally keep memory until the process exits.
sanitize: $(DEVELOPING) ## run the native tests under the address and undefined-behavior sanitizers
	cmake -S native -B build/sanitize -DFLEDGE_SANITIZE=ON
	cmake --build build/sanitize --parallel
	@mkdir -p build/native && cp build/sanitize/libfledge_native.so build/native/
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		$(BIN)/python -m pytest -q -p no:cacheprovider $(NATIVE_TESTS); status=$$?; rm -rf build/native; exit $$status

$(VENV_STAMP):
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
		echo "Fledge needs Python 3.10 to 3.13, but \"$(PYTHON)\" is: $$($(PYTHON) --version 2>&1 | tail -n 1)"; \
		echo "Install a supported Python and name it: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12"; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu install the package python3-venv."; exit 1; }
	@touch $@

ifeq ($(wildcard $(DEVELOPING)),)
$(INSTALLED): $(VENV_STAMP) $(SOURCES)
	@echo "Installing fledge and what it needs into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check .
	@touch $@
else
# A development install runs from the working tree, so an edited source needs no new install.
$(INSTALLED): $(DEVELOPING)
	@touch $@
endif

# What `make native` has left would hide the library that is installed here.
$(DEVELOPING): $(VENV_STAMP) pyproject.toml $(NATIVE)
	@echo "Installing fledge for development into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@rm -rf build/native
	@touch $@

# Biome checks the JavaScript, CSS and HTML of the web pages. Without npm, or without access to its registry, the recipe
# creates no stamp and the check is skipped. The version is pinned in package.json.
$(BIOME_STAMP): package.json
	@if ! command -v npm >/dev/null; then exit 0; fi; \
		echo "Installing Biome into node_modules"; \
		npm install --silent --no-audit --no-fund --fetch-retries=1 && touch $@ || true

define biome
@if [ -e $(BIOME_STAMP) ]; then echo "node_modules/.bin/biome $(1)"; node_modules/.bin/biome $(1); else \
	echo "SKIPPED: biome (format and lint of the web pages): npm or its registry is not available"; fi
endef

# The chat page is tested in Chromium. Where none can be had, those tests are skipped and say so.
$(BROWSING): $(DEVELOPING)
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit; done; \
		echo "Installing a browser to test the chat page in"; \
		{ [ "$$(id -u)" = 0 ] && apt-get -qq update && apt-get -qq -y install chromium; } >/dev/null 2>&1 || \
		$(BIN)/python -m playwright install chromium >/dev/null 2>&1 || \
		echo "None could be had: the tests of the chat page will be skipped"
	@touch $@

native: ## build only the native library, for work on it: found in build/native until the next installation
	cmake -S native -B build/native
	cmake --build build/native --parallel
