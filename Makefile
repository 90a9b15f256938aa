# Two commands on a fresh machine with Python and make: `make demo`, `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Real data for the demo and the tests, where a folder with it lies beside the checkout.
ifneq ($(wildcard ../shared/data),)
export NORMSCOPE_DATA ?= $(abspath ../shared/data)
endif

.PHONY: help demo test check rules bench lab triton sanitize portable format clean
help:
	@echo "make demo    what Batch Normalization does, on real data, as figures and a page in normscope-demo/"
	@echo "make test    all tests"
	@echo "make check   format, lint, types, architecture"
	@echo "make rules   how often the doctor is right: all fixtures, resumable, results in build/confusion/"
	@echo "make bench   speed against eager torch and against copying, up to 15 minutes, in normscope-bench/"
	@echo "make lab     the exact experiments and the ledger of claims, in normscope-lab/"
	@echo "make triton  tests of the kernels for GPUs, by Triton's interpreter where there is no GPU"
	@echo "make sanitize  kernel tests under the address and undefined-behaviour sanitizers"
	@echo "make portable  the kernels compiled for arm64 and run by an emulator"
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

# `make bench BENCH=docs/bench` renews what the README and docs/benchmarks.md show.
BENCH ?= normscope-bench
bench: $(READY)
	$(BIN)/normscope bench --output $(BENCH)

# Two runs at a time; a stopped command goes on where it was. LAB="B01 B06" PROFILE=cpu for others.
LAB ?= exact
PROFILE ?= cpu
lab: $(READY)
	$(BIN)/normscope lab run $(LAB) --profile $(PROFILE) --jobs 2
	$(BIN)/normscope lab report

# Installs nothing: triton takes 1 GB.
triton: $(READY)
	@$(BIN)/python -c "import triton" || { echo "first: $(BIN)/python -m pip install --no-deps triton"; exit 1; }
	if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; \
		then NORMSCOPE_TRITON=on $(BIN)/python -m pytest tests/test_triton.py; \
		else NORMSCOPE_TRITON=interpret $(BIN)/python -m pytest --numprocesses 2 tests/test_triton.py; fi

# A copy of the package with its kernels built under the address and undefined-behaviour sanitizers, and the kernel tests
# with every instruction set: half an hour on two cores. Run from its folder, so that nothing imports the checkout.
SANITIZE  := -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZED := build/sanitized
PRELOADED  = $$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)
sanitize: $(READY)
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)/source
	git ls-files -z | xargs -0 cp --parents --target-directory $(SANITIZED)/source
	NORMSCOPE_CXXFLAGS="$(SANITIZE)" $(BIN)/python -m pip install --quiet --no-deps --target $(SANITIZED)/installed $(SANITIZED)/source
	for isa in baseline avx2 avx512; do \
		(cd $(SANITIZED) && NORMSCOPE_ISA=$$isa PYTHONPATH=$(CURDIR)/$(SANITIZED)/installed ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(PRELOADED)" \
		$(abspath $(BIN))/python -m pytest $(CURDIR)/tests/test_kernels.py -k "not every_instruction_set") || exit; \
	done

# The baseline bodies as other machines compile them, against their formulas: by default for arm64, run by its emulator.
PORTABLE ?= aarch64-linux-gnu-g++
EMULATOR ?= qemu-aarch64
portable:
	mkdir -p build
	$(PORTABLE) -O2 -std=c++20 -ffp-contract=fast -fno-math-errno -fno-trapping-math -static -Inormscope/kernels/cpp \
		scripts/portable.cpp normscope/kernels/cpp/bodies_baseline.cpp -o build/portable
	$(EMULATOR) build/portable

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info normscope/kernels/cpp/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis normscope-demo normscope-bench normscope-lab
