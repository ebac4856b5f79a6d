"""What each rank of a notebook's job runs: the function that was pickled there."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

from distui.core.paths import open_own

RESULT = "result.pkl"
"""Beside the call: what the function returned on rank 0."""


def main() -> None:
    """Call the function on this rank and keep what rank 0 returns."""
    path = Path(sys.argv[1])
    sys.argv[1:] = []
    # The notebook's folder, where its own modules are; ranks are started in it.
    sys.path.insert(0, os.getcwd())
    with open(open_own(path), "rb") as file:
        function, arguments = pickle.load(file)
    result = function(*arguments)
    if os.environ.get("RANK", "0") != "0":
        return
    import cloudpickle

    temporary = path.with_name(f".{RESULT}")
    try:
        temporary.write_bytes(cloudpickle.dumps(result))
    except Exception as error:
        raise TypeError(
            f"{getattr(function, '__name__', 'the function')} returned a {type(result).__name__}, "
            f"which cannot be sent back to the notebook: {error}"
        ) from error
    os.replace(temporary, path.with_name(RESULT))


if __name__ == "__main__":
    main()
