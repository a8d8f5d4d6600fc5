"""Text for the recipes: embedded, and from files."""

import csv
import json

import pytest
from datasets import Dataset

from pgt_hf.text import DOCSTRINGS, STDLIB, load_labelled_text, load_plain_text, train_tokenizer

ROWS = [(f"text number {i}, with a comma", ("cold", "warm")[i % 2]) for i in range(40)]


@pytest.fixture(scope="module")
def docstrings():
    return load_labelled_text(DOCSTRINGS)


def test_docstrings_are_balanced_and_do_not_name_their_library(docstrings):
    names = docstrings["train"].features["label"].names
    counts = [docstrings["train"]["label"].count(label) for label in range(len(names))]
    assert min(counts) > 0.9 * max(counts) > 200
    assert not any(names[row["label"]] in row["text"] for row in docstrings["validation"])


def test_docstrings_for_validation_come_from_other_files_than_those_for_training(docstrings):
    trained = set(docstrings["train"]["text"])
    seen = sum(text in trained for text in docstrings["validation"]["text"])
    assert seen < 0.1 * docstrings["validation"].num_rows  # boilerplate that a library repeats


@pytest.mark.slow
def test_draws_depend_on_the_seed_alone():
    first, again, other = (load_labelled_text(DOCSTRINGS, max_train_samples=20, seed=seed) for seed in (0, 0, 1))
    assert first["train"]["text"] == again["train"]["text"] != other["train"]["text"]
    assert first["train"].num_rows == 20


def write(path, rows):
    table = [{"text": text, "label": label} for text, label in rows]
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    elif path.suffix == ".parquet":
        Dataset.from_list(table).to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in table))
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_file_gives_its_rows_with_a_tenth_of_each_class_held_out(tmp_path, suffix):
    splits = load_labelled_text(write(tmp_path / f"rows{suffix}", ROWS))
    feature = splits["train"].features["label"]
    assert feature.names == ["cold", "warm"]
    assert sorted(splits["validation"]["label"]) == [0, 0, 1, 1]
    rows = [(row["text"], feature.int2str(row["label"])) for split in splits.values() for row in split]
    assert sorted(rows) == sorted(ROWS)


def test_a_folder_with_both_splits_keeps_them_and_names_its_columns(tmp_path):
    for split, part in (("train", ROWS[:30]), ("test", ROWS[30:])):
        Dataset.from_list([{"body": text, "stars": i % 3} for i, (text, _) in enumerate(part)]).to_csv(
            tmp_path / f"{split}.csv"
        )
    splits = load_labelled_text(str(tmp_path), text_column="body", label_column="stars")
    assert {split: rows.num_rows for split, rows in splits.items()} == {"train": 30, "validation": 10}
    assert splits["validation"].features["label"].names == ["0", "1", "2"]
    assert splits["validation"][4] == {"text": "text number 34, with a comma", "label": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "boddy"}, r"text_column must be one of \['text', 'label'\], got 'boddy'"),
        ({"label_column": "stars"}, "label_column must be one of .* got 'stars'"),
        ({"max_train_samples": 0}, "number of samples must be at least 1, got 0"),
    ],
)
def test_bad_columns_and_numbers_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load_labelled_text(write(tmp_path / "rows.csv", ROWS), **options)


def test_what_is_nowhere_and_what_is_no_text_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="'no/such' is neither a file, nor a folder"):
        load_labelled_text("no/such")
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(ValueError, match=r"must be one of .csv, .json, .jsonl, .parquet, .txt, got .*a.xlsx"):
        load_plain_text(str(tmp_path / "a.xlsx"))


def test_plain_text_comes_from_python_itself_or_a_file(tmp_path):
    splits = load_plain_text(STDLIB)
    assert splits["train"].num_rows > 8 * splits["validation"].num_rows > 80
    assert any("def " in text for text in splits["train"][:5]["text"])
    (tmp_path / "book.txt").write_text("\n".join(f"line {i}" for i in range(50)))
    assert {split: rows.num_rows for split, rows in load_plain_text(str(tmp_path / "book.txt")).items()} == {
        "train": 45,
        "validation": 5,
    }


def test_the_tokenizer_gives_every_text_back_and_survives_saving(tmp_path):
    tokenizer = train_tokenizer([text for text, _ in ROWS], vocab_size=300)
    assert len(tokenizer) == 300
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    text = "unseen: über 10 €\n\ttabs"
    for one in (tokenizer, again):
        assert one.decode(one(text)["input_ids"], skip_special_tokens=True) == text
    with pytest.raises(ValueError, match="vocab_size must be at least 259, got 100"):
        train_tokenizer([], vocab_size=100)
