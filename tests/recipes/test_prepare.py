import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from filelock import FileLock
from launch import PYTHON, ROOT, as_program, load_recipe
from launch import run as start
from PIL import Image as Pictures

from pgt_hf.images import class_names, load_image_dataset, read_image, read_upright

pytestmark = pytest.mark.slow
PREPARE = str(ROOT / "recipes" / "prepare.py")
SHARED = ROOT.parent / "shared" / "data" / "imagenet-sample"
FEATURES = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog", "newt"])})
SMALL = 5  # every fifth image needs no resizing


def file_of(number: int) -> bytes:
    rng = np.random.default_rng(number)
    width, height = (40, 30) if number % SMALL == 0 else (90 + number, 70)
    file = io.BytesIO()
    Pictures.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def source(folder: Path, train: int = 50, bad: tuple[int, ...] = ()) -> str:
    folder.mkdir()
    for split, count in (("train", train), ("validation", 12)):
        files = [{"bytes": file_of(number), "path": f"/home/me/{number}.jpg"} for number in range(count)]
        for number in bad if split == "train" else ():
            files[number]["bytes"] = files[number]["bytes"][:300]
        rows = {"image": files, "label": [number % 3 for number in range(count)]}
        Dataset.from_dict(rows, features=FEATURES).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def options(name: str, output: Path, *more: str, processes: int = 1) -> list[str]:
    sizes = ["--size", "30", "--images-per-shard", "8", "--num-proc", str(processes)]
    return ["--dataset-name", name, "--output-dir", str(output), *sizes, *more]


def run(arguments: list[str], check: bool = True) -> tuple[str, str]:
    """The program in this process: what it printed, and what it said when it stopped with an error."""
    out, err = io.StringIO(), io.StringIO()
    with as_program(PREPARE, *arguments), redirect_stdout(out), redirect_stderr(err):
        if check:
            load_recipe("prepare").main()
            return out.getvalue(), err.getvalue()
        with pytest.raises(SystemExit) as stop:
            load_recipe("prepare").main()
    assert stop.value.code not in (0, None)
    return out.getvalue(), f"{err.getvalue()}{stop.value}"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, str]:
    """The name of a data set, the folder prepared from it in one process, and what was printed."""
    folder = tmp_path_factory.mktemp("prepared")
    name = source(folder / "source")
    return name, folder / "out", run(options(name, folder / "out"))[0]


def test_prepared_folder_is_the_data_set_in_order_with_its_shorter_side_resized(prepared):
    name, folder, _ = prepared
    before, after = load_image_dataset(name), load_image_dataset(str(folder))
    assert class_names(after["train"]) == class_names(before["train"])
    for split in ("train", "validation"):
        assert after[split]["label"][:] == before[split]["label"][:]
        cells = [each[split].cast_column("image", Image(decode=False))["image"][:] for each in (before, after)]
        for number, (old, new) in enumerate(zip(*cells, strict=True)):
            image = Pictures.open(io.BytesIO(read_image(new)))
            assert min(image.size) == 30
            assert (read_image(new) == file_of(number)) is (number % SMALL == 0)
            assert (image.width > image.height) and new["path"] == f"{number}.jpg", old["path"]


def test_several_processes_write_the_same_bytes(prepared, tmp_path):
    name, folder, _ = prepared
    run(options(name, tmp_path / "again", processes=2))
    assert contents(tmp_path / "again") == contents(folder)


def test_raw_pixels_are_mapped_verified_and_the_same_as_the_smaller_images(prepared, tmp_path):
    name, _, _ = prepared
    folder = tmp_path / "raw"
    printed, _ = run(options(name, folder, "--format", "raw"))
    assert "every checksum is right" in printed
    splits = load_image_dataset(str(folder))
    assert class_names(splits["train"]) == ["cat", "dog", "newt"] and splits["train"].num_rows == 50
    assert all(str(file["filename"]).startswith(str(folder)) for file in splits["train"].cache_files)
    images = splits["validation"]["image"]
    for number in range(12):
        expected = read_upright(file_of(number), 30)
        assert np.array_equal(np.asarray(images[number]), np.asarray(expected)), number
    (folder / "train-00001-of-00007.arrow").write_bytes(b"")
    assert "train-00001-of-00007.arrow has 0 bytes" in run(["--output-dir", str(folder), "--verify"], check=False)[1]


def test_manifest_counts_and_the_program_says_what_it_wrote(prepared):
    _, folder, printed = prepared
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["rows"] == {"train": 50, "validation": 12}
    assert manifest["classes"] == ["cat", "dog", "newt"]
    assert [shard["images"] for shard in manifest["shards"]] == [8] * 6 + [2, 8, 4]
    assert sum(shard["resized"] for shard in manifest["shards"]) == 40 + 9
    assert "train               50 images, 40 resized" in printed
    assert "every checksum is right" in printed


def test_verify_finds_what_was_changed_lost_or_added(prepared, tmp_path):
    _, folder, _ = prepared
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in contents(folder).items():
        (copy / name).write_bytes(content)
    verify = ["--output-dir", str(copy), "--verify"]
    assert "every checksum is right" in run(verify)[0]
    shard = copy / "train-00002-of-00007.parquet"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    (copy / "train-00003-of-00007.parquet").rename(copy / "train-00009-of-00007.parquet")
    error = run(verify, check=False)[1]
    for says in (
        "00002-of-00007.parquet is not what was written",
        "00003-of-00007.parquet is missing",
        "00009-of-00007.parquet does",
    ):
        assert says in error


def test_killed_run_goes_on_where_it_stopped(prepared, tmp_path):
    name, folder, _ = prepared
    big = source(tmp_path / "big", train=400)
    output, incomplete = tmp_path / "out", tmp_path / "out.incomplete"
    process = subprocess.Popen(
        [sys.executable, PREPARE, *options(big, output, processes=2)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while len(list(incomplete.glob("*.parquet"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in incomplete.glob("*.parquet")}
    assert 3 <= len(done) < 50
    assert not output.exists()
    with pytest.raises(ValueError, match="a file or folder that exists"):
        load_image_dataset(str(output))  # a half-prepared set cannot be taken for a whole one

    error = run(options(big, output, "--quality", "80"), check=False)[1]
    assert "was begun with other settings (quality=90, now 80)" in error
    run(options(big, output))
    assert {name: (output / name).stat().st_mtime_ns for name in done} == done
    run(options(big, tmp_path / "whole"))
    assert contents(output) == contents(tmp_path / "whole")


def test_kills_and_damage_are_survived(tmp_path):
    """A few of the faults; ``python tests/faults/prepare_faults.py`` tries all of them."""
    printed = start(
        *PYTHON, str(ROOT / "tests" / "faults" / "prepare_faults.py"), "--every", "53", cwd=tmp_path
    ).stdout
    assert ", 0 lost" in printed


def test_two_runs_do_not_write_into_the_same_folder(prepared, tmp_path):
    incomplete = tmp_path / "out.incomplete"
    incomplete.mkdir()
    with FileLock(incomplete / ".lock"):
        error = run(options(prepared[0], tmp_path / "out"), check=False)[1]
    assert f"error: {incomplete} is still being written by another run" in error
    run(options(prepared[0], tmp_path / "out"))


def test_full_disk_leaves_no_half_shard_and_the_run_goes_on_later(prepared, tmp_path):
    name, folder, _ = prepared
    largest = max(path.stat().st_size for path in folder.glob("*.parquet"))

    output, incomplete = tmp_path / "out", tmp_path / "out.incomplete"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may become larger: the write fails in the middle, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 5000, before[1]))
    try:
        error = run(options(name, output), check=False)[1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "error: " in error and "File too large" in error
    assert not output.exists()
    assert not list(incomplete.glob("*.partial")) and not list(incomplete.glob(".*.partial"))
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in incomplete.glob("*.parquet"))
    run(options(name, output))
    assert contents(output) == contents(folder)


def test_bad_image_stops_the_run_or_is_left_out_and_named(tmp_path):
    name = source(tmp_path / "source", train=20, bad=(4, 17))
    error = run(options(name, tmp_path / "out", processes=2), check=False)[1]
    assert "error: image 4 of train: the image cannot be decoded" in error or "error: image 17 of train" in error
    printed = run(options(name, tmp_path / "skipped", "--on-bad-image", "skip"))[0]
    assert "2 left out, since they could not be decoded: [4, 17]" in printed
    labels = load_image_dataset(str(tmp_path / "skipped"))["train"]["label"][:]
    assert labels == [number % 3 for number in range(20) if number not in (4, 17)]


@pytest.mark.parametrize("kind", ["jpeg", "raw"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_of_bad_images_alone_is_empty_and_the_others_can_be_read(kind, streaming, tmp_path):
    name = source(tmp_path / "source", train=20, bad=tuple(range(8)))
    run(options(name, tmp_path / "out", "--on-bad-image", "skip", "--format", kind))
    splits = load_image_dataset(str(tmp_path / "out"), streaming=streaming)
    assert [row["label"] for row in splits["train"]] == [number % 3 for number in range(8, 20)]


@pytest.mark.parametrize("kind", ["jpeg", "raw"])
def test_images_are_written_a_few_at_a_time(kind, tmp_path):
    recipe = load_recipe("prepare")
    recipe.ROW_GROUP, recipe.GROUP_BYTES = 3, 3500  # less than one raw image has
    split = load_image_dataset(source(tmp_path / "source", train=10))["train"].cast_column(
        "image", Image(decode=False)
    )
    settings = {"size": 30, "quality": None if kind == "raw" else 90, "on_bad_image": "stop"}
    shard = {"split": "train", "images": 0, "resized": 0, "bad": []}
    sizes = [table.num_rows for table in recipe.prepared(split, range(10), FEATURES, settings, shard)]
    assert sizes == ([1] * 10 if kind == "raw" else [3, 3, 3, 1])
    assert (shard["images"], shard["resized"]) == (10, 10 if kind == "raw" else 8)


@pytest.mark.parametrize(("option", "says"), [("--size", "in [1, 65500]"), ("--quality", "in [1, 95]")])
def test_option_out_of_range_stops_the_program_before_anything_is_written(option, says, tmp_path):
    error = run(options("digits", tmp_path / "out", option, "0"), check=False)[1]
    assert f"{option} must be a whole number {says}, got 0" in error
    assert not list(tmp_path.iterdir())


def test_smoke_prepares_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = run(["--smoke", "--num-proc", "1"])[0]
    assert "1,437 images, 1,437 resized" in printed
    assert "every checksum is right" in run(["--smoke", "--num-proc", "1"])[0]  # there is nothing left to do
    error = run(["--smoke", "--quality", "80"], check=False)[1]
    assert "runs/prepared-digits was begun with other settings (quality=90, now 80)" in error


@pytest.mark.skipif(not SHARED.is_dir(), reason="the ImageNet sample is not on this machine")
def test_real_photos_are_prepared(tmp_path):
    output = tmp_path / "out"
    arguments = ["--dataset-name", str(SHARED), "--output-dir", str(output), "--size", "64", "--num-proc", "1"]
    printed = run(arguments)[0]
    assert "validation       1,000 images" in printed
    assert min(load_image_dataset(str(output))["validation"][0]["image"].size) == 64
