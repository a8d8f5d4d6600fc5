"""Columns, labels and the split for evaluation, the same for images and for text."""

import logging

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features

from pgt_hf.data.splits import class_names, draw, find_column, train_and_validation


def rows(labels, names=None):
    """The labels' type is what they have themselves; a ClassLabel with names may hold what is no class."""
    split = Dataset.from_dict({"text": [f"text {i}" for i in range(len(labels))], "label": labels})
    if names is None:
        return split
    return Dataset(
        split.data, info=DatasetInfo(features=Features({**split.features, "label": ClassLabel(names=names)}))
    )


def test_labels_without_names_are_numbered_as_they_occur():
    stars = train_and_validation(DatasetDict(train=rows([5, 1, 3] * 20)), "stars", 0)
    assert class_names(stars["train"]) == class_names(stars["validation"]) == ["1", "3", "5"]
    found = {(text, label) for split in stars.values() for text, label in zip(split["text"], split["label"])}
    assert ("text 0", 2) in found and ("text 1", 0) in found and len(found) == 60


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 500, 100000], ["10", "500", "100000"]),
        (["10", "9", "b", "a"], ["9", "10", "a", "b"]),
        (["001", "010", "002"], ["001", "002", "010"]),
        ([-1, 1], ["-1", "1"]),
        ([2.0, 0.0, 1.0], ["0", "1", "2"]),
        ([True, False], ["False", "True"]),
        (["Cafe\u0301", " Caf\u00e9", "x"], ["Caf\u00e9", "x"]),
    ],
    ids=str,
)
def test_classes_are_named_as_written_and_numbers_are_in_order(labels, names):
    both = train_and_validation(DatasetDict(train=rows(labels * 20), test=rows(labels)), "set", 0)
    assert class_names(both["train"]) == class_names(both["validation"]) == names
    written = [both["validation"].features["label"].int2str(number) for number in both["validation"]["label"]]
    assert len(set(written)) == len(names) and written[-1] in str(labels[-1])


def test_evaluation_may_name_fewer_classes_in_another_order():
    splits = DatasetDict(train=rows([0, 1, 2], ["a", "b", "c"]), test=rows([0, 1], ["c", "a"]))
    assert train_and_validation(splits, "set", 0)["validation"]["label"][:] == [2, 0]


@pytest.mark.parametrize(
    ("test", "says"),
    [(["a", "b"], None), ([None, None], "test"), (["", " NA "], "test"), (["-1", "-1"], "test")], ids=str,
)  # fmt: skip
def test_test_split_serves_if_it_has_labels_and_a_warning_says_if_not(test, says, caplog):
    with caplog.at_level(logging.WARNING):
        both = train_and_validation(DatasetDict(train=rows(["a", "b"] * 20), test=rows(test)), "set", 0)
    assert both["validation"].num_rows == (2 if says is None else 4)
    assert ("the split test has no labels and is not used" in caplog.text) is (says is not None)


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
        (
            {"train": rows([0, 1], ["a", "b"]), "test": rows([0, 1], ["b", "c"])},
            r"classes that 'train' lacks: \['c'\]",
        ),
        (
            {"train": rows(["a", "b"])},
            "'set' is too small to hold out a validation split: each class needs 2 examples",
        ),
        ({"train": rows([0] * 30, ["a"])}, r"'set' must have at least 2 classes, got \['a'\] alone"),
        ({"train": rows([0, 1, -1] * 9)}, r"split 'train': row 2 \(from 0\) has no label, -1"),
        ({"train": rows([0, 7, 1] * 9, ["a", "b"])}, r"row 1 \(from 0\) has a label that is no class, 7"),
        ({"train": rows(["a", None, "b"] * 9)}, r"row 1 \(from 0\) has no label, None"),
        ({"train": rows(["a", "b", " NA"] * 9)}, r"row 2 \(from 0\) has no label, ' NA'"),
        ({"train": rows([0.5, 1.0] * 9)}, "the column holds numbers such as 0.5"),
        ({"train": rows(["0.5", "1"] * 9)}, "the column holds numbers such as 0.5"),
        ({"train": rows([0.0, float("nan")] * 9)}, r"row 1 \(from 0\) has no label, nan"),
        (
            {"train": rows([b"a", b"b"] * 9)},
            "a label must be one word or whole number, the column holds Value.*binary",
        ),
        ({"train": rows([["a"], ["b"]] * 9)}, "a label must be one word or whole number, the column holds List"),
        ({"train": rows([0, 1], ["a", " a"])}, "'set' gives the name 'a' to two classes"),
    ],
)
def test_what_cannot_be_split_is_an_error_that_says_why(splits, message):
    with pytest.raises(ValueError, match=message):
        train_and_validation(DatasetDict(splits), "set", 0)


def test_column_is_the_one_asked_for_or_the_usual_or_the_only_one_of_its_type():
    assert find_column(["a", "text"], "here", "text", "a", ("text",)) == "a"
    assert find_column(["a", "text"], "here", "text", None, ("body", "text")) == "text"
    assert find_column(["a", "b"], "here", "image", None, ("img",), typed=["b"]) == "b"
    with pytest.raises(ValueError, match=r"no image column among \['a', 'b'\]; name it with image_column"):
        find_column(["a", "b"], "here", "image", None, ("img",), typed=["a", "b"])


def test_draws_are_those_of_the_seed():
    split = rows(list(range(50)))
    assert draw(split, 5, 1)["text"] == draw(split, 5, 1)["text"] != draw(split, 5, 2)["text"]
    assert draw(split, 50, 1) is split and draw(split, None, 1) is split
