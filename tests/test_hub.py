"""`tests/hub.py` as the real client sees it: huggingface_hub and transformers push to it and load from it again."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import hub as transformers_hub

from tests import tiny
from tests.hub import Hub, without_waiting


try:
    from huggingface_hub.utils import httpx
except ImportError:  # before huggingface_hub 2
    import httpx


REPO = "user/name"
CARD = "---\nlicense: mit\n---\n# A card\n"


@pytest.fixture
def hub(monkeypatch):
    with Hub() as hub:
        hub.patch(monkeypatch)
        yield hub


@pytest.fixture
def api(hub):
    """A client, and a new repository."""
    api = HfApi()
    api.create_repo(REPO)
    return api


@pytest.fixture
def pauses(hub, monkeypatch):
    return without_waiting(monkeypatch)


def save(api, files: dict[str, bytes], title: str = "Save", **options):
    """Commit these files."""
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return api.create_commit(REPO, operations, commit_message=title, **options)


def download(path: str, **options) -> bytes:
    return Path(huggingface_hub.hf_hub_download(REPO, path, **options)).read_bytes()


# Pushing and loading


def test_a_folder_comes_back_byte_for_byte(hub, tmp_path):
    api = HfApi()
    assert api.whoami()["name"] == "user"
    assert api.create_repo("name") == f"{hub.url}/{REPO}"
    weights = os.urandom(2**20 + 7)
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a log.txt").write_bytes(b"")
    api.upload_folder(repo_id=REPO, folder_path=tmp_path, commit_message="Everything")

    expected = {"model.safetensors": weights, "README.md": CARD.encode(), "logs/a log.txt": b""}
    stored = hub.files(REPO)
    assert "*.safetensors filter=lfs" in stored.pop(".gitattributes").decode()
    assert stored == expected
    assert {path: download(path) for path in expected} == expected
    snapshot = Path(huggingface_hub.snapshot_download(REPO))
    assert {path: (snapshot / path).read_bytes() for path in expected} == expected
    assert [upload.path for upload in hub.seen("PUT", "")] == [f"/{REPO}/lfs/{hashlib.sha256(weights).hexdigest()}"]
    assert hub.seen("POST", "/verify$") and {request.status for request in hub.requests} == {200}
    assert {request.token for request in hub.requests} == {hub.token, None}
    assert [request.method for request in hub.requests if request.token is None] == ["PUT"]

    api.upload_folder(repo_id=REPO, folder_path=tmp_path, commit_message="The same again")
    assert hub.commits(REPO) == ["initial commit", "Everything"]
    assert len(hub.seen("PUT", "")) == len(hub.seen("POST", "/commit/")) == 1


def test_name_and_size_decide_what_is_a_large_file(hub, api):
    files = {"a/b.bin": b"bin", "notes.txt": b"notes", "all.json": bytes(10 * 2**20 + 1)}
    save(api, files)
    listed = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    assert {path for path, entry in listed.items() if getattr(entry, "lfs", None)} == {"a/b.bin", "all.json"}
    assert listed["a/b.bin"].lfs.sha256 == hashlib.sha256(b"bin").hexdigest() and listed["a/b.bin"].size == 3
    assert listed.keys() == {"a", ".gitattributes", *files}
    assert [entry.path for entry in api.list_repo_tree(REPO)] == [".gitattributes", "a", "all.json", "notes.txt"]
    assert [entry.path for entry in api.list_repo_tree(REPO, "a")] == ["a/b.bin"]
    assert api.list_repo_files(REPO) == [".gitattributes", "a/b.bin", "all.json", "notes.txt"]
    info = api.model_info(REPO, files_metadata=True)
    assert {file.rfilename: file.size for file in info.siblings if file.lfs} == {"a/b.bin": 3, "all.json": 10485761}
    assert api.file_exists(REPO, "a/b.bin") and not api.file_exists(REPO, "b.bin")
    assert not api.repo_exists("user/other") and not api.revision_exists(REPO, "other")
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "b"))


LOAD_AND_SAVE = """
import sys
from transformers import AutoModelForSequenceClassification
AutoModelForSequenceClassification.from_pretrained("user/name").save_pretrained(sys.argv[1])
"""


def test_a_model_is_loaded_as_it_was_pushed_here_and_in_another_process(hub, tmp_path):
    model = tiny.bert()
    model.push_to_hub(REPO, commit_message="A model")
    assert hub.files(REPO).keys() == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    loaded = AutoModelForSequenceClassification.from_pretrained(REPO)
    assert tiny.differing(dict(model.state_dict()), dict(loaded.state_dict())) == []

    hub.requests.clear()
    # A cache of its own, so that it has to download.
    environment = {**os.environ, **hub.environment(), "HF_HUB_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", LOAD_AND_SAVE, str(tmp_path / "loaded")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "loaded" / "model.safetensors").read_bytes() == hub.files(REPO)["model.safetensors"]
    # transformers asks which commit the branch points to, and loads all files from that one.
    commit = HfApi().model_info(REPO).sha
    expected = [f"/{REPO}/resolve/{commit}/{name}" for name in ("config.json", "model.safetensors")]
    assert [asked.path for asked in hub.seen("GET", "/resolve/")] == expected


def test_a_card_is_read_from_the_hub(hub, api):
    ModelCard(CARD).push_to_hub(REPO)
    assert hub.seen("POST", "/api/validate-yaml")
    card = ModelCard.load(REPO)
    assert (str(card), card.data.license) == (CARD, "mit")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        save(api, {"README.md": b"# Bare"})


# History


def test_earlier_revisions_stay_readable(hub, api):
    first = save(api, {"a.txt": b"1", "model.bin": b"one"}, "First").oid
    second = save(api, {"a.txt": b"2", "model.bin": b"two"}, "Second", parent_commit=first[:7]).oid
    for revision, number, word in ((first, b"1", b"one"), (second, b"2", b"two"), ("main", b"2", b"two")):
        assert (download("a.txt", revision=revision), download("model.bin", revision=revision)) == (number, word)
        assert (hub.files(REPO, revision)["a.txt"], hub.files(REPO, revision)["model.bin"]) == (number, word)
    assert hub.commits(REPO) == ["initial commit", "First", "Second"]
    assert [commit.title for commit in api.list_repo_commits(REPO)] == ["Second", "First", "initial commit"]
    assert api.model_info(REPO).sha == second and api.model_info(REPO, revision=first).sha == first
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        save(api, {"a.txt": b"3"}, parent_commit=first)
    with pytest.raises(RevisionNotFoundError):
        download("a.txt", revision="f" * 40)
    assert hub.commits(REPO)[-1] == "Second"


def test_files_and_folders_are_deleted(hub, api):
    first = save(api, {"a.txt": b"a", "folder/b.txt": b"b", "folder/c/d.txt": b"d", "folders.txt": b"e"}).oid
    api.delete_file("a.txt", REPO)
    assert hub.files(REPO).keys() == {".gitattributes", "folder/b.txt", "folder/c/d.txt", "folders.txt"}
    api.delete_folder("folder", REPO)
    assert hub.files(REPO).keys() == {".gitattributes", "folders.txt"}
    assert download("folder/c/d.txt", revision=first) == b"d"
    with pytest.raises(RemoteEntryNotFoundError):
        download("a.txt")
    for missing in (CommitOperationDelete("a.txt"), CommitOperationDelete("folder/")):
        with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
            api.create_commit(REPO, [missing], commit_message="Again")


def test_a_branch_goes_its_own_way(hub, api):
    tiny.bert().config.push_to_hub(REPO, revision="more")
    api.create_branch(REPO, branch="more", exist_ok=True)
    assert hub.files(REPO, "more").keys() == {".gitattributes", "README.md", "config.json"}
    assert hub.files(REPO).keys() == {".gitattributes"} and hub.commits(REPO) == ["initial commit"]
    assert [branch.name for branch in api.list_repo_refs(REPO).branches] == ["main", "more"]
    with pytest.raises(RevisionNotFoundError):
        save(api, {"a.txt": b"a"}, revision="less")


# What is refused


def test_a_repository_is_made_once(hub, api):
    assert api.create_repo(REPO, exist_ok=True) == f"{hub.url}/{REPO}"
    with pytest.raises(HfHubHTTPError, match="You already created this model repo") as refused:
        api.create_repo(REPO)
    assert refused.value.response.status_code == 409
    with pytest.raises(HfHubHTTPError, match="don't have the rights .* namespace 'someone'"):
        api.create_repo("someone/name", exist_ok=True)
    with pytest.raises(RepositoryNotFoundError):
        api.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id="user/other")


@pytest.mark.parametrize("token", ["hf_wrong", False], ids=["wrong", "none"])
def test_nothing_is_written_without_the_token(hub, api, token):
    save(api, {"model.bin": b"weights"})
    stranger = HfApi(token=token)
    calls = [
        lambda: stranger.create_repo("other"),
        lambda: stranger.create_branch(REPO, branch="other"),
        lambda: stranger.upload_file(path_or_fileobj=b"a", path_in_repo="a.txt", repo_id=REPO),
        lambda: stranger.delete_file("model.bin", REPO),
    ]
    for call in calls:
        with pytest.raises(HfHubHTTPError, match="Invalid (credentials in Auth|username or password)") as refused:
            call()
        assert refused.value.response.status_code == 401 == hub.requests[-1].status
    assert hub.requests[-1].token == (token or None)
    assert hub.commits(REPO) == ["initial commit", "Save"]
    with pytest.raises(ValueError, match=r"expected one of \['user/name'\], got 'user/other'"):
        hub.files("user/other")


def test_a_private_repository_is_hidden(hub, tmp_path):
    api = HfApi()
    api.create_repo(REPO, private=True)
    save(api, {"a.txt": b"a"})
    assert api.model_info(REPO).private and download("a.txt") == b"a"
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(REPO, token=False)
    with pytest.raises(RepositoryNotFoundError):
        download("a.txt", token=False, cache_dir=tmp_path)


def test_an_upload_with_another_content_is_refused(hub, api, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(1000))
    addition = CommitOperationAdd("model.safetensors", file)
    announced = addition.upload_info.sha256.hex()
    file.write_bytes(os.urandom(1000))
    with pytest.raises(RuntimeError, match=r"Error while uploading 'model\.safetensors'") as refused:
        api.create_commit(REPO, [addition], commit_message="Corrupt")
    assert f"Expected 1000 bytes with SHA-256 {announced}, got 1000 with" in str(refused.value.__cause__)
    assert [upload.status for upload in hub.seen("PUT", "/lfs/")] == [400]
    assert hub.commits(REPO) == ["initial commit"]


def test_what_has_no_answer_says_so(hub, api):
    with pytest.raises(
        HfHubHTTPError, match="501.*(?s:.)*hub_protocol.py has no answer to POST /api/models/user/name/tag/main"
    ):
        api.create_tag(REPO, tag="v1")


# Failures


@pytest.mark.parametrize(
    ("method", "pattern", "attempts"),
    [
        ("POST", "/api/models/.*/preupload/", 6),
        ("POST", "/objects/batch$", 6),
        ("PUT", "/lfs/", 6),
        ("POST", "/objects/verify$", 6),
        ("POST", "/api/models/.*/commit/", 1),
    ],
)
def test_how_often_the_client_tries_to_push(hub, api, pauses, method, pattern, attempts):
    for make_it_fail, error in ((hub.fail, HfHubHTTPError), (hub.cut, httpx.RemoteProtocolError)):
        before = len(hub.seen(method, pattern))
        make_it_fail(method, pattern, times=attempts)
        with pytest.raises((error, RuntimeError)) as raised:
            save(api, {"model.bin": os.urandom(10)})
        assert isinstance(raised.value.__cause__ if isinstance(raised.value, RuntimeError) else raised.value, error)
        assert len(hub.seen(method, pattern)) - before == attempts
        assert pauses == [1, 2, 4, 8, 8][: attempts - 1]
        pauses.clear()
    assert hub.commits(REPO) == ["initial commit"]
    hub.fail(method, pattern, times=attempts - 1)
    save(api, {"model.bin": b"weights"})
    assert hub.files(REPO)["model.bin"] == b"weights"


@pytest.mark.parametrize(
    ("method", "fault", "attempts", "error"),
    [
        # One attempt, for a copy from the cache in its stead; where there is none, six more.
        ("HEAD", "fail", 7, LocalEntryNotFoundError),
        ("HEAD", "cut", 1, httpx.RemoteProtocolError),
        ("GET", "fail", 1, HfHubHTTPError),
        ("GET", "cut", 6, httpx.RemoteProtocolError),
    ],
)
def test_how_often_the_client_tries_to_load(hub, api, pauses, method, fault, attempts, error):
    save(api, {"model.bin": b"weights"})
    getattr(hub, fault)(method, "/resolve/", times=attempts)
    with pytest.raises(error):
        download("model.bin")
    assert len(hub.seen(method, "/resolve/")) == attempts
    assert download("model.bin") == b"weights"


@pytest.mark.parametrize("share", [None, 0, 0.5])
def test_a_download_that_breaks_off_is_begun_again(hub, api, pauses, share):
    """Nothing is written before 10 MB have come: of a smaller file, no part is kept."""
    weights = os.urandom(10**6)
    save(api, {"model.bin": weights})
    hub.cut("GET", "/resolve/", share, times=5)
    assert download("model.bin") == weights
    assert len(hub.seen("GET", "/resolve/")) == 6 and pauses == [1] * 5


def test_a_commit_may_be_made_though_its_answer_is_lost(hub, api):
    hub.cut("POST", "/commit/", share=0)
    with pytest.raises(httpx.RemoteProtocolError):
        save(api, {"a.txt": b"a"}, "Unheard")
    assert hub.commits(REPO) == ["initial commit", "Unheard"]
    hub.cut("POST", "/commit/")
    with pytest.raises(httpx.RemoteProtocolError):
        save(api, {"a.txt": b"b"}, "Unmade")
    assert hub.commits(REPO) == ["initial commit", "Unheard"]
    assert [request.status for request in hub.seen("POST", "/commit/")] == [200, None]
    with pytest.raises(ValueError, match="expected a share in .*, got 0.5 for HEAD; or None"):
        hub.cut("HEAD", "/", share=0.5)


def test_the_process_is_as_it_was_before():
    def state():
        return [getattr(constants, name) for name in vars(constants) if name.isupper()], os.environ.copy()

    before, api_before = state(), (huggingface_hub.hf_api.api.endpoint, transformers_hub._hf_api)
    with pytest.MonkeyPatch.context() as monkeypatch, Hub() as hub:
        hub.patch(monkeypatch)
        assert (
            constants.ENDPOINT == huggingface_hub.hf_api.api.endpoint == transformers_hub.hf_api().endpoint == hub.url
        )
        assert constants.HF_HUB_CACHE.startswith(hub.environment()["HF_HOME"])
    assert (state(), (huggingface_hub.hf_api.api.endpoint, transformers_hub._hf_api)) == (before, api_before)


# The Trainer


class EndPush(TrainerCallback):
    """Ends each push before the next step: the Trainer pushes from the folder that its next save writes to."""

    trainer: Trainer

    def on_save(self, args, state, control, **kwargs):
        push = self.trainer.push_in_progress
        for job in [] if push is None else push.jobs:
            job.result()


def pushing_trainer(folder: Path, strategy: str) -> Trainer:
    """A Trainer that is to take 4 steps and to save after the second and the fourth."""
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        push_to_hub=True,
        hub_strategy=strategy,
        # Or else it leaves out a push where the one before has not ended.
        hub_always_push=True,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    end_push = EndPush()
    trainer = Trainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences(16), callbacks=[end_push])
    end_push.trainer = trainer
    return trainer


MODEL = {".gitattributes", "config.json", "model.safetensors", "training_args.bin"}
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


@pytest.mark.parametrize(
    ("strategy", "titles", "folders"),
    [
        ("end", [], []),
        ("every_save", ["{}"], []),
        ("checkpoint", ["{}", "{}, checkpoint"], ["last-checkpoint"]),
        ("all_checkpoints", ["{}", "{}, checkpoint"], ["checkpoint-2", "checkpoint-4"]),
    ],
)
def test_what_the_trainer_pushes(hub, tmp_path, strategy, titles, folders):
    trainer = pushing_trainer(tmp_path / "name", strategy)
    trainer.train()
    files = {f"{folder}/{name}" for folder in folders for name in (MODEL | STATE) - {".gitattributes"}}
    steps = [title.format(f"Training in progress, step {step}") for step in (2, 4) for title in titles]
    assert hub.commits(REPO) == ["initial commit", *steps]
    assert hub.files(REPO).keys() == ({".gitattributes"} if strategy == "end" else MODEL | files)

    trainer.push_to_hub(license="mit")
    # Where it has the weights already, the commit brings the card.
    assert hub.commits(REPO) == ["initial commit", *steps, "End of training"]
    assert hub.files(REPO).keys() == MODEL | files | {"README.md"}
    assert ModelCard.load(REPO).data.license == "mit"
    loaded = AutoModelForSequenceClassification.from_pretrained(REPO)
    assert tiny.differing(dict(trainer.model.state_dict()), dict(loaded.state_dict())) == []
