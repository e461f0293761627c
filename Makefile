# Targets are safe to run again: .venv is rebuilt only when the requirements change.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test test-faults test-dashboards bench lint clean

install: .venv/.run
	@echo "Now: . .venv/bin/activate"

demo: .venv/.run
	$(BIN)/python fineweb.py --source pydocs
	$(BIN)/python train_gpt2.py --preset tiny --optimizer muon --data_dir data/pydocs --out_dir log/demo --eval_every 190 --resume
	$(BIN)/python plot.py log/demo
	@echo
	@echo "Trained. Let it write, from a prompt of your own:"
	@echo "  .venv/bin/python sample.py --model log/demo/hf --prompt 'This function'"
	@echo "or train on your own text:"
	@echo "  .venv/bin/python fineweb.py --source texts/*.txt --out_dir data/mine"
	@echo "  .venv/bin/python train_gpt2.py --preset tiny --data_dir data/mine --out_dir log/mine"

test: .venv/bin/pytest
	$(BIN)/python -m pytest

# The slow tests: dozens of kills, a rank that hangs, two nodes (as root, on Linux). Ten minutes and more.
test-faults: .venv/bin/pytest
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_faults.py tests/test_resume.py
	$(BIN)/python -m pytest -m slow tests/test_fineweb.py tests/test_ddp.py tests/test_nodes.py tests/test_parallel.py

test-dashboards: .venv/bin/pytest
	$(BIN)/python -m pip install -q tensorboard==2.21.0 wandb==0.31.0
	$(BIN)/python -m pytest tests/test_dashboards.py

# The optimisation ladder on this machine (docs/ladder.md): half an hour on two CPU cores.
bench: .venv/.run
	mkdir -p log
	$(BIN)/python bench.py --out log/ladder.json --plot log/ladder.png

lint: .venv/bin/pytest
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/pip:  # also where uv has made an environment: those have no pip
	$(PYTHON) -m venv .venv

.venv/.run: requirements.txt | .venv/bin/pip
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/bin/pytest: requirements-dev.txt .venv/.run
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv data/pydocs log/demo
