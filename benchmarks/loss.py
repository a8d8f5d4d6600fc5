"""Time and peak memory of one forward and backward pass: ours, torch's cross-entropy, the paper's formula as a hook.

    python -m benchmarks.loss                       # CPU, float32
    python -m benchmarks.loss --device cuda --dtype bfloat16

All sides run in one process, alternated; each figure is a median, each ratio the median of the paired ratios.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pgt_hf import powergrad_cross_entropy, powergrad_log_softmax

ALPHA = 0.25
SHAPES = ((256, 1000), (1024, 1000), (64, 50257))


def torch_cross_entropy(logits: Tensor, target: Tensor) -> None:
    F.cross_entropy(logits, target).backward()


def ours(logits: Tensor, target: Tensor) -> None:
    powergrad_cross_entropy(logits, target, alpha=ALPHA).backward()


def ours_log_softmax(logits: Tensor, target: Tensor) -> None:
    F.nll_loss(powergrad_log_softmax(logits, alpha=ALPHA), target).backward()


def formula(logits: Tensor, target: Tensor) -> None:
    """From the formula, as a gradient hook: p = grad * N + q, then p ** alpha normalised, as published."""

    def hook(grad: Tensor) -> Tensor:
        q = F.one_hot(target, grad.size(1)).to(grad.dtype)
        powered = (grad * len(grad) + q).clamp(min=0).pow(ALPHA)
        return (powered / powered.sum(1, keepdim=True) - q) / len(grad)

    handle = logits.register_hook(hook)
    F.cross_entropy(logits, target).backward()
    handle.remove()


SIDES: dict[str, Callable[[Tensor, Tensor], None]] = {
    "F.cross_entropy": torch_cross_entropy,
    "powergrad_cross_entropy": ours,
    "nll_loss(powergrad_log_softmax)": ours_log_softmax,
    "published formula as a hook": formula,
}


def seconds(side: Callable[[Tensor, Tensor], None], logits: Tensor, target: Tensor, repeats: int) -> float:
    logits.grad = None
    _synchronize(logits)
    start = time.perf_counter()
    for _ in range(repeats):
        logits.grad = None
        side(logits, target)
    _synchronize(logits)
    return (time.perf_counter() - start) / repeats


def peak_bytes(side: Callable[[Tensor, Tensor], None], logits: Tensor, target: Tensor) -> int:
    """The most that was allocated at a time above what stood there before."""
    logits.grad = None
    if logits.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side(logits, target)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        side(logits, target)
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
    args = parser.parse_args()
    where = torch.cuda.get_device_name() if args.device != "cpu" else f"{torch.get_num_threads()} thread(s)"
    print(f"torch {torch.__version__}, {platform.machine()}, {where}, {args.dtype}, {args.rounds} rounds\n")
    print("| shape | side | median ms | ratio of time | peak MB | ratio of memory |\n|---|---|---|---|---|---|")
    for shape in SHAPES:
        torch.manual_seed(0)
        logits = torch.randn(shape, device=args.device, dtype=getattr(torch, args.dtype), requires_grad=True)
        target = torch.randint(shape[1], shape[:1], device=args.device)
        repeats = max(1, int(0.03 / seconds(torch_cross_entropy, logits, target, 3)))
        times: dict[str, list[float]] = {name: [] for name in SIDES}
        for _ in range(args.rounds):
            for name, side in SIDES.items():
                times[name].append(seconds(side, logits, target, repeats))
        memory = {name: peak_bytes(side, logits, target) for name, side in SIDES.items()}
        first = next(iter(SIDES))
        for name in SIDES:
            ratio = statistics.median(a / b for a, b in zip(times[name], times[first], strict=True))
            print(
                f"| {shape} | {name} | {1e3 * statistics.median(times[name]):.3f} | {ratio:.2f} "
                f"| {memory[name] / 2**20:.2f} | {memory[name] / memory[first]:.2f} |"
            )


if __name__ == "__main__":
    main()
