"""The ImageNet recipe as a user runs it: what it leaves, what it counts, and that it can be killed at any time."""

import json
import re
import shlex
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset, Image
from launch import ONE, PYTHON, ROOT, TWO, environment, run
from safetensors.torch import load_file

from pgt_hf.images import (
    PRESETS,
    BadImageError,
    ImageDataset,
    ImageTransform,
    collate,
    load_classifier,
    load_image_dataset,
    sources,
)

pytestmark = pytest.mark.slow

RECIPE = str(ROOT / "recipes" / "imagenet.py")
CONFIGS = ROOT / "recipes" / "configs"
SHORT = ["--dataset-name", "digits", "--max-steps", "6", "--max-train-samples", "200", "--logging-steps", "2"]
EVAL_IMAGES = 51  # neither the processes nor the batch divide it
STRONG = "--mixup 0.2 --cutmix 1.0 --random-erasing 0.25 --drop-path 0.1 --ema-decay 0.9 --label-smoothing-factor 0.1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A short run in two processes: the folder it was started in, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    evaluation = ["--max-eval-samples", str(EVAL_IMAGES), "--per-device-eval-batch-size", "8"]
    launch = [*PYTHON, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu.yaml")]
    return folder, run(*launch, RECIPE, *SHORT, *evaluation, cwd=folder).stdout


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_run_directory_answers_which_code_data_seed_and_result(trained):
    folder = trained[0] / "runs" / "digits"
    names = {"config.json", "model.safetensors", "metrics.json", "run.json", "history.jsonl", "training_curve.png"}
    assert names | {"checkpoint-6"} <= {path.name for path in folder.iterdir()}
    metrics, record = read(folder / "metrics.json"), read(folder / "run.json")
    known = {"dataset": "digits", "model": "resnet10t", "alpha": 0.25, "steps": 6, "world_size": 2, "batch": 64}
    assert {key: metrics[key] for key in known} == known
    assert metrics["learning_rate"] == pytest.approx(0.05)
    assert 0 < metrics["loss"] < 50
    assert metrics["nll"] == pytest.approx(metrics["loss"], rel=1e-4)
    assert metrics["top1"] <= metrics["top5"] <= 1
    assert {"ece", "ece_folded", "nll_folded", "bad_images"} <= set(metrics)
    assert record["data"]["name"] == "digits" and record["data"]["train"]["images"] == 200
    assert record["seed"] == 42 and record["arguments"]["alpha"] == 0.25
    assert record["environment"]["packages"]["timm"]
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 4, 6]


def test_two_processes_count_every_image_once_and_evaluate_the_very_model_that_is_saved(trained):
    folder = trained[0] / "runs" / "digits"
    model = load_classifier(folder)
    images = load_image_dataset("digits", max_eval_samples=EVAL_IMAGES, seed=42)["validation"]
    images = ImageDataset(images, ImageTransform(model.config.pretrained_cfg, training=False))
    batch = collate([images[index] for index in range(EVAL_IMAGES)])
    with torch.no_grad():
        output = model(**batch)
    hits = output.logits.topk(5).indices == batch["labels"][:, None]
    metrics = read(folder / "metrics.json")
    assert metrics["eval_images"] == EVAL_IMAGES
    assert metrics["top1"] == pytest.approx(hits[:, 0].sum().item() / EVAL_IMAGES, abs=1e-6)
    assert metrics["top5"] == pytest.approx(hits.any(dim=1).sum().item() / EVAL_IMAGES, abs=1e-6)
    assert metrics["nll"] == pytest.approx(output.loss.item(), rel=1e-4)


def test_report_is_printed_once_and_its_evaluate_command_gives_the_same_accuracy(trained):
    folder, printed = trained
    assert printed.count("What next") == 1
    command = re.search(r"evaluate +\S*python (.+)", printed)
    assert command is not None
    again = run(*PYTHON, *shlex.split(command[1]), "--output", str(folder / "again.json"), cwd=folder)
    assert "may have been trained on" not in again.stderr
    found, metrics = read(folder / "again.json"), read(folder / "runs" / "digits" / "metrics.json")
    assert [found[key] for key in ("images", "top1", "top5")] == [metrics[k] for k in ("eval_images", "top1", "top5")]
    assert found["raw"]["nll"] == pytest.approx(metrics["nll"], rel=1e-4)
    assert found["folded"]["ece"] == pytest.approx(metrics["ece_folded"], rel=1e-4)


def test_configuration_of_a_run_repeats_it_and_a_flag_wins(trained, here, tmp_path):
    config = trained[0] / "runs" / "digits" / "run.json"
    here("--config", str(config), "--max-steps", "2", "--output-dir", "again")
    before, after = read(config)["arguments"], read(tmp_path / "again" / "run.json")["arguments"]
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"max_steps", "output_dir"}


def test_preset_sets_the_run_and_the_table_of_presets_has_the_published_figures(here, tmp_path, capsys):
    with pytest.raises(SystemExit):
        here("--preset", "list")
    table = capsys.readouterr().out
    assert "| resnet50_cosine_pgt | resnet50 | cosine | 100 | 1024 | 0.4 | 0.05 | - | - | 79.68 | 77.216 |" in table
    assert len(table.splitlines()) == len(PRESETS) + 2
    small = ["--model-name", "resnet10t", "--image-size", "32", "--global-batch", "16", "--max-steps", "1"]
    small += ["--max-train-samples", "32", "--max-eval-samples", "20", "--dataset-name", "digits"]
    here("--preset", "normfree18_256_agc_pgt", *small)
    arguments = read(tmp_path / "runs" / "digits" / "run.json")["arguments"]
    wanted = {"alpha": 0.25, "clip_mode": "agc", "norm_free": True, "num_train_epochs": 100, "model_name": "resnet10t"}
    assert {key: arguments[key] for key in wanted} == wanted


def test_two_processes_make_the_updates_of_one_with_the_same_global_batch(tmp_path):
    common = [*SHORT, "--norm-free", "--max-eval-samples", "20", "--save-strategy", "no", "--base-lr", "0.2"]
    run(*ONE, RECIPE, *common, "--per-device-train-batch-size", "16", "--output-dir", "one", cwd=tmp_path)
    run(*TWO, RECIPE, *common, "--per-device-train-batch-size", "32", "--output-dir", "two", cwd=tmp_path)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5)
    assert read(tmp_path / "one" / "metrics.json")["batch"] == read(tmp_path / "two" / "metrics.json")["batch"] == 64


def parquet_digits(folder: Path) -> str:
    """Digits in four files, which can be streamed."""
    splits = load_image_dataset("digits", max_train_samples=160, max_eval_samples=20)
    folder.mkdir()
    for part in range(4):
        shard: Dataset = splits["train"].shard(4, part)
        shard.to_parquet(folder / f"train-0000{part}-of-00004.parquet")
    splits["validation"].to_parquet(folder / "validation-00000-of-00001.parquet")
    return str(folder)


def everyone(process: subprocess.Popen) -> list[psutil.Process]:
    """A program and all that it has started: a launcher puts each process into a session of its own."""
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def kill(process: subprocess.Popen, orphan: bool) -> None:
    """Kills a run; or its launcher alone, and waits until the processes that it leaves have stopped by themselves."""
    members = everyone(process)
    for member in members[:1] if orphan else members:
        member.kill()
    process.wait(timeout=120)
    assert not psutil.wait_procs(members, timeout=120)[1], "processes go on without their launcher"


@pytest.mark.timeout(1200)  # three runs, on however slow a machine
@pytest.mark.parametrize(
    ("launcher", "streaming", "orphan"),
    [
        pytest.param(PYTHON, False, False, marks=pytest.mark.long),
        (TWO, True, True),
        pytest.param(TWO, False, False, marks=pytest.mark.long),
    ],
    ids=["one", "two, streaming, the launcher alone", "two"],
)
def test_run_that_is_killed_and_resumed_ends_with_the_bits_of_the_one_that_was_not(
    tmp_path, launcher, streaming, orphan
):
    data = parquet_digits(tmp_path / "data")
    options = f"--dataset-name {data} --model-name resnet10t --image-size 32 --global-batch 16 --num-train-epochs 3 "
    options += f"{STRONG} --save-strategy steps --save-steps 7 --logging-steps 1 --dataloader-num-workers 1 --hflip 0 "
    options += "--streaming --train-images 160" if streaming else ""
    command = [*launcher, RECIPE, *options.split()]
    run(*command, "--output-dir", "whole", cwd=tmp_path)

    history = tmp_path / "cut" / "history.jsonl"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [*command, "--output-dir", "cut"],
            cwd=tmp_path,
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        # Epochs have 10 steps: in the middle of the second one, after a checkpoint in it.
        while not (history.exists() and len(history.read_text().splitlines()) > 17):
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.02)
        kill(process, orphan)
    assert ("Stopped by the end of its launcher" in (tmp_path / "log").read_text()) is orphan
    assert not (tmp_path / "cut" / "metrics.json").exists()

    run(*command, "--output-dir", "cut", "--resume", "auto", cwd=tmp_path)
    for name in ("model.safetensors", "ema/model.safetensors"):
        whole, cut = (load_file(tmp_path / folder / name) for folder in ("whole", "cut"))
        assert all(torch.equal(whole[key], cut[key]) for key in whole), name
    steps = [json.loads(line).get("step") for line in history.read_text().splitlines() if '"loss"' in line]
    assert steps == list(range(1, 31))


@pytest.mark.long  # the quick form: test_stopping.py
def test_sigterm_saves_a_checkpoint_and_stops_all_processes_and_no_other_run_may_use_the_folder(tmp_path):
    options = (
        "--dataset-name digits --max-train-samples 320 --num-train-epochs 200 --logging-steps 1 --save-strategy no "
        "--dataloader-num-workers 1"
    )
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [*TWO, RECIPE, *options.split()],
            cwd=tmp_path,
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        history = tmp_path / "runs" / "digits" / "history.jsonl"
        while not (history.exists() and len(history.read_text().splitlines()) > 3):
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.05)
        second = run(*PYTHON, RECIPE, *options.split(), cwd=tmp_path, check=False)
        assert (second.returncode, "Traceback" in second.stderr) == (1, False)
        assert "error: another run is active in runs/digits" in second.stderr
        for member in everyone(process):  # data workers too, as a scheduler does
            member.terminate()
        assert process.wait(timeout=120) != 0
    printed = (tmp_path / "log").read_text()
    stopped = re.search(r"Stopped by SIGTERM at step (\d+)", printed)
    assert stopped is not None, printed[-3000:]
    checkpoint = tmp_path / "runs" / "digits" / f"checkpoint-{stopped[1]}"
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt"} <= {path.name for path in checkpoint.iterdir()}
    assert not (tmp_path / "runs" / "digits" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "resnet51"], "--preset must be one of list, "),
        (
            ["--dataset-name", "digits", "--global-batch", "0"],
            "--global-batch must be a whole number of at least 1, got 0",
        ),
        (["--dataset-name", "digits", "--resume", "nowhere"], "--resume must be 'auto' or a folder that exists"),
        (["--dataset-name", "digits", "--alpha", "-1"], "--alpha must be a number in [0, 1], got -1.0"),
    ],
)
def test_what_cannot_be_run_is_an_error_before_anything_is_written(here, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=f"^error: {re.escape(message)}"):
        here(*arguments)
    assert not list(tmp_path.iterdir())


def test_gated_data_set_stops_the_recipe_before_anything_is_written(here, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "get_token", lambda: None)
    monkeypatch.setattr(sources.datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(SystemExit, match="accept its terms at https://huggingface.co/datasets/ILSVRC/imagenet-1k"):
        here()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_configuration_is_one_that_accelerate_reads(config):
    loaded = load_config_from_file(str(config))
    assert loaded.num_processes == {"cpu": 2, "gpu1": 1, "nodes2x8": 16}.get(config.stem, 8)


def test_smoke_run_goes_to_its_end_and_an_unreadable_image_is_counted(here, tmp_path, caplog):
    splits = load_image_dataset("digits", max_train_samples=64, max_eval_samples=20)
    folder = tmp_path / "data"
    folder.mkdir()
    for name, split in splits.items():
        rows = split.cast_column("image", Image(decode=False)).to_list()
        rows[3]["image"] = {"bytes": rows[3]["image"]["bytes"][:60], "path": None}
        Dataset.from_list(rows, features=split.features).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    options = "--smoke --model-name resnet10t --image-size 32 --global-batch 16 --max-steps 4 --on-bad-image skip"
    (tmp_path / "run" / "report.html").mkdir(parents=True)  # in the way of the report, which is no reason to fail
    here(*options.split(), "--dataset-name", str(folder), "--output-dir", "run")
    assert "the report was not written: IsADirectoryError" in caplog.text
    metrics = read(tmp_path / "run" / "metrics.json")
    assert (metrics["steps"], metrics["bad_images"], metrics["skipped"]) == (4, 2, 1)
    with pytest.raises(BadImageError, match="image 3: the image cannot be decoded: the PNG file is truncated"):
        here(*options.replace("skip", "error").split(), "--dataset-name", str(folder))


def test_help_explains_the_recipes_own_options_and_the_trainers(here, capsys):
    with pytest.raises(SystemExit):
        here("--help")
    text = capsys.readouterr().out
    for option in ("--dataset-name", "--norm-free", "--base-lr", "--alpha", "--learning-rate", "--ema-decay"):
        assert option in text
