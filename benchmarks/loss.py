"""Time and peak memory of one forward and backward pass: ours beside torch's cross-entropy.

    python -m benchmarks.loss                       # CPU, float32
    python -m benchmarks.loss --dtype bfloat16 --autocast
    python -m benchmarks.loss --compile             # every side compiled by inductor
    python -m benchmarks.loss --device cuda         # and beside Liger's kernel, where that is installed

All sides run in one process, in turn. Time is the processor's on a CPU, where other programs may be running, and the
wall's on a GPU. Each ratio is the median of the paired ratios to ``F.cross_entropy``.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pgt_hf import attach_powergrad, powergrad_cross_entropy

ALPHA = 0.25
SHAPES = ((8, 10), (256, 1000), (1024, 1000), (64, 50257))
TARGETS = ("indices", "smoothed", "soft")  # label smoothing of 0.1; class probabilities
REFERENCE = "F.cross_entropy"
Loss = Callable[[Tensor, Tensor], Tensor]


class Head(nn.Module):
    """Hands on its input, as logits."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.view_as(logits)


def losses(kind: str, device: str = "cpu", compiled: bool = False) -> dict[str, Loss]:
    """The sides that can take such a target; torch's own loss comes first."""
    plain, attached = Head(), Head()
    attach_powergrad(attached, ALPHA)
    options = {"label_smoothing": 0.1 if kind == "smoothed" else 0.0}
    sides: dict[str, Loss] = {
        REFERENCE: lambda z, y: F.cross_entropy(plain(z), y, **options),
        "attached": lambda z, y: F.cross_entropy(attached(z), y, **options),
        "powergrad_cross_entropy": lambda z, y: powergrad_cross_entropy(plain(z), y, alpha=ALPHA, **options),
    }
    if compiled:
        return {name: torch.compile(loss) for name, loss in sides.items()}
    if kind == "indices":
        sides["published hook"] = published
    if device != "cpu" and kind != "soft" and find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerCrossEntropyLoss

        sides["Liger, without PGT"] = LigerCrossEntropyLoss(**options)
    return sides


def published(logits: Tensor, target: Tensor) -> Tensor:
    """The formula as a gradient hook, p = grad * N + q and then p ** alpha normalised, as it was published."""

    def hook(grad: Tensor) -> Tensor:
        q = F.one_hot(target, grad.size(1)).to(grad.dtype)
        powered = (grad * len(grad) + q).clamp(min=0).pow(ALPHA)
        return (powered / powered.sum(1, keepdim=True) - q) / len(grad)

    logits = logits.view_as(logits)
    logits.register_hook(hook)
    return F.cross_entropy(logits, target)


def measure(
    shape: tuple[int, int],
    kind: str,
    dtype: str = "float32",
    device: str = "cpu",
    compiled: bool = False,
    autocast: bool = False,
    rounds: int = 31,
    seconds_each: float = 0.03,
) -> dict[str, float | str]:
    """A row of the table: milliseconds and MB of ``F.cross_entropy``, and the other sides' ratios to it."""
    torch.manual_seed(0)
    torch.compiler.reset()
    logits = torch.randn(shape, device=device, dtype=getattr(torch, dtype), requires_grad=True)
    target = torch.randint(shape[1], shape[:1], device=device)
    if kind == "soft":
        target = torch.rand_like(logits).softmax(1).detach()
    sides = losses(kind, device, compiled)
    if autocast:
        sides = {name: torch.autocast(device, torch.bfloat16)(loss) for name, loss in sides.items()}
    for loss in sides.values():
        seconds(loss, logits, target, 3)  # warms up, and compiles
    memory = {name: peak_bytes(loss, logits, target) for name, loss in sides.items()}
    repeats = max(1, int(seconds_each / seconds(sides[REFERENCE], logits, target, 3)))
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in reversed(sides) if turn % 2 else sides:
            times[name].append(seconds(sides[name], logits, target, repeats))
    row: dict[str, float | str] = {
        "shape": str(shape),
        "target": kind,
        f"{REFERENCE}: ms": 1e3 * statistics.median(times[REFERENCE]),
        "MB": memory[REFERENCE] / 2**20,
    }
    for name in list(sides)[1:]:
        row[f"{name}: time"] = statistics.median(a / b for a, b in zip(times[name], times[REFERENCE], strict=True))
        row[f"{name}: memory"] = memory[name] / memory[REFERENCE]
    return row


def seconds(loss: Loss, logits: Tensor, target: Tensor, repeats: int) -> float:
    """Of the wall on a GPU; of the processor on a CPU, where other processes may be running."""
    clock = time.perf_counter if logits.is_cuda else time.process_time
    _synchronize(logits)
    start = clock()
    for _ in range(repeats):
        logits.grad = None
        loss(logits, target).backward()
    _synchronize(logits)
    return (clock() - start) / repeats


def peak_bytes(loss: Loss, logits: Tensor, target: Tensor) -> int:
    """The most that was allocated at a time above what stood there before."""
    logits.grad = None
    if logits.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(logits, target).backward()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        loss(logits, target).backward()
    total = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--compile", action="store_true", help="compile every side with inductor")
    parser.add_argument("--autocast", action="store_true", help="under autocast, as in mixed-precision training")
    args = parser.parse_args()
    where = torch.cuda.get_device_name() if args.device != "cpu" else f"{torch.get_num_threads()} thread(s)"
    how = f"{args.dtype}{', autocast' if args.autocast else ''}{', compiled' if args.compile else ''}"
    print(f"torch {torch.__version__}, {platform.machine()}, {where}, {how}, {args.rounds} rounds\n")
    columns: list[str] = []
    for shape, kind in product(SHAPES, TARGETS):
        row = measure(shape, kind, args.dtype, args.device, args.compile, args.autocast, args.rounds)
        if not columns:  # indices, which every side takes
            columns = list(row)
            print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        cells = (row.get(column, "") for column in columns)
        print(f"| {' | '.join(f'{c:.3g}' if isinstance(c, float) else c for c in cells)} |", flush=True)


if __name__ == "__main__":
    main()
