"""Trainer and a Hub that works, fails, hangs or refuses: training ends, checkpoints stay, what is missing is said."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from hub_client import COMMON, READER, TOKEN, Client
from launch import ROOT
from safetensors import safe_open

pytestmark = pytest.mark.slow

PUSH = f"push_to_hub=True, hub_token={TOKEN!r}, logging_steps=1"
LAUNCH_TWO = (
    "-m accelerate.commands.launch --num_machines 1 --mixed_precision no --dynamo_backend no "
    "--main_process_port 0 --multi_gpu --num_processes 2 --gpu_ids all"
)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".npy")


def command_in(printed: str) -> list[str]:
    """The words of the command that is to push the run later, after ``pgt-hf``."""
    (command,) = re.findall(r"^\s+(pgt-hf push .*)$", printed, re.MULTILINE)
    return shlex.split(command)[1:]


def test_training_pushes_its_checkpoints_and_its_end(server, client, tmp_path):
    client.run(f"""
        t = trainer({str(tmp_path / "run")!r}, {PUSH}, hub_model_id="alice/steps", hub_private_repo=True)
        t.train()
        assert t.push_to_hub(dataset="digits", license="mit").commit_message == "End of training"
        assert take_over(t).unpushed is None
        there = load("alice/steps", token={TOKEN!r})
        assert torch.allclose(logits(there), logits(t.model), rtol=1e-6, atol=1e-6)
    """)
    titles = server.titles("alice/steps")
    assert titles[0] == "End of training" and titles[-2] == "Training in progress, step 2"
    files = server.files("alice/steps")
    assert set(files) == {"README.md", "config.json", "model.safetensors", "training_curve.png", "report.html"}
    card = files["README.md"].decode()
    for text in ("license: mit", "alpha = 0.25", "CC BY 4.0", "| learning_rate | 0.01 |", "| batch | 4 |", "torch 2"):
        assert text in card, text
    assert server.repos["alice/steps"]["private"] is True
    assert not list((tmp_path / "run").glob("_hub*"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_checkpoint_on_the_hub_holds_no_pickle_and_resumes_on_the_same_bits(server, client, tmp_path):
    client.run(f"""
        first = trainer({str(tmp_path / "a")!r}, {PUSH}, hub_model_id="alice/resumed", hub_strategy="checkpoint",
                        max_steps=6, save_steps=3, eval_steps=3, optim_args="momentum=0.9", save_total_limit=3)
        first.train()
    """)
    revision = next(
        oid
        for oid, commit in server.repos["alice/resumed"]["commits"].items()
        if commit["title"] == "Training in progress, step 3"
    )
    files = server.files("alice/resumed", revision)
    assert "last-checkpoint/optimizer.pt.packed.safetensors" in files
    assert not [name for name in files if name.endswith(PICKLES)]
    assert str(tmp_path).encode() not in b"".join(files.values())
    client.run(f"""
        checkpoint = pull_checkpoint("alice/resumed", {str(tmp_path / "b")!r}, revision={revision!r})
        assert checkpoint.name == "checkpoint-3"
        second = trainer({str(tmp_path / "b")!r}, max_steps=6, save_steps=3, eval_steps=3, optim_args="momentum=0.9")
        second.train(resume_from_checkpoint=str(checkpoint))
        assert second.state.global_step == 6
        straight = load({str(tmp_path / "a" / "checkpoint-6")!r})
        assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), second.model.parameters(), strict=True))
    """)


def test_averaged_weights_are_what_image_trainer_publishes(server, client, tmp_path):
    client.run(f"""
        from pgt_hf import ImageTrainer, ImageTrainingArguments
        args = ImageTrainingArguments({str(tmp_path / "run")!r}, {PUSH}, hub_model_id="alice/averages", max_steps=4,
            optim="powergrad_sgd", learning_rate=0.01, per_device_train_batch_size=4, report_to="none", use_cpu=True,
            save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, disable_tqdm=True, ema_decay=0.5,
            ema_warmup=False, hub_strategy="checkpoint", hub_always_push=True, hub_timeout=60)
        data = torch.utils.data.ConcatDataset([DATA])
        t = ImageTrainer(create_model("resnet10t", NAMES, image_size=32), args, train_dataset=data, eval_dataset=data)
        t.train()
        assert t.push_to_hub(dataset="digits")
        average = {{name: value for name, value in t.ema.module.state_dict().items()}}
        there = load("alice/averages").state_dict()
        assert all(torch.equal(there[name], average[name]) for name in average)
        assert not all(torch.equal(there[name], value) for name, value in t.model.state_dict().items())
    """)
    files = server.files("alice/averages")
    assert "an exponential moving average" in files["README.md"].decode()
    assert {"last-checkpoint/model.safetensors", "last-checkpoint/ema/model.safetensors"} <= set(files)
    assert not [name for name in files if name.endswith(PICKLES)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (f"hub_token={READER!r}, hub_model_id='alice/refused'", "PermissionError: .*may not write to 'alice/refused'"),
        ("hub_token='hf_unknown_token', hub_model_id='alice/refused'", "PermissionError: .*is not valid"),
        (f"hub_token={TOKEN!r}, hub_model_id='mallory/refused'", "PermissionError: .*may not write"),
        (f"hub_token={TOKEN!r}, hub_model_id='a b'", "ValueError|HFValidationError"),
    ],
)
def test_refused_token_is_found_before_the_first_step(client, options, message, tmp_path):
    _, error = client.attempt(f"trainer({str(tmp_path / 'run')!r}, push_to_hub=True, {options})")
    assert re.search(message, error), error


def test_model_that_nobody_could_load_is_refused_before_the_first_step(client, tmp_path):
    _, error = client.attempt(f"""
        import timm
        trainer({str(tmp_path / "run")!r}, model=timm.create_model("resnet10t", num_classes=4), {PUSH})
    """)
    assert "ValueError: publishing needs a transformers model, got a ResNet" in error


def test_hub_that_is_down_changes_nothing_but_the_last_message(server, client, tmp_path):
    server.fail(".*", drop_after=0)
    printed = client.run(f"""
        t = trainer({str(tmp_path / "run")!r}, {PUSH}, hub_model_id="alice/down", hub_private_repo=True)
        t.train()
        assert t.state.global_step == 4
        assert t.push_to_hub() is None
        assert "ConnectionError" in take_over(t).unpushed
    """)
    assert "Training starts anyway" in printed and TOKEN not in printed
    last = printed[printed.rindex("NOT PUSHED") :]
    assert last.startswith("NOT PUSHED: the model to alice/down (ConnectionError")
    assert command_in(last)[1:] == [str(tmp_path / "run"), "--repo-id", "alice/down", "--private"]
    assert (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").is_file()
    assert not list((tmp_path / "run").glob("_hub*"))
    server.faults.clear()
    client.run(f"""
        from pgt_hf.__main__ import main
        os.environ["HF_TOKEN"] = {TOKEN!r}
        main({command_in(last)!r})
        there, here = load("alice/down").state_dict(), load({str(tmp_path / "run")!r}).state_dict()
        assert all(torch.equal(there[name], here[name]) for name in here)
        del os.environ["HF_TOKEN"]
    """)
    assert "model.safetensors" in server.files("alice/down") and server.repos["alice/down"]["private"] is True


def test_hub_that_never_answers_costs_its_timeout_once_and_leaves_no_copy(server, client, tmp_path):
    server.fail(".*", delay=120.0, drop_after=0)
    printed = client.run(f"""
        import time
        t = trainer({str(tmp_path / "run")!r}, {PUSH}, hub_model_id="alice/slow", hub_timeout=2.0)
        publish = take_over(t)
        waited, result = [], type(publish)._result
        def timed(*args, **kwargs):
            started = time.monotonic()
            try:
                return result(publish, *args, **kwargs)
            finally:
                waited.append(time.monotonic() - started)
        publish._left, publish._result = 2.0, timed
        t.train()
        assert t.push_to_hub() is None
        assert 1.9 < sum(waited) < 4, waited
        assert not list(Path({str(tmp_path / "run")!r}).glob("_hub-*"))
    """)
    assert "TimeoutError: the Hub has not answered within" in printed
    assert command_in(printed[printed.rindex("NOT PUSHED") :])


def test_token_that_is_revoked_in_mid_training_stops_nothing(server, client, tmp_path):
    server.fail(r"POST /api/models/alice/revoked/(commit|preupload)", status=401)
    printed = client.run(f"""
        t = trainer({str(tmp_path / "run")!r}, {PUSH}, hub_model_id="alice/revoked")
        t.train()
        assert t.state.global_step == 4 and take_over(t).unpushed
    """)
    assert "NOT PUSHED: the model of checkpoint-" in printed
    assert server.files("alice/revoked") == {}


def test_rotation_of_checkpoints_does_not_wait_for_a_slow_upload(server, client, tmp_path):
    server.fail(r"POST /api/models/alice/rotated/preupload", delay=1.0)
    client.run(f"""
        t = trainer({str(tmp_path / "run")!r}, {PUSH}, hub_model_id="alice/rotated", hub_always_push=True,
                    hub_strategy="all_checkpoints", max_steps=3, save_steps=1, save_total_limit=1)
        t.train()
        assert take_over(t).unpushed is None
        assert [path.name for path in Path({str(tmp_path / "run")!r}).glob("checkpoint-*")] == ["checkpoint-3"]
    """)
    pushed = {name.split("/")[0] for name in server.files("alice/rotated") if "/" in name}
    assert pushed == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


def test_two_processes_end_well_without_their_hub(server, tmp_path):
    program = tmp_path / "train.py"
    program.write_text(
        COMMON
        + """
t = trainer("run", push_to_hub=True, hub_model_id="alice/launched", hub_timeout=20)
t.train()
t.save_model()
results = t.evaluate()
if t.is_world_process_zero():
    print("evaluated", "eval_loss" in results, take_over(t).unpushed is not None)
t.end()
"""
    )
    server.fail(".*", drop_after=0)
    environment = Client.environment_for(server.url, tmp_path) | {"ACCELERATE_USE_CPU": "true", "HF_TOKEN": TOKEN}
    run = subprocess.run(
        [sys.executable, *LAUNCH_TWO.split(), str(program)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines()[-1] == "evaluated True True"
    assert run.stderr.count("NOT PUSHED") == 2  # once after training, once after the model was saved
    assert TOKEN not in run.stdout + run.stderr
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        assert file.keys()


def test_imagenet_recipe_pushes_from_two_processes_and_its_token_goes_nowhere_else(server, tmp_path):
    arguments = f"{LAUNCH_TWO} {ROOT / 'recipes' / 'imagenet.py'} --smoke --max-steps 4 --ema-decay 0.5 --push-to-hub "
    arguments += f"--hub-model-id alice/recipe --hub-private-repo true --hub-strategy end --hub-token {TOKEN}"
    environment = Client.environment_for(server.url, tmp_path / "home") | {"ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(
        [sys.executable, *arguments.split()],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    files = server.files("alice/recipe")
    assert {"README.md", "config.json", "model.safetensors", "report.html", "training_curve.png"} <= set(files)
    assert server.repos["alice/recipe"]["private"]
    config = json.loads(files["config.json"])
    assert (config["powergrad_alpha"], config["powergrad_folded"]) == (0.25, False)
    left = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    for name, content in files.items() | left.items():
        assert TOKEN.encode() not in content, name
    assert TOKEN not in run.stdout


def test_plain_trainer_publishes_by_the_callback_alone(server, client, tmp_path):
    client.run(f"""
        from transformers import Trainer, TrainingArguments
        publish = PublishCallback("alice/plain", token={TOKEN!r}, strategy="checkpoint", always=True, timeout=60)
        args = TrainingArguments({str(tmp_path / "run")!r}, max_steps=4, save_steps=2, per_device_train_batch_size=4,
                                 report_to="none", use_cpu=True, disable_tqdm=True)
        t = Trainer(create_model("resnet10t", NAMES, image_size=32), args, train_dataset=DATA, callbacks=[publish])
        t.train()
        assert publish.unpushed is None
        assert publish.push(t, dataset="digits", license="mit").commit_message == "End of training"
    """)
    files = server.files("alice/plain")
    assert {"README.md", "config.json", "model.safetensors", "last-checkpoint/model.safetensors"} <= set(files)
    assert "license: mit" in files["README.md"].decode()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_run_has_one_record_whoever_writes_into_it(client, tmp_path):
    client.run(f"""
        from pgt_hf.runs import RunFolder, read_record
        record = RunFolder({str(tmp_path / "run")!r}, {{"arguments": {{"alpha": 0.25, "note": "mine"}}, "seed": 7}})
        t = trainer({str(tmp_path / "run")!r}, {PUSH}, hub_model_id="alice/recorded")
        t.add_callback(record)
        t.train()
        found = read_record({str(tmp_path / "run")!r})
        assert found["hub_model_id"] == "alice/recorded" and found["arguments"]["note"] == "mine"
        assert found["environment"]["packages"]["torch"] and found["seed"] == 7
    """)
    assert not (tmp_path / "run" / "trainer_run.json").exists()
