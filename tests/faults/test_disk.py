"""Disks that are full, and folders that are gone: the run goes on, says what could not be written, and no checkpoint is lost."""

from __future__ import annotations

import errno
import gc
import logging
import os
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import TrainerCallback

from hf_sampa import SAMPaTrainer, compat
from hf_sampa.checkpoints import checkpoint
from hf_sampa.checkpoints.writing import NotSaved
from hf_sampa.files import sync
from tests import tiny
from tests.ranks import run_ranks
from tests.test_saving import Does, bytes_of, outcome, trainer_of


SAVES = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no"}


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def limit(size: int) -> None:
    """No file may become larger than so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def no_room_for(name: str) -> None:
    """The disk is full when a file of this name is to be put in place."""

    def replace(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        REPLACE(source, target)

    os.replace = replace


REPLACE = os.replace


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


def make_room(folder: Path) -> None:
    limit(resource.RLIM_INFINITY)
    os.replace = REPLACE
    if folder.is_file():
        folder.unlink()


# What happens to the output folder in step 3, which checkpoints are there at the end, and what is said of the others.
FAULTS = {
    "nothing fits": (lambda folder: limit(2_000), {1, 2, 5, 6}, r"the weights \(File too large"),
    "the weights fit": (lambda folder: limit(30_000), {1, 2, 5, 6}, r"the optimizer \(torch could not write the file"),
    "no g_t": (lambda folder: no_room_for("sampa.safetensors"), {1, 2, 5, 6}, r"SAMPa's state \(.*No space left"),
    "no manifest": (lambda folder: no_room_for("sampa.json"), {1, 2, 5, 6}, r"its files \(.*No space left"),
    "no folder": (shutil.rmtree, {3, 4, 5, 6}, None),
    "a file": (a_file, {5, 6}, r"the weights \(.*Not a directory"),
}


class Errors(logging.Handler):
    """Collects what is logged as an error."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.said: list[str] = []
        logging.getLogger("hf_sampa").addHandler(self)

    def emit(self, record):
        self.said.append(record.getMessage())


class Told(TrainerCallback):
    """Steps whose checkpoints callbacks were told of."""

    def __init__(self):
        self.steps = []

    def on_save(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def run(folder, name=None, **changes):
    """What came of a run whose disk fails in step 3 and is well again in step 5; what was said, told, and is in its folder."""
    folder, callbacks, errors, told = Path(folder) / "out", [], Errors(), Told()
    if name is not None and rank() == 0:
        begins = FAULTS[name][0]
        callbacks = [Does("on_step_end", 3, lambda: begins(folder)), Does("on_step_end", 5, lambda: make_room(folder))]
    try:
        dataset = tiny.sentences(18 * max(1, int(os.environ.get("WORLD_SIZE", 1)) // 2))
        found = outcome(trainer_of(folder, callbacks=[*callbacks, told], dataset=dataset, **SAVES, **changes))
    finally:
        make_room(folder)
        logging.getLogger("hf_sampa").removeHandler(errors)
    return found, errors.said, told.steps, sorted(os.listdir(folder)) if folder.is_dir() else []


def check(folder, name, found, errors, told, names, figure):
    """Everything went on as if nothing had been, but for the checkpoints that did not fit."""
    _, steps, message = FAULTS[name]
    assert names == [f"checkpoint-{step}" for step in sorted(steps)], errors
    assert all(checkpoint.is_whole(Path(folder) / "out" / each) for each in names)
    assert len(errors) == (2 if message else 0)
    assert told == ([1, 2, 5, 6] if message else [1, 2, 3, 4, 5, 6])
    for step, error in zip((3, 4), errors, strict=False):
        words = rf"{folder}/out/checkpoint-{step} could not be saved, and nothing of it is left: {message}.*\. It needs at least [\d,]+ bytes; "
        assert re.search(words + r"[\d,]+ are free in .*\. The run goes on, and the next save tries again\.$", error)
    figure("disks that failed", 1, 1)


@pytest.mark.parametrize("name", FAULTS)
def test_a_disk_that_fails(tmp_path, whole, name, figure):
    found, *rest = run(tmp_path, name)
    assert tiny.differing(whole, found) == []
    check(tmp_path, name, found, *rest, figure)


def every_fault(folder, names, changes):
    return [run(Path(folder) / str(i), name, **changes) for i, name in enumerate((None, *names))]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "names", "changes"),
    [
        (2, ("the weights fit", "no manifest"), {"shard_optimizer": True}),
        pytest.param(2, tuple(FAULTS), {}, marks=pytest.mark.whole),
        pytest.param(4, tuple(FAULTS), {"shard_optimizer": True}, marks=pytest.mark.whole),
    ],
)
def test_disks_that_fail_on_rank_0(tmp_path, world_size, names, changes, figure):
    """All ranks give up the same checkpoints, and go on together."""
    whole, *of_faults = zip(
        *run_ranks(every_fault, world_size, tmp_path, names, changes, folder=tmp_path), strict=True
    )
    for i, (name, of_ranks) in enumerate(zip(names, of_faults, strict=True), start=1):
        for (expected, *_), (found, *_) in zip(whole, of_ranks, strict=True):
            assert tiny.differing(expected, found) == [], name
        check(tmp_path / str(i), name, *of_ranks[0], figure)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run whose disk is well."""
    return run(tmp_path_factory.mktemp("whole"))[0]


def test_saving_by_hand_raises(tmp_path):
    trainer = trainer_of(tmp_path / "out", save_strategy="no")
    trainer.train()
    try:
        limit(30_000)
        with pytest.raises(
            NotSaved, match=r"checkpoint-6 could not be saved, and nothing of it is left: the optimizer .*\. It needs"
        ):
            trainer._save_checkpoint(trainer.model, trial=None)
    finally:
        limit(resource.RLIM_INFINITY)
    assert os.listdir(tmp_path / "out") == []
    trainer._save_checkpoint(trainer.model, trial=None)
    assert checkpoint.is_whole(tmp_path / "out" / "checkpoint-6")


def test_a_file_that_could_not_be_written_takes_no_room(tmp_path):
    """As long as it is open, a file that was removed does."""
    trainer = trainer_of(tmp_path / "out", save_strategy="no")
    trainer.train()
    gc.disable()
    try:
        limit(30_000)
        with pytest.raises(NotSaved):
            trainer._save_checkpoint(trainer.model, trial=None)
        opened = [os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink() and each.exists()]
    finally:
        limit(resource.RLIM_INFINITY)
        gc.enable()
    assert [path for path in opened if str(tmp_path) in path] == []


def test_a_checkpoint_that_is_replaced_comes_back(tmp_path):
    trainer = trainer_of(tmp_path / "out", **SAVES)
    trainer.train()
    before = bytes_of(tmp_path / "out")
    try:
        no_room_for("sampa.json")
        with pytest.raises(NotSaved, match="No space left"):
            trainer._save_checkpoint(trainer.model, trial=None)
    finally:
        make_room(tmp_path / "out")
    assert bytes_of(tmp_path / "out") == before


def failing(call, error, name):
    """`call`, which raises `error` where a path of this name is given."""

    def fails(*paths, **kwargs):
        if any(Path(path).name == name for path in paths[:2] if isinstance(path, str | Path)):
            raise error
        return call(*paths, **kwargs)

    return fails


def test_a_folder_that_cannot_be_moved_aside(tmp_path, whole, monkeypatch):
    """A torn checkpoint of the step, say, in a folder that is read only."""
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    monkeypatch.setattr(
        os, "rename", failing(os.rename, OSError(errno.EROFS, "Read-only file system"), "checkpoint-3")
    )
    found, errors, told, names = run(tmp_path)
    assert tiny.differing(whole, found) == [] and told == [1, 2, 4, 5, 6] and len(names) == 6
    assert "checkpoint-3 could not be saved" in errors[0] and "the folder ([Errno 30] Read-only" in errors[0]


def test_a_file_in_place_of_the_folder(tmp_path, whole):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint-3").write_text("somebody's")
    found, errors, told, _names = run(tmp_path)
    assert tiny.differing(whole, found) == [] and told == [1, 2, 4, 5, 6]
    assert "the folder (" in errors[0] and "checkpoint-3 is a file)" in errors[0]
    assert (tmp_path / "out" / "checkpoint-3").read_text() == "somebody's"


def test_a_link_in_place_of_the_folder(tmp_path):
    trainer = trainer_of(tmp_path / "out", **SAVES)
    trainer.train()
    last = tmp_path / "out" / "checkpoint-6"
    last.rename(tmp_path / "elsewhere")
    last.symlink_to(tmp_path / "elsewhere")
    before = bytes_of(tmp_path / "elsewhere")
    for _ in range(2):
        trainer._save_checkpoint(trainer.model, trial=None)
        assert checkpoint.is_whole(last) and not last.is_symlink()
    assert bytes_of(tmp_path / "elsewhere") == before
    assert len(os.listdir(tmp_path / "out")) == 6


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", None])
def test_what_is_removed_while_a_checkpoint_is_written(tmp_path, whole, name, figure):
    class Removed(SAMPaTrainer):
        def _save_rng_state(self, output_dir):
            if self.state.global_step == 3:
                shutil.rmtree(output_dir) if name is None else Path(output_dir, name).unlink()
                Path(output_dir).mkdir(exist_ok=True)
            super()._save_rng_state(output_dir)

    errors = Errors()
    found = outcome(trainer_of(tmp_path / "out", Removed, **SAVES))
    logging.getLogger("hf_sampa").removeHandler(errors)
    assert tiny.differing(whole, found) == []
    assert "checkpoint-3" not in os.listdir(tmp_path / "out") and len(errors.said) == 1
    assert f"{name or 'model.safetensors'} was removed from" in errors.said[0]
    figure("disks that failed", 1, 1)


def test_file_systems_that_do_not_sync_folders(tmp_path, whole, monkeypatch):
    fsync = os.fsync

    def files_alone(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    found, errors, told, _names = run(tmp_path)
    assert tiny.differing(whole, found) == [] and errors == [] and told == [1, 2, 3, 4, 5, 6]


def test_a_file_that_is_read_only(tmp_path, monkeypatch):
    file, opens, modes = tmp_path / "file", os.open, []
    file.write_text("content")

    def for_reading(path, flags):
        modes.append(flags)
        if flags != os.O_RDONLY:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opens(path, flags)

    monkeypatch.setattr(os, "open", for_reading)
    sync(file)
    assert modes == [os.O_RDWR, os.O_RDONLY]


def test_the_one_just_saved_outlives_a_damaged_one_that_was_passed_over(tmp_path, whole):
    """Of two that are kept by the limit, neither is removed until the damaged one has been written anew."""
    trainer_of(tmp_path / "out", **SAVES).train()
    (tmp_path / "out" / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    found = []

    class Kept(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            found.append(checkpoint.is_whole(tmp_path / "out" / f"checkpoint-{state.global_step}"))

    resumed = trainer_of(tmp_path / "out", callbacks=[Kept()], save_total_limit=1, **SAVES)
    shutil.rmtree(tmp_path / "out" / "checkpoint-5")
    again = outcome(resumed, True)
    assert tiny.differing(whole["weights"], again["weights"]) == []
    assert found == [True, True]
    assert os.listdir(tmp_path / "out") == ["checkpoint-6"]


@pytest.mark.skipif(not compat.keeps_best_step(), reason="refused")
def test_the_best_model_is_one_that_was_saved(tmp_path, figure):
    """The third step's is better, and cannot be written."""
    scores = iter([0.5, 0.6, 0.9, 0.7, 0.1, 0.2])
    trainer = trainer_of(
        tmp_path / "out",
        callbacks=[
            Does("on_step_end", 3, lambda: no_room_for("sampa.json")),
            Does("on_step_end", 4, lambda: make_room(tmp_path / "out")),
        ],
        **{**SAVES, "save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1},
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.compute_metrics = lambda prediction: {"score": next(scores)}
    try:
        trainer.train()
    finally:
        make_room(tmp_path / "out")
    assert trainer.state.best_metric == 0.7 and trainer.weights_step == 4
    assert trainer.state.best_model_checkpoint == str(tmp_path / "out" / "checkpoint-4")
    assert checkpoint.steps_in(tmp_path / "out") == ["checkpoint-4", "checkpoint-2", "checkpoint-1"]
    figure("disks that failed", 1, 1)


# ---- Processes that have other folders ----


def on_two(folder):
    found = {}

    def refusal(name, act):
        try:
            act()
        except ValueError as problem:
            found[name] = str(problem)

    trainer = trainer_of(Path(folder) / "out", **SAVES)
    trainer.train()
    given = {"only one goes on": [None, True], "one by its path": [True, str(Path(folder) / "out" / "checkpoint-2")]}
    for name, of_ranks in given.items():
        refusal(name, lambda of_ranks=of_ranks: trainer_of(Path(folder) / "out").train(of_ranks[rank()]))
    best = {**SAVES, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    own = Path(folder) / f"disk{rank()}"
    own.mkdir()
    os.chdir(own)
    refusal("the best is elsewhere", lambda: trainer_of("out", **best).train())
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    refusal("on each node", lambda: trainer_of(Path(folder) / "out", save_on_each_node=True))
    return found


@pytest.mark.distributed
def test_processes_that_have_other_folders(tmp_path):
    one, two = run_ranks(on_two, 2, tmp_path, folder=tmp_path / "ranks")
    assert one == two
    same = "resume_from_checkpoint: expected the same on every process, but got"
    assert one["only one goes on"] == f"{same} None on rank 0 and True on rank 1."
    assert one["one by its path"] == f"{same} True on rank 0 and '{tmp_path}/out/checkpoint-2' on rank 1."
    assert re.search(
        r"expected out/checkpoint-\d on every process, but rank 1 has no weights there", one["the best is elsewhere"]
    )
    assert one["on each node"].startswith(
        "save_on_each_node: expected False, because transformers writes weights on the first"
    )


# ---- File systems that are full, or read only ----


@pytest.fixture
def mounted(tmp_path):
    """Mount a small file system, where that is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "faults", folder], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a file system is not allowed")
        return folder

    yield mount
    subprocess.run(["umount", "-l", folder], capture_output=True)


@pytest.mark.whole
@pytest.mark.parametrize("kilobytes", [40, 80, 120, 200, 280, 360, 440])
def test_a_disk_that_is_full(mounted, whole, kilobytes, figure):
    """Some checkpoints fit: those that are there are whole, and a run that goes on from the last ends with the same bits."""
    folder = mounted(f"size={kilobytes}k")
    found, errors, _told, names = run(folder)
    assert tiny.differing(whole, found) == []
    assert len(names) + len(errors) == 6 and errors
    assert all(checkpoint.is_whole(folder / "out" / name) for name in names)
    if names:
        again = outcome(trainer_of(folder / "out", save_strategy="no", eval_strategy="no"), True)
        assert tiny.differing(whole["weights"], again["weights"]) == []
    figure("disks that were full", 1, 1)


@pytest.mark.whole
def test_a_disk_that_becomes_read_only(mounted, whole, figure):
    folder = mounted("size=4000k")
    (folder / "out").mkdir()

    def read_only():
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)

    errors = Errors()
    found = outcome(trainer_of(folder / "out", callbacks=[Does("on_step_end", 3, read_only)], **SAVES))
    assert tiny.differing(whole, found) == []
    assert len(errors.said) == 4 and all("Read-only file system" in error for error in errors.said)
    assert checkpoint.steps_in(folder / "out") == ["checkpoint-2", "checkpoint-1"]
    figure("disks that became read only", 1, 1)
