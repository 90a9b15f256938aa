# Two commands on a fresh machine with Python and make: `make demo`, `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Real data for the demo and the tests, where a folder with it lies beside the checkout.
ifneq ($(wildcard ../shared/data),)
export NORMSCOPE_DATA ?= $(abspath ../shared/data)
endif

.PHONY: help demo test check rules bench lab sanitize format clean
help:
	@echo "make demo    what Batch Normalization does, on real data, as figures and a page in normscope-demo/"
	@echo "make test    all tests"
	@echo "make check   format, lint, types, architecture"
	@echo "make rules   how often the doctor is right: all fixtures, resumable, results in build/confusion/"
	@echo "make bench   speed against eager torch and against copying, up to 15 minutes, in normscope-bench/"
	@echo "make lab     the exact experiments and the ledger of claims, in normscope-lab/"
	@echo "make sanitize  kernel tests under the address and undefined-behaviour sanitizers"
	@echo "make format  rewrite the code in the project's format"
	@echo "make clean   remove the virtual environment and caches"

# torch first and pinned, so that nothing else chooses its build.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard normscope/kernels/cpp/*.h normscope/kernels/cpp/*.cpp)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab,dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/normscope demo

test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

# May be stopped and started again; the tables go into docs/doctor.md, the pages of the rules into docs/rules/.
rules: $(READY)
	$(BIN)/python scripts/confusion.py --jobs 2 --markdown docs/doctor.md
	$(BIN)/python scripts/confusion.py --cases --markdown docs/doctor.md
	$(BIN)/python scripts/rule_pages.py

# The architectures come from timm; where it cannot be installed beside this torch, the bench says so and runs without.
bench: $(READY)
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt timm
	$(BIN)/normscope bench --output normscope-bench

# Two runs at a time; a stopped command goes on where it was. LAB="B01 B06" PROFILE=cpu for others.
LAB ?= exact
PROFILE ?= cpu
lab: $(READY)
	$(BIN)/normscope lab run $(LAB) --profile $(PROFILE) --jobs 2
	$(BIN)/normscope lab report

# A copy of the package with its kernels built under the address and undefined-behaviour sanitizers, and the kernel tests.
SANITIZE  := -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZED := build/sanitized
sanitize: $(READY)
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)/source
	git ls-files -z | xargs -0 cp --parents --target-directory $(SANITIZED)/source
	NORMSCOPE_CXXFLAGS="$(SANITIZE)" $(BIN)/python -m pip install --quiet --no-deps --target $(SANITIZED)/site $(SANITIZED)/source
	PYTHONPATH=$(SANITIZED)/site ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest tests/test_kernels.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info normscope/kernels/cpp/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis normscope-demo normscope-bench normscope-lab
