#!/bin/sh
# Builds the wheel with the Python of the virtual environment $1, installs it alone into a fresh one, and runs the demo
# from another folder, with the options that are left: what somebody gets who has no repository.
set -eu
python=$1/bin/python
shift
folder=$(mktemp -d)
mkdir -m 700 "$folder/rt"
end() { # the lock holds the pid of the daemon that the demo has started
    kill "$(cat "$folder/rt/daemon.lock")" 2>/dev/null || :
    rm -rf "$folder"
}
trap end EXIT

"$python" -m build --wheel --outdir "$folder" . >"$folder/build.log" 2>&1 || { cat "$folder/build.log" >&2; exit 1; }
PYTHON=$python sh scripts/install.sh "$folder/venv" "$folder"/*.whl
mkdir "$folder/elsewhere"
cd "$folder/elsewhere"
"$folder/venv/bin/distui" --version
DISTUI_STATE_DIR=$folder/state DISTUI_RUNTIME_DIR=$folder/rt "$folder/venv/bin/distui" demo --no-tui "$@"
