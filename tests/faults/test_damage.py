"""Files of a checkpoint that were damaged: each is found before anything is loaded, or harms nothing."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial

import pytest
import torch

from hf_sampa.checkpoints import checkpoint, manifest, whole
from tests import tiny
from tests.division import divided
from tests.former import as_before
from tests.test_saving import Does, trainer_of


RUN = {
    "model": partial(tiny.bert, 0.1),
    "dataset": tiny.sentences(14),
    "variant": "vasso",
    "max_steps": 4,
    "logging_steps": 3,
}
SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run of four steps, and its folder with checkpoints at steps 2 and 3."""
    folder = tmp_path_factory.mktemp("written")
    whole = tiny.comparable(tiny.run(folder, **RUN, **SAVING))
    shutil.rmtree(folder / "checkpoint-4")
    return whole, folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written[1], tmp_path / "out")


def resumed(folder, resume=True, **changes):
    return tiny.comparable(tiny.run(folder, resume=resume, **{**RUN, **changes}))


def damages(raw: bytes, flips: int, rng: random.Random):
    """By name: what is left of a file."""
    yield "missing", None
    yield "empty", b""
    yield "cut", raw[: len(raw) // 2]
    yield "a byte less", raw[:-1]
    yield "a byte more", raw + b"\0"
    yield "zeros", bytes(len(raw))
    yield "noise", rng.randbytes(len(raw))
    yield "half of it zeros", raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2)
    for _ in range(flips):
        bit = rng.randrange(8 * len(raw))
        yield f"flip of bit {bit}", raw[: bit // 8] + bytes([raw[bit // 8] ^ 1 << bit % 8]) + raw[bit // 8 + 1 :]


FILES = (
    *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "sampa.safetensors", "sampa_recipe.pt"),
    *("sampa.json", "trainer_state.json", "config.json", "training_args.bin", "README.md"),
)


def test_all_files_are_damaged(written):
    assert {file.name for file in (written[1] / "checkpoint-3").iterdir()} == set(FILES)


def damage_all(written, folder, name, flips, figure):
    """Damage one file in every way. What is not refused by its name must train to the same bits."""
    last = folder / "checkpoint-3"
    raw = (last / name).read_bytes()
    tried, right = 0, []
    for kind, content in damages(raw, flips, random.Random(f"1 {name}")):
        (last / name).unlink(missing_ok=True)
        if content is not None:
            (last / name).write_bytes(content)
        tried += 1
        try:
            checkpoint.inspect(last)
        except ValueError as problem:
            right.append(name in str(problem) and str(last) in str(problem) or (kind, str(problem)))
        else:
            right.append(not tiny.differing(written[0], resumed(folder / kind, str(last))) or (kind, "other bits"))
    figure(f"damage of {name}", tried, right.count(True))
    assert right == [True] * tried


@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_or_harmless(written, folder, name, figure):
    damage_all(written, folder, name, 8 if name != "README.md" else 0, figure)


@pytest.mark.whole
@pytest.mark.parametrize("name", [name for name in FILES if name != "README.md"])
def test_a_thousand_flips_in_every_file(written, folder, name, figure):
    damage_all(written, folder, name, 1000, figure)


@pytest.mark.parametrize("name", ["rng_state.pth", "sampa_recipe.pt", "sampa.json", "trainer_state.json"])
def test_the_one_before_is_taken(written, folder, caplog, name, figure):
    (folder / "checkpoint-3" / name).write_bytes(b"")
    with tiny.transformers_log(caplog):
        found = resumed(folder)
    (warning,) = {record.message for record in caplog.records if "Passing over a checkpoint" in record.message}
    assert name in warning and "checkpoint-3" in warning
    assert tiny.differing(written[0], found) == []
    with pytest.raises(ValueError) as refused:
        resumed(folder, str(folder / "checkpoint-3"))
    assert warning.partition("checkpoint. ")[2] in str(refused.value)
    figure("passed over", 1, 1)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("damage", ["empty", "cut", "noise"])
def test_checkpoints_without_checksums(written, folder, name, damage, figure):
    """Those of earlier versions and of plain Trainer say by themselves what is cut."""
    last = folder / "checkpoint-3"
    raw = (last / name).read_bytes()
    (last / name).write_bytes(dict(damages(raw, 0, random.Random(1)))[damage])
    as_before(last)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"checkpoint-3 is torn or damaged: {name} is damaged"):
            checkpoint.inspect(last)
        for ours in last.glob("sampa*"):
            ours.unlink()
    figure("damage of files without checksums", 2, 2)


def test_a_damaged_best_model_is_not_loaded(tmp_path, figure):
    def damage():
        for folder in tmp_path.glob("checkpoint-*"):
            file = folder / "model.safetensors"
            file.write_bytes(file.read_bytes()[:-1] + b"?")

    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(
        tmp_path, callbacks=[Does("on_save", 4, damage)], **{**settings, "load_best_model_at_end": True}
    )
    with pytest.raises(
        ValueError, match="^load_best_model_at_end: The checkpoint .* is not as it was written: model.safetensors"
    ):
        trainer.train()
    figure("damage of the best model", 1, 1)


def test_a_best_model_needs_no_optimizer(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}

    def removed():
        (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
        (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()

    trainer = trainer_of(
        tmp_path, callbacks=[Does("on_save", 4, removed)], **{**settings, "load_best_model_at_end": True}
    )
    trainer.train()
    assert trainer.weights_step == trainer.state.best_global_step


@pytest.mark.parametrize("flips", divided([40, 3000], whole=[3000]))
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"])
def test_whatever_is_damaged_is_looked_at_without_an_error(folder, name, flips, figure):
    """Also a pickle as torch wrote it before 1.6, which has no checksums."""
    file = folder / "checkpoint-3" / name
    texts = [file.read_bytes()]
    if name == "scheduler.pt":
        torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
        texts.append(file.read_bytes())
    tried = 0
    for text in texts:
        for _kind, content in damages(text, flips, random.Random(f"2 {name}")):
            if content is not None:
                file.write_bytes(content)
                whole.unreadable(file)
                tried += 1
    figure("files looked at without checksums", tried, tried)


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("README.md", "training_args.bin")])
@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_what_cannot_be_ignored(written, folder, caplog, name, damage, figure):
    """The way out is not shown where it leads nowhere, and a file that is not there is not ignored."""
    last = folder / "checkpoint-3"
    (last / name).unlink()
    if damage == "empty":
        (last / name).touch()
    elif name == "config.json":
        pytest.skip("a run goes on without it")
    for ignore in (False, True):
        with pytest.raises(ValueError, match=name) as refused:
            checkpoint.inspect(last, ignore)
        assert "ignore_changed_files" not in str(refused.value)
    with tiny.transformers_log(caplog):
        assert tiny.differing(written[0], resumed(folder, ignore_changed_files=True)) == []
    figure("damage that cannot be ignored", 1, 1)


class Mine:
    """What an optimizer of one's own may keep."""


def test_states_that_torch_does_not_load(written, folder, caplog, figure):
    """They were written as they are, and would end in advice to set weights_only=False, which nobody can."""
    last = folder / "checkpoint-3"
    torch.save({"mine": Mine()}, last / "scheduler.pt")
    content = json.loads((last / "sampa.json").read_text())
    content["files"]["scheduler.pt"] = vars(whole.recorded(last / "scheduler.pt"))
    (last / "sampa.json").write_text(put(content, ("format",), manifest.FORMAT))
    words = "checkpoint-3 cannot be loaded: scheduler.pt holds tests.faults.test_damage.Mine, which torch.load takes for unsafe"
    with pytest.raises(ValueError, match=words):
        resumed(folder, str(last))
    with tiny.transformers_log(caplog):
        assert tiny.differing(written[0], resumed(folder)) == []
    assert words in caplog.text
    with torch.serialization.safe_globals([Mine]):
        assert checkpoint.inspect(last) == {}
    figure("passed over", 2, 2)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("content", [{}, {"other": 1}, [1]], ids=str)
def test_states_of_another_kind(folder, name, content, figure):
    """Of plain Trainer's checkpoints, which have no checksums."""
    last = folder / "checkpoint-3"
    for ours in last.glob("sampa*"):
        ours.unlink()
    torch.save(content, last / name)
    try:
        resumed(folder, str(last), variant="sam")
    except ValueError as problem:
        assert f"{last} cannot be loaded" in str(problem) and name.partition(".")[0] in str(problem)
    figure("states of another kind", 1, 1)


# ---- sampa.json, of another program ----


def paths(value, before=()):
    """Of everything in a JSON document, the way to it."""
    for name, each in value.items() if isinstance(value, dict) else ():
        yield (*before, name)
        if before != ("files",):
            yield from paths(each, (*before, name))


OTHER_KINDS = {"null": None, "text": "x", "negative": -1, "infinite": float("inf"), "a list": [1], "a dict": {}}


def put(document, path, value):
    """A copy of `document` with another value at `path`, or none where it is ``...``; with the right checksum."""
    found = inner = json.loads(json.dumps(document))
    for name in path[:-1]:
        inner = inner[name]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    found.pop("checksum", None)
    return json.dumps({**found, "checksum": manifest._checksum(found)})


@pytest.mark.parametrize("share", divided([8, 1], whole=[1]))
def test_keys_of_another_kind(folder, share, figure):
    """Each is refused before the first step, in words of our own, or does not matter."""
    last = folder / "checkpoint-3"
    document = json.loads((last / "sampa.json").read_text())
    cases = [(path, each) for path in paths(document) for each in {"missing": ..., **OTHER_KINDS}.items()]
    cases = random.Random(1).sample(cases, len(cases) // share)
    wrong = []
    for path, (kind, value) in cases:
        (last / "sampa.json").write_text(put(document, path, value))
        try:
            resumed(folder / "again", str(last), max_steps=3)
        except ValueError as problem:
            if str(last) not in str(problem):
                wrong.append((path, kind, str(problem)))
        # Which is what must not be.
        except Exception as problem:
            wrong.append((path, kind, repr(problem)))
    figure("keys of sampa.json of another kind", len(cases), len(cases) - len(wrong))
    assert wrong == []


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"format": 2, "files": {"../../outside": {"bytes": 1}}}',
        json.dumps({"format": 2, "files": {"n" * 5000: {"bytes": 1}}}),
        json.dumps({"format": 10**30}),
        '{"format": ' + "9" * 5000 + "}",
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
    ids=["deep", "outside", "a long name", "a large format", "a long number", "no text"],
)
def test_hostile_manifests(folder, text, figure):
    (folder / "checkpoint-3" / "sampa.json").write_text(text)
    with pytest.raises(ValueError, match="sampa.json") as refused:
        checkpoint.inspect(folder / "checkpoint-3")
    assert len(str(refused.value)) < 1000
    figure("hostile manifests", 1, 1)
