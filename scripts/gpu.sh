#!/bin/sh
# Runs benchmarks/gpu by a Python whose torch sees a GPU: $PYTHON's own torch where it does, else the environment $1.
set -eu
venv=$1
shift
python=${PYTHON:-python3}
sees='import sys, torch; sys.exit(not torch.cuda.is_available())'
needs='import distui.core.engine.engine, pytest, pytest_timeout, pytest_asyncio, triton'

if ! command -v nvidia-smi >/dev/null 2>&1 && ! "$python" -c "$sees" 2>/dev/null; then
    echo "make gpu needs an NVIDIA GPU: nvidia-smi is not here, and the torch of $python sees none" >&2
    exit 2
fi
export PYTHONPATH=.
if ! { "$python" -c "$sees" && "$python" -c "$needs"; } 2>/dev/null; then
    PYTHON=$python sh scripts/install.sh "$venv"
    python=$venv/bin/python
fi
exec "$python" benchmarks/gpu "$@"
