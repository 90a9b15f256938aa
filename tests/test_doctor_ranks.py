"""Ranks compare their statistics without a collective: two processes, and one that waits for nobody."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import normscope


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    worker = Path(__file__).with_name("doctor_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", worker, folder]
    root = os.pathsep.join([str(Path(normscope.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": root}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def test_ranks_with_other_statistics_are_told_apart(told):
    for rank in told:
        assert rank["apart"][:2] == ["warn", ["1"]]


def test_ranks_with_the_same_statistics_are_silent(told):
    for rank in told:
        assert rank["alike"][0] == "pass"


def test_a_rank_that_checks_alone_does_not_hang(told):
    status, _, reason = told[0]["alone"]
    assert status == "could-not-check"
    assert "not every rank" in reason


def test_waiting_for_other_ranks_is_timed_on_all_at_once(told):
    for rank in told:
        status, milliseconds, problem = rank["timed"]
        # On a busy machine nothing is said; a message takes longer than the arithmetic of 8 channels.
        assert status in ("info", "could-not-check")
        assert milliseconds is not None, problem


def test_a_synchronized_rank_that_checks_alone_does_not_hang(told):
    status, milliseconds, problem = told[0]["timed alone"]
    assert (status, milliseconds) == ("could-not-check", None)
    assert "not every rank" in problem
