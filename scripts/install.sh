#!/bin/sh
# Makes the virtual environment $1 and installs into it, with the versions of constraints.txt, the wheel $2; without one,
# distui itself, editable, with all that its tests need.
# On Linux, PyPI's torch brings gigabytes of CUDA packages; a machine without an NVIDIA GPU gets the CPU build.
set -eu
venv=$1
wheel=${2:-}
python=${PYTHON:-python3}

"$python" - <<'PY' || exit 2
import sys
if sys.version_info < (3, 10):
    sys.exit(f"distui needs Python 3.10 or newer; this is {sys.version.split()[0]}. Set PYTHON=/path/to/python3.10")
PY
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"

torch=$(grep '^torch==' constraints.txt)
if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then
    if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
        # A mirror or a local folder may offer the CPU build already; else ask PyTorch's own index for it.
        if $pip install --quiet --dry-run --no-deps --report - "$torch" 2>/dev/null | grep -q '"version": "[0-9.]*+cpu"'; then
            $pip install --quiet -c constraints.txt "$torch"
        else
            $pip install --quiet -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu "$torch"
        fi
    fi
    # torch's CUDA build brings the Triton that it needs; the CPU build brings none, and kernels are tested interpreted.
    if [ -z "$wheel" ] && ! "$venv/bin/python" -c 'import triton' 2>/dev/null; then
        $pip install --quiet "triton==3.9.0; python_version >= '3.11'" "triton==3.8.0; python_version < '3.11'"
    fi
fi
if [ -n "$wheel" ]; then
    $pip install --quiet -c constraints.txt "$wheel"
else
    $pip install --quiet -c constraints.txt -e ".[dev]"
fi
