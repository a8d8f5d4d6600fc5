import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from launch import SHARED
from PIL import Image as Pictures
from torch.utils.data import DataLoader

from pgt_hf.images import (
    ImageDataset,
    ImageTransform,
    class_names,
    collate,
    create_model,
    load_image_dataset,
    sources,
    to_rgb,
)

CONFIG = {"input_size": (3, 32, 32), "crop_pct": 1.0}


def pictures(count: int, seed: int = 0) -> list[Pictures.Image]:
    pixels = np.random.default_rng(seed).integers(256, size=(count, 10, 12, 3), dtype=np.uint8)
    return [Pictures.fromarray(image) for image in pixels]


def parquet_folder(folder: Path, splits: dict[str, list[int]], image: str = "image", label: str = "label") -> str:
    features = Features({image: Image(), label: ClassLabel(names=["cat", "dog"]), "note": Value("string")})
    folder.mkdir()
    for split, labels in splits.items():
        columns = {image: pictures(len(labels)), label: labels, "note": ["x"] * len(labels)}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def test_digits_are_split_by_class_and_the_same_for_the_same_seed():
    first, again, other = (load_image_dataset("digits", seed=seed) for seed in (0, 0, 1))
    assert {key: split.num_rows for key, split in first.items()} == {"train": 1437, "validation": 360}
    assert min(np.bincount(first["validation"]["label"])) >= 34
    assert class_names(first["train"]) == [str(digit) for digit in range(10)]
    assert first["validation"]["label"] == again["validation"]["label"] != other["validation"]["label"]
    image = np.asarray(first["train"][0]["image"])
    assert (image.shape, image.dtype, image.max() <= 255) == ((8, 8), np.uint8, True)


def test_no_digit_is_in_both_splits():
    digits = load_image_dataset("digits")
    train, validation = ([image.tobytes() for image in digits[key]["image"]] for key in ("train", "validation"))
    assert len(set(train) | set(validation)) == len(set(train)) + len(set(validation))


@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "fine_label"), ("photo", "kind")])
def test_parquet_folder_becomes_image_and_label_whatever_the_columns_are_called(image, label, tmp_path):
    folder = parquet_folder(tmp_path / "set", {"train": [0, 1, 0, 1], "validation": [1, 0]}, image, label)
    dataset = load_image_dataset(folder)
    assert dataset["train"].column_names == dataset["validation"].column_names == ["image", "label"]
    assert dataset["train"]["label"][:] == [0, 1, 0, 1]
    assert class_names(dataset["validation"]) == ["cat", "dog"]


def test_column_that_is_not_there_is_an_error_that_lists_the_columns(tmp_path):
    folder = parquet_folder(tmp_path / "set", {"train": [0, 1], "validation": [0, 1]})
    with pytest.raises(ValueError, match=r"label_column must be one of \['image', 'label', 'note'\], got 'breed'"):
        load_image_dataset(folder, label_column="breed")


def test_image_folder_takes_its_classes_from_the_directories(tmp_path):
    for split in ("train", "val"):
        for kind in ("cat", "dog"):
            (tmp_path / split / kind).mkdir(parents=True)
            for number, picture in enumerate(pictures(3)):
                picture.save(tmp_path / split / kind / f"{number}.png")
    dataset = load_image_dataset(str(tmp_path))
    assert {key: split.num_rows for key, split in dataset.items()} == {"train": 6, "validation": 6}
    assert class_names(dataset["train"]) == ["cat", "dog"]


def test_unlabelled_test_split_is_never_used_for_evaluation(tmp_path, caplog):
    folder = parquet_folder(tmp_path / "set", {"train": [0, 1] * 20, "test": [-1] * 6})
    with caplog.at_level(logging.WARNING):
        dataset = load_image_dataset(folder)
    assert sorted(dataset["validation"]["label"]) == [0, 0, 1, 1]
    assert dataset["train"].num_rows == 36
    assert "a tenth of `train` is held out" in caplog.text


def test_labelled_test_split_serves_where_there_is_no_validation_split(tmp_path):
    folder = parquet_folder(tmp_path / "set", {"train": [0, 1, 0], "test": [1, 1]})
    assert load_image_dataset(folder)["validation"]["label"][:] == [1, 1]


def test_single_split_serves_twice_and_a_warning_says_so(tmp_path, caplog):
    folder = parquet_folder(tmp_path / "set", {"validation": [0, 1, 1]})
    with caplog.at_level(logging.WARNING):
        dataset = load_image_dataset(folder)
    assert dataset["train"]["label"][:] == dataset["validation"]["label"][:] == [0, 1, 1]
    assert "examples seen in training" in caplog.text


def test_no_labels_at_all_is_an_error(tmp_path):
    folder = parquet_folder(tmp_path / "set", {"train": [-1, -1], "test": [-1]})
    with pytest.raises(ValueError, match=r"nothing labelled in its splits \['test', 'train'\]"):
        load_image_dataset(folder)


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [(["dog", "cat", "dog"], ["cat", "dog"], [1, 0, 1]), ([10, 2, 0], ["0", "2", "10"], [2, 1, 0])],
    ids=["words", "numbers"],
)
def test_labels_without_class_names_get_them(labels, names, numbers, tmp_path):
    for split in ("train", "validation"):
        rows = {"image": pictures(3), "label": labels}
        table = Dataset.from_dict(rows, features=Features({"image": Image(), "label": _value(labels)}))
        table.to_parquet(tmp_path / f"{split}.parquet")
    dataset = load_image_dataset(str(tmp_path))
    assert class_names(dataset["train"]) == class_names(dataset["validation"]) == names
    assert dataset["validation"]["label"][:] == numbers


def _value(labels: list) -> Value:
    return Value("string" if isinstance(labels[0], str) else "int64")


def test_sample_limits_draw_the_same_images_for_the_same_seed(tmp_path):
    draws = [load_image_dataset("digits", max_train_samples=50, max_eval_samples=7) for _ in range(2)]
    assert [draws[0][key].num_rows for key in ("train", "validation")] == [50, 7]
    assert draws[0]["train"]["label"][:] == draws[1]["train"]["label"][:]
    assert len(set(draws[0]["train"]["label"])) > 5


def test_gated_data_set_without_a_token_is_an_error_that_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "get_token", lambda: None)
    monkeypatch.setattr(sources.datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(PermissionError) as error:
        load_image_dataset()
    for part in ("huggingface.co/datasets/ILSVRC/imagenet-1k", "hf auth login", "HF_TOKEN", "--dataset-name digits"):
        assert part in str(error.value)


def test_name_that_cannot_be_reached_is_said_to_be_neither_a_folder_nor_on_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sources.datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="'no/such-set' is neither a local folder nor in the cache"):
        load_image_dataset("no/such-set")


ODD = {
    "1": lambda: Pictures.new("1", (9, 7), 1),
    "L": lambda: Pictures.new("L", (9, 7), 200),
    "LA": lambda: Pictures.new("LA", (9, 7), (200, 255)),
    "P": lambda: Pictures.new("RGB", (9, 7), (200, 200, 200)).quantize(4),
    "RGBA": lambda: Pictures.new("RGBA", (9, 7), (200, 200, 200, 255)),
    "CMYK": lambda: Pictures.new("RGB", (9, 7), (200, 200, 200)).convert("CMYK"),
    "I;16": lambda: Pictures.fromarray(np.full((7, 9), 200 * 256, dtype=np.uint16)),
}


@pytest.mark.parametrize("mode", ODD)
def test_every_kind_of_image_becomes_rgb_of_the_same_brightness(mode):
    image = ODD[mode]()
    assert image.mode == mode
    pixels = np.asarray(to_rgb(image))
    assert pixels.shape == (7, 9, 3)
    assert np.all(pixels == (255 if mode == "1" else 200))


@pytest.mark.parametrize("mode", ODD)
@pytest.mark.parametrize("training", [True, False])
def test_every_kind_of_image_becomes_a_normalised_tensor_of_the_models_size(mode, training):
    tensor = ImageTransform(CONFIG, training)(ODD[mode]())
    assert (tensor.shape, tensor.dtype) == ((3, 32, 32), torch.float32)
    assert tensor.abs().max() < 3


@pytest.mark.slow
def test_transform_survives_pickling_into_worker_processes():
    transform = pickle.loads(pickle.dumps(ImageTransform(CONFIG, training=True, hflip=0.0, scale=(0.7, 1.0))))
    digits = load_image_dataset("digits", max_train_samples=8)["train"]
    for workers in (0, 1):
        batches = list(DataLoader(ImageDataset(digits, transform), 4, collate_fn=collate, num_workers=workers))
        assert [batch["pixel_values"].shape for batch in batches] == [(4, 3, 32, 32)] * 2
        assert torch.cat([batch["labels"] for batch in batches]).tolist() == digits["label"][:]


def test_training_is_augmented_and_evaluation_is_not():
    digits = load_image_dataset("digits", max_train_samples=1)["train"]
    config = create_model("resnet10t", class_names(digits), image_size=32).config.pretrained_cfg
    for training in (True, False):
        transform = ImageTransform(config, training)
        assert torch.equal(transform(digits[0]["image"]), transform(digits[0]["image"])) is not training


@pytest.mark.skipif(not SHARED.is_dir(), reason="the ImageNet sample is not on this machine")
def test_real_imagenet_photos_become_tensors():
    dataset = load_image_dataset(str(SHARED / "imagenet-sample"), max_eval_samples=60)["validation"]
    assert len(class_names(dataset)) == 1000
    images = ImageDataset(dataset, ImageTransform({"input_size": (3, 64, 64)}, training=False))
    batch = collate([images[i] for i in range(60)])
    assert batch["pixel_values"].shape == (60, 3, 64, 64)
    assert len(batch["labels"].unique()) == 60
