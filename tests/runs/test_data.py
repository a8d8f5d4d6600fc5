"""Whoever evaluates a run looks at the images that it held out, and is told where that cannot be."""

import json
from pathlib import Path

import pytest
from PIL import Image

from pgt_hf.images import load_image_dataset
from pgt_hf.runs import describe_data, load_validation

SEED = 7


def paths(split) -> set[str]:
    return {Path(path).name for path in split.cast_column("image", split.features["image"].__class__(decode=False))[
        :]["image"] for path in [path["path"]]}  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    """Forty pictures in a table, half of them dark; there is no validation split."""
    rows = []
    for number in range(40):
        Image.new("L", (8, 8), 5 * number).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{'dark' if number < 20 else 'bright'}\n")
    (tmp_path / "photos.csv").write_text("picture,kind\n" + "".join(rows))
    return tmp_path / "photos.csv"


@pytest.fixture
def trained(photos, tmp_path):
    """A run on them, and what it was trained on."""
    columns = {"image_column": "picture", "label_column": "kind"}
    splits = load_image_dataset(str(photos), seed=SEED, **columns)
    record = {"arguments": {"dataset_name": str(photos), "max_eval_samples": None, **columns}, "seed": SEED}
    (tmp_path / "run" / "checkpoint-9").mkdir(parents=True)
    record["data"] = describe_data(str(photos), splits)
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    return tmp_path / "run", splits


@pytest.mark.parametrize("place", [".", "checkpoint-9"])
def test_images_of_a_run_are_those_that_it_held_out(trained, place, caplog):
    folder, splits = trained
    caplog.clear()
    found = load_validation(folder / place)
    assert found["label"][:] == splits["validation"]["label"][:] and paths(found) == paths(splits["validation"])
    assert not paths(found) & paths(splits["train"])
    assert "may have been trained on" not in caplog.text
    fewer = load_validation(folder, max_eval_samples=2)
    assert paths(fewer) < paths(found) and fewer.num_rows == 2
    assert "may have been trained on" not in caplog.text


def test_another_draw_or_changed_data_are_a_warning(trained, photos, caplog):
    folder, splits = trained
    other = load_validation(folder, seed=SEED + 1)
    assert paths(other) & paths(splits["train"])
    assert "may have been trained on" in caplog.text
    caplog.clear()
    photos.write_text(photos.read_text().replace("39.png,bright", "0.png,dark"))
    load_validation(folder)
    assert "may have been trained on" in caplog.text


def test_model_of_ours_without_its_run_is_a_warning_and_one_of_others_is_not(photos, tmp_path, caplog):
    columns = {"image_column": "picture", "label_column": "kind"}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"powergrad_alpha": 0.25}')
    load_validation(tmp_path / "model", str(photos), **columns)
    assert "may have been trained on" in caplog.text
    caplog.clear()
    load_validation("resnet50.a1_in1k", str(photos), **columns)
    assert "may have been trained on" not in caplog.text
    with pytest.raises(ValueError, match="dataset_name must be given"):
        load_validation("resnet50.a1_in1k")


def test_split_of_the_data_sets_own_needs_no_record(trained, photos, tmp_path, caplog):
    (tmp_path / "set").mkdir()
    for split, lines in (("train", slice(1, 31)), ("validation", slice(31, 41))):
        rows = photos.read_text().splitlines()
        text = "\n".join([rows[0], *(f"../{row}" for row in rows[lines])])
        (tmp_path / "set" / f"{split}.csv").write_text(text.replace("dark", "bright", 1) + "\n")
    columns = {"image_column": "picture", "label_column": "kind"}
    found = load_validation(trained[0], str(tmp_path / "set"), **columns, allow_outside_files=True)
    assert found.num_rows == 10 and "may have been trained on" not in caplog.text
