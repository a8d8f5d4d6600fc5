"""What is the PowerGrad Transform worth on your data? A search over alpha and learning rate, against a fair baseline.

    python recipes/alpha_search.py --dataset-name digits                       # the grid, one worker
    accelerate launch recipes/alpha_search.py --sampler tpe --trials 40        # one worker for each process, or GPU
    python recipes/alpha_search.py --storage postgresql://user@host/name       # on as many machines as you like
    python recipes/alpha_search.py --storage journal:/shared/search.log        # the same, by a file they all see
    python recipes/alpha_search.py --smoke                                     # a minute, no download

Two studies get the same number of trials: PGT, over alpha and the learning rate, and the baseline (alpha = 1), over
the learning rate alone. A trial is trained once for each of --seeds. The best of each is then trained on
--confirm-seeds new seeds, and only those decide the verdict. Start it again, anywhere, and it goes on.
"""

import csv
import json
import logging
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import optuna
from transformers import PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging

from pgt_hf import ImageTrainer, ImageTrainingArguments
from pgt_hf.analysis import ClassificationMetrics, Point, plot_heat_map, verdict
from pgt_hf.images import DIGITS, ImageDataArguments, TimmModel, class_names, collate, create_model
from pgt_hf.limits import Count, Epochs, Folder, Needs, Number, OneOf, Rate, Whole
from pgt_hf.programs import IMAGE_DEFAULTS, errors_in_one_line, parse, refuse_large_batch, refuse_other_run
from pgt_hf.runs import describe_data
from pgt_hf.trainer import (
    PAPER_ALPHAS,
    ReportToStudy,
    StopOnSigterm,
    Storage,
    become_worker,
    completed_points,
    open_storage,
    open_study,
    paired_points,
    powergrad_hp_space,
    run_trials,
)

SIDES = ("baseline", "pgt")
FIRST_CONFIRM_SEED = 1000
DEFAULTS = {"dataset_name": DIGITS, "image_size": 32, "min_crop": 0.7, "hflip": 0.0, "color_jitter": 0.0}
QUIET = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "dataloader_num_workers": 0}
Several = Annotated[int, Whole("[1, 10000]")]
SAMPLERS, PRUNERS = ("grid", "random", "tpe"), ("median", "none")
SMOKE: dict[str, Any] = {
    "dataset_name": DIGITS, "alphas": [0.1, 0.5], "lr_low": 0.05, "lr_high": 0.2, "lr_points": 1, "seeds": 1,
    "confirm_seeds": 2, "epochs": 1, "max_train_samples": 320, "max_eval_samples": 100, "image_size": 16,
}  # fmt: skip
# What the storage remembers of a search: with other values it would be another one.
IDENTITY = (
    "dataset_name", "dataset_config", "image_column", "label_column", "max_train_samples", "max_eval_samples",
    "model_name", "image_size", "min_crop", "hflip", "color_jitter", "auto_augment", "epochs", "batch_size",
    "sampler", "alphas", "lr_low", "lr_high", "lr_points", "seeds", "pruner",
)  # fmt: skip


@dataclass
class SearchArguments(ImageDataArguments):
    model_name: TimmModel = field(default="resnet10t", metadata={"help": "A timm model."})
    output_dir: Folder = field(default="runs/alpha_search", metadata={"help": "Tables, picture, the default storage."})
    storage: Annotated[str | None, Storage()] = field(
        default=None, metadata={"help": "Any RDB URL, or journal:FILE; else sqlite here."}
    )
    sampler: Annotated[str, OneOf(SAMPLERS)] = field(default="grid", metadata={"help": "grid, random or tpe."})
    trials: Annotated[Several | None, Needs("sampler", ("random", "tpe"))] = field(
        default=None, metadata={"help": "Settings per side, for random and tpe."}
    )
    alphas: list[Annotated[float, Number("[0, 1)")]] = field(
        default_factory=lambda: list(PAPER_ALPHAS), metadata={"help": "The grid; its ends bound random and tpe."}
    )
    lr_low: Rate = field(default=0.003, metadata={"help": "Lowest learning rate."})
    lr_high: Rate = field(default=1.0, metadata={"help": "Highest learning rate."})
    lr_points: Annotated[Several, Needs("sampler", ("grid",))] = field(
        default=6, metadata={"help": "Learning rates of the grid; the baseline has a finer one."}
    )
    seeds: Several = field(default=2, metadata={"help": "Trainings of each setting in the search."})
    confirm_seeds: Annotated[int, Whole("[2, 10000]")] = field(default=5, metadata={"help": "New seeds for the best."})
    pruner: Annotated[str, OneOf(PRUNERS)] = field(default="none", metadata={"help": "Or 'median'; see the docs."})
    epochs: Epochs = field(default=4, metadata={"help": "Length of a training."})
    batch_size: Count = field(default=64, metadata={"help": "Images per step."})
    smoke: bool = field(default=False, metadata={"help": "A tiny search on digits, to see that everything works."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler == "grid":
            self.trials = len(self.alphas) * self.lr_points
        if self.trials is None:
            raise ValueError(f"trials must be given with --sampler {self.sampler}, got none")
        if self.lr_high <= self.lr_low:
            raise ValueError(f"lr_high must be above lr_low, {self.lr_low}, got {self.lr_high}")


def main() -> None:
    StopOnSigterm().listen()
    rank, args = become_worker(), parse(SearchArguments, description=__doc__, defaults=DEFAULTS, smoke=SMOKE)[0]
    quieten()
    with errors_in_one_line():
        refuse_other_run(args.output_dir)
        data = args.load()
        refuse_large_batch("batch_size", args.batch_size, len(data["train"]))
        create_model(args.model_name, class_names(data["validation"]), image_size=args.image_size)
        storage = open_storage(args.storage, args.output_dir)
        studies = {side: open_side(storage, side, data, args) for side in SIDES}
    try:
        search(storage, studies, data, args, rank)
    except ConnectionError as error:
        sys.exit(f"error: {error}; start the search again once it can, and it goes on")


def search(storage: Any, studies: dict[str, optuna.Study], data: Any, args: SearchArguments, rank: int) -> None:
    points: dict[str, list[Point]] = {}
    for side, study in studies.items():
        grid = grid_of(side, args) if args.sampler == "grid" else None
        run_trials(study, args.trials, partial(search_objective, side=side, data=data, args=args), rank, side, grid)
        points[side] = sorted(completed_points(study, args.trials, grid), key=lambda point: -point.mean)
    if not all(points.values()):
        sys.exit("error: no trial was trained to its end; every one was pruned")
    best = {side: points[side][0] for side in SIDES}

    confirm = open_confirmation(storage, best)
    seeds = range(FIRST_CONFIRM_SEED, FIRST_CONFIRM_SEED + args.confirm_seeds)
    grid = [{"side": side, "seed": seed} for seed in seeds for side in SIDES]
    run_trials(confirm, len(grid), partial(confirm_objective, best=best, data=data, args=args), rank, "confirm", grid)
    if rank == 0:
        report(points, paired_points(confirm, best, seeds), data["validation"]["label"], args)


def quieten() -> None:
    """One progress bar says what happens; hundreds of short trainings need not."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("pgt_hf").setLevel(logging.ERROR)
    logging.getLogger("pgt_hf.search").setLevel(logging.WARNING)


def open_side(storage: Any, side: str, data: Any, args: SearchArguments) -> optuna.Study:
    # No seeds: workers, and a search that goes on, must not draw the same settings again.
    tpe = optuna.samplers.TPESampler(multivariate=True, constant_liar=True)
    sampler = tpe if args.sampler == "tpe" else optuna.samplers.RandomSampler()
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5) if args.pruner == "median" else optuna.pruners.NopPruner()
    identity = {key: getattr(args, key) for key in IDENTITY} | {"data": describe_data(args.dataset_name, data)}
    return open_study(storage, f"alpha_search/{side}", sampler, pruner, identity)


def grid_of(side: str, args: SearchArguments) -> list[dict[str, float]]:
    """As many settings for the baseline, in learning rates alone, as for PGT in learning rates and alphas."""
    count = args.lr_points if side == "pgt" else args.trials
    ratio = args.lr_high / args.lr_low
    rates = [min(args.lr_high, args.lr_low * ratio ** (i / max(1, count - 1))) for i in range(count)]
    alphas = args.alphas if side == "pgt" else [1.0]
    return [{"alpha": alpha, "learning_rate": rate} for rate in rates for alpha in alphas]


def open_confirmation(storage: Any, best: dict[str, Point]) -> optuna.Study:
    chosen = [f"{best[side].alpha:.6g},{best[side].learning_rate:.6g}" for side in SIDES]
    name = " ".join(["alpha_search/confirm", *chosen])
    return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)


def search_objective(trial: Any, side: str, data: Any, args: SearchArguments) -> float:
    alphas = (min(args.alphas), max(args.alphas)) if side == "pgt" else (1.0, 1.0)
    setting = powergrad_hp_space((args.lr_low, args.lr_high), alphas)(trial)
    return train_seeds(trial, setting, range(args.seeds), data, args, prune=True)


def confirm_objective(trial: Any, best: dict[str, Point], data: Any, args: SearchArguments) -> float:
    point = best[trial.suggest_categorical("side", SIDES)]
    seed = trial.suggest_int("seed", FIRST_CONFIRM_SEED, FIRST_CONFIRM_SEED + args.confirm_seeds - 1)
    chosen = {"alpha": point.alpha, "learning_rate": point.learning_rate}
    return train_seeds(trial, chosen, [seed], data, args, prune=False)


def train_seeds(trial: Any, setting: Any, seeds: Any, data: Any, args: SearchArguments, prune: bool) -> float:
    scores: list[float] = []
    with ReportToStudy(trial, prune) as watch:
        for seed in seeds:
            scores.append(train(setting, seed, data, args, watch))
            trial.set_user_attr("scores", scores)
    return sum(scores) / len(scores)


def train(setting: dict[str, float], seed: int, data: Any, args: SearchArguments, watch: Any) -> float:
    """Top-1 after a training with this seed: initialisation, order and augmentation."""
    set_seed(seed)
    model = create_model(args.model_name, class_names(data["validation"]), image_size=args.image_size)
    images, held_out = args.datasets(data, model.config.pretrained_cfg, seed)
    metrics = ClassificationMetrics()
    with tempfile.TemporaryDirectory() as folder:
        trainer = ImageTrainer(
            model,
            ImageTrainingArguments(
                folder,
                **setting,
                optim="powergrad_sgd",
                optim_args="momentum=0.9,nesterov=true",
                weight_decay=5e-4,
                schedule="cosine",
                warmup_epochs=args.epochs / 10,
                num_train_epochs=args.epochs,
                per_device_train_batch_size=args.batch_size,
                per_device_eval_batch_size=256,
                **IMAGE_DEFAULTS | QUIET,
                seed=seed,
            ),
            train_dataset=images,
            eval_dataset=held_out,
            data_collator=collate,
            compute_metrics=metrics,
            preprocess_logits_for_metrics=metrics.preprocess,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return next(entry["eval_top1"] for entry in reversed(trainer.state.log_history) if "eval_top1" in entry)


def report(points: dict[str, list[Point]], confirmed: dict[str, Point], labels: Any, args: SearchArguments) -> None:
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    columns = ["phase", "side", "alpha", "learning_rate", "seeds", "top1_mean", "top1_half_width_95"]
    rows = [["confirm", side, *confirmed[side].cells()] for side in SIDES]
    rows += [["search", side, *point.cells()] for side in SIDES for point in points[side]]
    with open(folder / "results.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    table = ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]
    sentences = verdict(confirmed, (args.lr_low, args.lr_high), labels[:])
    pruned = {side: args.trials - len(points[side]) for side in SIDES}
    told = f"{args.trials} trials a side ({args.sampler}), of which pruned: {json.dumps(pruned)}; seeds: {args.seeds}"
    (folder / "results.md").write_text("\n".join([*sentences, "", told, "", *table, ""]), encoding="utf-8")
    title = f"{args.model_name} on {Path(args.dataset_name).name}, {args.epochs:g} epochs, {args.seeds} seed(s)"
    plot_heat_map([*points["baseline"], *points["pgt"]], folder / "heat_map.png", title)
    written = f"Written to {folder}: results.md, results.csv, heat_map.png"
    print("\n".join(["", *table[: 2 + len(SIDES)], "", *sentences, "", told, written]))


if __name__ == "__main__":
    main()
