# The README's commands. Each sets itself up: the first call makes .venv, a later call installs nothing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: shakespeare test lab bench assignments mlflow export

shakespeare: .venv/learner     ## train the laptop preset on data/shakespeare.txt and let it write
	$(BIN)/python -m makemoe train laptop

test: .venv/developer          ## every test, the notebooks included
	$(BIN)/python -m pytest

lab: .venv/learner             ## open the first lesson in Jupyter
	$(BIN)/jupyter lab notebooks/00_lab.ipynb

bench: .venv/bench             ## how fast, how good, against whom: tables, JSON and a picture in runs/bench
	$(BIN)/python -m benchmarks

assignments: .venv/developer   ## the lessons for students, without solutions, in assignments/
	$(BIN)/python -m makemoe.classroom release assignments

mlflow: .venv/learner          ## the page with all runs that were trained with --mlflow, at http://127.0.0.1:5000
	MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000

export: .venv/developer        ## notebooks -> makemoe/*.py
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export

.venv/learner: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/developer: .venv/learner
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

.venv/bench: .venv/learner
	$(BIN)/pip install --quiet --editable '.[bench]'
	touch $@
