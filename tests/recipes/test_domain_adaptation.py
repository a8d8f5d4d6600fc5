"""Domain adaptation: what each piece does to the network, and the recipe from its arguments to its table."""

import csv
import io
import re
import runpy
import shutil
from argparse import Namespace
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features
from datasets import Image as Feature
from filelock import FileLock
from launch import ROOT, TWO, run
from PIL import Image

from pgt_hf.analysis import plot_adaptation
from pgt_hf.images import (
    CORRUPTIONS,
    Corrupted,
    ImageDataArguments,
    ImageDataset,
    ImageTransform,
    load_image_dataset,
    seeded,
)
from pgt_hf.images.adaptation import (
    AdaptationRun,
    DomainAdversary,
    _endless,
    confident_labels,
    dann_schedule,
    entropy,
    reverse_gradient,
    train_norms_alone,
)

pytestmark = pytest.mark.slow

RECIPE = str(ROOT / "recipes" / "domain_adaptation.py")


def photo(side: int = 64) -> Image.Image:
    """Smooth, with an edge: noise, blur and blocks all show on it."""
    rows, columns = np.mgrid[:side, :side] / side
    disc = (rows - 0.43) ** 2 + (columns - 0.61) ** 2 < 0.09
    pixels = np.stack([rows, columns, disc], axis=-1)
    return Image.fromarray((255 * pixels).astype(np.uint8))


# --- corruptions


def corrupt(image: Image.Image, kind: str, level: int) -> Image.Image:
    return CORRUPTIONS[kind](image, level - 1)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_higher_the_level_the_further_from_the_image(kind):
    image = photo()
    distances = []
    for level in (1, 3, 5):
        with seeded(0, 0, 0):
            corrupted = corrupt(image, kind, level)
        assert (corrupted.size, corrupted.mode) == (image.size, "RGB")
        distances.append(np.abs(np.asarray(corrupted, float) - np.asarray(image, float)).mean())
    assert distances[0] > 0 and distances == sorted(distances)


def test_noise_and_contrast_have_the_published_strength():
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    with seeded(0, 0, 0):
        noisy = np.asarray(corrupt(grey, "gaussian_noise", 3), float) / 255
    assert noisy.std() == pytest.approx(0.18, abs=0.005)
    flat = np.asarray(corrupt(photo(), "contrast", 3), float)
    assert flat.std(axis=(0, 1)) == pytest.approx(0.2 * np.asarray(photo(), float).std(axis=(0, 1)), rel=0.02)


def test_corrupted_images_are_the_same_for_the_same_seed_epoch_and_index_and_others_in_the_next_epoch():
    digits = load_image_dataset("digits", max_train_samples=4)["train"]
    transform = ImageTransform({"input_size": (3, 32, 32), "crop_pct": 1.0}, training=False)
    images, again = (ImageDataset(digits, Corrupted(transform, "gaussian_noise", 3)) for _ in range(2))
    first = images[1]["pixel_values"]
    assert first.shape == (3, 32, 32)
    assert torch.equal(first, again[1]["pixel_values"])
    images.set_epoch(1)
    assert not torch.equal(first, images[1]["pixel_values"])


def test_corruption_takes_bytes_of_an_oblong_grey_image_too():
    file = io.BytesIO()
    photo().convert("L").resize((80, 50)).save(file, "JPEG")
    transform = ImageTransform({"input_size": (3, 32, 32)}, training=True)
    assert Corrupted(transform, "pixelate", 2)(file.getvalue()).shape == (3, 32, 32)


@pytest.mark.parametrize(("kind", "level", "named"), [("snow", 3, "kind"), ("jpeg", 0, "level"), ("jpeg", 6, "level")])
def test_unknown_corruption_is_an_error_that_lists_what_there_is(kind, level, named):
    transform = ImageTransform({"input_size": (3, 32, 32)}, training=False)
    with pytest.raises(ValueError, match=f"{named} must be"):
        Corrupted(transform, kind, level)


# --- pieces


def test_reversed_gradient_has_the_opposite_sign_and_the_strength():
    x = torch.randn(3, requires_grad=True)
    y = reverse_gradient(x, 0.3)
    assert torch.equal(y, x)
    y.backward(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(x.grad, torch.tensor([-0.3, -0.6, -0.9]))
    assert dann_schedule(0) == 0 and 0.99 < dann_schedule(1) < 1


def test_adversary_gives_the_networks_own_logits_and_turns_the_backbone_against_the_domain_classifier():
    network = timm.create_model("test_resnet", num_classes=10)
    adversary = DomainAdversary(network).eval()
    images = torch.randn(4, 3, 32, 32)
    logits, domains = adversary(images, strength=1.0)
    torch.testing.assert_close(logits, network(images))
    gradients = []
    for strength in (1.0, 0.5):
        adversary.zero_grad()
        adversary(images, strength)[1].sum().backward()
        backbone, head = next(network.parameters()), adversary.domain[0].weight
        gradients.append((backbone.grad.clone(), head.grad.clone()))
    torch.testing.assert_close(gradients[0][0], 2 * gradients[1][0])  # the backbone's follows the strength
    torch.testing.assert_close(gradients[0][1], gradients[1][1])  # the domain classifier's does not


def test_entropy_and_confidence_of_a_pgt_network_are_those_of_the_folded_probabilities():
    logits, alpha = torch.randn(50, 10) * 8, 0.25
    folded = (alpha * logits).softmax(-1)
    torch.testing.assert_close(entropy(alpha * logits), -(folded * folded.log()).sum(-1).mean())
    labels = confident_labels(alpha * logits, 0.5)
    sure = folded.amax(-1) >= 0.5
    assert 0 < sure.sum() < 50
    assert torch.equal(labels[sure], logits.argmax(-1)[sure]) and (labels[~sure] == -100).all()


def test_entropy_is_minimised_by_the_norms_alone():
    network = timm.create_model("test_resnet", num_classes=10).train()
    before = deepcopy(network)
    train_norms_alone(network)
    images, optimizer = torch.randn(16, 3, 32, 32), torch.optim.SGD(network.parameters(), lr=0.05)
    entropies = []
    for _ in range(8):
        value = entropy(network(images))
        entropies.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert entropies[-1] < entropies[0]
    norms = {name for name, module in network.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    for (name, old), new in zip(before.named_parameters(), network.parameters(), strict=True):
        assert torch.equal(old, new) or name.rpartition(".")[0] in norms
    with pytest.raises(ValueError, match="must have normalisation layers to adapt"):
        train_norms_alone(torch.nn.Linear(2, 2))


def test_bad_images_that_are_skipped_are_in_no_batch_and_no_accuracy():
    digits = load_image_dataset("digits", max_eval_samples=15)["validation"].cast_column(
        "image", Feature(decode=False)
    )
    cells, labels = digits["image"][:], digits["label"][:]
    spoilt = [{"bytes": b"", "path": None}, *cells]
    transform = ImageTransform({"input_size": (3, 32, 32), "crop_pct": 1.0}, training=False)
    with_bad, without = (
        ImageDataset(
            Dataset.from_dict({"image": images, "label": [0] * (len(images) - 15) + labels}, features=digits.features),
            transform,
            on_bad_image="skip",
        )
        for images in (spoilt, cells)
    )
    settings = Namespace(batch=4, num_workers=0)
    run = AdaptationRun(Accelerator(cpu=True), settings, 0.25, {"train": with_bad})
    torch.manual_seed(1)
    network = timm.create_model("test_resnet", num_classes=10)
    assert run.accuracy(network, with_bad) == run.accuracy(network, without)
    batches = _endless(run._loader(with_bad, shuffle=True))
    seen = [next(batches) for _ in range(4)]
    assert sorted(len(images) for images, _ in seen) == [3, 4, 4, 4]
    assert all(images.flatten(1).std(dim=1).min() > 0 and (labels >= 0).all() for images, labels in seen)


# --- the recipe


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The smoke run, with a hard target, in two processes."""
    folder = tmp_path_factory.mktemp("adaptation")
    printed = run(*TWO, RECIPE, "--smoke", "--targets", "contrast:5", "--output-dir", "run", cwd=folder).stdout
    return folder / "run", printed


def test_smoke_run_in_two_processes_writes_every_cell_of_the_grid(launched):
    folder, printed = launched
    with open(folder / "results.csv") as file:
        rows = list(csv.DictReader(file))
    methods = ["source-only", "bn", "tent", "pseudo-labels", "dann"]
    assert [(row["alpha"], row["method"]) for row in rows] == [(a, m) for a in ("1.0", "0.25") for m in methods]
    for row in rows:
        for key in ("source_top1", "target_top1"):
            share = float(row[key])
            assert 0 <= share <= 1 and share * 101 == pytest.approx(round(share * 101), abs=1e-6)  # each image once
    table = (folder / "table.md").read_text()
    assert "| contrast:5 | dann |" in table and table.strip() in printed
    assert (folder / "target_accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_statistics_taken_from_the_target_change_its_accuracy_and_keep_the_network_of_the_next_method(launched):
    with open(launched[0] / "results.csv") as file:
        rows = {(row["alpha"], row["method"]): row for row in csv.DictReader(file)}
    for alpha in ("1.0", "0.25"):
        plain, adapted = rows[alpha, "source-only"], rows[alpha, "bn"]
        assert (plain["source_top1"], plain["target_top1"]) != (adapted["source_top1"], adapted["target_top1"])


def test_run_that_was_stopped_finds_the_rows_that_are_missing_and_keeps_the_others(launched, here, tmp_path):
    results = Path(shutil.copytree(launched[0], tmp_path / "run"), "results.csv")
    lines = results.read_bytes().splitlines(keepends=True)
    lines[1] = b"1.0,0,contrast:5,source-only,0.5,0.5\r\n"  # what no training finds: it is kept, not found again
    results.write_bytes(b"".join(lines[:-1]))
    words = ["--smoke", "--targets", "contrast:5", "--output-dir", "run"]
    run(*TWO, RECIPE, *words, cwd=tmp_path)
    assert results.read_bytes() == b"".join(lines)
    with pytest.raises(SystemExit, match=r"other settings \(lr=0.05, now 0.1; processes=2, now 1\)"):
        here(*words, "--lr", "0.1")
    assert results.read_bytes() == b"".join(lines)


def test_second_run_in_the_folder_of_a_running_one_is_refused(here, tmp_path):
    with FileLock(tmp_path / ".run.lock"), pytest.raises(SystemExit, match="another run is active in "):
        here("--smoke", "--output-dir", ".")


def test_another_data_set_is_a_target_whatever_the_order_of_its_classes(tmp_path):
    digits = load_image_dataset("digits", max_train_samples=30, max_eval_samples=20)
    backwards = Features({"image": Feature(), "label": ClassLabel(names=[str(9 - number) for number in range(10)])})
    for split, part in digits.items():
        flipped = {"image": part["image"][:], "label": [9 - number for number in part["label"]]}
        Dataset.from_dict(flipped, features=backwards).to_parquet(tmp_path / f"{split}.parquet")
    recipe = runpy.run_path(RECIPE, run_name="recipe")
    args = ImageDataArguments("digits", image_size=32)
    domain, names = recipe["load"](args, str(tmp_path), [str(number) for number in range(10)])
    assert names == [str(number) for number in range(10)]
    assert [row["labels"] for row in domain["validation"]] == digits["validation"]["label"][:]
    with pytest.raises(ValueError, match="must have the classes of digits"):
        recipe["load"](args, str(tmp_path), ["cat", "dog"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magic"], "--methods must be one of source-only, bn, tent, pseudo-labels, dann, got 'magic'"),
        (["--alphas", "0"], "--alphas must be a number in (0, 1], got 0.0"),
        (["--targets", "contrast:9"], "with a level from 1 to 5, or a data set, got 'contrast:9'"),
        (["--batch", "200"], "--batch must be at most 192, the training images of digits for each process, got 200"),
        (["--target-config", "small"], "--target-config must be left out, no target is a data set, got 'small'"),
        (["--dataset-config", "x"], "--dataset-config is for data sets from the Hub, got 'x' for 'digits'"),
        (["--model-name", "resnet_10"], "--model-name must be a timm model, got 'resnet_10'"),
    ],
)
def test_what_cannot_be_run_is_an_error_before_training(here, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=f"^error: .*{re.escape(message)}"):
        here("--smoke", *arguments)
    assert not list(tmp_path.iterdir())


def test_help_explains_the_methods(here, capsys):
    with pytest.raises(SystemExit):
        here("--help")
    text = capsys.readouterr().out
    for part in ("gradient reversal", "--alphas", "--targets", "(default: 0.9)"):
        assert part in text


def test_no_rows_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match="rows must hold at least one run"):
        plot_adaptation([], tmp_path / "none.png")
