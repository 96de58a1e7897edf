# One command, no set-up step: each target makes .venv itself, from the versions in constraints.txt.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test lint bench results clean

demo: $(READY)  ## text by a real model (491 MB, fetched once into the user's cache)
	$(BIN)/qwenkern generate --model demo "Write a Python function that says whether a number is prime."

test: $(READY)  ## not `python -m pytest`, which would put kernels/ on the path under its bare name
	$(BIN)/pytest -q -n $(WORKERS) --dist loadgroup $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)  ## each kernel, or its twin on a CPU, beside torch and torch.compile; then a whole model beside transformers
	$(BIN)/python benchmarks/run.py $(ARGS)
	$(BIN)/python benchmarks/end_to_end.py

results: $(READY)  ## the tables of README.md and docs/performance.md, from benchmarks/results
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf .venv build .benchmarks *.egg-info .pytest_cache .ruff_cache .hypothesis

$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[test,hub]"
	touch $@
