# Every target works as the first command in a fresh clone: it needs Python 3.10 or newer and, for the native CPU
# backend, a C++ compiler. Everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m
# What takes long says every few seconds where it stands, and the rest of it only if it fails. Python compiles a module
# when it is first imported: doing so for all of torch takes longer than most targets.
QUIETLY := @sh requirements/quietly.sh
PIP_OPTIONS := --disable-pip-version-check --progress-bar off --no-compile
PIP_INSTALL := $(QUIETLY) $(RUN) pip install $(PIP_OPTIONS)

# Stamps: torch; layca_fast with its native modules and what the demo needs; the development tools. Each also says what
# it was made for, and torch.txt constrains later installs to the torch that is there.
TORCH_STAMP := $(VENV)/torch.txt
BUILT := $(VENV)/built.txt
STAMP := $(VENV)/installed.txt
BENCH_STAMP := $(VENV)/bench.txt
DOCS := $(VENV)/docs
DOCS_STAMP := $(DOCS)/installed.txt
RELEASE := $(VENV)/release
RELEASE_STAMP := $(RELEASE)/installed.txt
TRAINERS := $(VENV)/trainers
TRAINERS_STAMP := $(TRAINERS)/installed.txt
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

# TORCH='torch==2.12.0' (any pip requirement) chooses another torch, and .venv keeps to it until another is named.
CHOSEN_TORCH := $(shell sed -n 's/.* chosen: //p' $(TORCH_STAMP) 2>/dev/null)
TORCH ?= $(CHOSEN_TORCH)
TORCH_REQUIREMENT := $(if $(TORCH),'$(TORCH)',--requirement requirements/torch.txt)

# The CUDA module takes minutes to compile: it is built where a GPU is there to run it, where LAYCA_CUDA=ON asks for it,
# and, for every GPU, where test-exhaustive is to read what nvcc made of it.
EXHAUSTIVE := $(filter test-all test-exhaustive,$(MAKECMDGOALS))
NVCC := $(or $(CUDACXX),$(shell command -v nvcc))
ifeq ($(origin LAYCA_CUDA),undefined)
ifneq ($(and $(EXHAUSTIVE),$(NVCC)),)
LAYCA_CUDA := ON
LAYCA_CUDA_ARCHITECTURES := all
else
LAYCA_CUDA := $(if $(shell nvidia-smi -L 2>/dev/null | grep '^GPU'),AUTO,OFF)
endif
endif
WANTED := $(LAYCA_CUDA)-$(LAYCA_CUDA_ARCHITECTURES)
BUILT_FOR := $(shell cat $(BUILT) 2>/dev/null)

# The tests of a file stay together, for what they share, and come in the order of tests/conftest.py. A test that hangs
# is ended after an hour; no other limit depends on how fast the machine is.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --timeout 3600
# Idle threads of one process must not spin while the other has work to do.
TEST_ENVIRONMENT := OMP_WAIT_POLICY=passive

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup plans demo test test-exhaustive test-trainers test-all bench bench-full papers gpu verify docs lint format fuzz sanitize \
    wheel wheels wheel-cuda check-tag test-versions FORCE
# Targets of one command run one after the other: their tests and timings want the cores for themselves.
.NOTPARALLEL:

help:  ## list the targets
	@echo "make TARGET, where TARGET is one of:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Options: PYTHON=python3.11 (for a new .venv), TORCH='torch==2.12.0', ARGS='...' (passed on to the command),"
	@echo "  LAYCA_CUDA=ON (build the CUDA module where no GPU is visible), LAYCA_REQUIRE_NATIVE=1 (a failed build is an error)"

setup: $(STAMP)  ## make .venv and install layca_fast with its development tools into it

demo: $(BUILT)  ## train on real MNIST digits with SGD and with FusedLayca; a table and a figure (a minute, once set up)
	@echo "==> Running the demo"
	@$(RUN) layca_fast demo $(ARGS)

test: $(STAMP)  ## run the tests: every property on every backend here, in minutes
	@echo "==> Running the tests"
	@$(TEST_ENVIRONMENT) $(RUN) pytest -m 'not exhaustive' $(PARALLEL) $(ARGS)

test-exhaustive: $(STAMP)  ## run the tests that 'make test' leaves out: full products of options, compilation for all GPUs
	@echo "==> Running the exhaustive tests"
	@$(TEST_ENVIRONMENT) $(RUN) pytest -m exhaustive $(PARALLEL) $(ARGS)

test-trainers: $(TRAINERS_STAMP)  ## run the tests in Hugging Face's Trainer, Lightning and accelerate, installed for that
	@echo "==> Running the tests in trainers"
	@$(TEST_ENVIRONMENT) $(TRAINERS)/bin/python -m pytest tests/trainers $(PARALLEL) $(ARGS)

test-all: test test-exhaustive test-trainers  ## run all tests

bench: $(BENCH_STAMP)  ## time a step of every backend beside torch's and others' on ResNet-50 (minutes; ARGS=--full: all models)
	@echo "==> Running the benchmarks"
	@$(RUN) pytest bench --benchmark-columns=median,iqr,rounds --benchmark-sort=name $(ARGS)

# Each program trains what its CSV lacks and draws its figure; the page is written from the CSVs at the end. What the
# transfer study lacks takes hours: its tables and figures are made of the rows that there are, and it is run by itself.
PAGE_WRITER := examples/papers/write_page.py
TRANSFER := examples/papers/transfer.py
PAPERS := $(filter-out $(PAGE_WRITER) $(TRANSFER),$(shell grep -l __main__ examples/papers/*.py))
papers: $(BUILT)  ## what docs/papers.md shows: train what its CSVs lack, draw its figures, write its tables (an hour from nothing)
	@set -e; for program in $(PAPERS) '$(TRANSFER) --report'; do echo "==> $$program"; $(BIN)/python $$program $(ARGS); done
	@$(BIN)/python $(PAGE_WRITER)

# Where docs/speed.md looks for them. ARGS='--rounds 11' makes the first of them shorter.
RESULTS := bench/results
bench-full: $(BENCH_STAMP)  ## all models in interleaved rounds, and scaling: the files, table and figures of docs/speed.md (hours)
	@echo "==> Running all benchmarks"
	@mkdir -p $(RESULTS)
	@$(RUN) bench.ratios --out $(RESULTS)/ratios.csv $(ARGS)
	@$(RUN) bench.plot $(RESULTS)/ratios.csv --out docs/speed.png
	@$(RUN) bench.table $(RESULTS)/ratios.csv
	@$(RUN) bench.goals --out $(RESULTS)/goals.csv
	@$(RUN) bench.scaling --out $(RESULTS)/scaling.csv --figure docs/scaling.png

# On a machine with a GPU that has Python with torch and Triton, nvcc, CMake and Ninja; it needs no network and no .venv.
gpu:  ## build, prove and measure on an NVIDIA GPU; one file in bench/results (WHEELS=folder: of missing packages)
	@$(PYTHON) -m bench.gpu $(if $(WHEELS),--wheels '$(WHEELS)') $(ARGS)

verify: $(BUILT)  ## check the backends here against the float64 reference (a minute; ARGS=--full: every case)
	@echo "==> Checking every backend against the reference"
	@$(RUN) layca_fast verify $(ARGS)

wheel: $(RELEASE_STAMP)  ## sdist and wheel into dist/, checked, and tried in fresh environments (ARGS='--python python3.12')
	@$(RELEASE)/bin/python -m release.wheel $(ARGS)

check-tag:  ## whether the tag of this commit, v..., is that of layca_fast/version.py
	@tag=v$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' layca_fast/version.py); git tag --points-at HEAD | grep -qx "$$tag" || \
	    { echo "this commit has no tag $$tag: layca_fast/version.py and the tag of a release must agree"; exit 1; }

wheels: $(RELEASE_STAMP)  ## wheels for all versions of Python here by cibuildwheel (containers on Linux); see pyproject.toml
	@$(RELEASE)/bin/python -m cibuildwheel --output-dir dist $(ARGS)

wheel-cuda: $(RELEASE_STAMP)  ## the CUDA kernels for all GPUs as the package layca_fast_cuda (needs nvcc; many minutes)
	@$(RELEASE)/bin/python -m release.wheel --cuda $(ARGS)

test-versions: $(RELEASE_STAMP)  ## core tests under several versions of Python and torch; writes the table of docs/backends.md
	@$(TEST_ENVIRONMENT) $(RELEASE)/bin/python -m release.versions $(ARGS)

docs: $(DOCS_STAMP)  ## build the documentation into site/; warnings, such as of dead links, are errors
	@echo "==> Building site/index.html"
	@rm -rf site
	@$(DOCS)/bin/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env -c docs -d $(DOCS)/doctrees . site \
	    $(ARGS)

lint: $(STAMP)  ## run ruff, mypy, clang-format and the checks of workflows through pre-commit
	@echo "==> Running the linters"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(RUN) pre_commit run --all-files $(ARGS)

plans: $(TRAINERS_STAMP)  ## write docs/plans.md: what layer_groups does with the models of transformers and peft
	@$(TRAINERS)/bin/python docs/make_plans.py $(ARGS)

format: $(STAMP)  ## format Python and C++, and mend what ruff can
	@$(RUN) ruff check --fix-only --quiet .
	@$(RUN) ruff format .
	@find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' | xargs $(BIN)/clang-format -i

fuzz: $(STAMP)  ## random models, options and events: cpu against torch against the reference (ARGS='--steps 1000000')
	@echo "==> Fuzzing"
	@$(TEST_ENVIRONMENT) $(RUN) tests.fuzz $(ARGS)

sanitize: $(STAMP)  ## the native code under the address, undefined-behaviour and thread sanitizers (ARGS=--short: minutes)
	@echo "==> Running the native code under sanitizers"
	@$(TEST_ENVIRONMENT) $(RUN) tests.sanitize $(ARGS)

$(TORCH_STAMP): requirements/torch.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "PYTHON=$(PYTHON): Python 3.10 or newer is needed; name one, as in: make PYTHON=python3.11" >&2; exit 1; }
	@echo "==> Setting up $(VENV) with $$($(PYTHON) --version)"
	$(QUIETLY) $(PYTHON) -m venv $(VENV)
	@echo "==> Installing $(or $(TORCH),$$(grep '^torch' requirements/torch.txt)) (once; it is large)"
	$(PIP_INSTALL) $(TORCH_REQUIREMENT)
	@$(RUN) pip list --format=freeze | grep -E '^(torch|triton)==' > $@
	@echo "# chosen: $(TORCH)" >> $@

$(BUILT): export LAYCA_CUDA := $(LAYCA_CUDA)
$(BUILT): export LAYCA_CUDA_ARCHITECTURES := $(LAYCA_CUDA_ARCHITECTURES)
$(BUILT): $(TORCH_STAMP) $(SOURCES)
	@echo "==> Building layca_fast and installing what the demo needs" \
	    "($(if $(filter OFF,$(LAYCA_CUDA)),without CUDA kernels: LAYCA_CUDA=ON builds them,with CUDA kernels where there is nvcc: minutes))"
	$(PIP_INSTALL) --verbose --constraint $(TORCH_STAMP) --editable '.[demo]'
	@echo "LAYCA_REQUIRE_NATIVE=$(LAYCA_REQUIRE_NATIVE) CUDA=$(WANTED)" > $@

# pip finds layca_fast installed, and adds what the extra names.
$(STAMP): $(BUILT) requirements/dev.txt
	@echo "==> Installing the development tools"
	$(PIP_INSTALL) --constraint $(TORCH_STAMP) --constraint requirements/dev.txt 'layca_fast[dev]'
	@touch $@

$(BENCH_STAMP): $(STAMP) requirements/bench.txt
	@echo "==> Installing the optimizers to compare with"
	$(PIP_INSTALL) --constraint $(TORCH_STAMP) --requirement requirements/bench.txt
	@touch $@

# An environment of its own: the site needs neither torch nor the package.
$(DOCS_STAMP): requirements/docs.txt
	@echo "==> Installing Sphinx (once, some seconds)"
	@$(PYTHON) -m venv --clear $(DOCS)
	$(QUIETLY) $(DOCS)/bin/python -m pip install $(PIP_OPTIONS) --requirement requirements/docs.txt
	@touch $@

# The tools of a release: they make environments of their own, so this one has nothing else.
$(RELEASE_STAMP): requirements/release.txt
	@echo "==> Installing the tools of a release (once, some seconds)"
	@$(PYTHON) -m venv --clear $(RELEASE)
	$(QUIETLY) $(RELEASE)/bin/python -m pip install $(PIP_OPTIONS) --requirement requirements/release.txt
	@touch $@

# Dozens of packages, which what reads the installed ones (pytest's plugins, mypy) must not find in the other targets. So
# they lie in an environment of their own; a .pth file adds to it all that $(VENV) has, torch and pip included.
PACKAGES_OF = $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
$(TRAINERS_STAMP): $(STAMP) requirements/trainers.txt requirements/recipes.txt
	@echo "==> Installing the trainers (once, a minute)"
	@$(RUN) venv --clear --without-pip $(TRAINERS)
	@echo "$(call PACKAGES_OF,$(VENV))" > "$(call PACKAGES_OF,$(TRAINERS))/development.pth"
	$(QUIETLY) $(TRAINERS)/bin/python -m pip install $(PIP_OPTIONS) \
	    --constraint $(TORCH_STAMP) --requirement requirements/trainers.txt
	$(QUIETLY) $(TRAINERS)/bin/python -m pip install $(PIP_OPTIONS) --no-deps --requirement requirements/recipes.txt
	@touch $@

# Set up again where a stamp was made for something else than is asked for now.
ifneq ($(TORCH),$(CHOSEN_TORCH))
$(TORCH_STAMP): FORCE
endif
ifdef LAYCA_REQUIRE_NATIVE
ifneq ($(filter LAYCA_REQUIRE_NATIVE=%,$(BUILT_FOR)),LAYCA_REQUIRE_NATIVE=$(LAYCA_REQUIRE_NATIVE))
$(BUILT): FORCE
endif
endif
# Kernels for all GPUs serve every wish, and where none are wanted they do no harm.
ifneq ($(LAYCA_CUDA),OFF)
ifeq ($(filter CUDA=$(WANTED) CUDA=ON-all,$(BUILT_FOR)),)
$(BUILT): FORCE
endif
endif
