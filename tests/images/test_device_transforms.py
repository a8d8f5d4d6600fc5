import pytest
import torch
from PIL import Image
from test_transforms import config, difference, photo
from timm.data import create_transform

from pgt_hf import ImageTrainer, ImageTrainingArguments
from pgt_hf.images import (
    ImageDataset,
    ImageStream,
    ImageTransform,
    augment,
    collate,
    create_model,
    load_image_dataset,
    normalize,
    seeded,
)

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


def test_a_black_image_draws_no_random_numbers():
    transform = ImageTransform(config(), training=True, on_device=True)
    before = torch.get_rng_state()
    transform.blank()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_of_floats_comes_out_normalised_as_each_image_does():
    transform = ImageTransform(config(), training=True, on_device=True)
    left = batch(transform, [photo()])
    alone = batch(ImageTransform(config(), training=True), [photo()])
    found = normalize(augment(left["pixel_values"], left["augmentation"]), transform.mean, transform.std)
    assert (found - alone["pixel_values"]).abs().mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_the_trainer_feeds_the_network_the_same_batches_either_way(streaming, tmp_path):
    def first_batch(**options):
        size = {"input_size": (3, 32, 32)}
        transform = ImageTransform(size, training=True, color_jitter=0.4, **options)
        split = load_image_dataset("digits", streaming=streaming)["train"]
        images = (
            ImageStream(split, transform, batch_size=16, num_samples=64)
            if streaming
            else ImageDataset(split, transform, seed=1)
        )
        model = create_model("test_resnet", [str(i) for i in range(10)], image_size=32)
        args = ImageTrainingArguments(
            str(tmp_path), per_device_train_batch_size=16, max_steps=1, report_to="none", use_cpu=True
        )
        trainer = ImageTrainer(model, args, train_dataset=images, data_collator=collate)
        seen = []
        model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
        trainer.train()
        return seen[0]["pixel_values"]

    on_device, alone = first_batch(on_device=True), first_batch(normalize=False)
    assert on_device.shape == (16, 3, 32, 32)
    assert (on_device - alone).abs().max() < 0.05
