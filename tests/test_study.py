"""The study: its methods are what they are called, it goes on where it stopped, and README shows what was measured."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from studies import images, report, run, settings
from studies import train as training
from studies.images import Images, Split
from studies.settings import ALPHAS, PLAN, SEARCH_SEEDS, SEEDS, Job, Setting, equivalents

pytestmark = pytest.mark.slow

PGT = Setting("tiny-imagenet", "norm-free", alpha=0.25)


def make_split(size: int, seed: int) -> Split:
    """Ten classes that differ in brightness."""
    draws = np.random.default_rng(seed)
    labels = draws.permutation(np.arange(size) % 10)
    pixels = 25 * labels[:, None, None, None] + draws.integers(0, 25, (size, 3, 36, 36))
    return Split(torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels))


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    return {"train": make_split(512, seed=0), "select": make_split(100, seed=1), "test": make_split(200, seed=2)}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(training, "EPOCHS", {"tiny-imagenet": 1.0, "fashion-mnist": 1.0})


def trained(setting: Setting, rate: float, splits: dict[str, Split]) -> dict:
    result = training.train(setting, rate, 1, splits)
    assert result.pop("seconds") > 0
    return result


@pytest.fixture
def plain_and_pgt(short, splits) -> tuple[dict, dict]:
    return trained(replace(PGT, alpha=1.0), 0.1, splits), trained(PGT, 0.1, splits)


def test_four_parts_and_a_translated_temperature_are_pgt_and_no_three_parts_are(plain_and_pgt, short, splits):
    plain, pgt = plain_and_pgt
    distance = abs(plain["checksum"] - pgt["checksum"])
    assert distance > 0.1
    (parts, same), (temperature, times) = equivalents(PGT)
    assert (same, times) == (1.0, 4.0)
    by_parts, by_temperature = (trained(which, 0.1 * f, splits) for which, f in ((parts, same), (temperature, times)))
    assert by_parts["checksum"] == pytest.approx(pgt["checksum"], abs=distance / 100)
    assert by_parts["test_loss"] == pytest.approx(pgt["folded_nll"], rel=1e-3)
    assert 4 * by_parts["head_norm"] == pytest.approx(pgt["head_norm"], rel=1e-4)
    # A power of two scales bits without rounding: these two are one and the same backbone, and the same logits.
    assert by_temperature["checksum"] == by_parts["checksum"]
    assert by_temperature["test_loss"] == by_parts["test_loss"]
    for left_out in ("init", "rate", "features"):
        three = replace(parts, parts=tuple(part for part in parts.parts if part != left_out))
        assert abs(trained(three, 0.1, splits)["checksum"] - pgt["checksum"]) > distance / 20, left_out


def test_weight_decay_of_the_head_is_the_parts_own(splits):
    model, (head,) = _model()
    groups = training.prepare_method(
        model, head, replace(PGT, method="parts", parts=("decay", "rate")), 0.1
    ).param_groups
    of_head = {group["lr"]: group["weight_decay"] for group in groups if group["params"][0] is head.weight}
    assert of_head == {0.025: 4 * PGT.weight_decay}
    assert {group["weight_decay"] for group in groups if group["params"][0].ndim == 1} == {0.0}


def _model():
    model = training.create_model(training.NETWORK, [str(i) for i in range(10)], image_size=32)
    return model, training.last_linear(model)


def test_clipping_and_smoothing_reach_the_training_and_diagnostics_their_file(plain_and_pgt, short, splits, tmp_path):
    _, pgt = plain_and_pgt
    for changed in (replace(PGT, clip="agc"), replace(PGT, clip="norm"), replace(PGT, label_smoothing=0.1)):
        assert trained(changed, 0.1, splits)["checksum"] != pgt["checksum"], changed
    training.train(PGT, 0.1, 1, splits, tmp_path / "new" / "seen.npz")
    assert "filters" in pgt and np.load(tmp_path / "new" / "seen.npz")["logit_norm"].size


def test_a_run_that_diverges_is_a_row_like_any_other(short, splits, monkeypatch):
    monkeypatch.setattr(training, "EPOCHS", {"tiny-imagenet": 8.0})
    row = trained(PGT, 1e4, splits)
    assert row["verdict"] == "divergence"
    assert row["test_top1"] < 0.3 and row["logit_norm"] is None


def test_search_goes_on_beyond_the_better_end_and_a_second_start_trains_nothing(short, splits, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_splits", lambda data, cache: splits)
    results = tmp_path / "results.jsonl"
    job = Job(PGT, 0.02, ((replace(PGT, label_smoothing=0.1), 2.0),))
    run.carry_out(job, 1, tmp_path, results)
    rows = run.read_rows(results)
    searched, again = (
        {row["learning_rate"]: row["select_top1"] for row in rows if row["seed"] == seed} for seed in SEARCH_SEEDS
    )
    first = max(searched, key=lambda rate: searched[rate])
    assert len(searched) == run.LONGEST_SEARCH or min(searched) < first < max(searched)
    assert len(again) == 2 and sorted(searched.values())[-2:] == sorted(searched[rate] for rate in again)
    best = max(again, key=lambda rate: searched[rate] + again[rate])
    assert all(rate / 0.02 in [2.0**k for k in range(-9, 10)] for rate in searched)
    after = [row for row in rows if row["seed"] == SEEDS[0]]
    assert [(row["learning_rate"], row["label_smoothing"]) for row in after] == [(best, 0.0), (2 * best, 0.1)]
    assert (tmp_path / "diagnostics" / "tiny-imagenet_norm-free_0.25.npz").is_file()
    before = results.read_bytes()
    run.carry_out(job, 1, tmp_path, results)
    assert results.read_bytes() == before
    results.write_bytes(before[: before.rstrip(b"\n").rfind(b"\n") + 1])  # the last training is lost
    run.carry_out(job, 1, tmp_path, results)
    again = run.read_rows(results)
    assert [row["checksum"] for row in again] == [row["checksum"] for row in rows]


def test_images_of_an_epoch_are_crops_and_flips_that_depend_on_seed_and_epoch_alone(splits):
    train = splits["train"]
    first, again = Images(train, seed=3), Images(train, seed=3)
    again.set_epoch(1)
    differ = [not torch.equal(first[i]["pixel_values"], again[i]["pixel_values"]) for i in range(20)]
    assert sum(differ) > 10
    again.set_epoch(0)
    for index in range(20):
        image = first[index]["pixel_values"]
        assert torch.equal(image, again[index]["pixel_values"])
        windows = train.images[index].unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 32, 32)
        assert any(torch.equal(image, window) or torch.equal(image.flip(-1), window) for window in windows)


def test_fashion_mnist_is_read_from_its_own_files_into_disjoint_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "FASHION_TRAIN", 6)
    monkeypatch.setattr(images, "FASHION_SELECT", 3)
    for name, count in (("train", 12), ("t10k", 5)):
        pixels = np.arange(count, dtype=np.uint8)[:, None, None] * np.ones((1, 28, 28), np.uint8) + 1
        header = bytes(16)
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
        labels = np.arange(count, dtype=np.uint8)
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    images.prepare("fashion-mnist", str(tmp_path), tmp_path / "cache")
    read = images.read("fashion-mnist", tmp_path / "cache")
    assert {name: len(split.labels) for name, split in read.items()} == {"train": 6, "select": 3, "test": 5}
    for split in read.values():
        assert torch.equal(split.images[:, 0, 18, 18].long(), split.labels + 1)  # the image goes with its label
        assert split.images[:, :, :4].sum() == 0 and split.centre().shape[1:] == (3, 32, 32)
    assert not set(read["train"].labels.tolist()) & set(read["select"].labels.tolist())


def test_plan_searches_every_alpha_on_every_data_set_and_network():
    searched = {job.setting for job in PLAN}
    for data, network in report.PAIRS:
        assert {Setting(data, network, alpha) for alpha in ALPHAS} <= searched
    assert len(searched) == len(PLAN)
    assert not set(SEARCH_SEEDS) & set(SEEDS) and len(SEEDS) >= 3
    assert set(settings.PARTS) == {part for job in PLAN for part in job.setting.parts}


def test_readme_shows_what_the_results_say():
    study = report.Study(run.read_rows())
    text = (Path(report.HERE) / "README.md").read_text(encoding="utf-8")
    fresh = text
    for name, table in report.TABLES.items():
        fresh = report.put(fresh, name, table(study))
    assert fresh == text, "run: python -m studies.report"
    drawn = {path.stem for path in (report.HERE / "figures").glob("*.png")}
    assert set(report.FIGURES) <= drawn
    assert all(f"figures/{name}.png" in text for name in drawn)
