"""Text for the recipes: embedded, and from files."""

import csv
import json
import logging

import pytest
from datasets import Dataset

from pgt_hf.text import DOCSTRINGS, STDLIB, load_labelled_text, load_plain_text, train_tokenizer

ROWS = [(f"text number {i}, with a comma", ("cold", "warm")[i % 2]) for i in range(40)]


@pytest.fixture(scope="module")
def docstrings():
    return load_labelled_text(DOCSTRINGS)


@pytest.mark.slow
def test_docstrings_are_balanced_and_do_not_name_their_library(docstrings):
    names = docstrings["train"].features["label"].names
    counts = [docstrings["train"]["label"].count(label) for label in range(len(names))]
    assert min(counts) > 0.9 * max(counts) > 200
    assert not any(names[row["label"]] in row["text"] for row in docstrings["validation"])


@pytest.mark.slow
def test_docstrings_for_validation_come_from_other_files_than_those_for_training(docstrings):
    trained = set(docstrings["train"]["text"])
    seen = sum(text in trained for text in docstrings["validation"]["text"])
    assert seen < 0.1 * docstrings["validation"].num_rows  # boilerplate that a library repeats


def test_draws_depend_on_the_seed_alone(tmp_path):
    file = write(tmp_path / "rows.csv", ROWS)
    first, again, other = (load_labelled_text(file, max_train_samples=20, seed=seed) for seed in (0, 0, 1))
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
        ({"max_train_samples": 0}, "max_train_samples must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_columns_and_numbers_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load_labelled_text(write(tmp_path / "rows.csv", ROWS), **options)


def test_what_is_nowhere_and_what_is_no_text_are_named(tmp_path):
    with pytest.raises(ConnectionError, match="'no/such' is neither a local folder"):
        load_labelled_text("no/such")
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(ValueError, match=r"must be one of .csv, .tsv, .json, .jsonl, .parquet, .txt, got .*a.xlsx"):
        load_plain_text(str(tmp_path / "a.xlsx"))


def test_plain_text_comes_from_python_itself():
    splits = load_plain_text(STDLIB)
    assert splits["train"].num_rows > 8 * splits["validation"].num_rows > 80
    assert any("def " in text for text in splits["train"][:5]["text"])


def csv_of(rows, header="text,label"):
    return "\n".join([header, *(f"{text},{label}" for text, label in rows), ""])


REVIEWS = [(f"review {i}", "ab"[i % 2]) for i in range(40)]
FILES = {  # what is in the folder, and the numbers of texts in train and validation, and the classes
    "reviews and a test": (
        {"reviews.csv": csv_of(REVIEWS), "reviews_test.csv": csv_of(REVIEWS[:6])}, (40, 6), ["a", "b"],
    ),
    "a, val, test": (
        {"a.csv": csv_of(REVIEWS), "val.csv": csv_of(REVIEWS[:4]), "test.csv": csv_of(REVIEWS[:6])},
        (40, 4), ["a", "b"],
    ),
    "unlabelled test": (
        {"train.csv": csv_of(REVIEWS), "test.csv": "text\nreview\n"}, (36, 4), ["a", "b"],
    ),
    "a test of blanks": (
        {"train.csv": csv_of(REVIEWS), "test.csv": csv_of([("x", ""), ("y", "")])}, (36, 4), ["a", "b"],
    ),
    "numbers as classes": (
        {"train.tsv": csv_of([(f"text {i}", i % 11 + 1) for i in range(66)]).replace(",", "\t")},
        (55, 11), [str(i) for i in range(1, 12)],
    ),
    "texts without text": (
        {"train.csv": csv_of([*REVIEWS, ("", "a"), ("  ", "b")]), "val.csv": csv_of(REVIEWS[:3])}, (40, 3), ["a", "b"],
    ),
    "shards": ({"train-0.jsonl": '{"text": "x", "label": "a"}', "train-1.jsonl": '{"text": "y", "label": "b"}',
                "test.jsonl": '{"text": "z", "label": "b"}'}, (2, 1), ["a", "b"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files_of_a_folder_are_the_splits_that_their_names_say(case, tmp_path, caplog):
    files, sizes, names = FILES[case]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with caplog.at_level(logging.WARNING):
        splits = load_labelled_text(str(tmp_path))
    assert (splits["train"].num_rows, splits["validation"].num_rows) == sizes
    assert splits["train"].features["label"].names == splits["validation"].features["label"].names == names
    assert ("2 rows without text are left out, row 40 (from 0) first" in caplog.text) is (case == "texts without text")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"train.csv": csv_of([*REVIEWS, ("x", "")])}, r"split 'train': row 40 \(from 0\) has no label, ''"),
        (
            {"train.csv": csv_of([("caf\u00e9", "a")]).encode("latin1")},
            "train.csv' cannot be read: it holds byte 0xe9, which is not UTF-8",
        ),
        ({"a.txt": "caf\u00e9".encode("latin1")}, "a.txt' cannot be read: it holds byte 0xe9"),
        ({"a.txt": " \n"}, "a.txt' has no text"),
        ({"a.csv": csv_of(REVIEWS), "b.csv": csv_of(REVIEWS)}, "which of 'a.csv', 'b.csv' is for training"),
        ({"a.txt": "some text"}, r"no label column among \['text'\]"),
        ({"a.jsonl": '{"text": 5, "label": "a"}'}, "column 'text' must hold text"),
        ({"a.xlsx": "x"}, "holds no .csv, .tsv, .json, .jsonl, .parquet or .txt files"),
    ],
    ids=str,
)
def test_texts_that_cannot_be_read_are_refused_by_name(files, says, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=says):
        load_labelled_text(str(tmp_path))


def test_text_file_keeps_its_lines_and_its_end_is_for_validation(tmp_path):
    book = "".join(f"line {i}\n" for i in range(50)) + "the end"
    (tmp_path / "book.txt").write_text(book)
    (tmp_path / "b").mkdir()
    for number in range(3):
        (tmp_path / "b" / f"{number}.txt").write_text(f"{number}: " + book)
    splits = load_plain_text(str(tmp_path / "book.txt"))
    assert splits["train"]["text"][0] + splits["validation"]["text"][0] == book
    assert 0.08 < len(splits["validation"]["text"][0]) / len(book) < 0.12
    splits = load_plain_text(str(tmp_path / "b"))
    halves = zip(splits["train"]["text"], splits["validation"]["text"], strict=True)
    assert [first + rest for first, rest in halves] == [f"{number}: " + book for number in range(3)]


def test_text_files_by_split_and_documents_of_any_length(tmp_path):
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text(f"{split}\n" * 400_000)
    splits = load_plain_text(str(tmp_path))
    assert {key: set("".join(split["text"]).split()) for key, split in splits.items()} == {
        "train": {"train"}, "validation": {"valid"},
    }  # fmt: skip
    pieces = splits["train"]["text"][:]
    assert "".join(pieces) == "train\n" * 400_000 and max(map(len, pieces)) <= 1 << 20
    assert all(piece.endswith("\n") for piece in pieces)


def test_many_documents_are_held_out_whole(tmp_path):
    documents = [f"document {number}\nof two lines" for number in range(20)]
    for number, text in enumerate(documents):
        (tmp_path / f"{number}.txt").write_text(text)
    splits = load_plain_text(str(tmp_path))
    assert (splits["train"].num_rows, splits["validation"].num_rows) == (18, 2)
    assert sorted([*splits["train"]["text"], *splits["validation"]["text"]]) == sorted(documents)


def test_the_tokenizer_gives_every_text_back_and_survives_saving(tmp_path):
    tokenizer = train_tokenizer([text for text, _ in ROWS], vocab_size=300)
    assert len(tokenizer) == 300
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    text = "unseen: über 10 €\n\ttabs"
    for one in (tokenizer, again):
        assert one.decode(one(text)["input_ids"], skip_special_tokens=True) == text
    with pytest.raises(ValueError, match="vocab_size must be a whole number in .259, 10000000., got 100"):
        train_tokenizer([], vocab_size=100)
