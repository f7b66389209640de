# make help lists the targets. Variables, each optional:
#   ARGS='...'     handed to the demo or to pytest       PYTHON=python3.12   which Python
#   TORCH='...'    install this torch (torch==2.13.0)    FORCE_CUDA=1, FORCE_CPU=1
PYTHON ?= python3
VENV ?= .venv

python := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean always

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile

demo: $(VENV)/built  ## train four workers on real text: GMC beside three other methods
	@$(python) benchmarks/train.py $(ARGS)

test: $(VENV)/built  ## run the tests
	@$(python) -m pytest $(ARGS)

lint: $(VENV)/lint  ## check style: ruff, clang-format
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | \
	    xargs $(VENV)/bin/clang-format --dry-run -Werror

clean:  ## remove what was made here: the environment, the build
	@rm -rf $(VENV) build dist *.egg-info tests/*/build gmc_cuda/*.so gmc_cuda/_build_config.json
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@rm -rf .pytest_cache .hypothesis .ruff_cache

# The environment. Each step leaves a stamp, so that it is taken once.
$(VENV)/created:
	@echo 'Making $(VENV)'
	@'$(PYTHON)' make_venv.py create '$(VENV)' --torch '$(TORCH)'
	@touch $@

installed_torch := $(shell cat $(VENV)/packages 2>/dev/null)
$(VENV)/packages: $(VENV)/created pyproject.toml \
    $(if $(TORCH),$(if $(filter-out $(installed_torch),$(TORCH)),always))
	@$(python) make_venv.py fill demo test --torch '$(or $(TORCH),$(installed_torch))'
	@echo '$(or $(TORCH),$(installed_torch))' > $@

$(VENV)/lint: $(VENV)/created pyproject.toml
	@$(python) make_venv.py fill lint
	@touch $@

# The extension, in place: again when a source or an option changed, or when another environment
# has built it since (the record is then newer than the stamp).
sources := setup.py $(wildcard tools/*.py) $(shell find csrc -type f)
record := gmc_cuda/_build_config.json
options := $(strip $(foreach name,FORCE_CUDA FORCE_CPU TORCH_CUDA_ARCH_LIST CUDA_HOME,$(name)=$($(name))))
built_options := $(shell cat $(VENV)/built 2>/dev/null)
$(VENV)/built: $(VENV)/packages $(sources) $(or $(wildcard $(record)),always) \
    $(if $(filter-out x$(subst $() ,,$(built_options)),x$(subst $() ,,$(options))),always)
	@echo 'Building the extension (the first time takes a minute or more)'
	@$(python) -m pip install --quiet --quiet --no-build-isolation --no-deps --editable .
	@$(python) -c 'import json; print(json.load(open("$(record)"))["summary"])'
	@echo '$(options)' > $@

# Results go to RESULTS (default benchmarks/results). Both run to the end and say what was left out.
results := $(or $(RESULTS),benchmarks/results)
.PHONY: bench gpu
bench: $(VENV)/built  ## time the ops and the whole step on this machine's GPU or CPU
	@$(python) benchmarks/kernels.py --quick --output '$(results)' $(ARGS)
	@$(python) benchmarks/step.py --quick --output '$(results)' $(ARGS)

gpu:  ## on a machine with a GPU: build, tests, sanitizers, benchmarks, NCCL; RESULTS=folder
	@'$(PYTHON)' benchmarks/gpu.py --python '$(abspath $(python))' --results '$(results)' \
	    --build '$(MAKE) --no-print-directory $(VENV)/built'

# The wheel serves one version of Python and every torch from 2.11 on. Its tests install it into
# new environments. WITH='torch==2.12.0 installed' says with which torch (installed: this
# environment's), SHORT=1 runs the main tests with the oldest and with the installed one.
.PHONY: wheel test-wheel
wheel: $(VENV)/packages  ## build the wheel into dist/
	@rm -rf build/lib.* dist/*.whl  # what is in there would come along, renamed since or not
	@$(python) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

test-wheel: wheel  ## test the installed wheel with the oldest torch, with 2.13.0 and the newest
	@$(python) tools/test_wheel.py dist/*.whl $(if $(WITH),--torch $(foreach torch,$(WITH),'$(torch)')) $(if $(SHORT),--short) \
	    $(ARGS)
