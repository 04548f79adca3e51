# make help lists the targets. Every target builds the environment first if need be.
# Where pip finds no "+cpu" build of torch by itself, name an index that has one:
#   make env TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PYTHON ?=
PYTEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# One worker per core the tests may use, two at most: every worker runs a vLLM engine.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); [ "$$n" -ge 2 ] && echo 2 || echo 0)

.DEFAULT_GOAL := help
.PHONY: help env test demo lint docs package lowest sbom bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@sed -n '2,3s/^# //p' $(firstword $(MAKEFILE_LIST))

env: $(STAMP) ## build .venv with vLLM for CPU and the development tools (once)

$(STAMP): pyproject.toml constraints-cpu.txt
	@rm -f $@
	@set -eu; \
	python=""; \
	for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$$candidate"; break; fi; \
	done; \
	[ -n "$$python" ] || { echo "make env: no Python 3.11 or newer found; name one with PYTHON=..." >&2; exit 1; }; \
	[ -x $(BIN)/python ] || "$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[cpu,dev,docs]' --constraint constraints-cpu.txt \
	    $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	    || { echo "make env: pip failed; if it found no torch +cpu, set TORCH_INDEX (see make help)" >&2; exit 1; }
	@# Not needed for text models, and what pip picks need not match the +cpu build of torch.
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/python patches/name_vllm.py
	@touch $@

test: $(STAMP) ## run the tests, PYTEST_ARGS="-k words" for some, "--exhaustive" to compile every model
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

demo: $(STAMP) ## serve the bundled model with 25 % of its experts in fast memory
	$(BIN)/python examples/demo.py

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP) ## build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

package: ## build wheel and sdist twice, compare, install each in empty environments (build/package)
	.ci/package

lowest: ## run the tests that need no vLLM with the oldest versions that pyproject.toml admits
	.ci/lowest

sbom: ## what the package needs, as CycloneDX JSON (build/sbom.json)
	rm -rf build/sbom && python3 -m venv build/sbom/env && python3 -m venv build/sbom/tools
	build/sbom/env/bin/python -m pip install --quiet .
	build/sbom/tools/bin/python -m pip install --quiet 'cyclonedx-bom>=5'
	build/sbom/tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	    --output-format JSON --output-file build/sbom.json build/sbom/env/bin/python

bench: $(STAMP) ## compare with plain vLLM on a widened model (needs an idle machine)
	$(BIN)/python benchmarks/decode.py $(BENCH_ARGS)

clean: ## remove the environment and caches
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
