import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from test_transforms import config, difference, jpeg, photo

from pgt_hf.images import (
    BadImageError,
    ImageDataset,
    ImageStream,
    ImageTransform,
    decode,
    load_image_dataset,
    read_upright,
    shrink,
    write_arrow,
)


def whole(width: int, height: int):
    return (0, 0, width, height), None


@pytest.fixture
def folder(tmp_path):
    """Two shards of training images and one of validation, as ``prepare.py --format raw`` writes them."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        files = [shrink(jpeg(photo(90, 70, seed=len(name) + number)), 60, None) for number in range(5)]
        cells = {"image": [{"bytes": file, "path": None} for file in files], "label": [0, 1, 0, 1, 0]}
        table = Dataset.from_dict(cells, features=features).data.table.cast(features.arrow_schema)
        write_arrow([table[:2], table[2:4], table[4:]], table.schema, tmp_path / f"{name}.arrow")
    return tmp_path


def test_the_pixels_are_those_of_the_smaller_image():
    file = shrink(jpeg(photo(300, 200)), 100, None)
    expected = np.asarray(read_upright(jpeg(photo(300, 200)), 100))
    assert expected.shape == (100, 150, 3)
    np.testing.assert_array_equal(decode(memoryview(file), whole)[0], expected)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file))), expected)  # and Pillow reads it too
    box = (10, 20, 40, 90)
    np.testing.assert_array_equal(decode(file, lambda *_: (box, None))[0], expected[20:90, 10:40])


def test_a_truncated_file_is_noticed():
    with pytest.raises(BadImageError, match="cannot be decoded"):
        decode(shrink(jpeg(photo()), 50, None)[:-1], whole)


def test_a_folder_of_arrow_files_is_mapped_and_not_copied(folder):
    splits = load_image_dataset(str(folder))
    assert {key: split.num_rows for key, split in splits.items()} == {"train": 10, "validation": 5}
    assert {str(file["filename"]) for file in splits["train"].cache_files} == {
        str(folder / f"train-0000{number}-of-00002.arrow") for number in (0, 1)
    }


def test_samples_are_the_same_as_without_arrow(folder):
    split = load_image_dataset(str(folder))["train"].shuffle(seed=0)
    transform = ImageTransform(config(48), training=True, normalize=False)
    images = ImageDataset(split, transform, seed=3)
    images.set_epoch(2)
    again = ImageDataset(split.with_format("numpy").flatten_indices(), transform, seed=3)
    again.set_epoch(2)
    for number, sample in enumerate(images.__getitems__(range(10))):
        assert torch.equal(sample["pixel_values"], again[number]["pixel_values"])
        assert sample["labels"] == split[number]["label"]
    assert images[0]["pixel_values"].shape == (3, 48, 48)
    assert difference(images[0]["pixel_values"], images[1]["pixel_values"])[0] > 1


def test_a_folder_of_arrow_files_can_be_streamed_and_its_evaluation_split_is_downloaded_alone(
    folder, tmp_path_factory, monkeypatch
):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    splits = load_image_dataset(str(folder), streaming=True)
    transform = ImageTransform(config(48), training=True, normalize=False)
    stream = ImageStream(splits["train"], transform, batch_size=2, num_samples=10)
    assert [sample["labels"] for sample in stream].count(0) == 6
    assert splits["validation"]["label"][:] == [0, 1, 0, 1, 0]
    assert [path.name.split("-")[-1] for path in cache.rglob("*.arrow")] == ["validation.arrow"]


def test_loading_a_part_of_it_leaves_nothing_behind_and_a_read_only_folder_can_be_loaded(folder):
    before = sorted(folder.iterdir())
    for _ in range(2):
        splits = load_image_dataset(str(folder), max_train_samples=3, max_eval_samples=2)
        assert {key: split.num_rows for key, split in splits.items()} == {"train": 3, "validation": 2}
    for file in folder.glob("validation-*"):
        file.unlink()
    for _ in range(2):
        assert load_image_dataset(str(folder))["validation"].num_rows == 2
    assert sorted(folder.iterdir()) == [file for file in before if not file.name.startswith("validation")]


def test_what_datasets_keeps_beside_the_files_is_none_of_them(folder):
    load_image_dataset(str(folder))["train"].shuffle(seed=0).filter(lambda label: label == 0, input_columns="label")
    assert list(folder.glob("cache-*.arrow"))
    assert load_image_dataset(str(folder))["train"].num_rows == 10


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_file_is_noticed(folder, streaming):
    (folder / "train-00000-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match="must have 2 files of its split 'train', it has 1"):
        load_image_dataset(str(folder), streaming=streaming)


@pytest.mark.parametrize("left", [0.0, 0.3, "a batch", 1.0])
def test_a_truncated_arrow_file_is_named(folder, left):
    file = folder / "train-00001-of-00002.arrow"
    whole = file.read_bytes()
    with pa.ipc.open_stream(source := pa.BufferReader(whole)) as reader:
        reader.read_next_batch()
        file.write_bytes(whole[: source.tell() if left == "a batch" else int(left * len(whole)) - 1 * (left == 1)])
    with pytest.raises(ValueError, match=r"train-00001-of-00002.arrow is truncated"):
        load_image_dataset(str(folder))


def test_a_wrong_offset_is_an_error_and_does_not_end_the_process(folder):
    file = folder / "train-00001-of-00002.arrow"
    whole = bytearray(file.read_bytes())
    size = len(shrink(jpeg(photo(90, 70, seed=len(file.stem))), 60, None))
    offsets = whole.index(np.array([0, size, 2 * size], np.int32).tobytes())  # of the first batch's two images
    whole[offsets + 7] ^= 0x40
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=r"train-00001-of-00002.arrow is damaged: .*offset"):
        load_image_dataset(str(folder))


def test_a_header_of_absurd_numbers_is_a_bad_image():
    for size in (b"9" * 5000, b"0 " + b"9" * 20):
        with pytest.raises(BadImageError):
            decode(b"P6\n" + size + b"\n255\n", whole)
