"""How honest are PGT's probabilities? Trains a small network at each alpha, scores them raw, folded and fitted.

    python recipes/calibration.py                                        # digits, 3 seeds at each of 5 alphas
    python recipes/calibration.py --smoke                                # a minute
    accelerate launch recipes/calibration.py --dataset-name zh-plus/tiny-imagenet --min-crop 0.35 --hflip 0.5

raw: softmax(z). folded: softmax(alpha z), what PGT trained. fitted: softmax(z / T), where each half of the validation
images is scored at the temperature T fitted to the other half. Writes table.csv, table.md and reliability.png to
--output-dir, and the logits of each run, from which a second call with the same settings goes on.
"""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import set_seed

from pgt_hf import PowerGradTrainer, PowerGradTrainingArguments
from pgt_hf.analysis import (
    IGNORED,
    Calibration,
    compare_calibration,
    plot_reliability,
    reliability,
    require_matplotlib,
)
from pgt_hf.atomic import replacing
from pgt_hf.images import DIGITS, ImageDataArguments, TimmModel, class_names, collate, create_model
from pgt_hf.limits import Count, Epochs, Folder, Rate, Seed, Share, Whole, Workers
from pgt_hf.programs import errors_in_one_line, parse, refuse_large_batch, refuse_other_run, refuse_other_settings
from pgt_hf.runs import claim_folder, describe_data
from pgt_hf.trainer import StopOnSigterm

KINDS = ("raw", "folded", "fitted")
DEFAULTS = {"dataset_name": DIGITS, "image_size": 32, "min_crop": 0.7, "hflip": 0.0, "color_jitter": 0.0}
SMOKE: dict[str, Any] = {
    "alphas": [1.0, 0.25], "seeds": [0], "epochs": 4.0, "max_train_samples": 400,
    "output_dir": "runs/calibration-smoke",
}  # fmt: skip
GRID = {"output_dir", "alphas", "seeds", "bins", "num_workers", "smoke"}  # may change: the logits stay valid


@dataclass
class DataArguments(ImageDataArguments):
    max_eval_samples: Annotated[int | None, Whole("[2, inf)")] = field(
        default=None, metadata={"help": "Evaluate on at most this many images, in two halves."}
    )


@dataclass
class CalibrationArguments:
    output_dir: Folder = field(default="runs/calibration", metadata={"help": "Where tables, picture and logits go."})
    alphas: list[Share] = field(
        default_factory=lambda: [1.0, 0.5, 0.25, 0.1, 0.05], metadata={"help": "A row of the table for each."}
    )
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "A training for each."})
    model_name: TimmModel = field(default="resnet10t", metadata={"help": "A timm network."})
    epochs: Epochs = field(default=8.0, metadata={"help": "Length of each training."})
    learning_rate: Rate = field(default=0.05, metadata={"help": "The same at every alpha."})
    batch_size: Count = field(default=64, metadata={"help": "Images per process and step."})
    bins: Annotated[int, Whole("[1, 10000]")] = field(default=15, metadata={"help": "Bins of the ECE."})
    num_workers: Workers = field(default=0, metadata={"help": "Processes that decode, per process."})
    smoke: bool = field(default=False, metadata={"help": f"A minute on a laptop: {SMOKE}"})


def main() -> None:
    StopOnSigterm().listen()
    data_args, args, _ = parse(
        DataArguments, CalibrationArguments, description=__doc__, defaults=DEFAULTS, smoke=SMOKE
    )
    state = PartialState()
    folder = Path(args.output_dir)
    with errors_in_one_line():
        refuse_other_run(folder)
        require_matplotlib()
        with state.main_process_first():
            dataset = data_args.load()
        refuse_large_batch("batch_size", args.batch_size, len(dataset["train"]), state.num_processes)
        create_model(args.model_name, class_names(dataset["train"]), image_size=data_args.image_size)
        settings = {key: value for key, value in (vars(data_args) | vars(args)).items() if key not in GRID}
        settings |= {"data": describe_data(data_args.dataset_name, dataset), "processes": state.num_processes}
        for file in folder.glob("alpha-*/logits.npz"):
            with np.load(file) as saved:
                refuse_other_settings(folder, json.loads(str(saved["settings"])), settings)
        if state.is_main_process:
            claim_folder(folder)

    rows, predicted = [], {}
    for alpha in args.alphas:
        for seed in args.seeds:
            file = folder / f"alpha-{alpha:g}-seed-{seed}" / "logits.npz"
            logits, labels = trained_logits(dataset, alpha, seed, args, data_args, file, settings)
            predicted.setdefault(alpha, []).append((logits, labels))
            top1 = (logits.argmax(dim=1) == labels).double().mean().item()
            norm = logits.norm(dim=1).mean().item()
            for kind, found in compare_calibration(logits, labels, alpha, bins=args.bins).items():
                rows.append(row(alpha, seed, top1, norm, kind, found))
    if state.is_main_process:
        write(rows, folder)
        draw(predicted, args.bins, folder / "reliability.png", str(data_args.dataset_name))
        print(f"\nWritten to {folder}: table.csv, table.md, reliability.png")
    state.destroy_process_group()


def trained_logits(
    dataset: Any,
    alpha: float,
    seed: int,
    args: CalibrationArguments,
    data_args: DataArguments,
    file: Path,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """The validation images' logits and labels from one training run, or from its file if it was done before."""
    if file.is_file():
        with np.load(file) as saved:
            return torch.from_numpy(saved["logits"]), torch.from_numpy(saved["labels"])

    set_seed(seed)
    model = create_model(args.model_name, class_names(dataset["train"]), image_size=data_args.image_size)
    train, validation = data_args.datasets(dataset, model.config.pretrained_cfg, seed, normalize=True)
    trainer = PowerGradTrainer(
        model,
        PowerGradTrainingArguments(
            str(file.parent),
            alpha=alpha,
            optim="powergrad_sgd",
            optim_args="momentum=0.9,nesterov=true",
            learning_rate=args.learning_rate,
            weight_decay=5e-4,
            max_grad_norm=0.0,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=256,
            dataloader_num_workers=args.num_workers,
            dataloader_pin_memory=torch.cuda.is_available(),
            ddp_find_unused_parameters=False,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            seed=seed,
        ),
        train_dataset=train,
        data_collator=collate,
    )
    trainer.train()
    found = trainer.predict(validation)
    read = found.label_ids != IGNORED
    logits, labels = found.predictions[read], found.label_ids[read]
    with errors_in_one_line():
        if not np.isfinite(logits).all():
            raise ValueError(
                f"learning_rate must be lower: at alpha {alpha:g} the run diverged, got {args.learning_rate}"
            )
    if trainer.is_world_process_zero():
        file.parent.mkdir(parents=True, exist_ok=True)
        with errors_in_one_line(), replacing(file) as draft, open(draft, "wb") as written:
            np.savez_compressed(written, logits=logits, labels=labels, settings=json.dumps(settings))
    return torch.from_numpy(logits), torch.from_numpy(labels)


def row(alpha: float, seed: int, top1: float, norm: float, kind: str, found: Calibration) -> dict[str, Any]:
    return {
        "alpha": alpha,
        "seed": seed,
        "top1": top1,
        "logit_norm": norm,
        "probabilities": kind,
        "temperature": mean(found.temperatures),
        "nll": found.nll,
        "ece": found.ece,
        "brier": found.brier,
    }


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """table.csv: each run. table.md, also printed: means over the seeds, with their standard deviation."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        "| alpha | probabilities | top-1 | logit norm | temperature | NLL | ECE | Brier |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for alpha, kind in {(entry["alpha"], entry["probabilities"]): None for entry in rows}:
        runs = [entry for entry in rows if (entry["alpha"], entry["probabilities"]) == (alpha, kind)]
        cells = [f"{alpha:g}", kind]
        for key, form in (
            ("top1", ".2%"), ("logit_norm", ".3g"), ("temperature", ".3g"),
            ("nll", ".4f"), ("ece", ".4f"), ("brier", ".4f"),
        ):  # fmt: skip
            values = [run[key] for run in runs]
            spread = (
                f" ± {stdev(values):{form}}" if len(values) > 1 and key not in ("temperature", "logit_norm") else ""
            )
            cells.append(f"{mean(values):{form}}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    (folder / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n" + "\n".join(lines))


def draw(predicted: dict[float, list[tuple[Tensor, Tensor]]], bins: int, path: Path, dataset: str) -> None:
    """One row of diagrams per alpha; the images of all its seeds together."""
    diagrams = {}
    for alpha, runs in predicted.items():
        certain: dict[str, list[Any]] = {}
        for logits, labels in runs:
            hits = (logits.argmax(dim=1) == labels).numpy()
            for kind, found in compare_calibration(logits, labels, alpha, bins=bins).items():
                certain.setdefault(kind, []).append((found.confidence, hits))
        for kind in KINDS:
            parts = certain.get(kind, certain["raw"])  # at alpha = 1, folded is raw
            confidence, hits = (np.concatenate(part) for part in zip(*parts, strict=True))
            diagrams[f"alpha = {alpha:g}, {kind}"] = reliability(confidence, hits, bins)
    plot_reliability(diagrams, path, dataset, columns=len(KINDS))


if __name__ == "__main__":
    main()
