import pytest
import torch
from PIL import Image
from test_transforms import config, difference, photo
from timm.data import create_transform

from pgt_hf.images import ImageTransform, augment, collate, normalize, seeded

AUGMENTATIONS = [
    {"color_jitter": 0.4},
    {"color_jitter": 0},
    {"color_jitter": (0.4, 0.0, 0.9), "hflip": 1.0, "vflip": 0.5},
    {"color_jitter": (0.4, 0.4, 0.4, 0.1)},  # hue: PIL does it, for each image
    {"auto_augment": "rand-m9-mstd0.5-inc1", "hflip": 1.0},  # flips come first
    {"no_aug": True},
]


def batch(transform: ImageTransform, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    samples = []
    for number, image in enumerate(images):
        with seeded(0, 0, number):
            found = transform(image)
        samples.append((found if isinstance(found, dict) else {"pixel_values": found}) | {"labels": number})
    return collate(samples)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=str)
def test_the_device_gives_what_timm_and_each_image_alone_give(augmentation):
    images = [photo(200, 90, number) for number in range(24)]
    options = config() | {"color_jitter": 0.4} | augmentation
    del options["crop_pct"]
    theirs = create_transform(is_training=True, normalize=False, **options)
    left = batch(ImageTransform(config(), training=True, on_device=True, **augmentation), images)
    alone = batch(ImageTransform(config(), training=True, normalize=False, **augmentation), images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert left["pixel_values"].dtype == torch.uint8
    found = augment(left["pixel_values"].to(device), left["augmentation"].to(device)).cpu()
    for number, image in enumerate(images):
        with seeded(0, 0, number):
            mean, most = difference(found[number], torch.as_tensor(theirs(image)))
        assert mean < 0.7 and (most <= 10 or "auto_augment" in augmentation), number
        mean, most = difference(found[number], alone["pixel_values"][number])
        assert mean < 0.05 and most <= 3, number  # rounding, after each of three steps


def test_what_is_left_to_the_device_and_what_is_not():
    assert batch(ImageTransform(config(), training=True, on_device=True), [photo()])["augmentation"].shape == (1, 4, 3)
    assert batch(ImageTransform(config(), training=True, on_device=True, color_jitter=0), [photo()])[
        "augmentation"
    ].shape == (1, 1, 3)
    turned = ImageTransform(config(), training=True, on_device=True, color_jitter=0, hflip=1.0, vflip=1.0)
    assert batch(turned, [photo()])["augmentation"].tolist() == [[[1, 1, 0]]]


def test_a_black_image_can_be_in_the_batch():
    transform = ImageTransform(config(), training=True, on_device=True)
    both = collate([transform(photo()) | {"labels": 0}, transform.blank() | {"labels": -100}])
    assert augment(both["pixel_values"], both["augmentation"])[1].unique().tolist() == [0]


def test_a_batch_of_floats_comes_out_normalised_as_each_image_does():
    transform = ImageTransform(config(), training=True, on_device=True)
    left = batch(transform, [photo()])
    alone = batch(ImageTransform(config(), training=True), [photo()])
    found = normalize(augment(left["pixel_values"], left["augmentation"]), transform.mean, transform.std)
    assert (found - alone["pixel_values"]).abs().mean() < 1e-3
