"""Columns, labels and the split for evaluation, the same for images and for text."""

import logging

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from pgt_hf.splits import class_names, draw, find_column, train_and_validation


def rows(labels, names=None):
    feature = ClassLabel(names=names) if names else Value("string" if isinstance(labels[0], str) else "int64")
    features = Features({"text": Value("string"), "label": feature})
    return Dataset.from_dict({"text": [f"text {i}" for i in range(len(labels))], "label": labels}, features=features)


def test_labels_without_names_are_numbered_as_they_occur():
    stars = train_and_validation(DatasetDict(train=rows([5, 1, 3] * 20)), "stars", 0)
    assert class_names(stars["train"]) == class_names(stars["validation"]) == ["1", "3", "5"]
    found = {(text, label) for split in stars.values() for text, label in zip(split["text"], split["label"])}
    assert ("text 0", 2) in found and ("text 1", 0) in found and len(found) == 60


def test_tenth_of_each_class_is_held_out_and_a_warning_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        both = train_and_validation(DatasetDict(train=rows(["a", "a", "b", "b"] * 25)), "pairs", seed=1)
    assert sorted(both["validation"]["label"]) == [0] * 5 + [1] * 5
    assert "pairs has no split for evaluation: a tenth of `train` is held out (seed 1)" in caplog.text


def test_unlabelled_test_split_is_not_evaluated_on():
    splits = DatasetDict(train=rows([0, 1] * 20, ["a", "b"]), test=rows([-1, -1], ["a", "b"]))
    assert train_and_validation(splits, "set", 0)["validation"].num_rows == 4


def test_plain_text_needs_no_labels():
    splits = DatasetDict(train=rows([0] * 30).remove_columns("label"))
    both = train_and_validation(splits, "book", 0, labelled=False)
    assert (both["train"].num_rows, both["validation"].num_rows) == (27, 3)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"test": rows([-1, -1])}, "'set' has nothing labelled in its splits"),
        ({"train": rows([0], ["a"]), "test": rows([0], ["b"])}, "the splits of 'set' name different classes"),
        ({"train": rows(["a", "b"])}, "'set' is too small to hold out a validation split"),
    ],
)
def test_what_cannot_be_split_is_an_error_that_says_why(splits, message):
    with pytest.raises(ValueError, match=message):
        train_and_validation(DatasetDict(splits), "set", 0)


def test_column_is_the_one_asked_for_or_the_usual_or_the_only_one_of_its_type():
    assert find_column(["a", "text"], "text", "a", ("text",)) == "a"
    assert find_column(["a", "text"], "text", None, ("body", "text")) == "text"
    assert find_column(["a", "b"], "image", None, ("img",), typed=["b"]) == "b"
    with pytest.raises(ValueError, match=r"no image column among \['a', 'b'\]; name it with image_column"):
        find_column(["a", "b"], "image", None, ("img",), typed=["a", "b"])


def test_draws_are_those_of_the_seed():
    split = rows(list(range(50)))
    assert draw(split, 5, 1)["text"] == draw(split, 5, 1)["text"] != draw(split, 5, 2)["text"]
    assert draw(split, 50, 1) is split and draw(split, None, 1) is split
    with pytest.raises(ValueError, match="at least 1, got 0"):
        draw(split, 0, 1)
