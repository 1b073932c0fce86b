# The README's commands. Each sets itself up: the first call makes .venv, a later call installs nothing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: shakespeare lab learn assignments test bench mlflow outputs export

shakespeare: .venv/learner     ## train the laptop preset on data/shakespeare.txt and let it write
	$(BIN)/python -m makemoe train laptop

lab: .venv/learner             ## read: the lessons as they are, with their outputs
	$(BIN)/jupyter lab notebooks/00_lab.ipynb

learn: .venv/learner           ## learn: the lessons with stubs to fill in, in learn/, never over your work
	$(BIN)/python -m classroom learn learn
	$(BIN)/jupyter lab learn/00_lab.ipynb

assignments: .venv/learner     ## teach: a tree for students, without answers, in assignments/
	$(BIN)/python -m classroom release assignments

test: .venv/developer          ## every test, the notebooks included
	$(BIN)/python -m pytest

bench: .venv/bench             ## how fast, how good, against whom: tables, JSON and a picture in runs/bench
	$(BIN)/python -m benchmarks

mlflow: .venv/learner          ## the page with all runs that were trained with --mlflow, at http://127.0.0.1:5000
	MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000

outputs: .venv/developer       ## run all lessons, or those in LESSONS="04 05", and save them with what they show
	$(BIN)/python tests/outputs.py $(LESSONS)
	$(BIN)/nbdev-clean

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
