"""Time and peak memory of one forward and backward pass: ours, torch's cross-entropy, the published hook.

    python -m benchmarks.loss                       # CPU, float32
    python -m benchmarks.loss --compile             # the same, compiled by inductor
    python -m benchmarks.loss --label-smoothing 0.1
    python -m benchmarks.loss --device cuda --dtype bfloat16

The row "attached" is ``F.cross_entropy`` of a head that PGT is attached to; "plain head" is the same without PGT.
All sides run in one process, alternated; each figure is a median, each ratio the median of the paired ratios.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pgt_hf import attach_powergrad, powergrad_cross_entropy, powergrad_log_softmax

ALPHA = 0.25
SHAPES = ((8, 10), (256, 1000), (1024, 1000), (64, 50257))
Loss = Callable[[Tensor, Tensor], Tensor]


class Head(nn.Module):
    """Hands on its input, as logits."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.view_as(logits)


def published(logits: Tensor, target: Tensor) -> Tensor:
    """From the formula, as a gradient hook: p = grad * N + q, then p ** alpha normalised, as published."""

    def hook(grad: Tensor) -> Tensor:
        q = F.one_hot(target, grad.size(1)).to(grad.dtype)
        powered = (grad * len(grad) + q).clamp(min=0).pow(ALPHA)
        return (powered / powered.sum(1, keepdim=True) - q) / len(grad)

    logits = logits.view_as(logits)
    logits.register_hook(hook)
    return F.cross_entropy(logits, target)


def losses(label_smoothing: float, compiled: bool) -> dict[str, Loss]:
    """The sides; torch's own loss of a plain head comes first."""
    plain, attached = Head(), Head()
    attach_powergrad(attached, ALPHA)
    options = {"label_smoothing": label_smoothing}
    sides: dict[str, Loss] = {
        "plain head": lambda z, y: F.cross_entropy(plain(z), y, **options),
        "attached": lambda z, y: F.cross_entropy(attached(z), y, **options),
        "powergrad_cross_entropy": lambda z, y: powergrad_cross_entropy(plain(z), y, alpha=ALPHA, **options),
    }
    if compiled:
        return {name: torch.compile(loss) for name, loss in sides.items()}
    sides["nll_loss(powergrad_log_softmax)"] = lambda z, y: F.nll_loss(powergrad_log_softmax(z, alpha=ALPHA), y)
    sides["published formula as a hook"] = published
    return sides


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
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--compile", action="store_true", help="compile every side with inductor")
    args = parser.parse_args()
    where = torch.cuda.get_device_name() if args.device != "cpu" else f"{torch.get_num_threads()} thread(s)"
    print(f"torch {torch.__version__}, {platform.machine()}, {where}, {args.dtype}, {args.rounds} rounds\n")
    print("| shape | side | median ms | ratio of time | peak MB | ratio of memory |\n|---|---|---|---|---|---|")
    for shape in SHAPES:
        torch.manual_seed(0)
        torch.compiler.reset()
        sides = losses(args.label_smoothing, args.compile)
        logits = torch.randn(shape, device=args.device, dtype=getattr(torch, args.dtype), requires_grad=True)
        target = torch.randint(shape[1], shape[:1], device=args.device)
        first = next(iter(sides))
        for loss in sides.values():
            seconds(loss, logits, target, 3)
        repeats = max(1, int(0.03 / seconds(sides[first], logits, target, 3)))
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, loss in sides.items():
                times[name].append(seconds(loss, logits, target, repeats))
        memory = {name: peak_bytes(loss, logits, target) for name, loss in sides.items()}
        for name in sides:
            ratio = statistics.median(a / b for a, b in zip(times[name], times[first], strict=True))
            print(
                f"| {shape} | {name} | {1e3 * statistics.median(times[name]):.3f} | {ratio:.2f} "
                f"| {memory[name] / 2**20:.2f} | {memory[name] / memory[first]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
