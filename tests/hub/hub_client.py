"""An interpreter that knows the local Hub only."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from hub_server import User
from launch import ROOT

TOKEN, READER, STRANGER = "hf_canaryTokenOfAlice", "hf_readOnlyToken", "hf_tokenOfMallory"
USERS = {
    TOKEN: User("alice", organizations=("lab",)),
    READER: User("alice", role="read"),
    STRANGER: User("mallory"),
}
# Runs what it is sent, one program after another, so that torch and transformers are imported once.
LOOP = """
import contextlib, io, json, logging, sys, traceback
channel, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    printed, error = io.StringIO(), None
    handler = logging.StreamHandler(printed)
    logging.getLogger("pgt_hf").addHandler(handler)
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(json.loads(line), "<program>", "exec"), {"__name__": "__main__"})
        except BaseException:
            error = traceback.format_exc()
    logging.getLogger("pgt_hf").removeHandler(handler)
    print(json.dumps({"printed": printed.getvalue(), "error": error}), file=channel, flush=True)
"""
COMMON = """
import json, logging, os, shutil
from pathlib import Path
import torch
from pgt_hf import PowerGradTrainer, PowerGradTrainingArguments
from pgt_hf.hub import *
from pgt_hf.hub.publish import take_over
from pgt_hf.images import create_model, load_classifier
import pgt_hf.models
from transformers import AutoModelForImageClassification

load = AutoModelForImageClassification.from_pretrained
torch.manual_seed(0)
NAMES = ["ant", "bee", "cat", "dog"]
DATA = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 4} for i in range(8)]

def trainer(folder, model=None, **options):
    defaults = dict(alpha=0.25, optim="powergrad_sgd", learning_rate=0.01, per_device_train_batch_size=4, max_steps=4,
                    report_to="none", use_cpu=True, logging_steps=1, save_strategy="steps", save_steps=2,
                    eval_strategy="steps", eval_steps=2, disable_tqdm=True, save_total_limit=1, hub_timeout=60)
    model = model or create_model("resnet10t", NAMES, image_size=32)
    return PowerGradTrainer(model, PowerGradTrainingArguments(str(folder), **defaults | options),
                            train_dataset=DATA, eval_dataset=DATA)

def logits(model):
    torch.manual_seed(3)
    with torch.no_grad():
        output = model.eval()(torch.randn(2, 3, 32, 32))
    return getattr(output, "logits", output)
"""


class Client:
    """An interpreter that knows the local Hub only."""

    @staticmethod
    def environment_for(endpoint: str, home: Path) -> dict[str, str]:
        settings = {
            "PYTHONPATH": str(ROOT / "src"), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home),
            "USER": "canaryuser", "LOGNAME": "canaryuser", "HOME": "/home/canary",
            "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        return {key: value for key, value in os.environ.items() if "TOKEN" not in key} | settings

    def __init__(self, endpoint: str, home: Path) -> None:
        home.mkdir(exist_ok=True)
        self.errors = open(home / "stderr", "w")  # noqa: SIM115  open as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            text=True, env=self.environment_for(endpoint, home), cwd=home,
        )  # fmt: skip

    def run(self, program: str, common: str = COMMON) -> str:
        """What the program printed or logged; an AssertionError with its traceback if it failed."""
        printed, error = self.attempt(program, common)
        assert error is None, f"{printed}\n{error}"
        return printed

    def attempt(self, program: str, common: str = COMMON) -> tuple[str, str | None]:
        self.process.stdin.write(json.dumps(common + textwrap.dedent(program)) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["printed"], answer["error"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)
        self.errors.close()
