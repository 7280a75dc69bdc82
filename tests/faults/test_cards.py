"""Cards that were cut, emptied, filled with zeros or replaced by something else; writing that fails or is killed in the middle."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import signal
from pathlib import Path
from unittest.mock import patch

import pytest
from huggingface_hub import ModelCard

from hf_sampa import SAMPaTrainer
from hf_sampa.cards import model_card
from hf_sampa.cards.signature import FORMER, MARKER, signed, why_left_alone
from tests import models, tiny
from tests.division import divided
from tests.ranks import run_ranks


def trained(folder, model=tiny.bert, **changes) -> SAMPaTrainer:
    """A run of two steps, saved after each."""
    args = tiny.arguments(folder, **{"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **changes})
    trainer = SAMPaTrainer(model=model(), args=args, train_dataset=tiny.sentences(16))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """A card of ours, with a letter that takes several bytes."""
    trainer = trained(tmp_path_factory.mktemp("run"))
    trainer.card_facts.remarks = ["trained in Zürich – twice"]
    trainer.create_model_card()
    return (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")


def former(text: str) -> str:
    """As an earlier version signed it."""
    head, _, body = re.sub(r"^# .*\n", "", text, count=1, flags=re.M).partition("\n---\n\n")
    plain = f"{head}\n---\n\n<!-- {MARKER} -->\n\n{body}"
    return plain.replace(f"{MARKER} -->", f"{MARKER} {hashlib.sha256(plain.encode()).hexdigest()[:16]} -->", 1)


# Whose it is


def taken_for_somebodys(folder: Path, contents) -> int:
    file = folder / "README.md"
    found = 0
    for content in contents:
        file.write_bytes(content)
        found += why_left_alone(file) is not None
    return found


@pytest.mark.parametrize("step", divided([7, 1], whole=[1]))
def test_a_card_that_was_cut_at_any_place_is_written_anew(tmp_path, text, figure, step):
    whole = text.encode()
    places = [*range(100), *range(100, len(whole) + 1, step)]
    wrong = taken_for_somebodys(tmp_path, (whole[:place] for place in places))
    figure("cards that were cut", len(places), len(places) - wrong)
    assert wrong == 0
    zeros = [whole[:place] + bytes(len(whole) - place) for place in range(0, len(whole), 64)]
    zeros += [former(text).encode()[:place] + bytes(64) for place in (former(text).index("# run"), 4096)]
    wrong = taken_for_somebodys(tmp_path, [*zeros, b"", b"\n", bytes(100), whole.replace(b"\n", b"\r\n")])
    figure("cards with zeros, empty, or with other line ends", len(zeros) + 4, len(zeros) + 4 - wrong)
    assert wrong == 0


def persons_cards(text: str) -> dict[str, str]:
    """What a person may make of a card of ours."""
    lines = text.splitlines(keepends=True)
    end_of_metadata = lines.index("---\n", 1)
    metadata = "".join(lines[: end_of_metadata + 1])
    cards = {f"a line after line {i}": "".join([*lines[:i], "Mine.\n", *lines[i:]]) for i in range(len(lines) + 1)}
    cards |= {f"another line {i}": "".join([*lines[:i], "Mine.\n", *lines[i + 1 :]]) for i in range(len(lines))}
    cards |= {
        f"shortened after line {i}, and added to": "".join([*lines[:i], "Mine.\n", "And more.\n"])
        for i in range(2, len(lines))
    }
    return cards | {
        "another body": f"{metadata}\n# Mine\n",
        "added to without an end of line": f"{text}Mine.",
        "without our comment": re.sub(r"^# .*\n", "", text, count=1, flags=re.M),
        "own": "# Mine\n",
        "own metadata": "---\nlicense: mit\n---\n",
        "a rule": "---\n\nMine.\n",
        "one word": "Mine",
        "former, changed": former(text).replace("loss", "my loss"),
        "former, added to": former(text) + "Mine.\n",
        "former, shortened": former(text)[:-200],
    }


def test_what_a_person_wrote_or_changed_is_never_written_over(tmp_path, text, figure):
    cards = persons_cards(text)
    (tmp_path / "README.md").write_text(former(text), encoding="utf-8")
    assert why_left_alone(tmp_path / "README.md") is None and FORMER.search(former(text))
    left = [name for name, card in cards.items() if taken_for_somebodys(tmp_path, [card.encode()])]
    figure("cards of persons", len(cards), len(left))
    assert left == list(cards)


def test_what_is_lost_of_a_cut_card_is_kept_beside_it(tmp_path, text, caplog):
    trainer = trained(tmp_path)
    card = tmp_path / "README.md"
    cut = text[: len(text) // 2]
    card.write_text(cut, encoding="utf-8")
    with tiny.transformers_log(caplog):
        trainer.create_model_card()
    assert f"{card} was cut, and is written anew. What there was of it is in _README.md.cut." in caplog.text
    assert (tmp_path / "_README.md.cut").read_text(encoding="utf-8") == cut
    assert "- steps: 2," in ModelCard.load(card).text


def test_empty_cards_are_written_anew_in_the_checkpoint_and_beside_it(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        (folder / "README.md").touch()
    trained(tmp_path).create_model_card()
    for name in ("README.md", "checkpoint-1/README.md", "checkpoint-2/README.md"):
        assert "- steps: " in (tmp_path / name).read_text()
    assert not list(tmp_path.rglob("_*"))


def test_the_cut_card_of_a_run_is_not_signed_as_a_whole_one(tmp_path, text):
    card = tmp_path / "README.md"
    card.write_text(text[:-100], encoding="utf-8")
    assert not model_card.is_of_a_run(card)
    card.write_text(text, encoding="utf-8")
    assert model_card.is_of_a_run(card)
    card.write_text(former(text), encoding="utf-8")
    assert model_card.is_of_a_run(card)
    model_card.lead_to(card, "user/name")
    assert why_left_alone(card) is None and card.read_text(encoding="utf-8").count(MARKER) == 1
    card.write_text(card.read_text(encoding="utf-8")[:-1], encoding="utf-8")
    assert not model_card.is_of_a_run(card)


# What is no card


@pytest.mark.parametrize("kind", ["folder", "bytes", "utf-16"])
def test_what_is_no_text_is_left_alone_and_named(tmp_path, caplog, kind):
    why = "it is no file" if kind == "folder" else "it is no text in UTF-8"

    def put(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind == "folder":
            file.mkdir()
            (file / "mine").touch()
        else:
            file.write_bytes(b"\xff\xfe\x00 mine" if kind == "bytes" else "# Mine".encode("utf-16"))

    put(tmp_path / "README.md")
    put(tmp_path / "checkpoint-2" / "README.md")
    before = {
        file: file.is_dir() or file.read_bytes() for file in tmp_path.rglob("*") if file.name in ("README.md", "mine")
    }
    trainer = trained(tmp_path)
    with tiny.transformers_log(caplog):
        trainer.create_model_card()
        trainer.save_model()
    assert f"{tmp_path / 'README.md'} is left as it is, since {why}. Remove it to have it written anew." in caplog.text
    assert (tmp_path / "checkpoint-2" / "sampa.json").exists()
    assert before == {file: file.is_dir() or file.read_bytes() for file in before}


# Writing that does not come to its end


def full_disk():
    """Without room for more than half of a card."""
    write = Path.write_text

    def write_half(file, content, *args, **kwargs):
        write(file, content[: len(content) // 2], *args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    return patch.object(Path, "write_text", write_half)


def test_on_a_full_disk_the_old_card_stays(tmp_path, caplog):
    trainer = trained(tmp_path)
    trainer.create_model_card()
    card = tmp_path / "README.md"
    before = card.read_bytes()
    with full_disk(), pytest.raises(OSError, match="No space left"):
        trainer.create_model_card(license="mit")
    with full_disk(), tiny.transformers_log(caplog):
        trainer.push_in_progress = None
        trainer._card.push(lambda: None)
    assert card.read_bytes() == before and not list(tmp_path.rglob("_*"))
    assert f"There is no new card in {tmp_path}: OSError: " in caplog.text


@pytest.mark.filterwarnings("default:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_save_that_fails_leaves_the_card_as_it_was(tmp_path):
    trainer = trained(tmp_path, model=models.lora_bert)
    trainer.create_model_card()
    before = (tmp_path / "README.md").read_bytes()
    with patch(
        "hf_sampa.trainer.Trainer._save",
        side_effect=lambda *_: shutil.copy(__file__, tmp_path / "README.md") and 1 / 0,
    ):
        with pytest.raises(ZeroDivisionError):
            trainer.save_model()
    assert (tmp_path / "README.md").read_bytes() == before


def killed_while_it_writes(folder, place):
    """Write a card, and be killed when so much of the next one is written."""
    trainer = SAMPaTrainer(model=tiny.bert(), args=tiny.arguments(folder), train_dataset=tiny.sentences(8))
    trainer.create_model_card()
    (folder / "before").write_bytes((folder / "README.md").read_bytes())
    write = Path.write_text

    def write_some(file, content, *args, **kwargs):
        write(file, content[: int(place * len(content))], *args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(Path, "write_text", write_some):
        trainer.create_model_card(license="mit")


@pytest.mark.distributed
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_process_that_is_killed_while_it_writes_leaves_the_old_card(tmp_path, place):
    with pytest.raises(FileNotFoundError, match="rank0"):  # of what it was to return
        run_ranks(killed_while_it_writes, 1, tmp_path / "out", place, folder=tmp_path / "ranks")
    out = tmp_path / "out"
    assert (out / "README.md").read_bytes() == (out / "before").read_bytes()
    # With a name that Trainer's pushes leave out; the next card takes its place.
    assert [file.name for file in out.iterdir() if "partial" in file.name] == ["_README.md.partial"]
    trained(out).create_model_card()
    assert not (out / "_README.md.partial").exists()


def test_a_partial_card_in_a_checkpoint_does_not_go_into_the_one_that_replaces_it(tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "_README.md.partial").write_text("half")
    (folder / "notes.txt").write_text("mine")
    trained(tmp_path)
    assert {"notes.txt", "README.md"} <= {file.name for file in folder.iterdir()}
    assert not (folder / "_README.md.partial").exists()


def test_the_checksums_are_of_the_text(text):
    assert ModelCard(text).data.model_name == ModelCard(former(text)).data.model_name
    assert signed(re.sub(r"^# .*\n", "", text, count=1, flags=re.M)) == text
