"""Evaluate a network: top-1, top-5, NLL, ECE and Brier score of its raw, folded and fitted probabilities.

    python recipes/evaluate_images.py runs/digits                                  # a run, on the images it held out
    python recipes/evaluate_images.py runs/digits/checkpoint-540
    python recipes/evaluate_images.py runs/photos --dataset-name path/to/others    # a run, on other images
    python recipes/evaluate_images.py resnet50.a1_in1k                             # timm's weights, ILSVRC/imagenet-1k
    accelerate launch recipes/evaluate_images.py microsoft/resnet-50 --bf16        # a Hub id, on every GPU

"folded" are the probabilities that PGT trained, softmax(alpha z), with the alpha that the model's config names.
"fitted" are those at the best temperature; each half of the images is scored at the one fitted to the other half.
Which of the three is best has to be measured: folding helps where the network fits its data, and hurts elsewhere.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from pgt_hf.analysis import BINS, IGNORED, calibration_table, compare_calibration, ranked_classes, top_k_accuracy
from pgt_hf.images import (
    DEFAULT_DATASET,
    DataSetName,
    ImageDataset,
    OnBadImage,
    Side,
    TimmName,
    class_names,
    collate,
    load_classifier,
    match_labels,
    preprocessing,
    worker_options,
)
from pgt_hf.limits import Count, ExistingPath, Seed, Share, Whole, Workers, WritableFile
from pgt_hf.programs import errors_in_one_line, parse, quiet_other_processes, workers_per_process
from pgt_hf.runs import load_validation, package_versions, read_record, run_folder
from pgt_hf.trainer import StopOnSigterm


@dataclass
class EvaluationArguments:
    model: Annotated[str, TimmName(folder=True, hub=True)] = field(
        metadata={"help": "Folder of a trained model or checkpoint, timm name, or Hub id."}
    )
    weights: Annotated[str | None, ExistingPath("file")] = field(
        default=None, metadata={"help": "Local file of weights: safetensors or a state dict."}
    )
    dataset_name: DataSetName | None = field(
        default=None, metadata={"help": f"Hub id, folder of images, or 'digits'; the run's, else {DEFAULT_DATASET}."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The Hub data set's configuration, if any."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images, if it is not detected."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels, if it is not detected."})
    max_eval_samples: Count | None = field(
        default=None, metadata={"help": "So many images; default: the run's, or all."}
    )
    allow_outside_files: bool = field(
        default=False, metadata={"help": "Let a CSV or other table name images outside its folder."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the images without downloading them."})
    on_bad_image: OnBadImage = field(
        default="error", metadata={"help": "'error', or 'skip': leave it out, and count it."}
    )
    image_size: Side | None = field(default=None, metadata={"help": "Side in pixels, if not the model's own."})
    alpha: Share | None = field(default=None, metadata={"help": "Exponent of the training, if the config lacks it."})
    bins: Annotated[int, Whole("[1, 10000]")] = field(default=BINS, metadata={"help": "Bins of the ECE."})
    batch_size: Count = field(default=64, metadata={"help": "Images per process and batch."})
    num_workers: Workers = field(
        default=workers_per_process(), metadata={"help": "Processes that decode, per process."}
    )
    bf16: bool = field(default=False, metadata={"help": "Run the network in bfloat16 autocast."})
    seed: Seed | None = field(
        default=None, metadata={"help": "Draws images; default: the run's, so that none is known."}
    )
    output: Annotated[str | None, WritableFile(".json")] = field(
        default=None, metadata={"help": "File to write all figures to, as JSON."}
    )


def main() -> None:
    # parse
    StopOnSigterm().listen()
    args, _ = parse(EvaluationArguments, description=__doc__, defaults={}, positional="model")
    accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else "no")
    quiet_other_processes(accelerator.process_index)

    # build
    with errors_in_one_line():
        run = run_folder(args.model)
        dataset_name = args.dataset_name or (read_record(run).get("data", {}).get("name") if run else DEFAULT_DATASET)
        with accelerator.main_process_first():
            split = load_validation(
                args.model,
                dataset_name,
                args.dataset_config,
                image_column=args.image_column,
                label_column=args.label_column,
                max_eval_samples=args.max_eval_samples,
                allow_outside_files=args.allow_outside_files,
                seed=args.seed,
                streaming=args.streaming or None,
            )
            model = load_classifier(args.model, args.weights)
        alpha = getattr(model.config, "powergrad_alpha", None)
        if args.alpha not in (None, alpha) and alpha is not None:
            raise ValueError(f"alpha must be left out, since the model's config has it, {alpha}, got {args.alpha}")
        folded = getattr(model.config, "powergrad_folded", False)
        alpha = None if folded else args.alpha if alpha is None else alpha
        to_class = match_labels(class_names(split), list(model.config.id2label.values()))
        transform = preprocessing(model, args.model, args.image_size)
        images = ImageDataset(split, transform, on_bad_image=args.on_bad_image)

    # evaluate
    started = time.perf_counter()
    predicted = predict(accelerator, model, images, args.batch_size, args.num_workers)
    seconds = time.perf_counter() - started

    # report
    if accelerator.is_main_process:
        logits, labels = predicted
        labels = torch.where(labels == IGNORED, labels, torch.tensor(to_class)[labels.clamp(min=0)])
        with errors_in_one_line():
            calibration = compare_calibration(logits, labels, alpha, bins=args.bins)
        report = {
            "model": args.model,
            "weights": args.weights,
            "dataset": dataset_name,
            **score(logits, labels),
            "alpha": alpha,
            "bins": args.bins,
            **{
                name: {"temperatures": found.temperatures, "nll": found.nll, "ece": found.ece, "brier": found.brier}
                for name, found in calibration.items()
            },
            "bf16": args.bf16,
            "world_size": accelerator.num_processes,
            "seconds": round(seconds, 1),
            "versions": package_versions(),
        }
        print(f"\n{heading(report)}\n\n{calibration_table(calibration)}")
        if args.output:
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    accelerator.end_training()


@torch.inference_mode()
def predict(
    accelerator: Accelerator, model: Any, images: ImageDataset, batch_size: int, num_workers: int
) -> list[Tensor]:
    """Logits and labels of all images, each image once, in the memory of the main process; nothing on the others."""
    model.to(accelerator.device)
    loader = accelerator.prepare(DataLoader(images, batch_size, collate_fn=collate, **worker_options(num_workers)))
    kept = []
    hidden = None if accelerator.is_main_process else True  # None: shown on a terminal
    for batch in tqdm(loader, desc="evaluate", disable=hidden, leave=False):
        with accelerator.autocast():
            logits = model(pixel_values=batch["pixel_values"]).logits
        gathered = accelerator.gather_for_metrics((logits.float(), batch["labels"]))
        if accelerator.is_main_process:
            kept.append([tensor.cpu() for tensor in gathered])
    return [torch.cat(parts) for parts in zip(*kept, strict=True)]


def score(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    counted = labels != IGNORED
    accuracies = top_k_accuracy(ranked_classes(logits[counted]), labels[counted])
    return {"images": int(counted.sum()), "skipped": int((~counted).sum())} | accuracies


def heading(report: dict[str, Any]) -> str:
    accuracies = ", ".join(f"{key} {value:.2%}" for key, value in report.items() if key.startswith("top"))
    skipped = f" ({report['skipped']:,} skipped)" if report["skipped"] else ""
    return f"{report['model']} on {report['dataset']}: {report['images']:,} images{skipped}, {accuracies}"


if __name__ == "__main__":
    main()
