"""Parts of a job are killed at random moments: it always goes on or ends, and leaves nothing. The script does more."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.cluster.conftest import REPOSITORY


@pytest.mark.cluster
@pytest.mark.timeout(1500)
def test_whatever_is_killed_the_job_ends_as_it_should() -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--kills", "5", "--seed", "7"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not json.loads(done.stdout.splitlines()[-1])["failures"]
