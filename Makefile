# Everything a clone needs: `make demo` and `make test` set up what they use. `make help` lists the rest.
#
#   VENV=.venv      the virtual environment to make; an empty VENV= installs into the active one and leaves its torch alone
#   PYTHON=python3  the interpreter that makes it, 3.11 or newer
#   TORCH_INDEX=    where torch comes from, for example https://download.pytorch.org/whl/cpu for the build without CUDA
#   WORKERS=2       processes that share the tests; a file's are one process's. Some start up to four ranks of their own.

VENV ?= .venv
WORKERS ?= 2
# A thread each: more of them wait for one another's cores, spinning, and a run takes five times as long.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist loadfile
PYTHON ?= python3
TORCH_INDEX ?=
TORCH := $(shell grep '^torch==' constraints-cuda.txt)

PY := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
# Newer than its inputs once the environment is ready.
STAMP := $(or $(VENV),$(shell $(PYTHON) -c 'import sys; print(sys.prefix)'))/.dgpo-fast-ready
INPUTS := pyproject.toml setup.py CMakeLists.txt constraints-cpu.txt constraints-cuda.txt $(wildcard csrc/*/*)

DEMO := runs/demo
# With a compiler at hand a failed build of csrc/ is an error; without one the operators run on PyTorch.
NATIVE := $(if $(shell command -v $${CXX:-c++}),1,0)
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check
# With torch in sight, as without build isolation, its setup.py asks for nvcc; its dependencies come with the package.
DEEPSPEED := $(PIP_INSTALL) --quiet --no-deps deepspeed

.PHONY: help setup test test-full demo bench bench-check sanitize lint clean

help:
	@echo 'make demo       set up, fine-tune the embedded pipeline with DGPO, evaluate it   (minutes on two CPU cores)'
	@echo 'make test       set up, run the test suite                                       (minutes)'
	@echo 'make test-full  the same with the slow sweeps'
	@echo 'make setup      the environment alone'
	@echo 'make bench      time the operators and the engines; CSV files in runs/bench'
	@echo 'make bench-check  whether engines are as fast as recorded on this device, and DGPO learns as fast'
	@echo 'make sanitize   the C++ operators and their tests under AddressSanitizer and UndefinedBehaviorSanitizer (GCC)'
	@echo 'make lint       style and types'
	@echo 'make clean      remove what was built, and keep the environment and runs/'

setup: $(STAMP)

ifneq ($(VENV),)
$(STAMP): $(INPUTS)
	@echo 'setup: makes $(VENV) with $(TORCH) and the package; 2 to 5 minutes, once.'
	@echo 'setup: $(if $(TORCH_INDEX),torch comes from $(TORCH_INDEX).,on Linux the default torch is the CUDA build: \
	a download of several GB. Without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu makes it 200 MB.)'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'setup: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.11'; exit 2; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --quiet -c constraints-cuda.txt setuptools wheel cmake ninja
	@$(PIP_INSTALL) -c constraints-cuda.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	@$(DEEPSPEED) -c constraints-cuda.txt
	@flavour=$$($(PY) -W ignore -c 'import torch; print("cuda" if torch.version.cuda else "cpu")'); \
		DGPO_FAST_REQUIRE_NATIVE=$(NATIVE) $(PIP_INSTALL) --quiet -c constraints-$$flavour.txt --no-build-isolation -e '.[dev]'
	@$(MAKE) --no-print-directory report-native
	@touch $@
else
$(STAMP): $(INPUTS)
	@echo 'setup: installs the package into the active environment ($(PYTHON)), whose torch stays as it is; a minute or two.'
	@mkdir -p build
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > build/torch.txt 2>/dev/null || \
		{ echo 'setup: the active environment has no torch; install one (2.11 or newer), or leave VENV unset'; exit 2; }
	@$(PIP_INSTALL) --quiet -c build/torch.txt torch 'setuptools>=77' wheel cmake ninja
	@$(DEEPSPEED) -c build/torch.txt
	@DGPO_FAST_REQUIRE_NATIVE=$(NATIVE) $(PIP_INSTALL) --quiet -c build/torch.txt --no-build-isolation -e '.[dev]'
	@$(MAKE) --no-print-directory report-native
	@touch $@
endif

.PHONY: report-native
report-native:
	@if test -e dgpo_fast/_cpu.so; then echo 'setup: done; the C++ operators are built.'; \
	else echo 'setup: done; no C++ compiler was found, so operators run on PyTorch.'; fi

test: setup
	@echo 'test: the whole suite; at most 20 minutes on two CPU cores.'
	$(PYTEST)

test-full: setup
	@echo 'test-full: the suite and its slow sweeps.'
	$(PYTEST) -m ''

demo: setup
	@if test -e $(DEMO) && ! test -e $(DEMO)/config.yaml; then \
		echo 'demo: $(DEMO) exists and is no run directory; move it away'; exit 2; fi
	@test ! -e $(DEMO) || echo 'demo: replaces $(DEMO), an earlier run.'
	@rm -rf $(DEMO)
	@echo 'demo: fine-tunes the embedded pipeline; 6 to 7 minutes on two CPU cores; results in $(DEMO).'
	$(PY) -m dgpo_fast train tiny-dgpo --out $(DEMO)
	$(PY) -m dgpo_fast eval $(DEMO) --picture $(DEMO)/before-after.png
	@echo 'demo: look at $(DEMO)/report.html and $(DEMO)/before-after.png'

bench: setup
	@echo 'bench: times every operator on this machine, a minute or two each, and whole engines, 4 minutes; CSV files in runs/bench.'
	@status=0; for script in benchmarks/bench_*.py; do \
		$(PY) -m benchmarks.$$(basename $$script .py) --out runs/bench || status=1; done; exit $$status

bench-check: setup
	@echo 'bench-check: the engines against the best record of this device, interleaved, 5 minutes; whether DGPO learns as fast, 3.'
	@status=0; for check in speed_check learning_check; do $(PY) -m benchmarks.$$check || status=1; done; exit $$status

SANITIZED := build/sanitize
# Python itself is not instrumented, so the runtimes come first into the process, and its leaks are its own.
SANITIZERS = LD_PRELOAD="$(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

sanitize: setup
	@echo 'sanitize: builds the C++ operators and their tests in $(SANITIZED); a minute or two.'
	$(PY) -m cmake -S . -B $(SANITIZED) -DDGPO_FAST_SANITIZE=ON -DCMAKE_CXX_COMPILER=$(CXX) \
		-DPython3_EXECUTABLE="$$($(PY) -c 'import sys; print(sys.executable)')"
	$(PY) -m cmake --build $(SANITIZED) --parallel
	CTEST_OUTPUT_ON_FAILURE=1 $(PY) -m cmake --build $(SANITIZED) --target test
	$(SANITIZERS) DGPO_FAST_OPS=native DGPO_FAST_NATIVE_DIR=$(SANITIZED) \
		$(PY) -m pytest -q --capture=sys tests/ops -k 'not reference' -m 'not own_process and not slow'

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf build dist *.egg-info dgpo_fast/*.so $(STAMP) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
