# Every target needs only Python 3.10+, git and make; `setup` makes .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-cluster gpu check format proto try-wheel clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/install.sh
	PYTHON=$(PYTHON) sh scripts/install.sh $(VENV)
	@touch $@

demo: setup
	@$(BIN)/distui demo

# Three at a time, on two cores: many tests wait for processes more than they work. Those processes are hundreds: each
# would compile all of distui anew where Python is told to keep no bytecode.
test: export PYTHONDONTWRITEBYTECODE =
test: setup
	$(BIN)/python -m pytest -n 3 --dist worksteal

# Jobs on hosts that are namespaces of this machine, each with an sshd: needs root and openssh-server, else it skips.
test-cluster: setup
	$(BIN)/python -m pytest tests/cluster -m "cluster or not cluster"

# On a machine with GPUs, under 8 minutes: all that needs one. Elsewhere it says so, and ends with 2.
gpu:
	@PYTHON=$(PYTHON) sh scripts/gpu.sh $(VENV) --out gpu-figures.json

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: setup
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. distui/proto/telemetry.proto distui/proto/cluster.proto distui/proto/rollup.proto

try-wheel: setup
	sh scripts/try_wheel.sh $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
