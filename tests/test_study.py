"""The study: its methods are what they are called, it goes on where it stopped, its pages show what was measured."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from PIL import Image

from pgt_hf.images import create_model
from studies import first, images, language, report, run, settings
from studies import train as training
from studies.first import report as first_report
from studies.images import Images, Split
from studies.results import Study
from studies.settings import (
    ALPHAS,
    NORMS,
    PARTS,
    PILOT_ALPHAS,
    PILOTS,
    SCALES,
    SEARCH_SEEDS,
    SEEDS,
    SOURCE,
    Row,
    Scale,
    Search,
    Setting,
    plan,
)
from studies.tables import place

pytestmark = pytest.mark.slow

HEAD = ("init", "rate", "decay")
PGT = Setting("tiny-imagenet", "norm-free", alpha=0.25, scale="small")


def make_split(size: int, seed: int) -> Split:
    """Ten classes that differ in brightness."""
    draws = np.random.default_rng(seed)
    labels = draws.permutation(np.arange(size) % 10)
    pixels = 25 * labels[:, None, None, None] + draws.integers(0, 25, (size, 28, 28, 3))
    return Split(torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels))


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    return {"train": make_split(512, seed=0), "select": make_split(100, seed=1), "test": make_split(200, seed=2)}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setitem(SCALES, "small", replace(SCALES["small"], epochs=2))


def trained(setting: Setting, rate: float, splits: dict[str, Split]) -> dict:
    result = training.train(setting, rate, 1, Images(SCALES[setting.scale], splits))
    assert result.pop("seconds") > 0
    return result


@pytest.fixture
def plain_and_pgt(short, splits) -> tuple[dict, dict]:
    return trained(replace(PGT, alpha=1.0), 0.05, splits), trained(PGT, 0.05, splits)


def test_four_parts_and_a_translated_temperature_are_pgt_and_no_three_parts_are(plain_and_pgt, short, splits):
    plain, pgt = plain_and_pgt
    distance = abs(plain["checksum"] - pgt["checksum"])
    assert distance > 0.1
    (parts, same), (temperature, times) = first_report.equivalents(PGT)
    assert (same, times) == (1.0, 4.0)
    by_parts, by_temperature = (trained(which, 0.05 * f, splits) for which, f in ((parts, same), (temperature, times)))
    assert by_parts["checksum"] == pytest.approx(pgt["checksum"], abs=distance / 100)
    assert by_parts["test_loss"] == pytest.approx(pgt["folded_nll"], rel=1e-3)
    assert 4 * by_parts["head_norm"] == pytest.approx(pgt["head_norm"], rel=1e-4)
    # A power of two scales bits without rounding: these two are one and the same backbone, and the same logits.
    assert by_temperature["checksum"] == by_parts["checksum"]
    assert by_temperature["test_loss"] == by_parts["test_loss"]
    assert by_temperature["decay_time"] == pytest.approx(pgt["decay_time"])
    for left_out in ("init", "rate", "features"):
        three = replace(parts, parts=tuple(part for part in parts.parts if part != left_out))
        assert abs(trained(three, 0.05, splits)["checksum"] - pgt["checksum"]) > distance / 20, left_out


def test_under_adamw_the_heads_three_changes_are_pgt(short, splits):
    pgt = replace(PGT, network="bn", optimizer="adamw", weight_decay=0.1)
    ours, parts, plain = (
        trained(which, 3e-3, splits)
        for which in (pgt, replace(pgt, method="parts", parts=HEAD), replace(pgt, alpha=1.0))
    )
    assert 4 * parts["head_norm"] == pytest.approx(ours["head_norm"], rel=1e-3)
    assert abs(parts["test_loss"] - ours["folded_nll"]) < abs(parts["test_loss"] - plain["test_loss"]) / 20


def test_parts_change_the_rate_and_decay_of_what_they_name_alone():
    network = "bn"
    model = create_model(SCALES["small"].network, [str(i) for i in range(10)], image_size=24)
    (head,) = training.last_linear(model)
    of_head = {id(parameter) for parameter in head.parameters()}

    def groups(*parts: str) -> dict[tuple[bool, int], tuple[float, float]]:
        setting = replace(PGT, network=network, method="parts", parts=parts)
        return {
            (id(group["params"][0]) in of_head, group["params"][0].ndim): (group["lr"], group["weight_decay"])
            for group in training.prepare_method(model, head, setting, 0.1).param_groups
        }

    decay = PGT.weight_decay
    plain = {(False, 4): (0.1, decay), (False, 1): (0.1, 0), (True, 2): (0.1, decay), (True, 1): (0.1, 0)}
    assert groups() == plain
    assert groups("decay", "rate") == plain | {(True, 2): (0.025, 4 * decay), (True, 1): (0.025, 0)}
    assert groups("norms") == plain | {(False, 1): (0.4, 0)}


def test_clipping_smoothing_batch_and_optimizer_reach_the_training_and_diagnostics_their_file(
    plain_and_pgt, short, splits, tmp_path
):
    _, pgt = plain_and_pgt
    for changed in (
        {"clip": "agc"},
        {"clip": "norm"},
        {"label_smoothing": 0.1},
        {"batch": 64},
        {"optimizer": "adamw"},
    ):
        assert trained(replace(PGT, **changed), 0.05, splits)["checksum"] != pgt["checksum"], changed
    training.train(
        replace(PGT, network="bn"), 0.1, 1, Images(SCALES["small"], splits), diagnostics=tmp_path / "new" / "seen.npz"
    )
    seen = np.load(tmp_path / "new" / "seen.npz")
    assert seen["step"].tolist() == list(range(8))  # 2 epochs of 4 steps
    kinds = {name.split("/")[0] for name in seen.files if "/" in name}
    assert kinds == {"filter", "weight_norm", "effective_lr", "angle", "norm_scale", "norm_bias"}
    assert len(pgt["curve"]) == 2 and pgt["curve"][-1] == pgt["select_top1"]
    assert (pgt["steps"], pgt["decay_time"]) == (8, pytest.approx(0.05 * PGT.weight_decay * 8))


def test_a_run_that_diverges_ends_early_and_is_a_row_like_any_other(short, splits, monkeypatch):
    monkeypatch.setitem(SCALES, "small", replace(SCALES["small"], epochs=20))
    row = trained(PGT, 1e4, splits)
    assert row["verdict"] == "divergence" and len(row["curve"]) < 20
    assert row["test_top1"] < 0.3 and row["logit_norm"] is None
    json.dumps(row, allow_nan=False)


SEARCH = Search("search/test", PGT, (0.01, 0.4), (1e-4, 1e-2), ((0.05, 5e-4), (0.2, 5e-4)), trials=6)


def test_search_goes_on_where_it_stopped_and_its_best_two_are_trained_again(short, splits, tmp_path):
    lab = run.Lab(Images(SCALES["small"], splits), tmp_path / "results.jsonl")
    lab.carry_out(SEARCH, SEEDS[0])
    rows = run.read_rows(lab.results)
    tried = run.trials(SEARCH, rows)
    assert [(row["learning_rate"], row["weight_decay"]) for row in tried[:2]] == list(SEARCH.anchors)
    assert len(tried) == 6 and [row["seed"] for row in rows] == [SEARCH_SEEDS[0]] * 6 + [SEARCH_SEEDS[1]] * 2 + [1]
    assert all(0.01 <= row["learning_rate"] <= 0.4 and 1e-4 <= row["weight_decay"] <= 1e-2 for row in tried)
    again = {row["learning_rate"]: row["select_top1"] for row in rows[6:8]}
    ended = [row for row in tried if row["verdict"] is None]
    best = sorted(ended, key=lambda row: -row["select_top1"])[:2]
    assert {row["learning_rate"] for row in best} == set(again)
    chosen = max(best, key=lambda row: row["select_top1"] + again[row["learning_rate"]])
    assert all(rows[-1][key] == chosen[key] for key in ("learning_rate", "weight_decay", "alpha"))
    assert (tmp_path / "diagnostics" / "small_search_test_0.25.npz").is_file()

    before = lab.results.read_bytes()
    lab.carry_out(SEARCH, SEEDS[0])
    assert lab.results.read_bytes() == before
    for kept in (3, 7):  # stopped in the search, and before the last training
        lab.results.write_bytes(b"".join(before.splitlines(keepends=True)[:kept]))
        lab.carry_out(SEARCH, SEEDS[0])
        assert [row["checksum"] for row in run.read_rows(lab.results)] == [row["checksum"] for row in rows]


def test_hopeless_trial_is_pruned_and_stays_so_when_the_search_is_rebuilt(splits, tmp_path, monkeypatch):
    monkeypatch.setitem(SCALES, "small", replace(SCALES["small"], epochs=6))
    bad = replace(
        SEARCH, rates=(1e-6, 0.4), anchors=((0.02, 5e-4), (0.03, 5e-4), (0.04, 5e-4), (1e-6, 5e-4)), trials=4
    )
    lab = run.Lab(Images(SCALES["small"], splits), tmp_path / "results.jsonl")
    lab.search(bad)
    *good, pruned = run.trials(bad, run.read_rows(lab.results))
    assert [row["verdict"] for row in good] == [None] * 3
    assert pruned["verdict"] == "pruned" and len(pruned["curve"]) == 2  # after a third of the epochs
    rebuilt = run._as_trial(pruned, {"learning_rate": optuna.distributions.FloatDistribution(1e-6, 0.4, log=True)})
    assert rebuilt.state == optuna.trial.TrialState.PRUNED and list(rebuilt.intermediate_values) == [1, 2]


def test_a_line_that_its_plan_or_search_did_not_choose_is_refused():
    lines = run.read_rows()
    Study(lines)
    seen = set()
    for number, line in enumerate(lines):
        kind = line["chosen_by"] == "plan", line["seed"] if line["seed"] in SEARCH_SEEDS else "table"
        if kind in seen:
            continue
        seen.add(kind)
        for change in (
            {"learning_rate": 7.0}, {"weight_decay": 0.7}, {"clip": "norm"}, {"chosen_by": "nothing"},
            {"chosen_by": None}, {"group": "pilot/other"},
        ):  # fmt: skip
            with pytest.raises(ValueError, match="did not choose learning rate"):
                Study([*lines[:number], line | change, *lines[number + 1 :]])
    assert (True, "table") in seen


SEARCHED = "small/search/sgd/bn/0.3"


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        ({"group": "ladder/bn", "seed": 2}, {"seed": 77}, r"seed must be one of \(1, 2, .* 15\)"),
        ({"group": "ladder/bn", "seed": 2}, {"seed": 1}, "two lines of one training"),
        ({"chosen_by": SEARCHED, "seed": 2}, {"seed": 3}, "two lines of one training"),
        ({"chosen_by": SEARCHED, "seed": 2}, {"precision": "float32"}, "precision and device must be"),
        ({"chosen_by": SEARCHED, "seed": 2}, {"device": "cuda"}, "precision and device must be"),
        ({"chosen_by": SEARCHED, "seed": 2}, {"verdict": "pruned"}, "only a search's trials may be pruned"),
        ({"group": "ladder/bn", "seed": 2}, {"decay_time": 9.0}, "decay_time must be learning rate .* got 9.0"),
        ({"group": "ladder/bn", "seed": 2}, {"steps": 500, "decay_time": 0.05}, "steps must be .* got 500"),
    ],
)
def test_a_line_that_differs_from_its_like_is_refused(which, change, message):
    lines = run.read_rows()
    number = next(i for i, row in enumerate(lines) if which.items() <= row.items() and row["weight_decay"] <= 5e-3)
    lines[number] = lines[number] | change
    with pytest.raises(ValueError, match=message):
        Study(lines)


def test_a_search_with_other_trials_than_its_plan_is_refused():
    lines = run.read_rows()
    first, *_, last = [row for row in lines if row["chosen_by"] == SEARCHED and row["seed"] == SEARCH_SEEDS[0]]
    one_more = last | {"learning_rate": last["learning_rate"] / 2, "decay_time": last["decay_time"] / 2}
    with pytest.raises(ValueError, match=f"{SEARCHED} has 16 trials, got 17"):
        Study([*lines, one_more])
    with pytest.raises(ValueError, match=f"{SEARCHED} must begin with .*, began with"):
        Study([*(row for row in lines if row is not first), first])


def test_lines_of_another_device_are_not_taken_for_new_trainings(short, splits, tmp_path):
    lab = run.Lab(Images(SCALES["small"], splits), tmp_path / "results.jsonl")
    lab.fetch(PGT, 0.05, 1, "ladder/norm-free", "plan")
    (row,) = run.read_rows(lab.results)
    lab.results.write_text(json.dumps(row | {"device": "cuda"}))
    with pytest.raises(ValueError, match="holds trainings on cuda"):
        lab.fetch(PGT, 0.05, 1, "ladder/norm-free", "plan")


def test_first_studys_report_refuses_a_learning_rate_that_its_search_did_not_choose():
    rows = first_report.read_rows()
    number = next(i for i, row in enumerate(rows) if row["label_smoothing"])
    rows[number] = rows[number] | {"learning_rate": 3.0}
    with pytest.raises(ValueError, match="the search chose learning rate 0.4 for .*label_smoothing=0.1"):
        first_report.Study(rows)


def test_crops_and_flips_of_an_epoch_depend_on_seed_and_epoch_alone(splits):
    train = splits["train"]
    (index, draws), *rest = train.batches(128, 24, seed=3, epoch=0)
    assert len(rest) == 3 and len({*index.tolist(), *(i for batch, _ in rest for i in batch.tolist())}) == 512
    again, other = (train.batches(128, 24, 3, epoch)[0] for epoch in (0, 1))
    assert torch.equal(index, again[0]) and torch.equal(draws, again[1])
    assert not torch.equal(index, other[0])
    crops = train.crops(index, draws, 24)
    assert crops.shape == (128, 3, 24, 24) and crops.is_contiguous(memory_format=torch.channels_last)
    flipped = 0
    for image, crop in zip(train.images[index[:30]].permute(0, 3, 1, 2), crops, strict=False):
        windows = image.unfold(1, 24, 1).unfold(2, 24, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 24, 24)
        mirrored = any(torch.equal(crop.flip(-1), window) for window in windows)
        assert mirrored or any(torch.equal(crop, window) for window in windows)
        flipped += mirrored
    assert 5 < flipped < 25


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six training and two validation images of each of six classes, as an image folder; the colour is the class."""
    for split, count in (("train", 6), ("validation", 2)):
        for label in range(6):
            (tmp_path / "data" / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                pixels = np.full((40, 40, 3), 40 * label + number, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / f"class{label}" / f"{number}.png")
    return tmp_path / "data"


def test_splits_are_disjoint_and_one_command_trains_a_part_of_the_plan(folder, tmp_path, monkeypatch):
    tiny = replace(SCALES["small"], classes=5, images=4, select=2, epochs=1)
    monkeypatch.setitem(SCALES, "small", tiny)
    monkeypatch.setattr(settings, "LADDERS", {"norm-free": (1e-3,), "bn": (1e-3,)})
    monkeypatch.setattr(settings, "PLAIN_BATCH", 8)
    command = ["run", "--source", folder, "--cache", tmp_path, "--results", tmp_path / "results.jsonl"]
    monkeypatch.setattr("sys.argv", [*map(str, command), "--only", "ladder/bn/0", "--seeds", "2"])
    run.main()
    rows = run.read_rows(tmp_path / "results.jsonl")
    assert [(row["alpha"], row["seed"]) for row in rows] == [(a, s) for s in (1, 2) for a in ALPHAS[1:]]

    read = images.read(tmp_path / "tiny-imagenet_small.npz")
    seen = {name: {(int(split.labels[i]), int(split.images[i, 9, 9, 0])) for i in range(len(split))}
            for name, split in read.items()}  # fmt: skip
    assert seen["train"] == {(label, 40 * label + n) for label in range(5) for n in range(4)}
    assert seen["select"] == {(label, 40 * label + n) for label in range(5) for n in (4, 5)}
    assert seen["test"] == {(label, 40 * label + n) for label in range(5) for n in (0, 1)}
    with pytest.raises(ValueError, match="images must leave 2 of 6 for the search, got 5"):
        images.prepare(replace(tiny, images=5), str(folder), tmp_path / "other.npz")


@pytest.mark.parametrize("scale", SCALES)
def test_plan_names_each_row_and_each_search_once(scale):
    items = list(plan(scale))
    rows = [item for item in items if isinstance(item, Row)]
    searches = [item for item in items if isinstance(item, Search)]
    assert len({(row.group, row.setting, row.learning_rate) for row in rows}) == len(rows)
    assert len({search.name for search in searches}) == len(searches)
    assert {item.setting.scale for item in items} == ({scale} if scale != SOURCE else set())


@pytest.mark.parametrize("scale", ["small", "medium", "large", "fashion"])
def test_plan_searches_every_alpha_with_one_budget(scale):
    rows = [item for item in plan(scale) if isinstance(item, Row)]
    searches = [item for item in plan(scale) if isinstance(item, Search)]
    for name in report.SEARCHES if rows else report.SGD_SEARCHES:
        of_group = [search for search in searches if search.group == f"search/{name}"]
        assert [search.setting.alpha for search in of_group] == list(ALPHAS)
        assert len({(search.rates, search.decays, search.anchors, search.trials) for search in of_group}) == 1
    assert {part for row in rows for part in row.setting.parts} <= set(PARTS) | set(NORMS)
    assert not set(SEARCH_SEEDS) & set(SEEDS) and len(SEEDS) == 5
    scale_of_images = SCALES[scale]
    assert isinstance(scale_of_images, Scale) and {item.setting.data for item in plan(scale)} == {scale_of_images.data}
    assert scale_of_images.data in images.HUB


@pytest.mark.parametrize("scale", PILOTS)
def test_pilot_searches_every_alpha_with_one_budget(scale):
    searches = [item for item in plan(scale) if item.group == "pilot"]
    assert [search.setting.alpha for search in searches] == list(PILOT_ALPHAS)
    assert len({(search.rates, search.decays, search.anchors, search.trials) for search in searches}) == 1
    assert {search.name.split("/")[0] for search in searches} == {scale}


def test_pilots_move_the_labels_they_say_thin_classes_out_and_take_other_classes(folder, tmp_path, monkeypatch):
    tiny = replace(SCALES["small"], classes=5, images=4, select=2)

    def read(name: str, **changes: float) -> dict[str, Split]:
        images.prepare(replace(tiny, **changes), str(folder), tmp_path / f"{name}.npz")
        return images.read(tmp_path / f"{name}.npz")

    plain, noisy = read("plain"), read("noisy", noise=0.4)
    assert torch.equal(plain["train"].images, noisy["train"].images)
    assert (plain["train"].labels != noisy["train"].labels).sum() == 8 and noisy["train"].labels.max() < 5
    for name in ("select", "test"):
        assert torch.equal(plain[name].labels, noisy[name].labels)
    tail = read("tail", imbalance=4.0)
    assert tail["train"].labels.bincount().tolist() == [4, 3, 2, 1, 1]
    assert tail["select"].labels.bincount().tolist() == [2] * 5
    others = read("others", first=2, classes=4)
    assert others["train"].labels.bincount().tolist() == [4] * 4
    assert others["train"].images.amin() == 80  # the colour of class 2


def test_start_gives_all_but_the_head_and_a_teacher_half_of_the_target(short, splits, tmp_path):
    scale, plain = SCALES["small"], replace(PGT, network="bn", alpha=1.0)
    path = tmp_path / "given.pt"
    training.train(plain, 0.05, 7, Images(scale, splits), weights=path)
    given = torch.load(path)
    model = Images(replace(scale, start=SOURCE), splits, given).create(plain).state_dict()
    fresh = {key for key, value in model.items() if not torch.equal(value, given[key])}
    assert fresh == {"timm_model.fc.weight", "timm_model.fc.bias"}

    with torch.no_grad():
        student = Images(scale, splits).create(plain).eval()
        alone = next(Images(scale, splits).losses(student, plain, 1, 0))
        taught = next(Images(replace(scale, teacher="small"), splits, given).losses(student, plain, 1, 0))
        teacher = Images(scale, splits).create(plain).eval()
        teacher.load_state_dict(given)
        task = Images(scale, splits)
        (index, draws), *_ = splits["train"].batches(plain.batch, scale.crop, 1, 0)
        pixels = images.normalize(splits["train"].crops(index, draws, scale.crop), images.MEAN, images.STD)
        logits, shares = task._logits(student, pixels), task._logits(teacher, pixels).softmax(1)
    from_teacher = torch.nn.functional.cross_entropy(logits, shares)
    assert taught.item() == pytest.approx(((alone + from_teacher) / 2).item(), rel=1e-5) and taught != alone


def test_language_model_is_scored_folded_and_learns(tmp_path):
    scale = replace(PILOTS["language"], vocabulary=300, context=16, width=32, layers=1, epoch_steps=20, epochs=3)
    (setting,) = (search.setting for search in plan("language") if search.setting.alpha == 0.3)
    draws = torch.Generator().manual_seed(0)
    splits = {name: torch.randint(8, (100, 16), generator=draws) for name in ("train", "select", "test")}
    task = language.Text(scale, splits)
    model = task.create(setting)
    assert task.score(model, setting) == pytest.approx(1 / 300, rel=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCALES, "language", scale)
        row = run.Lab(task, tmp_path / "results.jsonl").fetch(setting, 0.01, 1, "pilot", "language/pilot/0.3")
    assert len(row["curve"]) == 3 and row["curve"][-1] == pytest.approx(1 / 8, rel=0.2)  # eight tokens at random
    assert row["curve"][-1] == pytest.approx(np.exp(-row["select_loss"]))
    assert row["raw_test_loss"] != row["test_loss"]
    json.dumps(row, allow_nan=False)


def test_pages_show_what_the_results_say(tmp_path):
    study = Study(run.read_rows())
    earlier = first_report.Study(first_report.read_rows())
    readme, evidence = report.HERE / "README.md", report.HERE.parent / "docs" / "evidence.md"
    pages = {
        readme: {name: table(study) for name, table in report.TABLES.items() if name != "evidence"},
        evidence: {"evidence": report.evidence(study)},
        Path(first.__file__).with_name("README.md"): {
            name: table(earlier) for name, table in first_report.TABLES.items()
        },
    }
    for number, (page, tables) in enumerate(pages.items()):
        copy = Path(shutil.copy(page, tmp_path / f"{number}.md"))
        place(copy, tables)
        assert copy.read_text() == page.read_text(), "run: python -m studies.report"
    for module, page in ((report, readme), (first_report, readme.parent / "first" / "README.md")):
        drawn = {path.stem for path in (page.parent / "figures").glob("*.png")}
        assert set(module.FIGURES) == drawn
        assert all(f"figures/{name}.png" in page.read_text() for name in drawn)
