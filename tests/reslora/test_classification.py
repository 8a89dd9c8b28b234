from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from reslora.classification import classification_data, collate_labelled, encode_labelled
from reslora.labelled_rows import LabelledExample, LabelScheme, find_labels
from reslora.metrics import label_metrics, metric_names
from reslora.settings import TrainSettings
from tests.reslora.tiny_encoder import build_encoder, build_encoder_tokenizer, labelled_examples

BINARY = LabelScheme(("no", "yes"))
NUMBER = LabelScheme(())


def logits_for(classes: list[int], count: int) -> np.ndarray:
    return np.eye(count)[classes] + 0.1


def test_pairs_are_joined_marked_and_cut_where_they_are_longer() -> None:
    tokenizer = build_encoder_tokenizer()
    pair = LabelledExample("x", ("abcdefghij", "kl"), "yes")
    (whole,) = encode_labelled([pair], tokenizer, 20, BINARY)
    assert tokenizer.decode(whole.input_ids).replace(" ", "") == "[CLS]abcdefghij[SEP]kl[SEP]"
    assert whole.token_type_ids == (0,) * 12 + (1,) * 3
    assert whole.target == 1
    (cut,) = encode_labelled([pair], tokenizer, 9, BINARY)
    assert tokenizer.decode(cut.input_ids).replace(" ", "") == "[CLS]abcd[SEP]kl[SEP]"


def test_padding_is_masked_and_changes_no_prediction() -> None:
    tokenizer, model = build_encoder_tokenizer(), build_encoder()
    examples = labelled_examples(5)
    rows = encode_labelled(examples, tokenizer, 40, find_labels(examples))
    batch = collate_labelled(rows, 0)
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(row) for row in rows]
    assert bool((batch["input_ids"][batch["attention_mask"] == 0] == 0).all())
    assert batch["labels"].tolist() == [0, 1, 2, 0, 1]
    with torch.no_grad():
        together = model(**batch).logits
        alone = torch.cat([model(**collate_labelled([row], 0)).logits for row in rows])
        del batch["attention_mask"]
        unmasked = model(**batch).logits
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert (unmasked - alone).abs().max() > 1e-3


def test_numbers_are_float_labels() -> None:
    rows = encode_labelled(
        [LabelledExample("x", ("a",), 2), LabelledExample("x", ("b",), 0.5)],
        build_encoder_tokenizer(),
        16,
        NUMBER,
    )
    labels = collate_labelled(rows, 0)["labels"]
    assert labels.dtype == torch.float32
    assert labels.tolist() == [2.0, 0.5]


def test_the_data_of_a_run_holds_out_measures_and_has_a_digest() -> None:
    examples = labelled_examples(20)
    labels = find_labels(examples)
    settings = TrainSettings(max_tokens=40, validation_fraction=0.25)
    tokenizer = build_encoder_tokenizer()
    data = classification_data(examples, None, tokenizer, settings, labels)
    assert (len(data.train), len(data.validation)) == (15, 5)
    assert list(map(len, data.validation)) == sorted(map(len, data.validation))
    targets = np.array([row.target for row in data.validation])
    assert data.measure is not None
    measured = data.measure(EvalPrediction(logits_for(list(targets), 3), targets))
    assert measured == {"accuracy": 1.0, "mcc": 1.0}
    assert data.metrics == ("accuracy", "mcc")
    other = [*examples[:-1], LabelledExample("x", examples[-1].texts, 0)]
    changed = classification_data(other, [], tokenizer, settings, labels)
    same = classification_data(examples, [], tokenizer, settings, labels)
    assert same.digest() != changed.digest()
    wrong = LabelScheme(("1", "2"))
    with pytest.raises(ValueError, match="tiny:3: label is 0, expected one of 1, 2"):
        classification_data(examples[1:3], examples[3:4], tokenizer, settings, wrong)


def test_class_metrics_by_hand() -> None:
    targets = np.array([1, 1, 1, 0, 0, 0, 0, 1])
    found = logits_for([1, 1, 0, 0, 0, 1, 0, 1], 2)  # tp 3, fn 1, tn 3, fp 1
    metrics = label_metrics(found, targets, BINARY)
    assert metrics["accuracy"] == 6 / 8
    assert metrics["f1"] == pytest.approx(3 / (3 + (1 + 1) / 2))
    assert metrics["mcc"] == pytest.approx((3 * 3 - 1) / math.sqrt(4 * 4 * 4 * 4))
    assert tuple(metrics) == metric_names(BINARY)
    never = label_metrics(logits_for([0] * 8, 2), targets, BINARY)
    assert never == {"accuracy": 0.5, "mcc": 0.0, "f1": 0.0}


def test_regression_metrics_by_hand() -> None:
    targets = np.array([0.0, 1.0, 2.0, 5.0])
    found = np.array([[0.1], [0.2], [0.3], [0.4]])
    metrics = label_metrics(found, targets, NUMBER)
    assert metrics["spearman"] == pytest.approx(1.0)
    x, y = np.array([-1.5, -0.5, 0.5, 1.5]), targets - 2
    assert metrics["pearson"] == pytest.approx(float(x @ y / np.sqrt((x @ x) * (y @ y))))
    assert label_metrics(-found, targets, NUMBER)["spearman"] == pytest.approx(-1.0)
    constant = label_metrics(0 * found, targets, NUMBER)
    assert constant == {"pearson": 0.0, "spearman": 0.0}


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="no rows"):
        label_metrics(np.zeros((0, 2)), np.zeros(0, dtype=int), BINARY)
    with pytest.raises(ValueError, match="NaN or infinite"):
        label_metrics(np.array([[0.0, np.nan]]), np.array([1]), BINARY)
