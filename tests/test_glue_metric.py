"""`glue/glue_metric.py` against hand-computed values, scikit-learn and scipy."""

import math

import numpy as np
import pytest
from glue_metric import GlueMetric, make_compute_metrics
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from tasks import TASKS
from transformers import EvalPrediction


def compute(task_name, predictions, references):
    return GlueMetric(task_name, keep_in_memory=True).compute(predictions=predictions, references=references)


def test_metrics_have_their_textbook_values():
    # 6 true positives, 3 true negatives, 1 false positive, 2 false negatives.
    predictions, references = [1] * 6 + [0] * 3 + [1] + [0] * 2, [1] * 6 + [0] * 3 + [0] + [1] * 2
    matthews = (6 * 3 - 1 * 2) / math.sqrt((6 + 1) * (6 + 2) * (3 + 1) * (3 + 2))
    assert compute("cola", predictions, references) == pytest.approx({"matthews_correlation": matthews})
    assert compute("mrpc", predictions, references) == pytest.approx(
        {"accuracy": 9 / 12, "f1": 2 * 6 / (2 * 6 + 1 + 2)}
    )
    assert compute("rte", predictions, references) == pytest.approx({"accuracy": 9 / 12})
    assert compute("mnli", [0, 1, 2, 2], [0, 1, 2, 0]) == {"accuracy": 0.75}
    # Monotone and not linear: Pearson of (1, 2, 3) and (1, 4, 9) is 8 / sqrt(2 * 98 / 3).
    expected = {"pearson": 8 / math.sqrt(2 * 98 / 3), "spearmanr": 1.0}
    assert compute("stsb", [1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == pytest.approx(expected)


def test_metrics_are_those_of_scikit_learn_and_scipy():
    rng = np.random.default_rng(0)
    predictions, references = rng.integers(0, 2, (2, 100))
    assert compute("cola", predictions, references)["matthews_correlation"] == matthews_corrcoef(
        references, predictions
    )
    assert compute("qqp", predictions, references)["f1"] == f1_score(references, predictions)
    scores = rng.uniform(0, 5, (2, 100)).astype(np.float32)
    result = compute("stsb", *scores)
    assert result["pearson"] == pytest.approx(pearsonr(*scores).statistic)
    assert result["spearmanr"] == pytest.approx(spearmanr(*scores).statistic)


@pytest.mark.parametrize("task_name", TASKS)
def test_every_task_is_scored_with_its_metrics_again_and_again(task_name):
    metric = GlueMetric(task_name, keep_in_memory=True)
    for right in ([0, 1, 1], [1, 0]):
        perfect = metric.compute(predictions=right, references=right)
        assert perfect == pytest.approx(dict.fromkeys(TASKS[task_name].metrics, 1.0))


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_undefined_correlations_are_nan():
    for predictions, references in (([2.5] * 3, [1.0, 2.0, 3.0]), ([1.0], [1.0])):
        result = compute("stsb", predictions, references)
        assert set(result) == {"pearson", "spearmanr"} and all(math.isnan(value) for value in result.values())


def test_one_class_only_scores_zero():
    assert compute("cola", [0, 0, 0], [0, 1, 0]) == {"matthews_correlation": 0.0}
    assert compute("mrpc", [0, 0, 0], [0, 1, 0])["f1"] == 0.0


def test_another_task_is_refused():
    with pytest.raises(ValueError, match="Expected a GLUE task among cola, sst2, .*, wnli, got 'snli'."):
        GlueMetric("snli")


def test_logits_become_classes_and_scores():
    logits = np.array([[0.1, 0.2, 0.0], [1.0, -1.0, 0.0], [0.0, 0.1, 0.3]], dtype=np.float32)
    assert make_compute_metrics(TASKS["mnli"])(EvalPrediction(logits, np.array([1, 0, 1]))) == {"accuracy": 2 / 3}
    scores = make_compute_metrics(TASKS["stsb"])(
        EvalPrediction(np.array([[1.0], [2.0], [3.0]], dtype=np.float32), np.array([2.0, 4.0, 6.0], dtype=np.float32))
    )
    assert scores == pytest.approx({"pearson": 1.0, "spearmanr": 1.0})


def test_a_correlation_that_is_undefined_counts_as_none_and_is_warned_of(caplog):
    constant = EvalPrediction(np.full((3, 1), 2.5, dtype=np.float32), np.array([1.0, 2.0, 3.0], dtype=np.float32))
    with pytest.warns(match="An input array is constant"):
        assert make_compute_metrics(TASKS["stsb"])(constant) == {"pearson": 0.0, "spearmanr": 0.0}
    assert "pearson, spearmanr: undefined, since all predictions or all labels are the same; 0 is taken" in caplog.text


def test_outputs_that_are_no_numbers_are_no_classes():
    with pytest.raises(ValueError, match="Expected numbers from the model, got NaN for 1 of 2 examples"):
        make_compute_metrics(TASKS["rte"])(EvalPrediction(np.array([[0.0, 1.0], [np.nan, 0.0]]), np.array([0, 1])))


def test_f1_is_of_the_tasks_class_1_whatever_its_place_in_the_model():
    logits, labels = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]), np.array([1, 1, 0, 0])
    expected = make_compute_metrics(TASKS["mrpc"])(EvalPrediction(logits, labels))
    turned = make_compute_metrics(TASKS["mrpc"], (1, 0))(EvalPrediction(logits[:, ::-1], 1 - labels))
    assert turned == expected == {"accuracy": 0.5, "f1": 0.5}
    uneven = np.array([1, 1, 1, 0])
    expected = make_compute_metrics(TASKS["mrpc"])(EvalPrediction(logits, uneven))
    assert make_compute_metrics(TASKS["mrpc"], (1, 0))(EvalPrediction(logits[:, ::-1], 1 - uneven)) == expected
