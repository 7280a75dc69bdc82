"""What the tests run in: forked ranks, and scripts in them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys

import pytest
import torch.distributed as dist

from tests.ranks import Ran, RankFailed, run_ranks, run_script


pytestmark = pytest.mark.distributed


def begun() -> tuple[set[str], bool, bool, str]:
    return set(sys.modules), gc.get_freeze_count() > 10**5, dist.is_initialized(), multiprocessing.get_start_method()


def test_ranks_begin_with_everything_imported(tmp_path):
    """Of a module of `tests.ready` that cannot be imported, the server says nothing."""
    for modules, frozen, initialized, starts in run_ranks(begun, 2, folder=tmp_path):
        assert {"tests.ready", "tests.tiny", "trl", "sentence_transformers"} <= modules
        assert frozen and not initialized
        # As a user's process does, and not by a server of its own, which would import everything for the workers of a loader.
        assert starts == multiprocessing.get_all_start_methods()[0]


def fails_on_rank_1():
    if os.environ["RANK"] == "1":
        raise ValueError("of its own")
    return "well"


def test_a_rank_that_fails_is_named(tmp_path):
    with pytest.raises(RankFailed, match="(?s)rank 1:.*ValueError: of its own") as failure:
        run_ranks(fails_on_rank_1, 2, folder=tmp_path)
    assert "rank 0:" not in str(failure.value)


SCRIPT = """
import os, sys
import beside
if __name__ == "__main__":
    print(beside.WORD, *sys.argv[1:], os.environ.get("RANK"), os.environ["OF_OUR_OWN"])
    sys.exit("wrong" if os.environ.get("RANK") == "1" else 0)
"""


def test_a_script_runs_as_python_runs_it(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("WORD = 'hello'")
    command, environment = (tmp_path / "script.py", "--n", 3), {"OF_OUR_OWN": "x"}
    (alone,) = run_script(*command, folder=tmp_path / "one", environment=environment)
    assert alone == Ran(0, "hello --n 3 None x\n", "")
    first, second = run_script(*command, folder=tmp_path / "two", processes=2, environment=environment)
    assert first == Ran(0, "hello --n 3 0 x\n", "")
    assert (second.returncode, second.stdout) == (1, "hello --n 3 1 x\n") and "wrong" in second.stderr
    (tmp_path / "beside.py").unlink()
    (broken,) = run_script(*command, folder=tmp_path / "three", environment=environment)
    assert broken.returncode == 1 and "No module named 'beside'" in broken.stderr
