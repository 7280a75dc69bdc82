"""Secrets in the command line and in the arguments: not in a card, in sampa.json, trainer_state.json or training_args.bin."""

from __future__ import annotations

import copy
import json
import pickle
import random
import shlex
import string
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import classification_arguments
import glue_arguments
import pytest
import torch
import vit_arguments
from peft import LoraConfig, get_peft_model

from hf_sampa import SAMPaTrainer, SAMPaTrainingArguments
from hf_sampa.cards import declare_options, started
from hf_sampa.cards.harmless import is_plain, masked, shown, types_of
from hf_sampa.variants.directions import Smoothed
from hf_sampa.variants.recipe import Recipe
from tests import tiny
from tests.division import divided
from tests.former import as_before
from tests.hub import Hub
from tests.project import ROOT
from tests.test_docs import PAGES, commands


LETTERS = string.ascii_letters + string.digits
HEX = "0123456789abcdef"
LONGEST = 5  # characters of a secret that may be found somewhere by chance


def secrets(seed: int) -> dict[str, tuple[str, str]]:
    """A secret of every kind, and the word that it is in."""
    drawn = random.Random(seed)

    def draw(count: int, of: str = LETTERS) -> str:
        return "".join(drawn.choices(of, k=count))

    base64, upper = f"{LETTERS}+/", string.ascii_uppercase + string.digits
    forms = {
        "Hub": ("hf_{}", draw(34)),
        "Hub, of an organization": ("api_org_{}", draw(34)),
        "GitHub": ("ghp_{}", draw(36)),
        "GitHub, OAuth": ("gho_{}", draw(36)),
        "GitHub, of an app": ("ghs_{}", draw(36)),
        "GitHub, of a user of an app": ("ghu_{}", draw(36)),
        "GitHub, refresh": ("ghr_{}", draw(76)),
        "GitHub, fine-grained": ("github_pat_{}", f"{draw(22)}_{draw(59)}"),
        "GitLab": ("glpat-{}", draw(20, f"{LETTERS}-_")),
        "GitLab, trigger": ("glptt-{}", draw(40, HEX)),
        "GitLab, runner": ("glrt-{}", draw(20, f"{LETTERS}-_")),
        "Slack, bot": ("xoxb-{}", f"{draw(12, string.digits)}-{draw(12, string.digits)}-{draw(24)}"),
        "Slack, user": ("xoxp-{}", f"{draw(12, string.digits)}-{draw(12, string.digits)}-{draw(32, HEX)}"),
        "Slack, app": ("xapp-1-{}", f"A{draw(10, upper)}-{draw(13, string.digits)}-{draw(64, HEX)}"),
        "AWS, id": ("AKIA{}", draw(16, upper)),
        "AWS, id of a session": ("ASIA{}", draw(16, upper)),
        "AWS, secret": ("{}", draw(40, base64)),
        "OpenAI": ("sk-{}", draw(48)),
        "OpenAI, project": ("sk-proj-{}", draw(120, f"{LETTERS}-_")),
        "Anthropic": ("sk-ant-api03-{}", draw(95, f"{LETTERS}-_")),
        "Stripe": ("sk_live_{}", draw(24)),
        "Google": ("AIza{}", draw(35, f"{LETTERS}-_")),
        "Google, OAuth": ("ya29.{}", draw(60, f"{LETTERS}-_")),
        "npm": ("npm_{}", draw(36)),
        "PyPI": ("pypi-{}", draw(120, f"{LETTERS}-_")),
        "W&B": ("{}", draw(40, HEX)),
        "Datadog": ("{}", draw(32, HEX)),
        "UUID": ("{}", f"{draw(8, HEX)}-{draw(4, HEX)}-{draw(4, HEX)}-{draw(4, HEX)}-{draw(12, HEX)}"),
        "Azure": ("{}==", draw(86, base64)),
        "JWT": ("eyJhbGciOiJIUzI1NiJ9.{}", f"eyJzdWIiOiI{draw(20)}.{draw(43, f'{LETTERS}-_')}"),
        "URL, password": ("https://user:{}@host/x", draw(14)),
        "URL, token": ("https://{}@host/x", draw(20)),
        "URL, user": ("postgresql://{}@host/db", draw(10, string.ascii_lowercase)),
        "URL, sig": ("https://host/x?sv=1&sig={}", draw(43)),
        "URL, signature of AWS": ("https://host/x?X-Amz-Signature={}", draw(64, HEX)),
        "URL, path": ("https://hooks.host/services/{}", draw(24)),
        "header, key": ("X-Api-Key: {}", draw(32)),
        "header, basic": ("Authorization: Basic {}", draw(24, base64)),
        "header, bearer": ("Authorization: Bearer {}", draw(40)),
        "header, cookie": ("Cookie: session={}", draw(26)),
        "pairs": ("lr=1,token={}", draw(20)),
        "pair": ("HF_TOKEN={}", draw(20)),
        "connection": ("Server=x;Password={};", draw(12)),
        "JSON": ('{{"token": "{}"}}', draw(20)),
        "JSON, nested": ('{{"a": {{"headers": ["x", "{}"]}}}}', draw(20)),
        "JSON, key": ('{{"{}": 1}}', draw(20)),
        "absolute path": ("/home/{}/out", draw(10, string.ascii_lowercase)),
        "home": ("~{}/out", draw(10, string.ascii_lowercase)),
        "path of Windows": ("C:\\Users\\{}\\out", draw(10, string.ascii_lowercase)),
        "private key": ("-----BEGIN KEY-----\n{}", draw(60, base64)),
    }
    return {kind: (secret, form.format(secret)) for kind, (form, secret) in forms.items()}


# Words that no look tells from others: not to be shown where their option says nothing, or says that they are secret.
PASSWORDS = {
    "password": "hunterxyz",
    "pass phrase": "correct horse battery",
    "number": "84759302847",
    "dashed": "-secretword",
}
# Where nothing is known of a value, or where it may only be a number, one of a few words, or a name.
UNKNOWN = (
    "--pass --db_pass --token2 --hftoken --HFToken --hub_tok --hub-tok --push_to_hub_token --hub_token --hub-token --hubToken "
    "--wandb_api_key --header --password -p --x --endpoint --learn --seeds"
).split()
TYPED = (
    "--learning_rate --seed --bf16 --do_train --lr_scheduler_type --optim --optim_args --lr_scheduler_kwargs --accelerator_config "
    "--hub_strategy --rho --variant_args --no_overlap_exchange --trackio_space_id --hub_revision --gradient_checkpointing_kwargs"
).split()
NAMES = "--output_dir --run_name --report_to --hub_model_id --optim_target_modules --label_names --model_name_or_path".split()


def command_lines(kind: str, secret: str, word: str, options: list[str]) -> list[list[str]]:
    """A word in all places that a command line has."""
    found = [[option, word] for option in options] + [[f"{option}={word}"] for option in options]
    found += [["--x", "1", option, word, "--bf16"] for option in options]
    return found + [[option, "1", word] for option in options]


def positions(kind: str, secret: str, word: str) -> list[list[str]]:
    # A number where numbers are expected is no secret, and a word where names are looks like one.
    options = UNKNOWN + (TYPED if kind != "number" else []) + (NAMES if kind not in PASSWORDS else [])
    alone = [[word], ["--", word], ["--do_train", word], ["--output_dir", "out", word], [f"-p{word}"], [f"-{word}"]]
    alone += [[f"--{word}"], ["--hub_token", f"--{word}"], ["--password", f"-{word}"], ["--api_keys", "k1", word]]
    alone += [[f"{word}.json"], ["--label_names", "a", word, "b"], ["--variant_args", "theta=0.5", f"token={word}"]]
    return command_lines(kind, secret, word, options) + ([] if kind in PASSWORDS else alone)


def is_in(secret: str, text: str) -> bool:
    """Whether so much of `secret` is in `text` that it cannot be by chance."""
    pieces = [secret[i : i + LONGEST + 1] for i in range(max(1, len(secret) - LONGEST))]
    return any(piece in text for piece in pieces)


@pytest.fixture
def from_a_script(monkeypatch):
    """This process is one that Python started from a script, without a launcher."""
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=None))
    for name in started.VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def script(monkeypatch, from_a_script):
    def start(words):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        return started.command(SAMPaTrainingArguments, 1)

    declare_options()
    return start


@pytest.mark.parametrize("seed", divided(range(8), whole=range(1, 8)))
def test_no_secret_is_in_the_command_whatever_its_form_and_place(script, figure, seed):
    kinds = secrets(seed) | {kind: (secret.lstrip("-"), secret) for kind, secret in PASSWORDS.items()}
    tried, shown = 0, []
    for kind, (secret, word) in kinds.items():
        for words in positions(kind, secret, word):
            tried += 1
            if is_in(secret, script(words).partition("train.py")[2]):
                shown.append((kind, words))
    figure("secrets in commands", tried, tried - len(shown))
    assert shown == [] and len(kinds) * len(UNKNOWN) > 93


def test_an_option_that_may_be_the_value_of_the_one_before_is_hidden(script):
    for words, expected in {
        "--password --Hidden --bf16": "--password HIDDEN --bf16",
        "--flag --other 3 --seed 3": "--flag HIDDEN HIDDEN --seed 3",
        "--hub_token -x --seed -3": "--hub_token HIDDEN --seed -3",
        "--bf16 --my-flag word": "--bf16 --my-flag HIDDEN",
        "--x 1 2 --y=3 4": "--x HIDDEN HIDDEN --y=HIDDEN HIDDEN",
    }.items():
        assert script(words.split()) == f"```bash\npython train.py {expected}\n```"


@pytest.mark.parametrize(
    "words",
    [
        "--optim adamw_torch --optim_args amsgrad=True,eps=1e-6 --lr_scheduler_type cosine",
        "--variant vasso --variant_args theta=0.9 --rho 0.1 --lmbda .2 --method sampa",
        "--bf16 --do_train false --no_overlap_exchange --save_total_limit 2 --learning_rate=1e-3 --seed -1",
        "--run_name rte-seed-1 --output_dir out/rte --report_to tensorboard --hub_model_id user/name",
        "--label_names start_positions end_positions --metric_for_best_model eval_f1 --greater-is-better True",
        "--model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --data_dir ../data --dataset_name nyu-mll/glue",
        "arguments.json",
        "configs/rte_seed_1.yaml",
    ],
)
def test_a_command_without_secrets_stays_as_it_is(script, words):
    assert script(words.split()) == f"```bash\npython train.py {words}\n```"


def test_json_is_shown_where_it_is_of_numbers(script):
    words = ["--lr_scheduler_kwargs", '{"num_cycles": 2, "deep": {"a": [1, true, null]}}']
    assert shlex.split(script(words).splitlines()[1])[2:] == words
    assert "HIDDEN" in script([words[0], '{"num_cycles": "2"}']) and "HIDDEN" in script([words[0], '{"password": 2}'])


def test_long_words_are_hidden_in_no_time(script):
    before = time.monotonic()
    for piece in ("hf_", "://", "/", "x-", "a=1,", '{"a":', "1", "A"):
        for option in ("--run_name", "--optim_args", "--lr_scheduler_kwargs", "--x"):
            assert "HIDDEN" in script([option, piece * 40_000])
    assert time.monotonic() - before < 10


def test_of_an_absolute_path_the_name_is_shown(script):
    assert " --output_dir HIDDEN/rte-sampa\n" in script(["--output_dir", "/home/me/rte-sampa/"])


def test_what_is_around_the_options_is_shown_as_far_as_it_is_harmless(script, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    assert "\nACCELERATE_DYNAMO_BACKEND=inductor python train.py\n" in script([])
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "https://me:word@host")
    assert "\nACCELERATE_DYNAMO_BACKEND=HIDDEN python train.py\n" in script([])
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    monkeypatch.setattr(sys, "argv", ["/home/me/train.py"])
    shown_command = started.command(SAMPaTrainingArguments, 1)
    assert "/home" not in shown_command and shown_command.startswith("Put the folder of `train.py` before its name:")


@pytest.mark.filterwarnings("default:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_of_an_adapter_names_of_modules_are_shown_and_other_texts_are_not(tmp_path):
    secret = "ghp_" + "a1B2" * 9
    config = LoraConfig(r=2, target_modules=["query", "value"], layers_to_transform=[0], layers_pattern="layer")
    model = get_peft_model(tiny.bert(), config)
    config = model.peft_config["default"]
    config.rank_pattern, config.target_parameters = {secret: 4}, [secret]
    trainer = SAMPaTrainer(model=model, args=tiny.arguments(tmp_path), train_dataset=tiny.sentences(8))
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "r 2, target_modules ['query', 'value'], layers_to_transform [0], layers_pattern layer" in card
    assert "rank_pattern HIDDEN" in card and "target_parameters HIDDEN" in card and not is_in(secret, card)


PARSERS = {
    "glue/run_glue.py": glue_arguments,
    "glue/run_classification.py": classification_arguments,
    "vit_finetune/run_vit.py": vit_arguments,
}


def test_the_commands_of_the_documentation_are_shown_whole(tmp_path, monkeypatch, from_a_script, figure):
    monkeypatch.chdir(tmp_path)
    found = [words for page in PAGES for words in commands(page) if set(words) & PARSERS.keys()]
    for text in ((ROOT / script).read_text() for script in PARSERS):
        lines = text.partition('"""')[2].partition('"""')[0].replace("\\\n", " ").splitlines()
        found += [shlex.split(line) for line in lines if any(script in line.split() for script in PARSERS)]
    changed = []
    for words in found:
        place = next(i for i, word in enumerate(words) if word in PARSERS)
        given = words[place + 1 :]
        if "--help" in given:
            continue
        arguments = PARSERS[words[place]].parse_args(given)[-1]
        monkeypatch.setattr(sys, "argv", words[place:])
        shown = shlex.split(started.command(type(arguments), 1, resumed=True).splitlines()[1])[1:]
        if shown != words[place:]:
            changed.append(shown)
    figure("commands of the documentation that stay whole", len(found), len(found) - len(changed))
    assert changed == [] and len(found) > 8


NAMES_OF_MODELS = (
    "bert-base-uncased google/vit-base-patch16-224-in21k Qwen/Qwen2.5-0.5B-Instruct meta-llama/Llama-3.1-8B-Instruct "
    "microsoft/deberta-v3-base google/bert_uncased_L-2_H-128_A-2 mistralai/Mixtral-8x7B-v0.1 facebook/wav2vec2-large-xlsr-53 "
    "FacebookAI/xlm-roberta-large-finetuned-conll03-english distilbert-base-uncased-finetuned-sst-2-english "
    "DistilBertForSequenceClassification out/sst2-20240131T120000 hf_sampa_rte_rho_0_05 task_classification glue-sampa-long-name"
).split()


def test_names_that_people_make_are_told_from_random_ones(figure):
    assert [name for name in NAMES_OF_MODELS if not is_plain(name)] == []
    drawn = random.Random(0)
    alphabets = [
        (LETTERS, 20),
        (LETTERS, 40),
        (HEX, 32),
        (f"{LETTERS}+/", 40),
        (string.ascii_uppercase + "234567", 16),
    ]
    words = ["".join(drawn.choices(letters, k=count)) for letters, count in alphabets for _ in range(200)]
    hidden = [word for word in words if not is_plain(word)]
    figure("random words as names", len(words), len(hidden))
    # A letter for a letter, nothing tells all of them from words; every vendor's own form is known besides.
    assert len(hidden) >= 0.995 * len(words)


# ---- Arguments ----


@dataclass
class Mine(SAMPaTrainingArguments):
    """With everything that somebody's class may declare."""

    wandb_api_key: str = ""
    pin_code_token: int = 0
    note: str = ""
    place: str | None = None
    headers: dict | None = None
    names: list[str] = field(default_factory=list)
    anything: object = None
    steps_of_mine: int = 0
    with_token: bool = False


def given(secret: str, word: str) -> dict:
    """Arguments that hold a secret in many places."""
    return {
        "hub_token": word,
        "wandb_api_key": word,
        "note": word,
        "place": word,
        "headers": {"X-Api-Key": word, "deep": [{"a": word}]},
        "names": [word],
        "anything": SimpleNamespace(token=word),
        "run_name": word,
        "label_names": ["labels", word],
        "metric_for_best_model": word,
        "optim_target_modules": [word],
        "accelerator_config": {"split_batches": False},
        "lr_scheduler_kwargs": None,
        "trackio_space_id": word,
    }


class Talking(torch.optim.SGD):
    """An optimizer with an option that is text."""

    def __init__(self, params, endpoint: str):
        super().__init__(params, lr=1e-3, momentum=0.5)
        self.defaults["endpoint"] = endpoint
        for group in self.param_groups:
            group["endpoint"] = endpoint


class Remembering(Smoothed):
    """A part of a recipe that knows a secret, as one that talks to a service might."""

    def __init__(self, theta: float, key: str):
        super().__init__(theta)
        self.key = key


def test_no_secret_of_the_arguments_is_in_what_a_run_writes(tmp_path, figure, monkeypatch):
    tried = hidden = 0
    shown = []
    for number, (kind, (secret, word)) in enumerate(secrets(1).items()):
        if kind not in ("Hub", "GitLab", "W&B", "URL, sig", "AWS, secret"):
            continue
        monkeypatch.setattr(sys, "argv", ["train.py", "--note", word, "--run_name", word])
        settings = {
            "use_cpu": True,
            "report_to": [],
            "max_steps": 2,
            "save_steps": 1,
            "save_strategy": "steps",
            "optim": "adamw_torch",
        }
        args = Mine(
            str(tmp_path / str(number)), **settings, **given(secret, word), pin_code_token=84759302, steps_of_mine=3
        )
        model = tiny.bert()
        trainer = SAMPaTrainer(
            model=model,
            args=args,
            train_dataset=tiny.sentences(8),
            recipe=Recipe(direction=Remembering(0.5, word)),
            optimizers=(Talking(model.parameters(), word), None),
        )
        trainer.train()
        trainer.create_model_card()
        folder = Path(args.output_dir)
        card = (folder / "README.md").read_text()
        assert "- steps_of_mine: 3\n" in card and "- note: HIDDEN\n" in card and "84759302" not in card
        assert "- optimizer: Talking, endpoint HIDDEN, momentum 0.5\n" in card
        for file in [folder / "README.md", *folder.glob("checkpoint-*/*.*")]:
            if file.name in ("README.md", "sampa.json", "trainer_state.json"):
                tried += len(given(secret, word))
                found = is_in(secret, file.read_text())
                shown += [(kind, file.name)] if found else []
                hidden += 0 if found else len(given(secret, word))
    figure("secrets in cards and sampa.json", tried, hidden)
    assert shown == [] and tried > 93


def test_a_run_with_hidden_settings_goes_on_and_says_what_changed(tmp_path):
    def run(folder, resume=None, **settings):
        args = Mine(
            str(folder), use_cpu=True, report_to=[], max_steps=2, save_steps=1, save_strategy="steps", **settings
        )
        recipe = Recipe(direction=Remembering(0.5, "ghp_" + "a1B2" * 9))
        trainer = SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(8), recipe=recipe)
        trainer.train(resume)
        return trainer

    run(tmp_path, note="hunter", steps_of_mine=3)
    checkpoint = str(tmp_path / "checkpoint-1")
    assert json.loads((tmp_path / "checkpoint-1" / "sampa.json").read_text())["computation"]["note"] == "HIDDEN"
    assert run(tmp_path / "same", checkpoint, note="hunter", steps_of_mine=3).continued == []
    changed = run(tmp_path / "changed", checkpoint, steps_of_mine=4).continued
    assert changed == ["continued after step 1 with other settings: steps_of_mine 3, then 4; note HIDDEN, then none"]
    # As earlier versions wrote it.
    file = tmp_path / "checkpoint-1" / "sampa.json"
    found = json.loads(file.read_text())
    found["computation"]["note"] = "hunter"
    file.write_text(json.dumps(found))
    as_before(file.parent)
    assert run(tmp_path / "same", checkpoint, note="hunter", steps_of_mine=3).continued == []
    assert run(tmp_path / "changed", checkpoint, steps_of_mine=4).continued == changed


def test_of_annotations_that_cannot_be_read_nothing_is_known():
    @dataclass
    class Unreadable(SAMPaTrainingArguments):
        number: Elsewhere = 0  # noqa: F821 - that is the point
        other: torch.no_such_type = 0

    declared = types_of(Unreadable)
    assert declared["number"] is declared["other"] is None and declared["seed"] is int
    assert shown("number", "3", declared["number"]) == "HIDDEN" and shown("seed", "3", declared["seed"]) == "3"


def test_what_is_masked_can_still_be_compared():
    key = "ghp_" + "a1B2" * 9
    settings = "MyLengthscaleDirection(theta=0.30000000000000004, steps=[100, 20000], names=['query', 'key'], key={})"
    assert masked(settings.format(key)) == settings.format(masked(key))
    assert len(masked(key)) == 8 and masked(key) != masked(key[:-1] + "3")


# ---- training_args.bin ----


@dataclass
class WithTexts(SAMPaTrainingArguments):
    wandb_api_key: str = ""
    headers: dict | None = None
    note: str = ""
    pad_token: str = ""


def arguments_of(folder, token, **changes):
    key = "glpat-" + "x1Y2" * 5
    return WithTexts(
        str(folder),
        use_cpu=True,
        report_to=[],
        hub_token=token,
        wandb_api_key="hunter",
        headers={"X-Api-Key": "hunter", "a": [key], "accept": "text"},
        note="my words",
        pad_token="<pad>",
        **changes,
    )


def test_the_arguments_that_are_written_have_no_secrets_and_those_in_use_have_them(tmp_path):
    args = arguments_of(tmp_path, "tokentoken")
    trainer = SAMPaTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(8))
    before = copy.deepcopy(vars(args))
    trainer.save_model()
    written = (tmp_path / "training_args.bin").read_bytes()
    assert not any(secret in written for secret in (b"tokentoken", b"hunter", b"x1Y2"))
    assert b"my words" in written and b"<pad>" in written
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (loaded.hub_token, loaded.wandb_api_key, loaded.note) == (None, None, "my words")
    assert loaded.headers == {"X-Api-Key": None, "a": [None], "accept": "text"}
    SAMPaTrainer(model=tiny.bert(), args=loaded, train_dataset=tiny.sentences(8)).train()
    for there in (args, copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert (there.hub_token, there.wandb_api_key) == ("tokentoken", "hunter")
    assert {name: str(value) for name, value in vars(args).items()} == {n: str(v) for n, v in before.items()}


@pytest.fixture
def hub(monkeypatch):
    with Hub() as hub:
        hub.patch(monkeypatch)
        yield hub


def test_nothing_that_is_pushed_has_a_token_and_pushes_authenticate(hub, tmp_path, monkeypatch, caplog):
    token = hub.token
    monkeypatch.delenv("HF_TOKEN")
    settings = {
        "push_to_hub": True,
        "hub_model_id": "user/tiny",
        "hub_strategy": "all_checkpoints",
        "hub_always_push": True,
    }
    with tiny.transformers_log(caplog):
        trainer = SAMPaTrainer(
            model=tiny.bert(),
            args=arguments_of(tmp_path, token, max_steps=2, save_steps=1, save_strategy="steps", **settings),
            train_dataset=tiny.sentences(8),
        )
    assert (
        "training_args.bin, which is pushed, holds the training arguments, with None for what has the name or the look of a "
        "secret. headers, note, pad_token will be in it as given: take out what is not for everybody." in caplog.text
    )
    trainer.train()
    trainer.push_to_hub()
    files = hub.files("user/tiny")
    assert {"training_args.bin", "checkpoint-1/training_args.bin", "checkpoint-2/sampa.json"} <= files.keys()
    assert [name for name, content in files.items() if token.encode() in content or b"hunter" in content] == []
    assert not any("partial" in name or name.startswith("_") for name in files)
