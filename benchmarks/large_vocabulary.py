"""Time and peak memory of a linear head with its loss, forward and backward, where the vocabulary is large.

    python -m benchmarks.large_vocabulary                       # CPU, float32
    python -m benchmarks.large_vocabulary --device cuda --dtype bfloat16 --tokens 8192 --features 2048

All sides run in one process, alternated; each figure is a median, each ratio the median of the paired ratios. Memory
is the peak above the features and the head's weight; every side has to make the weight's gradient, of the same size.
"""

import argparse
import platform
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pgt_hf import powergrad_cross_entropy, powergrad_linear_cross_entropy

from .loss import ALPHA, Loss, peak_bytes, seconds

VOCABULARIES = (50257, 128256)  # GPT-2's and Llama 3's


def linear_and_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


def linear_and_powergrad(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return powergrad_cross_entropy(F.linear(hidden, weight), target, alpha=ALPHA)


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def ours(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return powergrad_linear_cross_entropy(hidden, weight, target, alpha=ALPHA)


def liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, ALPHA * hidden, target) / ALPHA


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear, `F.cross_entropy`": linear_and_cross_entropy,
    "linear, `powergrad_cross_entropy`": linear_and_powergrad,
    "`F.linear_cross_entropy`, torch's own chunks": torch_linear_cross_entropy,
    "`powergrad_linear_cross_entropy`": ours,
}


def of_head(side: Callable[[Tensor, Tensor, Tensor], Tensor], weight: Tensor) -> Loss:
    def loss(hidden: Tensor, target: Tensor) -> Tensor:
        weight.grad = None
        return side(hidden, weight, target)

    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    on_gpu = args.device != "cpu"
    sides = SIDES | ({"Liger's fused loss, alpha as documented": liger} if on_gpu else {})
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} thread(s)"
    print(f"torch {torch.__version__}, {platform.machine()}, {where}, {args.dtype}, {args.rounds} rounds\n")
    print("| vocabulary | variant | median ms | time ratio | peak MB | memory ratio |\n|---|---|---|---|---|---|")
    for vocabulary in VOCABULARIES:
        torch.manual_seed(0)
        options = {"device": args.device, "dtype": getattr(torch, args.dtype)}
        hidden = torch.randn(args.tokens, args.features, **options, requires_grad=True)
        weight = (torch.randn(vocabulary, args.features, **options) / args.features**0.5).requires_grad_()
        target = torch.randint(vocabulary, (args.tokens,), device=args.device)

        losses = {name: of_head(side, weight) for name, side in sides.items()}
        times: dict[str, list[float]] = {name: [] for name in losses}
        for _ in range(args.rounds):
            for name, loss in losses.items():
                times[name].append(seconds(loss, hidden, target, 1))
        memory = {}
        for name, loss in losses.items():
            weight.grad = None
            memory[name] = peak_bytes(loss, hidden, target)
        first = next(iter(losses))
        for name in losses:
            ratio = statistics.median(a / b for a, b in zip(times[name], times[first], strict=True))
            print(
                f"| {vocabulary:,} | {name} | {1e3 * statistics.median(times[name]):.0f} | {ratio:.2f} "
                f"| {memory[name] / 2**20:.0f} | {memory[name] / memory[first]:.2f} |"
            )


if __name__ == "__main__":
    main()
