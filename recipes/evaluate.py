"""Evaluate a network: top-1, top-5, NLL, ECE and Brier score of its raw, folded and fitted probabilities.

    python recipes/evaluate.py runs/digits --dataset-name digits            # a folder that a recipe wrote
    python recipes/evaluate.py runs/digits/checkpoint-540 --dataset-name digits
    python recipes/evaluate.py resnet50.a1_in1k                             # timm's weights, ILSVRC/imagenet-1k
    accelerate launch recipes/evaluate.py microsoft/resnet-50 --bf16        # a Hub id, on every GPU of this machine

"folded" are the probabilities that PGT trained, softmax(alpha z), with the alpha that the model's config names.
"fitted" are those at the best temperature; each half of the images is scored at the one fitted to the other half.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

# Python searches a script's own folder first: there, `import evaluate`, the package, finds this file, from any recipe.
# So the folder leaves the path, and who came for the package gets it.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
if __name__ == "evaluate":
    del sys.modules["evaluate"]
    import evaluate  # noqa: F401
else:
    from pgt_hf.analysis import BINS, IGNORED, TopKAccuracy, compare_calibration
    from pgt_hf.functional import check_alpha
    from pgt_hf.images import (
        DEFAULT_DATASET,
        ImageDataset,
        class_names,
        collate,
        load_classifier,
        load_image_dataset,
        match_labels,
        preprocessing,
    )


def main() -> None:
    args = parse()
    accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else "no")
    if not accelerator.is_main_process:
        logging.getLogger("pgt_hf").setLevel(logging.ERROR)
    try:
        with accelerator.main_process_first():
            split = load_image_dataset(
                args.dataset_name,
                image_column=args.image_column,
                label_column=args.label_column,
                max_eval_samples=args.max_eval_samples,
                seed=args.seed,
            )["validation"]
            model = load_classifier(args.model, args.weights)
        alpha = args.alpha
        if alpha is None and not getattr(model.config, "powergrad_folded", False):
            alpha = getattr(model.config, "powergrad_alpha", None)
        to_class = match_labels(class_names(split), list(model.config.id2label.values()))
        transform = preprocessing(model, args.model, args.image_size)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")

    images = ImageDataset(split, transform, on_bad_image=args.on_bad_image)
    started = time.perf_counter()
    predicted = predict(accelerator, model, images, args.batch_size, args.num_workers)
    seconds = time.perf_counter() - started
    if accelerator.is_main_process:
        logits, labels = predicted
        labels = torch.where(labels == IGNORED, labels, torch.tensor(to_class)[labels.clamp(min=0)])
        report = score(logits, labels, alpha, args.bins, args.seed)
        report = {
            "model": args.model,
            "weights": args.weights,
            "dataset": args.dataset_name,
            **report,
            "bf16": args.bf16,
            "world_size": accelerator.num_processes,
            "seconds": round(seconds, 1),
            "versions": {package: version(package) for package in ("torch", "transformers", "timm", "datasets")},
        }
        tell(report)
        if args.output:
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    accelerator.end_training()


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("model", help="folder of a trained model or checkpoint, timm name, or Hub id")
    add("--weights", help="local file of weights for it: safetensors, or a state dict that torch.save wrote")
    add("--dataset-name", default=DEFAULT_DATASET, help="Hub id, folder of Parquet files or images, or 'digits'")
    add("--image-column", help="column of the images, if not found by itself")
    add("--label-column", help="column of the labels, if not found by itself")
    add("--max-eval-samples", type=int, help="evaluate on so many images only, drawn by --seed")
    add("--on-bad-image", default="error", choices=["error", "skip"], help="skip: leave it out, and count it")
    add("--image-size", type=int, help="side in pixels, where it is not to be the model's own")
    add("--alpha", type=float, help="exponent that the model was trained with; default: what its config says")
    add("--bins", type=int, default=BINS, help=f"bins of the ECE (default {BINS})")
    add("--batch-size", type=int, default=64, help="images per process and batch (default 64)")
    add("--num-workers", type=int, default=min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    add("--bf16", action="store_true", help="run the network in bfloat16 autocast")
    add("--seed", type=int, default=0, help="of the drawn images, and of the halves that temperatures are fitted on")
    add("--output", help="file to write all figures to, as JSON")
    args = parser.parse_args()
    for name in ("bins", "batch_size", "image_size", "max_eval_samples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    try:
        check_alpha(0.0 if args.alpha is None else args.alpha)
    except ValueError as error:
        parser.error(f"--alpha: {error}")
    return args


@torch.inference_mode()
def predict(
    accelerator: Accelerator, model: Any, images: ImageDataset, batch_size: int, num_workers: int
) -> list[Tensor]:
    """Logits and labels of all images, each image once, in the memory of the main process; nothing on the others."""
    model.to(accelerator.device)
    loader = accelerator.prepare(DataLoader(images, batch_size, num_workers=num_workers, collate_fn=collate))
    kept = []
    for batch in tqdm(loader, desc="evaluate", disable=not accelerator.is_main_process, mininterval=2):
        with accelerator.autocast():
            logits = model(pixel_values=batch["pixel_values"]).logits
        gathered = accelerator.gather_for_metrics((logits.float(), batch["labels"]))
        if accelerator.is_main_process:
            kept.append([tensor.cpu() for tensor in gathered])
    return [torch.cat(parts) for parts in zip(*kept, strict=True)]


def score(logits: Tensor, labels: Tensor, alpha: float | None, bins: int, seed: int) -> dict[str, Any]:
    counted = labels != IGNORED
    best = logits[counted].topk(min(5, logits.size(1))).indices
    report = {"images": int(counted.sum()), "skipped": int((~counted).sum()), "alpha": alpha, "bins": bins}
    report |= TopKAccuracy().compute(predictions=best, references=labels[counted])
    for name, found in compare_calibration(logits, labels, alpha, bins=bins, seed=seed).items():
        report[name] = {"temperatures": found.temperatures, "nll": found.nll, "ece": found.ece, "brier": found.brier}
    return report


def tell(report: dict[str, Any]) -> None:
    accuracies = ", ".join(f"{key} {value:.2%}" for key, value in report.items() if key.startswith("top"))
    skipped = f" ({report['skipped']:,} skipped)" if report["skipped"] else ""
    print(f"\n{report['model']} on {report['dataset']}: {report['images']:,} images{skipped}, {accuracies}\n")
    print(f"{'probabilities':15}{'temperature':>13}{'NLL':>10}{'ECE':>10}{'Brier':>10}")
    for name in ("raw", "folded", "fitted"):
        if row := report.get(name):
            used = "/".join(f"{value:.3g}" for value in row["temperatures"])
            print(f"{name:15}{used:>13}{row['nll']:>10.4f}{row['ece']:>10.4f}{row['brier']:>10.4f}")
    print("\nfitted: each half of the images at the temperature fitted to the other half")


if __name__ == "__main__":
    main()
