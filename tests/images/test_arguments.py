"""A program's flags for its images, and the data sets that come of them."""

import pytest
import torch

from pgt_hf.images import ImageDataArguments


def test_flags_decide_size_number_and_augmentation():
    data = ImageDataArguments(
        "digits", max_train_samples=40, max_eval_samples=20, image_size=24, min_crop=1.0, hflip=0.0, color_jitter=0.0
    )
    splits = data.load(seed=3)
    train, validation = data.datasets(splits, {"input_size": (3, 32, 32), "crop_pct": 1.0})
    assert (len(train), len(validation)) == (40, 20)
    first, seen = train[0]["pixel_values"], validation[0]["pixel_values"]
    assert (first.shape, first.dtype) == ((3, 24, 24), torch.uint8)  # training's own size, normalised on the device
    assert (seen.shape, seen.dtype) == ((3, 32, 32), torch.uint8)
    again = ImageDataArguments("digits", max_train_samples=40).load(seed=3)["train"]
    assert again["label"][:] == splits["train"]["label"][:]


@pytest.mark.parametrize("name", ["max_train_samples", "max_eval_samples", "image_size"])
def test_number_below_one_is_an_error_that_names_its_flag(name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number .*, got 0"):
        ImageDataArguments("digits", **{name: 0})


def test_data_set_must_be_named():
    with pytest.raises(ValueError, match="--dataset-name must be given"):
        ImageDataArguments().load()
