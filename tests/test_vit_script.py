"""`vit_finetune/run_vit.py`: its arguments, its messages, and whole runs on a CIFAR folder of a few images."""

import csv
import dataclasses
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import run_vit
import torch
from accelerate import PartialState
from image_data import ImageDataset
from image_predictions import write_predictions
from image_transforms import ImageTransform
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    Dinov2Config,
    MobileNetV2Config,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from vit_arguments import DataArguments, ViTModelArguments, ViTTrainingArguments, make_parser, parse_args
from vit_model import load_classifier

from hf_sampa.compat import on_pillow
from tests.image_tasks import load_task
from tests.pictures import ViTProcessor
from tests.ranks import run_script


ROOT = Path(__file__).parents[1]
TINY = ["--from_scratch", "--hidden_size", "16", "--num_hidden_layers", "1", "--patch_size", "16", "--use_cpu"]
SHORT = [*TINY, "--batch_size", "8", "--max_steps", "4", "--logging_steps", "1", "--learning_rate", "1e-2"]


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """An official folder of 40 training and 20 test images, whose brightness tells their class."""
    folder = tmp_path_factory.mktemp("data") / "cifar-10-batches-py"
    folder.mkdir()
    for seed, name, n in ((1, "data_batch_1", 20), (2, "data_batch_2", 20), (3, "test_batch", 20)):
        labels = [i % 10 for i in range(n)]
        noise = np.random.default_rng(seed).integers(0, 20, (n, 3072))
        pixels = (25 * np.array(labels)[:, None] + noise).astype(np.uint8)
        (folder / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels}, protocol=2))
    names = {b"label_names": [b"class%d" % i for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    return folder


def read_json(path):
    return json.loads(Path(path).read_text())


def step_logs(output_dir):
    """What was logged at each step, without the timings."""
    return [entry for entry in read_json(output_dir / "trainer_state.json")["log_history"] if "loss" in entry]


# Arguments


def test_help_formats_and_every_own_field_has_a_help_text():
    text = make_parser().format_help()
    for cls in (ViTModelArguments, DataArguments, ViTTrainingArguments):
        own = set(cls.__annotations__) & {field.name for field in dataclasses.fields(cls)}
        for field in dataclasses.fields(cls):
            if field.name in own:
                assert field.metadata["help"].endswith("."), field.name
                assert f"--{field.name}" in text
    assert "left open by the paper" in " ".join(text.lower().split())


def test_a_score_that_no_evaluation_has_is_refused_before_the_first_step(cifar10, tmp_path):
    given = [
        "--data_dir",
        str(cifar10),
        *SHORT,
        "--output_dir",
        str(tmp_path / "out"),
        "--early_stopping_patience",
        "2",
    ]
    with pytest.raises(
        ValueError, match=r"an evaluation of this run finds, loss, accuracy, got f1\. Give one of these\."
    ):
        run_vit.main([*given, "--metric_for_best_model", "f1"])
    assert not list((tmp_path / "out").iterdir())


def test_the_papers_settings_are_the_defaults(tmp_path):
    model_args, data_args, args = parse_args(["--output_dir", str(tmp_path), "--use_cpu"])
    assert model_args.model_name_or_path == "google/vit-base-patch16-224-in21k"
    assert (data_args.dataset, data_args.label_noise, data_args.augment) == ("cifar10", 0.0, True)
    assert (args.method, args.rho, args.lmbda) == ("sampa", 0.1, 0.2)
    assert (args.learning_rate, args.max_grad_norm, args.num_train_epochs) == (1e-4, 1.0, 10)
    assert (args.lr_scheduler_type, args.label_smoothing_factor) == ("cosine", 0.1)
    assert args.optim.value.startswith("adamw_torch")
    assert args.per_device_train_batch_size == args.batch_size == 128
    assert args.report_to == []


@pytest.mark.parametrize(
    ("given", "rho"),
    [
        (["--method", "sam"], 0.05),
        (["--method=sampa"], 0.1),
        (["--method", "adamw"], 0.0),
        (["--method", "sam", "--rho", "0.3"], 0.3),
        (["--rho", "0"], 0.0),
    ],
)
def test_the_default_of_rho_is_the_methods_and_an_explicit_one_wins(tmp_path, given, rho):
    assert parse_args(["--output_dir", str(tmp_path), "--use_cpu", *given])[2].rho == rho


def test_the_best_model_is_the_one_with_the_best_accuracy(tmp_path):
    given = ["--output_dir", str(tmp_path), "--use_cpu"]
    assert parse_args(given)[2].metric_for_best_model is None
    args = parse_args([*given, "--early_stopping_patience", "2"])[2]
    assert (args.metric_for_best_model, args.load_best_model_at_end) == ("accuracy", True)


def test_an_unknown_method_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--method", "asam"])
    assert "invalid choice: 'asam' (choose from 'adamw', 'sam', 'sampa')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--hidden_size", "64"], "--hidden_size would have no effect: google/.* Add --from_scratch"),
        (
            ["--from_scratch", "--model_name_or_path", "x"],
            "--from_scratch starts from random weights and --model_name_or_path from x",
        ),
        (["--from_scratch", "--image_size", "30"], "--image_size: expected a multiple of --patch_size 4, got 30"),
    ],
)
def test_contradictory_arguments_are_refused(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        parse_args(["--output_dir", str(tmp_path), "--use_cpu", *given])


# Models


@pytest.fixture(autouse=True)
def state():
    """As a script's training arguments make it, before the model is loaded."""
    return PartialState()


def load(path, names, **given):
    torch.manual_seed(0)
    args = ViTModelArguments(model_name_or_path=str(path), **given)
    model, _labels, image_processor = load_classifier(args, names)
    return model, image_processor


@pytest.fixture
def saved_vit(tmp_path):
    """A ViT for 3 classes, its weights saved in half precision."""
    torch.manual_seed(1)
    shape = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(**shape, num_attention_heads=2, num_labels=3)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    return tmp_path


def test_a_checkpoint_gets_a_new_classifier_and_fp32_weights(saved_vit):
    with pytest.raises(
        ValueError, match="for the 4 classes of the data, a, b, c, d, .* Add --ignore_mismatched_sizes to"
    ):
        load(saved_vit, ["a", "b", "c", "d"])
    model, image_processor = load(saved_vit, ["a", "b", "c", "d"], ignore_mismatched_sizes=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d"} and model.config.label2id["d"] == 3
    assert model.classifier.weight.shape == (4, 16)
    assert dict(image_processor.size) == {"height": 8, "width": 8}
    saved = ViTForImageClassification.from_pretrained(saved_vit, dtype=torch.float32).vit.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.vit.state_dict().items())


def test_a_folder_with_a_config_alone_starts_from_random_weights(saved_vit, caplog):
    (saved_vit / "model.safetensors").unlink()
    model, image_processor = load(saved_vit, ["a", "b"])
    assert "holds no weights: the model is trained from scratch" in caplog.text
    assert model.config.hidden_size == 16 and model.classifier.weight.shape == (2, 16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    (saved_vit / "preprocessor_config.json").unlink()
    assert dict(load(saved_vit, ["a", "b"])[1].size) == dict(image_processor.size) == {"height": 8, "width": 8}


def test_a_checkpoint_that_leaves_weights_undetermined_is_refused(saved_vit):
    config = read_json(saved_vit / "config.json")
    (saved_vit / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="expected every weight but the head's, but 16 would start at random"):
        load(saved_vit, ["a", "b"])


# Runs


def test_a_saved_model_is_scored_without_training(cifar10, tmp_path):
    out, data = tmp_path / "out", ["--data_dir", str(cifar10)]
    training = ["--output_dir", str(out), "--eval_strategy", "no", "--do_eval", "false"]
    reported = run_vit.main([*SHORT, *data, *training])
    assert reported == {}
    weights = (out / "model.safetensors").read_bytes()
    scored = run_vit.main(
        [
            *data,
            "--model_name_or_path",
            str(out),
            "--output_dir",
            str(out),
            "--do_train",
            "false",
            "--disable_tqdm",
            "true",
        ]
    )
    assert scored["eval_accuracy"] == read_json(out / "eval_results.json")["eval_accuracy"]
    assert (out / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("method", ["adamw", "sam", "sampa"])
def test_a_saved_model_has_the_accuracy_that_was_reported(cifar10, tmp_path, method):
    out = tmp_path / "out"
    command = [*SHORT, "--method", method, "--data_dir", str(cifar10), "--output_dir", str(out), "--max_steps", "30"]
    metrics = run_vit.main(command)
    reported = read_json(out / "all_results.json")
    assert reported["eval_accuracy"] == metrics["eval_accuracy"]
    assert reported["train_loss"] < 2.3  # log(10) = 2.303 is what guessing gives

    model = AutoModelForImageClassification.from_pretrained(out).eval()
    image_processor = AutoImageProcessor.from_pretrained(out, **on_pillow())
    task = load_task("cifar10", str(cifar10))
    images = image_processor(list(task.evaluation.images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        predicted = model(images).logits.argmax(-1).numpy()
    assert (predicted == task.evaluation.labels).mean() == pytest.approx(reported["eval_accuracy"])
    assert model.config.id2label[9] == "class9"
    assert ("sharpness" in step_logs(out)[0]) == (method != "adamw")
    assert (out / "README.md").is_file()


def test_label_noise_reaches_the_training_labels_and_no_others(cifar10, tmp_path, monkeypatch):
    datasets = {}

    class Recorder(run_vit.BaselineTrainer):
        def __init__(self, *args, train_dataset, eval_dataset, **kwargs):
            datasets.update(train=train_dataset, test=eval_dataset)
            super().__init__(*args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)

    monkeypatch.setattr(run_vit, "BaselineTrainer", Recorder)
    given = [*SHORT, "--data_dir", str(cifar10), "--max_steps", "1", "--method", "adamw", "--label_noise", "0.4"]
    run_vit.main([*given, "--output_dir", str(tmp_path / "out")])
    task = load_task("cifar10", str(cifar10))
    assert (datasets["train"].data.labels != task.train.labels).sum() == 16
    assert np.array_equal(datasets["test"].data.labels, task.evaluation.labels)
    assert datasets["train"].transform.crop == "padded" and datasets["test"].transform.crop is None
    run_vit.main([*given, "--output_dir", str(tmp_path / "again"), "--no_augment", "--seed", "1"])
    assert (datasets["train"].data.labels != task.train.labels).sum() == 16
    assert datasets["train"].transform.crop is None


def test_bad_data_arguments_reach_the_user(cifar10, tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"--label_noise: expected a share .* got 40\.0"):
        run_vit.main([*SHORT, "--data_dir", str(cifar10), "--output_dir", out, "--label_noise", "40"])
    with pytest.raises(FileNotFoundError, match="expected a folder, but nowhere is none"):
        run_vit.main([*SHORT, "--data_dir", "nowhere", "--output_dir", out])
    assert not Path(out).exists()


def test_a_run_is_continued_bit_for_bit_and_never_written_over_by_accident(cifar10, tmp_path):
    out = tmp_path / "out"
    command = [*SHORT, "--data_dir", str(cifar10), "--save_strategy", "steps", "--save_steps", "2"]
    command += ["--output_dir", str(out)]
    run_vit.main(command)
    whole = load_file(out / "model.safetensors")
    with pytest.raises(FileExistsError, match=r"--output_dir .*out is not empty.*--resume_from_checkpoint true"):
        run_vit.main(command)

    shutil.rmtree(out / "checkpoint-4")
    (out / "model.safetensors").unlink()
    run_vit.main([*command, "--resume_from_checkpoint", "true"])
    resumed = load_file(out / "model.safetensors")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    run_vit.main([*command, "--overwrite_output_dir", "--max_steps", "1"])
    assert read_json(out / "trainer_state.json")["global_step"] == 1


@pytest.mark.parametrize(
    ("method", "variant", "settings"),
    [
        ("sampa", "asam", "eta=0.1"),
        ("sampa", "ssam_d", "sparsity=0.8"),
        ("sampa", "msam", "size=4"),
        ("sam", "rst", "p=0.3"),
        ("sam", "saf", "epochs=1 start=0"),
        ("sam", "gsam", "alpha=0.5"),
    ],
)
def test_a_run_with_a_variant(method, variant, settings, cifar10, tmp_path):
    """One of every part."""
    weights = {}
    for name, given in {variant: ["--variant", variant, "--variant_args", *settings.split()], "sam": []}.items():
        given = [*given, "--method", method, "--output_dir", str(tmp_path / name), "--max_steps", "8"]
        run_vit.main([*SHORT, "--data_dir", str(cifar10), *given])
        weights[name] = load_file(tmp_path / name / "model.safetensors")
        assert len(step_logs(tmp_path / name)) == 8
    assert not all(torch.equal(value, weights["sam"][name]) for name, value in weights[variant].items())
    assert f"- variant: {variant}" in (tmp_path / variant / "README.md").read_text()


def test_an_image_folder_is_trained_on(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "test"):
        for number, name in enumerate(("dark", "light")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(6):
                Image.new("L", (20, 20), color=200 * number + 5 * i).save(folder / f"{i}.png")
    given = ["--dataset", "imagefolder", "--data_dir", str(tmp_path / "images"), "--max_steps", "15"]
    metrics = run_vit.main([*SHORT, *given, "--output_dir", str(tmp_path / "out")])
    assert metrics["eval_accuracy"] == 1.0
    assert read_json(tmp_path / "out" / "config.json")["id2label"] == {"0": "dark", "1": "light"}


@pytest.mark.distributed
def test_two_processes_give_the_numbers_of_one(cifar10, tmp_path):
    given = [str(ROOT / "vit_finetune/run_vit.py"), *SHORT, "--data_dir", str(cifar10), "--label_noise", "0.4"]
    given += ["--dataloader_num_workers", "1"]
    for name, processes in (("one", 1), ("two", 2)):
        out = ["--output_dir", tmp_path / name]
        for run in run_script(*given, *out, processes=processes, folder=tmp_path / f"ranks of {name}"):
            assert run.returncode == 0, run.stderr
    assert read_json(tmp_path / "two" / "checkpoint-4" / "sampa.json")
    logs = step_logs(tmp_path / "one")
    assert len(logs) == 4 and logs == step_logs(tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    accuracies = {read_json(tmp_path / name / "all_results.json")["eval_accuracy"] for name in ("one", "two")}
    assert len(accuracies) == 1


@pytest.mark.parametrize("method", ["adamw", "sampa"])
def test_the_best_model_is_whole(method, cifar10, tmp_path, monkeypatch):
    """Not a mixture of the best step's weights and the last one's."""
    scores = iter([0.9, 0.5, 0.1, 0.1])
    monkeypatch.setattr(run_vit, "compute_accuracy", lambda prediction: {"accuracy": next(scores)})
    out = tmp_path / "out"
    given = [*TINY, "--method", method, "--data_dir", str(cifar10), "--batch_size", "8", "--num_train_epochs", "3"]
    run_vit.main([*given, "--learning_rate", "1e-2", "--early_stopping_patience", "2", "--output_dir", str(out)])
    best, saved = (load_file(out / name / "model.safetensors") for name in ("checkpoint-5", "."))
    last = load_file(out / "checkpoint-15" / "model.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in saved.items())
    assert not any(torch.equal(value, last[name]) for name, value in best.items())


# Images of one's own


@pytest.fixture
def pictures(tmp_path):
    """Dark, grey and light training and validation images, and four to predict in one folder."""
    for split in ("train", "validation"):
        for number, name in enumerate(("dark", "grey", "light")):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("L", (20, 16), color=100 * number + 5 * i).save(folder / f"{i}.png")
    (tmp_path / "pictures" / "test").mkdir()
    for i, grey in enumerate((3, 107, 203, 97)):
        Image.new("L", (16, 20), color=grey).save(tmp_path / "pictures" / "test" / f"{i}.png")
    return tmp_path / "pictures"


def read_table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_predictions_are_the_models_own(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    run_vit.main([*SHORT, "--data_dir", str(pictures), "--max_steps", "20", "--do_predict", "--output_dir", str(out)])
    assert f"Predictions of 4 images: {out / 'predictions.csv'}\n" in capsys.readouterr().out
    rows = read_table(out / "predictions.csv")
    assert [row["file"] for row in rows] == ["0.png", "1.png", "2.png", "3.png"]
    model = AutoModelForImageClassification.from_pretrained(out).eval()
    image_processor = AutoImageProcessor.from_pretrained(out, **on_pillow())
    images = [Image.open(pictures / "test" / row["file"]).convert("RGB") for row in rows]
    with torch.no_grad():
        expected = model(**image_processor(images, return_tensors="pt")).logits.softmax(-1)
    for row, probabilities in zip(rows, expected, strict=True):
        told = [float(row[f"probability_{name}"]) for name in ("dark", "grey", "light")]
        # Six digits are written.
        assert told == pytest.approx(probabilities.tolist(), abs=1e-6)
        assert row["prediction"] == model.config.id2label[int(probabilities.argmax())]
    assert "| pictures | validation | 12 |" in (out / "README.md").read_text().replace("the local folder ", "")


def test_the_model_is_asked_without_training_or_scoring(pictures, tmp_path):
    """Neither training nor validation images have to be there, and nothing else is written."""
    out, table = tmp_path / "out", tmp_path / "out" / "predictions.csv"
    run_vit.main([*SHORT, "--data_dir", str(pictures), "--do_predict", "--output_dir", str(out)])
    told, card = table.read_bytes(), (out / "README.md").read_bytes()
    table.unlink()
    asked = [
        "--do_train",
        "false",
        "--do_eval",
        "false",
        "--do_predict",
        "--model_name_or_path",
        str(out),
        "--use_cpu",
    ]
    run_vit.main([*asked, "--test_dir", str(pictures / "test"), "--output_dir", str(out)])
    assert table.read_bytes() == told and (out / "README.md").read_bytes() == card
    run_vit.main(
        [
            *asked,
            "--test_dir",
            str(pictures / "test"),
            "--output_dir",
            str(tmp_path / "other"),
            "--max_predict_samples",
            "2",
        ]
    )
    assert {row["file"] for row in read_table(tmp_path / "other" / "predictions.csv")} < {f"{i}.png" for i in range(4)}
    assert not (tmp_path / "other" / "README.md").exists()


def test_a_head_that_nobody_trained_is_not_asked(pictures, tmp_path, saved_vit):
    given = ["--do_train", "false", "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    message = "--do_train false: expected a model that is trained for dark, grey, light, got %s, whose head is new: its scores"
    with pytest.raises(ValueError, match=message % "a model --from_scratch"):
        run_vit.main([*given, "--data_dir", str(pictures), "--from_scratch"])
    file = saved_vit / "model.safetensors"
    headless = {name: each for name, each in load_file(file).items() if not name.startswith("classifier")}
    save_file(headless, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message % re.escape(str(saved_vit))):
        run_vit.main([*given, "--data_dir", str(pictures), "--model_name_or_path", str(saved_vit)])


def test_predictions_of_a_model_that_diverged(tmp_path):
    with pytest.raises(ValueError, match="predictions.csv: expected a number for every class, got NaN from the model"):
        write_predictions(tmp_path, ["a"], np.array([[0.0, np.nan]]), ["x", "y"])
    name = os.fsdecode(b"\xff, b.png")
    path = write_predictions(tmp_path, [name], np.array([[0.0, 1000.0]]), ["x", "y"])
    assert path.read_bytes() == b'file,prediction,probability_x,probability_y\r\n"\xff, b.png",y,0.000000,1.000000\r\n'


def test_training_without_evaluation_needs_no_images_to_score(pictures, tmp_path):
    shutil.rmtree(pictures / "validation")
    given = [
        *SHORT,
        "--train_dir",
        str(pictures / "train"),
        "--do_eval",
        "false",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert run_vit.main(given) == {}
    assert not any("eval_loss" in entry for entry in read_json(tmp_path / "out" / "trainer_state.json")["log_history"])


def test_a_models_own_labels_are_kept_and_found_by_name(pictures, tmp_path):
    """The same model with its outputs in another order has the same score, also on a part of its classes."""
    out = tmp_path / "out"
    run_vit.main([*SHORT, "--data_dir", str(pictures), "--max_steps", "20", "--output_dir", str(out)])
    model = AutoModelForImageClassification.from_pretrained(out)
    order = [2, 0, 1]
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.copy_(parameter[order])
    names = [model.config.id2label[index] for index in order]
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    model.save_pretrained(tmp_path / "other")
    shutil.copy(out / "preprocessor_config.json", tmp_path / "other")
    shutil.rmtree(pictures / "train")

    def score(path):
        given = ["--do_train", "false", "--data_dir", str(pictures), "--model_name_or_path", str(path), "--use_cpu"]
        metrics = run_vit.main([*given, "--output_dir", str(tmp_path / "scores")])
        return metrics["eval_accuracy"], metrics["eval_loss"]

    assert score(tmp_path / "other") == pytest.approx(score(out))
    shutil.rmtree(pictures / "validation" / "dark")
    (pictures / "validation" / "grey").rename(pictures / "validation" / "Grey")
    assert score(tmp_path / "other") == pytest.approx(score(out))


CLASSIFIERS = {
    "resnet": lambda: ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "convnext": lambda: ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=16),
    "swin": lambda: SwinConfig(image_size=16, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2),
    "dinov2": lambda: Dinov2Config(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    ),
    "mobilenet_v2": lambda: MobileNetV2Config(image_size=16, depth_multiplier=0.35),
}


@pytest.mark.parametrize(
    "name",
    ["resnet", "swin", *(pytest.param(n, marks=pytest.mark.whole) for n in ("convnext", "dinov2", "mobilenet_v2"))],
)
def test_any_image_classifier_is_trained(name, pictures, tmp_path):
    """One for other classes, with a new head; its image processor has a name of its own."""
    path = tmp_path / "model"
    AutoModelForImageClassification.from_config(CLASSIFIERS[name]()).save_pretrained(path)
    ViTProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "processor")
    given = ["--data_dir", str(pictures), "--model_name_or_path", str(path), "--ignore_mismatched_sizes", "--use_cpu"]
    given += ["--image_processor_name", str(tmp_path / "processor"), "--batch_size", "4", "--max_steps", "2"]
    run_vit.main([*given, "--do_predict", "--output_dir", str(tmp_path / "out")])
    saved = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert saved.config.model_type == name and saved.config.id2label == {0: "dark", 1: "grey", 2: "light"}
    assert len(read_table(tmp_path / "out" / "predictions.csv")) == 4


def test_a_model_of_which_nothing_says_the_size_of_its_images(pictures, tmp_path):
    ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]).save_pretrained(tmp_path / "model")
    given = ["--data_dir", str(pictures), "--model_name_or_path", str(tmp_path / "model"), "--use_cpu"]
    with pytest.raises(
        ValueError, match="or a config.json with an image_size, got neither for this resnet. Name an image"
    ):
        run_vit.main([*given, "--output_dir", str(tmp_path / "out")])


@pytest.mark.distributed
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_image_is_one_message(workers, pictures, tmp_path):
    """Also where a worker of a loader finds it."""
    path = pictures / "train" / "grey" / "1.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:900])
    given = [
        *SHORT,
        "--data_dir",
        str(pictures),
        "--output_dir",
        tmp_path / "out",
        "--dataloader_num_workers",
        workers,
    ]
    given += ["--disable_tqdm", "true"]
    script = str(ROOT / "vit_finetune/run_vit.py")
    for run in run_script(script, *given, processes=1, folder=tmp_path / "ranks"):
        told = [line for line in run.stderr.splitlines() if "error" in line.lower()]
        assert run.returncode == 1 and len(told) == 1 and "Traceback" not in run.stderr
        assert told[0].startswith(
            f"run_vit.py: error: {str(path)!r}: expected a whole image, got one that cannot be read"
        )


@pytest.mark.distributed
def test_two_processes_predict_what_one_predicts(pictures, tmp_path):
    (pictures / "test" / "3.png").unlink()
    given = [str(ROOT / "vit_finetune/run_vit.py"), *SHORT, "--data_dir", str(pictures), "--do_predict"]
    given += ["--per_device_eval_batch_size", "2"]
    for name, processes in (("one", 1), ("two", 2)):
        out = ["--output_dir", tmp_path / name]
        for run in run_script(*given, *out, processes=processes, folder=tmp_path / f"ranks of {name}"):
            assert run.returncode == 0, run.stderr
    one, two = (read_table(tmp_path / name / "predictions.csv") for name in ("one", "two"))
    assert len(one) == 3 and one == two


def test_items_hold_what_the_model_reads_and_nothing_else(cifar10):
    task = load_task("cifar10", str(cifar10))
    transform = ImageTransform(ViTImageProcessor(size={"height": 32, "width": 32}), crop=None)
    item = ImageDataset(task.evaluation, transform)[0]
    assert set(item) == {"pixel_values", "labels"}
