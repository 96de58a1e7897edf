# One command, no set-up step: each target makes .venv itself, from the versions in constraints.txt.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/ready
DOCS := .venv/docs-ready

.PHONY: demo quick test test-avx2 lint docs bench results clean

demo: $(READY)  ## text by a real model (491 MB, fetched once into the user's cache)
	$(BIN)/qwenkern generate --model demo "Write a Python function that says whether a number is prime."

test: $(READY)  ## the whole suite
	$(BIN)/pytest -q -n $(WORKERS) --dist loadgroup $(ARGS)

quick: $(READY)  ## a few cases of each test that is not slow: in every room, in less than three minutes
	$(BIN)/pytest -q -n $(WORKERS) --dist loadgroup --quick $(ARGS)

# What a processor without AVX-512 computes, here: our C for it, and no wider vectors in torch and in numpy's products.
AVX2 := QWENKERN_CPU_TARGET=x86-64-v3 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
	MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell

test-avx2: $(READY)  ## the tests for which the processor matters, as an x86-64 without AVX-512 runs them
	$(AVX2) $(BIN)/pytest -q -n $(WORKERS) --dist loadgroup -m processor $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.c' '*.h')
	$(BIN)/mypy

docs: $(DOCS)  ## the site, in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)  ## times each kernel next to torch and torch.compile, then a whole model next to transformers
	$(BIN)/python benchmarks/run.py $(ARGS)
	$(BIN)/python benchmarks/end_to_end.py

results: $(READY)  ## writes the tables of README.md and docs/ from benchmarks/results
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf .venv build .benchmarks *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[test,hub,serve,clients]"
	touch $@

$(DOCS): $(READY)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@
