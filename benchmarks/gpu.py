"""Everything that needs a GPU, in one command, in less than ten minutes on one card, without a network.

    python -m benchmarks.gpu                                   # or: make gpu
    python -m benchmarks.gpu --device cpu --small              # a rehearsal of it all in a minute or two

PGT's gradient against its formula (float32, bfloat16, float16 with a scaler, channels_last, fused optimizers,
compiled, CUDA graphs), waits for the device, the loss beside Liger's, steps and images per second of resnet50, the
augmentation of a batch, and a short comparison of alphas. It needs torch and transformers; timm, liger-kernel and
scikit-learn are used where they are installed, and the page says what is missing. What fails is in the results, and
makes the exit status 1. Results go to one JSON file and one page in Markdown beside it.
"""

import argparse
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.loss import ALPHA, SHAPES, TARGETS, measure
from pgt_hf import attach_powergrad

PACKAGES = ("torch", "transformers", "timm", "liger-kernel", "scikit-learn", "triton")
Rows = list[dict[str, Any]]


class Small(nn.Module):
    """A convolution, a ReLU and a head: what the exactness checks train."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2)
        self.fc = nn.Linear(32, 100)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(F.relu(self.stem(images)).mean((2, 3)))


def exactness(args: argparse.Namespace) -> Rows:
    """The gradient at the logits in a training step against (softmax(alpha z) - q) / N in float64."""
    cases: dict[str, dict[str, Any]] = {
        "float32": {},
        "bfloat16 autocast": {"dtype": torch.bfloat16},
        "float16 autocast with a scaler": {"dtype": torch.float16},
        "channels_last": {"channels_last": True},
        "fused SGD": {"optimizer": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True)},
        "fused AdamW": {"optimizer": lambda p: torch.optim.AdamW(p, 0.001, fused=True)},
        "compiled": {"compiled": "default"},
        "compiled, bfloat16": {"compiled": "default", "dtype": torch.bfloat16},
        "CUDA graphs (compiled, reduce-overhead)": {"compiled": "reduce-overhead"},
    }
    rows = []
    for name, options in cases.items():
        with failures(rows, {"case": name}) as row:
            row |= exact_step(args.device, **options)
            row["ok"] = row["largest error"] <= (1e-5 if options.get("dtype") is None else 2e-2)
    return rows


def exact_step(
    device: str,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    compiled: str | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.compiler.reset()
    network = Small().to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
    attach_powergrad(network, ALPHA)
    steps = (optimizer or (lambda p: torch.optim.SGD(p, 0.1)))(network.parameters())
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    target = torch.randint(100, (64,), device=device)
    images = torch.randn(64, 3, 32, 32, device=device)

    def loss_of(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
            logits = network(images)
            return F.cross_entropy(logits, target), logits

    run = loss_of if compiled is None else torch.compile(loss_of, mode=compiled)
    worst = 0.0
    for _ in range(4):  # CUDA graphs are recorded in the second or third
        loss, logits = run(images, target)
        scaler.scale(loss).backward()
        scaler.unscale_(steps)
        z = logits.detach().double()
        at_the_logits = (torch.softmax(ALPHA * z, 1) - F.one_hot(target, 100)) / len(z)
        # The bias of the head receives their sum over the batch.
        expected, found = at_the_logits.sum(0), network.fc.bias.grad.double()
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
        scaler.step(steps)
        scaler.update()
        steps.zero_grad()
    return {"largest error": worst}


def waits(args: argparse.Namespace) -> Rows:
    """Steps with PGT in which torch raises an error at the first wait for the GPU."""
    rows: Rows = []
    if args.device == "cpu":
        return [{"case": "training step", "skipped": "a CPU has nothing to wait for"}]
    from pgt_hf.images import augment

    torch.compiler.reset()
    network = Small().to(args.device)
    attach_powergrad(network, ALPHA)
    steps = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    pixels = torch.randint(256, (64, 3, 64, 64), device=args.device, dtype=torch.uint8)
    drawn = torch.rand(64, 4, 3, device=args.device)
    target = torch.randint(100, (64,), device=args.device)
    for _ in range(2):
        with failures(rows, {"case": "augmentation, loss and step"}) as row:
            F.cross_entropy(network(augment(pixels, drawn) / 255), target).backward()
            steps.step()
            steps.zero_grad()
            row["ok"] = True
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
    return rows[1:]  # the first one warms up


def loss_table(args: argparse.Namespace) -> Rows:
    """One forward and backward pass of the loss alone, as ``benchmarks.loss`` measures it."""
    rows: Rows = []
    shapes = SHAPES[:2] if args.small else SHAPES
    targets = [(kind, False) for kind in TARGETS] + [("indices", True)]
    for shape, dtype, (kind, compiled) in product(shapes, ("float32", "bfloat16"), targets):
        with failures(rows, {"dtype": dtype, "compiled": compiled, "shape": str(shape), "target": kind}) as row:
            row |= measure(
                shape, kind, dtype, args.device, compiled, rounds=3 if args.small else 21, seconds_each=0.01
            )
    return rows


def steps(args: argparse.Namespace) -> Rows:
    """Whole steps of resnet50 with and without PGT, alternated."""
    rows: Rows = []
    size, batch = (64, 4) if args.small else (224, 128)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with failures(rows, {"dtype": str(dtype).removeprefix("torch."), "pixels": size, "batch": batch}) as row:
            plain, attached = step_seconds(args, dtype, size, batch)
            row |= {"images/s with PGT": batch / statistics.median(attached)}
            row |= {"without": batch / statistics.median(plain)}
            row |= {"step ratio": statistics.median(a / b for a, b in zip(attached, plain, strict=True))}
    return rows


def step_seconds(
    args: argparse.Namespace, dtype: torch.dtype, size: int, batch: int
) -> tuple[list[float], list[float]]:
    """Of a step without PGT, and of one with it."""
    torch.manual_seed(0)
    network = resnet50().to(args.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-5)
    images = torch.randn(batch, 3, size, size, device=args.device).contiguous(memory_format=torch.channels_last)
    target = torch.randint(1000, (batch,), device=args.device)
    scaler = torch.amp.GradScaler(args.device, enabled=dtype == torch.float16)

    def step() -> None:
        with torch.autocast(args.device, dtype, enabled=dtype != torch.float32):
            found = network(images)
            loss = F.cross_entropy(getattr(found, "logits", found), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(3 if args.small else 12):
        for attached in (False, True) if turn % 2 else (True, False):
            handle = attach_powergrad(network, ALPHA) if attached else None
            taken = timed(step, args.device, 1 if args.small else 5)
            if turn:  # the first one warms up
                times[attached].append(taken)
            if handle is not None:
                handle.remove()
    return times[False], times[True]


def augmentation(args: argparse.Namespace) -> Rows:
    """What flips, colour jitter and normalisation of a batch cost on the device."""
    from pgt_hf.images import augment

    size, batch = (64, 4) if args.small else (224, 256)
    pixels = torch.randint(256, (batch, 3, size, size), device=args.device, dtype=torch.uint8)
    drawn = torch.rand(batch, 4, 3, device=args.device)
    rows: Rows = []
    for name, call in {"eager": augment, "compiled": torch.compile(augment)}.items():
        with failures(rows, {"side": name, "pixels": size, "batch": batch}) as row:
            call(pixels, drawn)
            taken = [timed(lambda call=call: call(pixels, drawn), args.device, 3) for _ in range(5)]
            row["ms"] = 1e3 * statistics.median(taken)
            row["images/s"] = batch / statistics.median(taken)
    return rows


def alphas(args: argparse.Namespace) -> Rows:
    """Accuracy on held-out handwritten digits after a short training, three seeds for each alpha."""
    if not find_spec("sklearn"):
        return [{"skipped": "scikit-learn, which holds the digits, is not installed"}]
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32, device=args.device).view(-1, 1, 8, 8)
    target = torch.tensor(labels, device=args.device)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0)).to(args.device)
    train, test = order[:1437], order[1437:]
    rows: Rows = []
    for alpha in (1.0, 0.5, 0.25):
        with failures(rows, {"alpha": alpha}) as row:
            found = []
            for seed in range(1 if args.small else 3):
                torch.manual_seed(seed)
                network = nn.Sequential(
                    nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU()
                )
                network = nn.Sequential(network, nn.Flatten(), nn.Linear(576, 10)).to(args.device)
                attach_powergrad(network, alpha)
                optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
                for _ in range(50 if args.small else 500):
                    chosen = train[torch.randint(len(train), (128,), device=args.device)]
                    F.cross_entropy(network(images[chosen]), target[chosen]).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                network.eval()
                with torch.no_grad():
                    found.append(float((network(images[test]).argmax(1) == target[test]).float().mean()))
            row |= {"accuracy": statistics.mean(found), "of each seed": ", ".join(f"{value:.4f}" for value in found)}
    return rows


PARTS = {
    "Exactness": exactness,
    "Waits for the device": waits,
    "Steps of resnet50": steps,
    "The loss alone": loss_table,
    "Augmentation on the device": augmentation,
    "Alphas on digits": alphas,
}


class failures:
    """Adds a row; what goes wrong while it is filled is written into it, and does not stop the others."""

    def __init__(self, rows: Rows, start: dict[str, Any]) -> None:
        self.row = dict(start)
        rows.append(self.row)

    def __enter__(self) -> dict[str, Any]:
        return self.row

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Exception):
            self.row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            traceback.print_exception(error)
        return isinstance(error, Exception)


def resnet50() -> nn.Module:
    if find_spec("timm"):
        import timm

        return timm.create_model("resnet50")
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=1000))


def timed(call: Callable[[], Any], device: str, repeats: int) -> float:
    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) / repeats


def installed() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "missing"


def page(results: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in results["packages"].items())
    lines = [f"# {results['device']}", "", f"{packages}; {results['seconds']:.0f} seconds in all.", ""]
    for title, rows in results["parts"].items():
        columns = list(dict.fromkeys(name for row in rows for name in row))
        lines += [f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(cell(row.get(name, '')) for name in columns)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--seconds", type=float, default=540, help="no part begins after so long")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu.json"))
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU; --device cpu --small rehearses everything on the CPU")
    start = time.perf_counter()
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if args.device != "cpu" else f"CPU, {platform.machine()}",
        "packages": dict(installed()),
        "parts": {},
    }
    for title, part in PARTS.items():
        since = time.perf_counter() - start
        if since > args.seconds:
            rows: Rows = [{"skipped": f"{since:.0f} of {args.seconds:.0f} seconds were used up"}]
        else:
            print(f"{since:5.0f} s  {title}", file=sys.stderr, flush=True)
            rows = []
            failed: Rows = []
            with failures(failed, {}):
                rows = part(args)
            rows = rows if failed == [{}] else failed
        results["parts"][title] = rows
        results["seconds"] = time.perf_counter() - start
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=2), encoding="utf-8")  # what is done is kept
        args.output.with_suffix(".md").write_text(page(results), encoding="utf-8")
    print(page(results))
    every = [row for rows in results["parts"].values() for row in rows]
    if any("error" in row or row.get("ok") is False for row in every):
        sys.exit("error: something failed or is not exact; see above")


if __name__ == "__main__":
    main()
