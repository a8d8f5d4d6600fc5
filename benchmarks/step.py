"""What a trainer adds to a training step: a plain loop, Trainer, and ours, on a network that takes next to nothing.

    python -m benchmarks.step              # 32 pixels, batch 8, one thread
    python -m benchmarks.step --rounds 21

The sides run in turns in one process. A side's figure in a round is the median CPU time of its steps, which other work
on the machine does not stretch much; what it adds is compared with Trainer in the same round.
"""

import argparse
import cProfile
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments

from pgt_hf import ImageTrainer, ImageTrainingArguments, PowerGradTrainer, PowerGradTrainingArguments, create_optimizer
from pgt_hf.images import create_model
from pgt_hf.trainer import DiagnosticsCallback, DivergenceCallback, StopOnSigterm

BATCH, SIDE, CLASSES, WARM_UP = 8, 32, 10, 20
COMMON = {
    "max_grad_norm": 0.0, "logging_steps": 10**6, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "per_device_train_batch_size": BATCH, "logging_nan_inf_filter": False, "learning_rate": 1e-3, "use_cpu": True,
    "dataloader_drop_last": True,
}  # fmt: skip
EXAMPLE = {"pixel_values": torch.randn(3, SIDE, SIDE), "labels": 1}


class Images(torch.utils.data.Dataset[dict[str, Any]]):
    """The same image over and over: reading takes no time."""

    def __len__(self) -> int:
        return BATCH * 10**5

    def __getitem__(self, index: int) -> dict[str, Any]:
        return EXAMPLE


class Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.process_time())

    def step(self) -> float:
        """The seconds of a step after the first few."""
        ends = self.ends[WARM_UP:]
        return statistics.median(later - earlier for earlier, later in pairwise(ends))


def smallest() -> Any:
    """Takes next to no time, so that a difference of microseconds is not lost in the noise of convolutions."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=CLASSES)
    return ResNetForImageClassification(config)


NETWORKS: dict[str, Callable[[], Any]] = {
    "test_resnet": lambda: create_model("test_resnet", [str(label) for label in range(CLASSES)], image_size=SIDE),
    "a ResNet of one block": smallest,
}


def plain_loop(make: Callable[[], Any], steps: int, optim: str) -> float:
    """The loop that a reader of torch's tutorial would write, with a DataLoader."""
    model = make().train()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-3)
    if optim != "sgd":
        optimizer = create_optimizer(model, optim, lr=1e-3, alpha=0.25, momentum=0, nesterov=False)
    batches, clock = iter(torch.utils.data.DataLoader(Images(), BATCH)), Clock()
    for _ in range(steps):
        batch = next(batches)
        F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.ends.append(time.process_time())
    return clock.step()


def trained(
    make: Callable[[], Any], steps: int, trainer: Any, arguments: Any, optim: str, callbacks: tuple[type, ...] = ()
) -> float:
    with tempfile.TemporaryDirectory() as folder:
        options = None if optim == "sgd" else "momentum=0,nesterov=false"  # as torch's SGD, which Trainer uses
        args = arguments(folder, max_steps=steps, optim=optim, optim_args=options, **COMMON)
        clock = Clock()
        made = [callback() for callback in callbacks]
        with redirect_stdout(sys.stderr):
            trainer(make(), args, train_dataset=Images(), callbacks=[*made, clock]).train()
    return clock.step()


SIDES: dict[str, Callable[[Callable[[], Any], int], float]] = {
    "plain loop, cross-entropy": partial(plain_loop, optim="sgd"),
    "plain loop, PGT": partial(plain_loop, optim="powergrad_sgd"),
    "Trainer": partial(trained, trainer=Trainer, arguments=TrainingArguments, optim="sgd"),
    "PowerGradTrainer": partial(
        trained, trainer=PowerGradTrainer, arguments=PowerGradTrainingArguments, optim="powergrad_sgd"
    ),
    "ImageTrainer": partial(trained, trainer=ImageTrainer, arguments=ImageTrainingArguments, optim="powergrad_sgd"),
    "ImageTrainer and its callbacks": partial(
        trained,
        trainer=ImageTrainer,
        arguments=ImageTrainingArguments,
        optim="powergrad_sgd",
        callbacks=(DivergenceCallback, DiagnosticsCallback, StopOnSigterm),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=140)
    parser.add_argument("--profile", choices=SIDES, help="print where the time of one side goes, and stop")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.profile:
        with cProfile.Profile() as trace:
            SIDES[given.profile](smallest, given.steps)
        pstats.Stats(trace).sort_stats("tottime").print_stats(40)
        return
    print(f"{given.rounds} rounds of {given.steps} steps; in brackets the quartiles of the rounds")
    for network, make in NETWORKS.items():
        found: dict[str, list[float]] = {name: [] for name in SIDES}
        for _ in range(given.rounds):
            for name, side in SIDES.items():
                found[name].append(side(make, given.steps))
        print(f"\n| {network} | microseconds a step | over Trainer |\n|---|---|---|")
        for name, seconds in found.items():
            more = [(mine - base) * 1e6 for mine, base in zip(seconds, found["Trainer"], strict=True)]
            low, middle, high = statistics.quantiles(more, n=4)
            print(
                f"| {name} | {statistics.median(seconds) * 1e6:,.0f} | {middle:+,.0f} ({low:+,.0f} to {high:+,.0f}) |"
            )


if __name__ == "__main__":
    main()
