import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pgt_hf.data import ImageDataset, load_image_dataset
from pgt_hf.models import load
from pgt_hf.transforms import ImageTransform, collate

ROOT = Path(__file__).parents[1]
IMAGENET, MINIMAL = (str(ROOT / "recipes" / name) for name in ("imagenet.py", "minimal.py"))
LAUNCH = (
    "-m accelerate.commands.launch --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
)
ONE = [*LAUNCH.split(), "--num_processes", "1"]
TWO = [*LAUNCH.split(), "--multi_gpu", "--num_processes", "2", "--gpu_ids", "all"]
SHORT = ["--dataset-name", "digits", "--max-steps", "6", "--max-train-samples", "200", "--logging-steps", "2"]
EVAL_IMAGES = 51  # neither the processes nor the batch divide it


def python(*arguments: str, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | settings | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0 or not check, run.stderr[-4000:]
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A short run in two processes: the folder it was started in, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    evaluation = ["--max-eval-samples", str(EVAL_IMAGES), "--per-device-eval-batch-size", "8"]
    return folder, python(*TWO, IMAGENET, *SHORT, *evaluation, cwd=folder).stdout


def test_recipe_leaves_model_checkpoint_metrics_and_curve(trained):
    folder = trained[0] / "runs" / "digits"
    assert {"config.json", "model.safetensors", "metrics.json", "training_curve.png", "checkpoint-6"} <= {
        path.name for path in folder.iterdir()
    }
    metrics = json.loads((folder / "metrics.json").read_text())
    known = {"dataset": "digits", "model": "resnet10t", "alpha": 0.25, "steps": 6, "world_size": 2, "batch": 64}
    assert {key: metrics[key] for key in known} == known
    assert metrics["learning_rate"] == pytest.approx(0.05)
    assert 0 < metrics["eval_loss"] < 50
    assert metrics["top1"] <= metrics["top5"] <= 1


def test_two_processes_count_every_image_once(trained):
    folder = trained[0] / "runs" / "digits"
    model = load(folder).eval()
    images = load_image_dataset("digits", max_eval_samples=EVAL_IMAGES, seed=42)["validation"]
    images = ImageDataset(images, ImageTransform(model.config.pretrained_cfg, training=False))
    batch = collate([images[index] for index in range(EVAL_IMAGES)])
    with torch.no_grad():
        best = model(batch["pixel_values"]).logits.topk(5).indices
    hits = best == batch["labels"][:, None]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["eval_images"] == EVAL_IMAGES
    assert metrics["top1"] == pytest.approx(hits[:, 0].sum().item() / EVAL_IMAGES, abs=1e-6)
    assert metrics["top5"] == pytest.approx(hits.any(dim=1).sum().item() / EVAL_IMAGES, abs=1e-6)


def test_two_processes_evaluate_the_very_model_that_is_saved(tmp_path):
    evaluation = ["--max-eval-samples", "40", "--per-device-eval-batch-size", "20"]
    python(*TWO, IMAGENET, *SHORT, *evaluation, cwd=tmp_path)
    folder = tmp_path / "runs" / "digits"
    model = load(folder).eval()
    images = load_image_dataset("digits", max_eval_samples=40, seed=42)["validation"]
    images = ImageDataset(images, ImageTransform(model.config.pretrained_cfg, training=False))
    with torch.no_grad():
        loss = model(**collate([images[index] for index in range(40)])).loss
    assert json.loads((folder / "metrics.json").read_text())["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_report_is_printed_once_and_its_evaluate_command_gives_the_same_figures(trained):
    folder, printed = trained
    assert printed.count("What next") == 1
    command = re.search(r"evaluate +python (.+)", printed)
    assert command is not None
    again = python(*shlex.split(command[1]), cwd=folder).stdout
    top1 = re.compile(r"top1 +[\d.]+%")
    assert top1.findall(again) == top1.findall(printed) != []


def test_resumed_run_goes_on_from_its_last_checkpoint(trained):
    folder = trained[0]
    arguments = [*SHORT, "--resume-from-checkpoint", "auto", "--max-steps", "8", "--max-eval-samples", "8"]
    python(*ONE, IMAGENET, *arguments, cwd=folder)
    state = json.loads((folder / "runs" / "digits" / "checkpoint-8" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [2, 4, 6, 8]


def test_gated_data_set_stops_the_recipe_before_anything_is_written(tmp_path):
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    environment = {"HF_HOME": str(home), "HF_TOKEN": "", "HF_TOKEN_PATH": str(home / "token")}
    environment["HF_DATASETS_CACHE"] = str(home / "datasets")
    run = python(IMAGENET, cwd=work, check=False, **environment)
    assert run.returncode == 1
    assert "accept its terms at https://huggingface.co/datasets/ILSVRC/imagenet-1k" in run.stderr
    assert "Traceback" not in run.stderr
    assert not list(work.iterdir())
    assert not list(home.rglob("*.safetensors"))


def test_evaluating_a_network_that_was_never_trained_is_an_error(tmp_path):
    run = python(IMAGENET, "--dataset-name", "digits", "--eval-only", cwd=tmp_path, check=False)
    assert run.returncode == 1
    assert "error: --eval-only needs a trained model" in run.stderr
    assert not list(tmp_path.iterdir())


def test_help_explains_the_recipes_own_options_and_the_trainers():
    text = python(IMAGENET, "--help", cwd=ROOT).stdout
    for option in ("--dataset-name", "--norm-free", "--base-lr", "--alpha", "--learning-rate"):
        assert option in text


def test_minimal_loop_learns_digits_in_two_processes(tmp_path):
    printed = python(*TWO, MINIMAL, cwd=tmp_path).stdout
    accuracy = re.findall(r"test accuracy ([\d.]+)% of 360 images", printed)
    assert len(accuracy) == 1
    assert float(accuracy[0]) > 90


def test_three_marked_lines_are_all_that_sets_minimal_apart_from_a_plain_loop():
    lines = Path(MINIMAL).read_text().splitlines()
    marked = [line for line in lines if re.search(r"# PGT \d", line)]
    using = [line for line in lines if "powergrad" in line.lower() and not line.lstrip().startswith(("#", '"'))]
    assert len(marked) == len(using) == 3
