import io
import logging
from pathlib import Path

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import ClassLabel, Dataset, Features, Image, Value
from launch import SHARED
from PIL import Image as Pictures
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from pgt_hf.images import (
    BadImageError,
    ImageDataset,
    ImageStream,
    ImageTransform,
    collate,
    load_image_dataset,
    num_images,
)
from pgt_hf.images.dataset import thumbnail

TINY_IMAGENET = SHARED / "tiny-imagenet"
CONFIG = {"input_size": (3, 16, 16), "crop_pct": 1.0}
BAD = (3, 10)
FEATURES = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(24)])})


def transform(training: bool = True) -> ImageTransform:
    return ImageTransform(CONFIG, training, normalize=False)


def images(count: int = 24, bad: tuple[int, ...] = ()) -> Dataset:
    """Grey images, each of its own brightness, which is also its label; the bad ones are cut short."""
    files = []
    for number in range(count):
        file = io.BytesIO()
        Pictures.new("L", (20, 20), 10 * number).save(file, "PNG")
        files.append({"bytes": file.getvalue()[: 40 if number in bad else None], "path": None})
    return Dataset.from_dict({"image": files, "label": list(range(count))}, features=FEATURES)


def load(dataset, workers: int = 0, batch: int = 4, **options) -> dict[str, torch.Tensor]:
    batches = list(DataLoader(dataset, batch, collate_fn=collate, num_workers=workers, **options))
    return {key: torch.cat([one[key] for one in batches]) for key in batches[0]}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_image_dataset("digits", max_train_samples=120)["train"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_gives_the_same_bits(workers, digits):
    dataset = ImageDataset(digits, transform())
    assert equal(load(dataset), load(dataset, workers))


def test_sample_is_a_function_of_seed_epoch_and_index(digits):
    def sample(seed, epoch, index):
        dataset = ImageDataset(digits, transform(), seed=seed)
        dataset.set_epoch(epoch)
        return dataset[index]["pixel_values"]

    first = sample(0, 0, 5)
    assert torch.equal(first, sample(0, 0, 5))
    assert torch.equal(first, sample(0, 0, 5 - len(digits)))
    same = [torch.equal(first, other) for other in (sample(1, 0, 5), sample(0, 1, 5), sample(0, 0, 6))]
    assert not any(same)


def test_order_of_reading_and_batches_change_nothing(digits):
    dataset = ImageDataset(digits, transform())
    shuffled = torch.randperm(len(dataset)).tolist()
    samples = dataset.__getitems__(shuffled)
    assert all(torch.equal(samples[shuffled.index(i)]["pixel_values"], dataset[i]["pixel_values"]) for i in (0, 7, 99))
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_random_numbers_of_the_training_loop_are_left_alone(digits):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    ImageDataset(digits, transform())[0]
    stream = ImageStream(digits.to_iterable_dataset(), transform(), batch_size=4, num_samples=8)
    torch.manual_seed(3)
    iterator = iter(stream)
    next(iterator)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_epoch_reaches_running_workers_and_their_bad_images_are_counted(how):
    dataset, here = (ImageDataset(images(bad=BAD), transform(), on_bad_image="skip") for _ in range(2))
    loader = DataLoader(
        dataset, 4, collate_fn=collate, num_workers=1, persistent_workers=True, multiprocessing_context=how
    )
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        here.set_epoch(epoch)
        assert dataset.bad_images == 0 or epoch == 0
        running = torch.cat([batch["pixel_values"] for batch in loader])
        assert torch.equal(running, load(here)["pixel_values"])
        assert dataset.bad_images == 2


def test_images_that_are_decoded_already_and_images_in_files_work(tmp_path):
    image = Pictures.new("RGB", (20, 20), (9, 8, 7))
    image.save(tmp_path / "a.png")
    rows = {"image": [image, str(tmp_path / "a.png")], "label": [0, 1]}
    batch = load(ImageDataset(Dataset.from_dict(rows, features=FEATURES), transform(False)))
    assert batch["pixel_values"][:, :, 0, 0].tolist() == [[9, 8, 7]] * 2


@pytest.mark.parametrize("make", [ImageDataset, lambda *args: ImageStream(*args, batch_size=1, num_samples=1)])
def test_column_that_is_missing_and_choice_that_is_none_are_errors(make):
    with pytest.raises(ValueError, match=r"split must have the columns 'image' and 'label', got \['image'\]"):
        make(images().remove_columns("label"), transform())
    with pytest.raises(ValueError, match="on_bad_image must be one of error, skip, got 'ignore'"):
        ImageDataset(images(), transform(), on_bad_image="ignore")


def test_bad_image_is_an_error_that_names_its_index():
    dataset = ImageDataset(images(bad=BAD), transform())
    with pytest.raises(BadImageError, match="image 10: the image cannot be decoded: "):
        dataset[10]
    with pytest.raises(BadImageError, match="image 3: "):
        load(dataset, workers=1)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_skipped_image_is_black_ignored_by_the_loss_and_said_once(training, caplog):
    dataset = ImageDataset(images(bad=BAD), transform(training), on_bad_image="skip")
    with caplog.at_level(logging.WARNING):
        batch = load(dataset)
        assert equal(batch, load(dataset))
    assert [i for i, label in enumerate(batch["labels"].tolist()) if label == -100] == list(BAD)
    assert batch["pixel_values"][list(BAD)].sum() == 0
    assert [record.message.split(" is skipped")[0] for record in caplog.records] == ["image 3", "image 10"]
    assert dataset.bad_images == 2
    logits = torch.randn(len(batch["labels"]), 24, requires_grad=True)
    nn.functional.cross_entropy(logits, batch["labels"]).backward()
    assert logits.grad[list(BAD)].abs().sum() == 0


@pytest.mark.slow
def test_bad_images_of_an_epoch_are_counted_over_all_workers():
    dataset = ImageDataset(images(bad=BAD), transform(), on_bad_image="skip")
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        assert dataset.bad_images == 0
        load(dataset, workers=2)
        assert dataset.bad_images == 2


def stream(source, **options) -> ImageStream:
    settings = {"batch_size": 4, "num_samples": 24, "block_size": 5} | options
    return ImageStream(source, transform(), **settings)


@pytest.mark.parametrize("shards", [1, 3, 8])
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (1, 2), (2, 3)])
def test_every_rank_gets_the_same_number_of_whole_batches(shards, ranks, workers):
    source = images().to_iterable_dataset(num_shards=shards)
    for rank in range(ranks):
        part = stream(source, num_samples=51, rank=rank, world_size=ranks)
        loader = DataLoader(part, 4, collate_fn=collate, num_workers=workers)
        assert [len(batch["labels"]) for batch in loader] == [4] * (51 // ranks // 4)
        assert len(loader) == len(part) // 4 == 51 // ranks // 4


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 12])
@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_readers_share_the_source_and_leave_nothing_out(shards, ranks, workers):
    source = images().to_iterable_dataset(num_shards=shards)
    for epoch in (0, 1):
        labels = []
        for rank in range(ranks):
            part = stream(source, rank=rank, world_size=ranks)
            part.set_epoch(epoch)
            labels += load(part, workers)["labels"].tolist()
        assert sorted(labels) == list(range(24))


def test_shards_left_over_are_shared_example_by_example():
    source = images().to_iterable_dataset(num_shards=3)
    labels = [set(load(stream(source, rank=rank, world_size=2))["labels"].tolist()) for rank in (0, 1)]
    assert [len(part) for part in labels] == [12, 12]
    assert not labels[0] & labels[1]


def test_order_and_augmentation_change_with_seed_and_epoch():
    source = images().to_iterable_dataset(num_shards=2)
    orders = []
    for seed, epoch in ((0, 0), (1, 0), (0, 1), (0, 0)):
        part = stream(source, seed=seed)
        part.set_epoch(epoch)
        orders.append(tuple(load(part)["labels"].tolist()))
    assert orders[0] == orders[3]
    assert len(set(orders)) == 3
    assert tuple(range(24)) not in orders


def test_reader_that_runs_out_starts_over_in_its_own_part():
    source = images(8).to_iterable_dataset(num_shards=2)
    labels = [load(stream(source, num_samples=64, rank=rank, world_size=2))["labels"] for rank in (0, 1)]
    assert [sorted(part.bincount()[part.unique()].tolist()) for part in labels] == [[8] * 4, [8] * 4]
    assert not set(labels[0].tolist()) & set(labels[1].tolist())


def test_more_readers_than_images_is_an_error_rather_than_an_endless_search():
    with pytest.raises(ValueError, match=r"reader 2 of 3 \(processes x workers\) has no image at all"):
        load(stream(images(2).to_iterable_dataset(), num_samples=12, rank=2, world_size=3))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"block_size": 0}, "block_size must be a whole number of at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, r"rank must be from 0 to 1 \(world_size - 1\), got 2"),
        ({"num_samples": 7, "world_size": 2}, r"num_samples must be at least world_size \* batch_size = 8, got 7"),
    ],
)
def test_stream_arguments_out_of_range_are_errors_that_say_the_range(options, says):
    with pytest.raises(ValueError, match=says):
        stream(images().to_iterable_dataset(), **options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [1, 4, 6])
def test_fast_forward_passes_over_batches_without_decoding_and_the_rest_is_bit_equal(workers, done):
    source = images(24, bad=BAD).to_iterable_dataset(num_shards=3)
    whole = stream(source, on_bad_image="skip")
    whole.set_epoch(2)
    expected = load(whole, workers)
    resumed = stream(source, on_bad_image="skip")
    resumed.set_epoch(2)
    resumed.fast_forward(2, done)
    found = load(resumed, workers)
    assert (found["labels"][: 4 * done] == -100).all() and found["pixel_values"][: 4 * done].sum() == 0
    assert equal({k: v[4 * done :] for k, v in found.items()}, {k: v[4 * done :] for k, v in expected.items()})
    if done == 6:
        assert resumed.bad_images == 0  # nothing was decoded
    resumed.set_epoch(3)
    whole.set_epoch(3)
    assert equal(load(resumed, workers), load(whole, workers))
    with pytest.raises(ValueError, match="batches must be from 0 to 6, got 7"):
        resumed.fast_forward(0, 7)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_of_a_stream_are_counted_and_named(workers):
    source = images(bad=BAD).to_iterable_dataset(num_shards=2)
    part = stream(source, num_samples=48, on_bad_image="skip")  # two laps: each is met twice
    labels = load(part, workers)["labels"]
    assert ((labels == -100).sum(), part.bad_images) == (4, 2)
    part.set_epoch(1)
    assert part.bad_images == 0
    with pytest.raises(BadImageError, match=r"image \d+ of shard \d: the image cannot be decoded"):
        load(stream(source), workers)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_accelerate_tells_the_epoch_to_the_stream_and_resumes_it_on_the_same_bits(workers):
    source = images().to_iterable_dataset(num_shards=3)

    def loader(part):
        plain = DataLoader(part, 4, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0)
        return prepare_data_loader(plain, num_processes=1, process_index=0, put_on_device=False)

    whole = loader(stream(source))
    epochs = [torch.cat([batch["pixel_values"] for batch in whole]) for _ in range(2)]
    assert not torch.equal(*epochs)
    part = stream(source)
    resumed = loader(part)
    resumed.set_epoch(1)
    part.fast_forward(1, 2)
    rest = torch.cat([batch["pixel_values"] for batch in skip_first_batches(resumed, 2)])
    assert torch.equal(rest, epochs[1][8:])


class SetEpoch(TrainerCallback):
    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.dataset.set_epoch(int(state.epoch or 0))


class Recorder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def forward(self, pixel_values, labels):
        self.seen += list(pixel_values)
        return {"loss": self.weight * pixel_values.float().mean(), "logits": pixel_values.float().mean((2, 3))}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["map", "stream"])
def test_trainer_sees_every_epoch_augmented_anew(kind, tmp_path):
    dataset = (
        ImageDataset(images(8), transform())
        if kind == "map"
        else stream(images(8).to_iterable_dataset(), num_samples=8)
    )
    model = Recorder()
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=3, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        remove_unused_columns=False, save_strategy="no", train_sampling_strategy="sequential",
    )  # fmt: skip
    Trainer(model, args, train_dataset=dataset, data_collator=collate, callbacks=[SetEpoch()]).train()
    assert len(model.seen) == 24
    assert dataset.epoch == 2
    for epoch in range(3):
        dataset.set_epoch(epoch)
        assert torch.equal(torch.stack(model.seen[8 * epoch : 8 * epoch + 8]), load(dataset)["pixel_values"])


def folder_of_parquet(folder: Path, **splits: Dataset) -> str:
    folder.mkdir()
    for name, split in splits.items():
        half = split.num_rows // 2
        for number, rows in enumerate((range(half), range(half, split.num_rows))):
            split.select(rows).to_parquet(folder / f"{name}-{number:05}-of-00002.parquet", batch_size=4)
    return str(folder)


@pytest.mark.slow
def test_streaming_reads_the_images_as_it_goes_and_downloads_none(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    name = folder_of_parquet(tmp_path / "set", train=images(), validation=images(13))
    dataset = load_image_dataset(name, streaming=True)
    assert (num_images(dataset["train"]), num_images(dataset["validation"])) == (24, 13)
    assert dataset["train"].num_shards == 2
    assert dataset["train"].features == dataset["validation"].features
    part = stream(dataset["train"], num_samples=num_images(dataset["train"]))
    assert sorted(load(part, workers=2)["labels"].tolist()) == list(range(24))
    streamed = load(ImageDataset(dataset["validation"], transform(False)), workers=2)
    assert not list((tmp_path / "cache").rglob("*.arrow"))

    downloaded = load_image_dataset(name)["validation"]  # in row groups of 4, 2, 4 and 3 images
    assert equal(streamed, load(ImageDataset(downloaded, transform(False))))
    for index in (9, 4, 12):  # the pictures of mistakes
        assert thumbnail(dataset["validation"], index, 8).getpixel((0, 0)) == (10 * index,) * 3


@pytest.mark.slow
def test_streaming_keeps_the_first_images_where_a_number_is_given(tmp_path):
    name = folder_of_parquet(tmp_path / "set", train=images(), test=images(6))
    dataset = load_image_dataset(name, streaming=True, max_train_samples=6, max_eval_samples=4)
    assert (num_images(dataset["train"]), dataset["validation"].num_rows) == (6, 4)
    with pytest.raises(ValueError, match="max_train_samples must be a whole number of at least 1, got 0"):
        load_image_dataset(name, streaming=True, max_train_samples=0)


def test_streaming_needs_both_splits_and_names_of_classes(tmp_path):
    name = folder_of_parquet(tmp_path / "one", train=images())
    with pytest.raises(ValueError, match=r"streaming needs a split `train` and a labelled one of .* has \['train'\]"):
        load_image_dataset(name, streaming=True)
    plain = [split.cast_column("label", Value("int64")) for split in (images(), images(6))]
    name = folder_of_parquet(tmp_path / "two", train=plain[0], validation=plain[1])
    with pytest.raises(ValueError, match="streaming needs class names"):
        load_image_dataset(name, streaming=True)


@pytest.mark.slow
def test_digits_stream_too():
    dataset = load_image_dataset("digits", streaming=True, max_train_samples=40)
    part = stream(dataset["train"], num_samples=num_images(dataset["train"]))
    assert len(load(part)["labels"]) == 40


@pytest.mark.skipif(not TINY_IMAGENET.is_dir(), reason="Tiny-ImageNet is not on this machine")
def test_real_parquet_streams():
    dataset = load_image_dataset(str(TINY_IMAGENET), streaming=True)
    assert (num_images(dataset["train"]), dataset["validation"].num_rows) == (40000, 10000)
    labels = load(stream(dataset["train"], num_samples=64, block_size=100), workers=2)["labels"]
    assert len(labels.unique()) > 1
