# Both targets set up their own virtual environment where it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
unexport PYTHONDONTWRITEBYTECODE  # tests start many processes, and each would compile everything again

.PHONY: demo test test-slow clean

demo: $(VENV)/.installed
	$(BIN)/dynamize run quickstart --out runs/quickstart --overwrite

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	rm -rf build/typed
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy -p dynamize
	$(BIN)/pytest -n auto --dist loadfile

test-slow: $(VENV)/.installed
	$(BIN)/pytest -m slow -n auto --dist loadfile

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info
