"""What DiagnosticsCallback and DivergenceCallback add to a training step.

    python -m benchmarks.diagnostics                                   # resnet18, 64 pixels, batch 32, CPU
    python -m benchmarks.diagnostics --model resnet50 --image-size 224 --batch 64 --device cuda

Steps without a callback, with one that looks at every step, and with one that never looks are timed in turns in one
process; the share is what a look costs, over the default interval, against a whole step. Figures are medians; on the
CPU they are of this process's own CPU time.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from transformers import TrainerControl, TrainerState, TrainingArguments

from pgt_hf import create_optimizer
from pgt_hf.trainer import DiagnosticsCallback, DivergenceCallback

NEVER = 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=args.classes).to(args.device).train()
    optimizer = create_optimizer(model, "powergrad_sgd", lr=1e-3, alpha=0.25, momentum=0.9)
    images = torch.randn(args.batch, 3, args.image_size, args.image_size, device=args.device)
    labels = torch.randint(args.classes, (args.batch,), device=args.device)

    def step(callback: Any = None, settings: Any = None, state: Any = None) -> None:
        event = {"model": model, "optimizer": optimizer}
        control = TrainerControl()
        if callback is not None:
            callback.on_step_begin(settings, state, control, **event)
        F.cross_entropy(model(images), labels).backward()
        if callback is not None:
            callback.on_pre_optimizer_step(settings, state, control, **event)
        optimizer.step()
        optimizer.zero_grad()
        if callback is not None:
            state.global_step += 1
            callback.on_step_end(settings, state, control, **event)

    def with_callback(callback: Any) -> Callable[[], None]:
        def side() -> None:
            settings, state = TrainingArguments(tempfile.mkdtemp(), report_to="none"), TrainerState(global_step=1)
            # The hooks are there only while this side runs.
            callback.on_train_begin(settings, state, TrainerControl(), model=model, optimizer=optimizer)
            seconds.append(timed(lambda: step(callback, settings, state), args.device))
            callback.on_train_end(settings, state, TrainerControl(), model=model, optimizer=optimizer)

        seconds: list[float] = []
        side.seconds = seconds  # type: ignore[attr-defined]
        return side

    def plain() -> None:
        plain.seconds.append(timed(step, args.device))  # type: ignore[attr-defined]

    plain.seconds = []  # type: ignore[attr-defined]
    sides = {
        "no callback": (plain, None),
        "DiagnosticsCallback, not looking": (with_callback(DiagnosticsCallback(interval=NEVER)), None),
        "DiagnosticsCallback, looking": (
            with_callback(DiagnosticsCallback(interval=1)),
            DiagnosticsCallback().interval,
        ),
        "DivergenceCallback, not looking": (with_callback(DivergenceCallback(interval=NEVER)), None),
        "DivergenceCallback, looking": (with_callback(DivergenceCallback(interval=1)), DivergenceCallback().interval),
    }
    step()
    for _ in range(args.rounds):
        for side, _ in sides.values():
            side()

    where = torch.cuda.get_device_name() if args.device != "cpu" else f"{torch.get_num_threads()} thread(s)"
    print(f"torch {torch.__version__}, {platform.machine()}, {where}, {args.model}, {args.image_size} pixels, "
          f"batch {args.batch}, {args.rounds} rounds\n")  # fmt: skip
    print("| side | median ms | added ms | share of a step at the default interval |\n|---|---|---|---|")
    for name, (side, interval) in sides.items():
        times, base = side.seconds, plain.seconds  # type: ignore[attr-defined]
        added = statistics.median(a - b for a, b in zip(times, base, strict=True))
        share = f"{added / statistics.median(base) / interval:.2%} (every {interval})" if interval else ""
        print(f"| {name} | {1e3 * statistics.median(times):.1f} | {1e3 * added:+.2f} | {share} |")


def timed(call: Callable[[], None], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    # On the CPU other programs' time does not count: what is timed is this process alone.
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


if __name__ == "__main__":
    main()
