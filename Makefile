# make help lists the targets. Variables, each optional:
#   ARGS='...'     handed to the demo or to pytest       PYTHON=python3.12   which Python
#   TORCH='...'    install this torch (torch==2.13.0)    FORCE_CUDA=1, FORCE_CPU=1
PYTHON ?= python3
VENV ?= .venv

python := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all soak lint docs build bench convergence network scaling gpu wheel test-wheel clean always

##@ Use it
help:  ## list the targets
	@sed -n 's/^##@ /\n/p; s/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

demo: $(VENV)/demo.installed build  ## train four workers on real text: GMC beside three other methods
	@$(python) -m examples.demo $(ARGS)

build: $(VENV)/build.installed  ## compile in place what has changed
	@$(python) setup.py -q build_ext --inplace

##@ Test it
# Without ARGS, two tests run at a time where pytest-xdist is there; -x, -s and --pdb want one.
pytest = $(python) -m pytest $(if $(ARGS),,$$($(python) -c 'import xdist' 2> /dev/null && \
    echo '--numprocesses=2 --dist=worksteal'))
for_tests := $(VENV)/demo.installed $(VENV)/test.installed $(VENV)/speed.tried

test: $(for_tests) build  ## run the tests, except those marked slow
	@$(pytest) -m 'not slow' $(ARGS)

test-all: $(VENV)/frameworks.installed $(if $(ARGS),$(for_tests) build,test)  ## run all tests, also those of the frameworks and of kernels under sanitizers
	@$(pytest) $(if $(ARGS),,-m slow) $(ARGS)

soak: $(for_tests) build  ## a long training run with faults, kills and resumes, checked at every step
	@PYTHONPATH=tests $(python) -m soak $(ARGS)

lint: $(VENV)/build.installed $(VENV)/lint.installed  ## check style and types: ruff, clang-format, mypy
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | \
	    xargs $(VENV)/bin/clang-format --dry-run -Werror
	@$(python) -m mypy

# Of pages that did not change Sphinx repeats no warning: hence -E.
docs: $(VENV)/docs.installed build  ## build the documentation as a site into build/docs; warnings are errors
	@$(python) -m sphinx -q -E -W --keep-going -c docs . build/docs
	@echo 'build/docs/index.html'

##@ Measure it
# Results go to RESULTS (default benchmarks/results). Both run to the end and say what was left out.
results := $(or $(RESULTS),benchmarks/results)
bench: $(VENV)/demo.installed build  ## time the ops and the whole step on this machine's GPU or CPU
	@$(python) -m benchmarks.ops.kernels --quick --output '$(results)' $(ARGS)
	@$(python) -m benchmarks.ops.step --quick --output '$(results)' $(ARGS)
	@$(python) -m benchmarks.ops.host --output '$(results)'

convergence: $(VENV)/demo.installed build  ## train at equal bytes, each method at its best momentum and lr: dense, GMC, DGC, memory SGD
	@$(python) -m benchmarks.training.convergence --output '$(results)' $(ARGS)

network: $(VENV)/demo.installed build  ## as root: training steps of four workers over 10 Gbit/s to 10 Mbit/s
	@$(python) -m benchmarks.training.network --output '$(results)' $(ARGS)
	@$(python) -m benchmarks.training.time_to_loss --output '$(results)'

scaling: $(VENV)/demo.installed build  ## by a model of a step: which method is the fastest, 2 to 1024 workers, 10 Mbit/s to 400 Gbit/s
	@$(python) -m benchmarks.training.scaling --output '$(results)' $(ARGS)

gpu:  ## on a machine with a GPU: build, tests, benchmarks, sanitizers; RESULTS=folder, ARGS=--quick
	@'$(PYTHON)' -m benchmarks.ops.gpu --python '$(abspath $(python))' --results '$(results)' $(ARGS) \
	    --build 'sh -c "$(MAKE) --no-print-directory $(VENV)/build.installed || echo Going on without; \
	        test -x $(python) && $(python) setup.py -q build_ext --inplace"'

##@ Package it
# The wheel serves one version of Python and every torch from 2.11 on. Its tests install it into
# new environments. WITH='torch==2.12.0 installed' says with which torch (installed: this
# environment's), SHORT=1 runs the main tests with the oldest and with the installed one.
wheel: $(VENV)/build.installed  ## build the wheel into dist/
	@rm -rf build/lib.* dist/*.whl  # what is in there would come along, renamed since or not
	@$(python) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

test-wheel: wheel  ## test the installed wheel with the oldest torch, with 2.13.0 and the newest
	@$(python) tools/test_wheel.py dist/*.whl $(if $(SHORT),--short) \
	    $(if $(WITH),--torch $(foreach torch,$(WITH),'$(torch)')) $(ARGS)

clean:  ## remove what was made here: the environment, the build
	@rm -rf $(VENV) build dist *.egg-info tests/*/build gmc_cuda/*.so gmc_cuda/_build_config.json
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache

# The environment. It sees this folder and, unless TORCH is given, the packages of $(PYTHON), so that
# nothing is downloaded that is there already. --system-site-packages would not do: $(PYTHON) may be
# in a virtual environment itself. For the same reason pip may be there without being installed;
# where it is not, ensurepip brings it, with a setuptools that is old and would hide $(PYTHON)'s.
$(VENV)/created:
	@'$(PYTHON)' -c 'import sys; sys.version_info >= (3, 10) or sys.exit( \
	    "Python 3.10 or later is needed, $(PYTHON) is " + sys.version.split()[0] + "; see make PYTHON=...")'
	@echo 'Making $(VENV)'
	@'$(PYTHON)' -m venv --clear --without-pip '$(VENV)'
	@{ echo '$(CURDIR)'; $(if $(TORCH),,'$(PYTHON)' -c 'import sys; print(*(folder for folder \
	    in sys.path if folder.endswith(("site-packages", "dist-packages"))), sep="\n")';) } > \
	    "$$($(python) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/gmc_cuda.pth"
	@$(python) -c 'import pip' 2> /dev/null || \
	    { $(python) -m ensurepip && $(python) -m pip uninstall --yes setuptools; } > /dev/null 2>&1 || \
	    echo '$(PYTHON) has neither pip nor ensurepip: nothing is installed, what it has is used'
	@touch $@

# Installs what is not there yet of a list in pyproject.toml. Tools that are started by their path
# must be in the environment itself.
listed = $(shell sed -n '/^$1 = \[.*\]$$/{s/[^[]*\[//; s/\]$$//; s/", "/" "/g; p;}' pyproject.toml)
build_needs = $(or $(TORCH:%="%"),$(call listed,dependencies)) $(call listed,requires) \
    $(if $(shell command -v ninja 2> /dev/null),,ninja)
$(VENV)/%.installed: pyproject.toml $(VENV)/created
	@! $(python) -c 'import pip' 2> /dev/null || { \
	    echo 'Installing what is missing for $*$(if $(filter build,$*), (torch can be several GB))'; \
	    $(python) -m pip install -qq $(if $(filter lint,$*),--ignore-installed) \
	        $(if $(filter build,$*),$(build_needs),$(call listed,$*)); } || { \
	    echo 'Could not install it (see above). If this machine has no network, install it for'; \
	    echo '$(PYTHON) by other means: what that has is used as it is.'; exit 1; }
	@echo '$(TORCH)' > $@

# What makes the tests faster. Without a network they run without it.
$(VENV)/speed.tried: $(VENV)/test.installed
	@$(python) -c 'import xdist' 2> /dev/null || \
	    $(python) -m pip install -qq --retries 0 --timeout 10 $(call listed,speed) 2> /dev/null || \
	    echo 'no $(call listed,speed) to be had: tests run one at a time'
	@touch $@

# Again when another torch is asked for.
$(VENV)/build.installed: $(if $(filter-out $(shell cat $(VENV)/build.installed 2>/dev/null),$(TORCH)),always)
