"""Data sets as people have them: read as they were meant, or refused in one line that names what is wrong."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from datasets import Image as ImageFeature
from PIL import Image

from pgt_hf.images import BadImageError, ImageDataset, ImageStream, ImageTransform, class_names, load_image_dataset

Maker = Callable[[Path], object]


def picture(path: Path, number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG"
    Image.fromarray(np.full((6, 8, 3), 40 + number, dtype=np.uint8)).save(path, kind)


def tree(*folders: str, count: int = 3, suffix: str = ".png") -> Maker:
    def make(root: Path) -> None:
        for folder in folders:
            for number in range(count):
                picture(root / folder / f"{number}{suffix}", number)

    return make


def table(name: str, text: str | bytes, images: int = 12) -> Maker:
    """A file of this content beside ``images`` pictures."""

    def make(root: Path) -> None:
        for number in range(images):
            picture(root / "photos" / f"{number}.png", number)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return make


def rows(labels: list, header: str = "image,label", separator: str = ",") -> str:
    lines = [header.replace(",", separator)]
    lines += [f"photos/{number}.png{separator}{label}" for number, label in enumerate(labels)]
    return "\n".join(lines) + "\n"


def parquet(columns: dict, features: dict) -> Maker:
    def make(root: Path) -> None:
        count = max(map(len, columns.values()))
        pixels = [np.full((6, 8, 3), number, dtype=np.uint8) for number in range(count)]
        Dataset.from_dict(
            {"picture": pixels} | columns, features=Features({"picture": ImageFeature()} | features)
        ).to_parquet(root / "train.parquet")

    return make


def both(*makers: Maker) -> Maker:
    return lambda root: [make(root) for make in makers]


def write(name: str, content: bytes = b"x") -> Maker:
    def make(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    return make


def link(name: str, target: str) -> Maker:
    def make(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)

    return make


LABEL = {"label": ClassLabel(names=["a", "b"])}
AB, TEXT = ["a", "b"] * 6, Value("string")
SPLITS = ("train/cat", "train/dog", "test/cat", "test/dog")
ROWS_AB = rows(AB)

# What is made, and the classes, the numbers of images in train and validation, and the part of a warning, if any.
RIGHT: dict[str, tuple[Maker, list[str], tuple[int, int], str]] = {
    "folders of classes": (tree("cat", "dog", count=10), ["cat", "dog"], (18, 2), "held out"),
    "in a folder of an archive": (tree("set/cat", "set/dog", count=10), ["cat", "dog"], (18, 2), ""),
    "splits": (tree(*SPLITS), ["cat", "dog"], (6, 6), ""),
    "Training and Testing": (tree("Training/cat", "Training/dog", "Testing/cat"), ["cat", "dog"], (6, 3), ""),
    "three splits": (tree(*SPLITS, "val/cat", "val/dog", count=2), ["cat", "dog"], (4, 4), ""),
    "upper-case suffixes": (tree(*SPLITS, suffix=".JPG"), ["cat", "dog"], (6, 6), ""),
    "numbers as classes": (tree(*(f"train/{n}" for n in (1, 2, 10)), "test/2"), ["1", "2", "10"], (9, 3), ""),
    "001 as a class": (tree("train/001", "train/002", "test/002"), ["001", "002"], (6, 3), ""),
    "a folder between": (tree("train/cat/images", "train/dog/images", "test/cat/images"), ["cat", "dog"], (6, 3), ""),
    "a class called train": (tree("car", "train", "bus", count=10), ["bus", "car", "train"], (27, 3), ""),
    "NFC against NFD": (tree("train/caf\u00e9", "train/x", "test/cafe\u0301"), ["caf\u00e9", "x"], (6, 3), ""),
    "what systems leave": (
        both(tree(*SPLITS, "__MACOSX/train/cat", ".cache/x"), write("train/.DS_Store"), write("train/Thumbs.db")),
        ["cat", "dog"], (6, 6), "",
    ),
    "links to folders": (
        both(tree(".tabby", "dog", count=10), link("cat", ".tabby"), link("dog/up", "..")),
        ["cat", "dog"], (18, 2), "",
    ),
    "classes called none and NA": (tree("none", "NA", "tumour", count=10), ["NA", "none", "tumour"], (27, 3), ""),
    "a class with underscores": (tree("__other__", "cat", count=10), ["__other__", "cat"], (18, 2), ""),
    "an empty class": (
        both(tree("cat", "dog", count=10), lambda root: (root / "owl").mkdir()), ["cat", "dog"], (18, 2),
        "no images in ['owl']",
    ),
    "notes among the images": (
        both(tree(*SPLITS), write("train/cat/notes.txt")), ["cat", "dog"], (6, 6), "1 of them, as",
    ),
    "a zip beside": (both(tree(*SPLITS), write("train.zip")), ["cat", "dog"], (6, 6), "archives are not read"),
    "a test set without classes": (
        tree("train/cat", "train/dog", "test", count=10), ["cat", "dog"], (18, 2), "test has no labels",
    ),
    "a CSV": (table("labels.csv", ROWS_AB), ["a", "b"], (10, 2), ""),
    "a CSV from Windows": (
        table("labels.csv", "\ufeff" + ROWS_AB.replace("/", "\\").replace("\n", "\r\n")), ["a", "b"], (10, 2), "",
    ),
    "a CSV with semicolons": (table("labels.csv", rows(AB, separator=";")), ["a", "b"], (10, 2), ""),
    "a CSV in UTF-16": (table("labels.csv", ROWS_AB.encode("utf-16")), ["a", "b"], (10, 2), ""),
    "a TSV": (table("labels.tsv", rows(AB, separator="\t")), ["a", "b"], (10, 2), ""),
    "JSON lines": (
        table("x.jsonl", "\n".join(json.dumps({"image": f"photos/{n}.png", "label": n % 2}) for n in range(12))),
        ["0", "1"], (10, 2), "",
    ),
    "a comma in a file called TSV": (table("labels.tsv", ROWS_AB), ["a", "b"], (10, 2), ""),
    "lines of an old Mac": (table("labels.csv", ROWS_AB.replace("\n", "\r")), ["a", "b"], (10, 2), ""),
    "quotes, commas and lines in a header": (
        table("x.csv", '"a ""note"", or\ntwo","image","label"\n' + "\n".join(
            f'"x, ""y""\nz",photos/{n}.png,"{"ab"[n % 2]}"' for n in range(12)
        )),
        ["a", "b"], (10, 2), "",
    ),
    "blanks around cells": (
        table("x.csv", "label, image\n" + "\n".join(f"{'ab'[n % 2]} , photos/{n}.png " for n in range(12))),
        ["a", "b"], (10, 2), "",
    ),
    "an index without a name": (
        table("x.csv", ",image,label\n" + "\n".join(f"{n},photos/{n}.png,{'ab'[n % 2]}" for n in range(12))),
        ["a", "b"], (10, 2), "",
    ),
    "an image that is named twice": (
        table("x.csv", ROWS_AB + "photos/0.png,a\n"), ["a", "b"], (11, 2), "named more than once, as 'photos/0.png'",
    ),
    "a column of splits": (
        table("x.csv", "image,label,split\n" + "\n".join(
            f"photos/{n}.png,{'ab'[n % 2]},{'Test' if n > 7 else 'train'}" for n in range(12)
        )),
        ["a", "b"], (8, 4), "rows are split as the column 'split' says",
    ),
    "true and false": (
        table("x.jsonl", "\n".join(json.dumps({"image": f"photos/{n}.png", "label": n > 5}) for n in range(12))),
        ["False", "True"], (10, 2), "",
    ),
    "long names and signs": (
        table("x.csv", rows(["x" * 5000, "9" * 5000, "\U0001f408 tabby & co. <b>"] * 4)),
        ["9" * 5000, "x" * 5000, "\U0001f408 tabby & co. <b>"], (9, 3), "",
    ),
    "upper-case header": (table("labels.csv", rows(AB, header=" Filename, Class")), ["a", "b"], (10, 2), ""),
    "labels 001": (table("labels.csv", rows(["001", "010"] * 6)), ["001", "010"], (10, 2), ""),
    "labels 10, 500, 100000": (
        table("labels.csv", rows([10, 500, 100000] * 4)), ["10", "500", "100000"], (9, 3), "",
    ),
    "an unlabelled test.csv": (
        both(table("train.csv", ROWS_AB), table("test.csv", "image\nphotos/0.png\n")),
        ["a", "b"], (10, 2), "test has no labels",
    ),
    "a test.csv of blanks": (
        both(table("train.csv", ROWS_AB), table("test.csv", rows(["", "NA"]))),
        ["a", "b"], (10, 2), "test has no labels",
    ),
    "a sample submission": (
        both(table("train.csv", ROWS_AB), table("val.csv", ROWS_AB), table("sample_submission.csv", ROWS_AB)),
        ["a", "b"], (12, 12), "sample_submission.csv not used",
    ),
    "a.csv and val.csv": (
        both(table("a.csv", ROWS_AB), table("val.csv", rows(["b"]))), ["a", "b"], (12, 1), "",
    ),
    "metadata.csv in each split": (
        both(*(
            both(tree(f"{split}/photos", count=12), table(f"{split}/metadata.csv", rows(AB, "file_name,label")))
            for split in ("train", "test")
        )),
        ["a", "b"], (12, 12), "",
    ),
    "a file_name beside the image": (
        parquet({"file_name": ["x"] * 20, "label": ["a", "b"] * 10}, dict.fromkeys(("file_name", "label"), TEXT)),
        ["a", "b"], (18, 2), "",
    ),
    "-1 and null among classes": (
        parquet({"label": [0, 1] * 10 + [-1, None]}, LABEL),
        ["a", "b"], (18, 2), "2 rows without a label are left out",
    ),
    "one class is rare in validation": (
        both(table("train.csv", rows(["a", "b", "c"] * 4)), table("val.csv", rows(["c"]))),
        ["a", "b", "c"], (12, 1), "",
    ),
    "saved to disk": (
        lambda root: DatasetDict(
            train=load_image_dataset("digits", max_train_samples=80)["train"]
        ).save_to_disk(root),
        [str(n) for n in range(10)], (70, 10), "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_data_is_read_as_it_was_meant(case, tmp_path, caplog):
    make, names, sizes, warning = RIGHT[case]
    make(tmp_path)
    with caplog.at_level(logging.WARNING):
        splits = load_image_dataset(str(tmp_path))
    assert class_names(splits["train"]) == class_names(splits["validation"]) == names
    assert (splits["train"].num_rows, splits["validation"].num_rows) == sizes
    assert splits["train"][0]["image"].size and warning in caplog.text


def test_bytes_of_files_are_images(tmp_path):
    picture(tmp_path / "x.png")
    cells = [(tmp_path / "x.png").read_bytes()] * 20
    (tmp_path / "set").mkdir()
    Dataset.from_dict({"image": cells, "label": ["a", "b"] * 10}).to_parquet(tmp_path / "set" / "train.parquet")
    assert load_image_dataset(str(tmp_path / "set"))["train"][0]["image"].size == (8, 6)


# What is made, and what the error says.
WRONG: dict[str, tuple[Maker, str]] = {
    "no class folders": (tree("train", "test"), r"train/0.png' must lie in a folder of its class"),
    "no folders": (tree("."), r"0.png' must lie in a folder of its class"),
    "a stray image": (both(tree(*SPLITS), tree("train", count=1)), "train/0.png' must lie in a folder of its class"),
    "one class": (tree("cat", count=20), r"must have at least 2 classes, got \['cat'\] alone"),
    "splits and others": (tree(*SPLITS, "extra/cat"), r"and others: \['extra'\]"),
    "two for one split": (tree("train/a", "training/b"), "has several folders for one split"),
    "deep classes": (tree("mammal/cat", "mammal/dog", "bird/owl"), "is its class 'bird' or 'owl'"),
    "a class that train lacks": (tree("train/a", "train/b", "test/c"), r"that 'train' lacks: \['c'\]"),
    "one image": (tree("cat", "dog", count=1), "each class needs 2 examples"),
    "HEIC alone": (
        both(*(write(f"{kind}/{n}.heic", b"\0\0\0\x18ftypheic" + bytes(9)) for kind in "ab" for n in range(2))),
        r"no image can be read, .*0.heic\): .* it is HEIC",
    ),
    "links to nowhere": (
        both(*(link(f"{kind}/{n}.png", "../nowhere.png") for kind in "ab" for n in range(2))),
        r"no image can be read, .*0.png\): .*No such file",
    ),
    "a name that is not UTF-8": (both(tree("a"), tree("b\udce9")), "the name is not UTF-8; rename it"),
    "paths with a zero byte": (
        table("x.csv", "image,label\n" + "\n".join(f"a\0{n},{'ab'[n % 2]}" for n in range(12))),
        "no image can be read, .*null byte",
    ),
    "a column of splits and others": (
        table("x.csv", "image,label,split\nphotos/0.png,a,train\nphotos/1.png,a,extra\n"),
        "the column 'split' names splits, such as 'train', and also 'extra'",
    ),
    "UTF-16 without a mark": (table("x.csv", ROWS_AB.encode("utf-16-le")), "x.csv' cannot be read: it holds zero"),
    "a damaged archive": (write("x.tar", b"x" * 10240), "cannot be read: "),
    "every label another": (table("x.csv", rows(list("abcdefghijkl"))), "each class needs 2 examples"),
    "numbers beyond all bounds": (
        table("x.jsonl", f'{{"image": "a", "label": {10**30}}}'), "x.jsonl' cannot be read: its column 'label'",
    ),
    "words among numbers": (
        table("x.jsonl", '{"image": "a", "label": 1}\n{"image": "b", "label": "c"}'), "its column 'label' .*'c'",
    ),
    "archives alone": (write("photos.zip"), "holds no images, .*; unpack 'photos.zip' first"),
    "nothing": (lambda root: None, "holds no images"),
    "all bad": (
        both(*(write(f"{kind}/{n}.png") for kind in "ab" for n in range(4))), r"no image can be read, .* \(.*png\)",
    ),
    "no such files": (table("x.csv", ROWS_AB, images=0), r"image 0 \(.*photos/\d+.png\): .*No such file"),
    "a blank label": (table("x.csv", rows(["a", "b", "", "a"])), r"split 'train': row 2 \(from 0\) has no label, ''"),
    "the label NA": (table("x.csv", rows(["a", "NA", "a"])), r"row 1 \(from 0\) has no label, 'NA'"),
    "-1 among numbers": (table("x.csv", rows([0, 1, -1, 2])), r"row 2 \(from 0\) has no label, '-1'"),
    "floats": (table("x.csv", rows([0.5, 1.5, 2])), "holds numbers such as 0.5"),
    "lists": (parquet({"label": [["a"], ["b"]]}, {"label": Sequence(Value("string"))}), "one word or whole number"),
    "bytes as labels": (parquet({"label": [b"a", b"b"]}, {"label": Value("binary")}), "one word or whole number"),
    "no labels": (table("x.csv", "image,note\nphotos/0.png,x\n"), r"no label column among \['image', 'note'\]"),
    "no images": (table("x.csv", "text,label\nx,a\n"), r"no image column among \['text', 'label'\]"),
    "numbers as images": (
        table("x.jsonl", '{"image": 1, "label": "a"}\n{"image": 2, "label": "b"}'), "must hold images or their paths",
    ),
    "a header alone": (table("x.csv", "image,label\n"), "x.csv' has no rows"),
    "an empty file": (table("x.csv", ""), "x.csv' cannot be read: it is empty"),
    "a column twice": (table("x.csv", "image,label,label\nx,a,b\n"), "x.csv' .*: its header names 'label' twice"),
    "a row too long": (table("x.csv", ROWS_AB + "x,a,b\n"), "x.csv' cannot be read: .*Expected 2 columns, got 3"),
    "latin-1": (table("x.csv", rows(["\u00e9", "b"]).encode("latin1")), "x.csv' cannot be read: it holds byte 0xe9"),
    "no JSON": (table("x.jsonl", '{"image": "a"}\n{"image'), "x.jsonl' cannot be read: line 2 is no JSON object"),
    "two files without a split": (both(table("a.csv", ROWS_AB), table("b.csv", ROWS_AB)), "which of 'a.csv', 'b.csv'"),
    "other columns in a shard": (
        both(table("train-0.csv", ROWS_AB), table("train-1.csv", "image,kind\nx,a\n")), "train-1.csv' has the columns",
    ),
    "damaged Parquet": (write("train.parquet", b"PAR1 and no more"), "train.parquet' cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_data_that_is_wrong_is_refused_by_name(case, tmp_path):
    make, says = WRONG[case]
    make(tmp_path)
    with pytest.raises((ValueError, BadImageError), match=says) as error:
        load_image_dataset(str(tmp_path))
    assert tmp_path.name in str(error.value) and "\n" not in str(error.value)


def test_single_files_and_arguments(tmp_path):
    table("a.tsv", rows(AB, separator="\t"))(tmp_path)
    assert load_image_dataset(str(tmp_path / "a.tsv"))["train"].num_rows == 10
    (tmp_path / "photos.zip").touch()
    with pytest.raises(ValueError, match=r"a file of images must be one of \.csv, .* got '.*photos.zip'"):
        load_image_dataset(str(tmp_path / "photos.zip"))
    with pytest.raises(ValueError, match="dataset_config is for data sets from the Hub, got 'small'"):
        load_image_dataset(str(tmp_path), "small")
    with pytest.raises(ValueError, match="must be two columns, got 'image' for both"):
        load_image_dataset(str(tmp_path), label_column="image")


@pytest.mark.parametrize("form", ["../elsewhere/{}", "{}", "file://{}"])
def test_table_names_files_outside_its_folder_only_where_that_is_allowed(form, tmp_path):
    tree("elsewhere/cat", "elsewhere/dog")(tmp_path)
    (tmp_path / "set").mkdir()
    files = [path.relative_to(tmp_path / "elsewhere") for path in sorted((tmp_path / "elsewhere").rglob("*.png"))]
    names = [form.format(file if ".." in form else tmp_path / "elsewhere" / file) for file in files]
    lines = [f"{name},{'ab'[number % 2]}" for number, name in enumerate(names)]
    (tmp_path / "set" / "x.csv").write_text("\n".join(["image,label", *lines]))
    with pytest.raises(ValueError, match=r"row 0 \(from 0\) must name a file in the folder of its table") as error:
        load_image_dataset(str(tmp_path / "set" / "x.csv"))
    assert names[0] in str(error.value)
    found = load_image_dataset(str(tmp_path / "set" / "x.csv"), allow_outside_files=True)
    assert sum(split.num_rows for split in found.values()) == len(files)


def test_configuration_of_a_data_set_can_be_named(tmp_path):
    for kind in ("small", "large"):
        (tmp_path / kind).mkdir()
        parquet({"label": [0, 1] * (10 if kind == "small" else 20)}, LABEL)(tmp_path / kind)
    card = ["---", "configs:"]
    card += [f"- config_name: {kind}\n  data_files: {kind}/*.parquet" for kind in ("small", "large")]
    (tmp_path / "README.md").write_text("\n".join([*card, "---", ""]))
    sizes = [load_image_dataset(str(tmp_path), kind)["train"].num_rows for kind in ("small", "large")]
    assert sizes == [18, 36]
    with pytest.raises(ValueError, match=r"dataset_config must be one of \['small', 'large'\]"):
        load_image_dataset(str(tmp_path))
    with pytest.raises(ValueError, match="huge"):
        load_image_dataset(str(tmp_path), "huge")


def test_local_data_is_streamed_and_known_again(tmp_path):
    tree("train/cat", "train/dog", "test/cat")(tmp_path)
    streamed = load_image_dataset(str(tmp_path), streaming=True)
    assert [row["label"] for row in streamed["train"]] == [0, 0, 0, 1, 1, 1]
    marks = [load_image_dataset(str(tmp_path))["train"]._fingerprint for _ in range(2)]
    assert marks[0] == marks[1]


def test_label_that_is_missing_stops_a_stream_at_its_image(tmp_path):
    for split, labels in (("train", [0, 1, -1, 1]), ("validation", [-1, 0])):
        pixels = [np.full((6, 8, 3), number, dtype=np.uint8) for number in range(len(labels))]
        features = Features({"image": ImageFeature()} | LABEL)
        Dataset.from_dict({"image": pixels, "label": labels}, features=features).to_parquet(
            tmp_path / f"{split}-00000-of-00001.parquet"
        )
    splits = load_image_dataset(str(tmp_path), streaming=True)
    transform = ImageTransform({"input_size": (3, 8, 8)}, training=True)
    validation = ImageDataset(splits["validation"], transform)
    assert validation[1]["labels"] == 0
    with pytest.raises(ValueError, match="image 0 must have the number of a class as its label, got -1"):
        validation[0]
    stream = ImageStream(splits["train"], transform, batch_size=4, num_samples=4)
    with pytest.raises(ValueError, match="image 2 of shard 0 must have the number of a class as its label, got -1"):
        list(stream)
