# Two commands do everything on a fresh machine with Python 3.10+ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench paper zoo clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[plots,serve,test,bench]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/expertflow demo

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks.decode_under_budget --quick

# Every table and figure of the paper beside ours, and docs/results.md; resumable, an hour and a half on two cores.
# PAPER: more arguments (make paper PAPER="--llama-cpp DIR").
paper: $(STAMP)
	$(BIN)/python -m benchmarks.paper --page docs/results.md $(PAPER)

# Small models with real routing, one per architecture of the paper's Table 1; resumable, about 40 minutes each.
ZOO := qwen1.5-moe switch-32 mixtral-8 deepseek-moe switch-64 switch-128
CORPUS ?= zoo/sample
ZOO_TOKENS ?= 2e6

zoo: $(ZOO:%=out/zoo/%/quality.json)

out/zoo/%/quality.json: $(STAMP)
	$(BIN)/python -m zoo.train --arch $* --corpus $(CORPUS) --tokens $(ZOO_TOKENS) --decay-share 0.4 --balance 0.1 \
		$(if $(filter switch-64 switch-128,$*),--expert-every 4) -o out/zoo/$*
	$(BIN)/python -m zoo.quality out/zoo/$*

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
