"""What is the PowerGrad Transform worth on your data? A search over alpha and learning rate, against a fair baseline.

    python recipes/alpha_search.py --dataset-name digits                       # the grid, one worker
    accelerate launch recipes/alpha_search.py --sampler tpe --trials 40        # one worker for each process, or GPU
    python recipes/alpha_search.py --storage postgresql://host/name            # on as many machines as you like
    python recipes/alpha_search.py --storage journal:/shared/search.log        # the same, by a file they all see
    python recipes/alpha_search.py --smoke                                     # a minute, no download

Two studies get the same number of trials: PGT, over alpha and the learning rate, and the baseline (alpha = 1), over
the learning rate alone. A trial is trained once for each of --seeds. The best of each is then trained on
--confirm-seeds new seeds, and only those decide the verdict. Start it again, anywhere, and it goes on: the storage
knows what is done.
"""

import csv
import json
import logging
import os
import random
import socket
import sys
import tempfile
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from sqlalchemy.exc import DBAPIError
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from pgt_hf import ImageTrainer, ImageTrainingArguments
from pgt_hf.analysis import ClassificationMetrics, Point, compare, interval, plot_heat_map
from pgt_hf.images import DIGITS, ImageDataset, ImageTransform, class_names, collate, create_model, load_image_dataset
from pgt_hf.trainer import PAPER_ALPHAS, powergrad_hp_space

SIDES = ("baseline", "pgt")
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
SILENT_SECONDS = 1800  # a worker on another machine that has reported nothing for so long is given up
FIRST_CONFIRM_SEED = 1000
SMOKE: dict[str, Any] = {
    "dataset_name": DIGITS,
    "alphas": [0.1, 0.5],
    "lr_low": 0.05,
    "lr_high": 0.2,
    "lr_points": 1,
    "seeds": 1,
    "confirm_seeds": 2,
    "epochs": 1,
    "max_train_samples": 320,
    "max_eval_samples": 100,
    "image_size": 16,
}
# What the storage remembers of a search: with other values it would be another one.
IDENTITY = (
    "dataset_name",
    "model_name",
    "image_size",
    "min_crop",
    "hflip",
    "epochs",
    "batch_size",
    "max_train_samples",
    "max_eval_samples",
    "sampler",
    "alphas",
    "lr_low",
    "lr_high",
    "lr_points",
    "seeds",
    "pruner",
)


def main() -> None:
    rank = become_worker()
    args = parse()
    quieten()
    try:
        data = load_image_dataset(
            args.dataset_name,
            max_train_samples=args.max_train_samples,
            max_eval_samples=args.max_eval_samples,
        )
        storage = open_storage(args.storage, args.output_dir)
        studies = {side: open_study(storage, side, args) for side in SIDES}
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")

    for side, study in studies.items():
        grid = grid_of(side, args) if args.sampler == "grid" else None
        run(study, args.trials, lambda trial, side=side: search_objective(trial, side, data, args), rank, side, grid)
    points = {
        side: sorted(search_points(study, args.trials), key=lambda p: -p.mean) for side, study in studies.items()
    }
    if not all(points.values()):
        sys.exit("error: no trial was trained to its end; every one failed or was pruned")
    best = {side: points[side][0] for side in SIDES}

    confirm = open_confirmation(storage, best)
    seeds = range(FIRST_CONFIRM_SEED, FIRST_CONFIRM_SEED + args.confirm_seeds)
    grid = [{"side": side, "seed": seed} for seed in seeds for side in SIDES]
    run(confirm, len(grid), lambda trial: confirm_objective(trial, best, data, args), rank, "confirm", grid)
    if rank == 0:
        report(points, confirmed_points(confirm, best), args)


def become_worker() -> int:
    """Makes each process of a launcher a worker of its own, on its own GPU, and returns its number."""
    rank, local = int(os.environ.get("RANK", "0")), os.environ.get("LOCAL_RANK")
    if local is not None:
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[int(local)] if gpus and "," in gpus else gpus or local
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return rank


def parse() -> Namespace:
    class Help(ArgumentDefaultsHelpFormatter):
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return text  # the examples keep their lines

    parser = ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--dataset-name", default=DIGITS, help="Hub id, folder of Parquet files or images, or 'digits'")
    add("--model-name", default="resnet10t", help="a timm model")
    add("--output-dir", default="runs/alpha_search", help="where tables, picture and the default storage go")
    add("--storage", help="any RDB URL, or journal:FILE; by default sqlite in --output-dir")
    add("--sampler", default="grid", choices=["grid", "random", "tpe"], help="how settings are chosen")
    add("--trials", type=int, help="settings per side, for random and tpe; the grid's size is its own")
    add("--alphas", type=float, nargs="+", default=list(PAPER_ALPHAS), help="the grid; its ends bound random and tpe")
    add("--lr-low", type=float, default=0.003, help="lowest learning rate")
    add("--lr-high", type=float, default=1.0, help="highest learning rate")
    add("--lr-points", type=int, default=6, help="learning rates of the grid; the baseline has a finer one")
    add("--seeds", type=int, default=2, help="trainings of each setting in the search")
    add("--confirm-seeds", type=int, default=5, help="trainings of the two best settings, with new seeds")
    add("--pruner", default="median", choices=["median", "none"], help="stop settings that are behind the others")
    add("--epochs", type=float, default=4, help="length of a training")
    add("--batch-size", type=int, default=64, help="images per step")
    add("--image-size", type=int, default=32, help="side of the images in pixels")
    add("--min-crop", type=float, default=0.7, help="smallest random crop, as a share of the image's area")
    add("--hflip", type=float, default=0.0, help="probability of a horizontal flip; 0.5 for photographs")
    add("--max-train-samples", type=int, help="train on so many images only")
    add("--max-eval-samples", type=int, help="evaluate on so many images only")
    add("--smoke", action="store_true", help="a tiny search on digits, to see that everything works")
    early, _ = parser.parse_known_args()
    parser.set_defaults(**(SMOKE if early.smoke else {}))
    args = parser.parse_args()
    if args.sampler == "grid":
        args.trials = len(args.alphas) * args.lr_points
    elif args.trials is None:
        parser.error(f"--sampler {args.sampler} needs --trials")
    if not all(0 <= alpha < 1 for alpha in args.alphas):
        parser.error(f"--alphas must lie in [0, 1); 1 is the baseline's, got {args.alphas}")
    if args.confirm_seeds < 2:
        parser.error(f"--confirm-seeds must be at least 2, for an interval, got {args.confirm_seeds}")
    if min(args.trials, args.seeds, args.lr_points) < 1:
        parser.error("--trials, --seeds and --lr-points must be at least 1")
    return args


def quieten() -> None:
    """One progress bar says what happens; hundreds of short trainings need not."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("pgt_hf").setLevel(logging.ERROR)


# --- storage and studies


def open_storage(name: str | None, output_dir: str) -> Any:
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    if name and name.startswith("journal:"):
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        return JournalStorage(JournalFileBackend(name.removeprefix("journal:")))
    url = name or f"sqlite:///{Path(output_dir, 'search.db').resolve()}"
    for attempt in range(10):
        try:
            return optuna.storages.RDBStorage(url)
        except DBAPIError:  # another worker is making the very same tables
            if attempt == 9:
                raise
            time.sleep(1)


def open_study(storage: Any, side: str, args: Namespace) -> optuna.Study:
    # No seeds: workers, and a search that goes on, must not draw the same settings again.
    tpe = optuna.samplers.TPESampler(multivariate=True, constant_liar=True)
    sampler = tpe if args.sampler == "tpe" else optuna.samplers.RandomSampler()
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5) if args.pruner == "median" else optuna.pruners.NopPruner()
    study = optuna.create_study(
        storage=storage,
        study_name=f"alpha_search/{side}",
        sampler=sampler,
        pruner=pruner,
        direction="maximize",
        load_if_exists=True,
    )
    wanted = {key: getattr(args, key) for key in IDENTITY}
    found = study.user_attrs.get("search", wanted)
    if changed := [key for key in IDENTITY if found.get(key) != wanted[key]]:
        was = ", ".join(f"{key}={found.get(key)!r}" for key in changed)
        raise ValueError(f"the storage holds another search, with {was}; give another --output-dir or --storage")
    study.set_user_attr("search", wanted)
    return study


def grid_of(side: str, args: Namespace) -> list[dict[str, float]]:
    """As many settings for the baseline, in learning rates alone, as for PGT in learning rates and alphas."""
    count = args.lr_points if side == "pgt" else args.trials
    ratio = args.lr_high / args.lr_low
    rates = [min(args.lr_high, args.lr_low * ratio ** (i / max(1, count - 1))) for i in range(count)]
    alphas = args.alphas if side == "pgt" else [1.0]
    return [{"alpha": alpha, "learning_rate": rate} for rate in rates for alpha in alphas]


def open_confirmation(storage: Any, best: dict[str, Point]) -> optuna.Study:
    chosen = " ".join(f"{best[side].alpha:.6g},{best[side].learning_rate:.6g}" for side in SIDES)
    name = f"alpha_search/confirm {chosen}"
    return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)


def run(study: optuna.Study, budget: int, objective: Any, rank: int, name: str, grid: Any = None) -> None:
    """Trains until ``budget`` trials are done, by this worker and the others, and waits for the others' last ones.

    With a ``grid``, each trial is one of its settings that is neither done nor being trained.
    """
    sampler = study.sampler
    with tqdm(total=budget, desc=name, disable=rank > 0) as bar:
        while True:
            trials = study.get_trials(deepcopy=False)
            done = [trial.params for trial in trials if trial.state in FINISHED]
            running = [t.params for t in trials if t.state == TrialState.RUNNING and not give_up(study, t)]
            if grid is not None:
                done = [setting for setting in grid if setting in done]
            bar.update(len(done) - bar.n)
            if len(done) >= budget:
                return
            if len(done) + len(running) >= budget:
                time.sleep(1)
                continue
            if grid is not None:
                left = [setting for setting in grid if setting not in done and setting not in running]
                study.sampler = optuna.samplers.PartialFixedSampler(random.choice(left), sampler)
            study.optimize(objective, n_trials=1)


def give_up(study: optuna.Study, trial: Any) -> bool:
    """Whether the worker of a running trial is dead; the trial has failed then, and its setting is free again."""
    host, _, pid = trial.user_attrs.get("worker", "").rpartition(":")
    heard = trial.user_attrs.get("heard", trial.datetime_start.timestamp())
    here = host == socket.gethostname()
    dead = (here and not alive(int(pid))) or time.time() - heard > SILENT_SECONDS
    if dead:
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    return dead


def alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # between two trials of this worker: the number was another process's before
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


# --- a training


def search_objective(trial: Any, side: str, data: Any, args: Namespace) -> float:
    alphas = (min(args.alphas), max(args.alphas)) if side == "pgt" else (1.0, 1.0)
    setting = powergrad_hp_space((args.lr_low, args.lr_high), alphas)(trial)
    return train_seeds(trial, setting, range(args.seeds), data, args, prune=True)


def confirm_objective(trial: Any, best: dict[str, Point], data: Any, args: Namespace) -> float:
    point = best[trial.suggest_categorical("side", SIDES)]
    seed = trial.suggest_int("seed", FIRST_CONFIRM_SEED, FIRST_CONFIRM_SEED + args.confirm_seeds - 1)
    setting = {"alpha": point.alpha, "learning_rate": point.learning_rate}
    return train_seeds(trial, setting, [seed], data, args, prune=False)


def train_seeds(trial: Any, setting: dict[str, float], seeds: Any, data: Any, args: Namespace, prune: bool) -> float:
    trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
    watch = Watch(trial, prune)
    scores = []
    for seed in seeds:
        scores.append(train(setting, seed, data, args, watch))
        trial.set_user_attr("scores", scores)
    return sum(scores) / len(scores)


def train(setting: dict[str, float], seed: int, data: Any, args: Namespace, watch: TrainerCallback) -> float:
    """Top-1 after a training with this seed: initialisation, order and augmentation."""
    set_seed(seed)
    model = create_model(args.model_name, class_names(data["validation"]), image_size=args.image_size)
    config = model.config.pretrained_cfg
    augment = ImageTransform(
        config, training=True, normalize=False, scale=(args.min_crop, 1.0), hflip=args.hflip, color_jitter=0.0
    )
    plain = ImageTransform(config, training=False, normalize=False)
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
                max_grad_norm=0.0,
                num_train_epochs=args.epochs,
                per_device_train_batch_size=args.batch_size,
                per_device_eval_batch_size=256,
                eval_strategy="epoch",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_drop_last=True,
                dataloader_pin_memory=False,
                logging_strategy="no",
                seed=seed,
            ),
            train_dataset=ImageDataset(data["train"], augment, seed=seed),
            eval_dataset=ImageDataset(data["validation"], plain),
            data_collator=collate,
            compute_metrics=metrics,
            preprocess_logits_for_metrics=metrics.preprocess,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return next(entry["eval_top1"] for entry in reversed(trainer.state.log_history) if "eval_top1" in entry)


class Watch(TrainerCallback):
    """Tells the storage how a trial is doing, seed after seed, and ends it where it is behind the others."""

    def __init__(self, trial: Any, prune: bool) -> None:
        self.trial = trial
        self.prune = prune
        self.evaluations = 0

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.trial.set_user_attr("heard", time.time())
        self.trial.report(metrics["eval_top1"], self.evaluations)
        self.evaluations += 1
        if self.prune and self.trial.should_prune():
            raise optuna.TrialPruned


# --- the report


def search_points(study: optuna.Study, budget: int) -> list[Point]:
    """The settings that were trained to the end, of the first ``budget`` different ones: no side gets more."""
    finished: dict[tuple[float, float], Any] = {}
    for trial in study.get_trials(deepcopy=False):
        if trial.state in FINISHED:
            finished.setdefault((trial.params["alpha"], trial.params["learning_rate"]), trial)
    return [
        Point(*setting, tuple(trial.user_attrs["scores"]))
        for setting, trial in list(finished.items())[:budget]
        if trial.state == TrialState.COMPLETE
    ]


def confirmed_points(study: optuna.Study, best: dict[str, Point]) -> dict[str, Point]:
    done = {side: {} for side in SIDES}
    for trial in study.get_trials(deepcopy=False):
        if trial.state == TrialState.COMPLETE:
            done[trial.params["side"]][trial.params["seed"]] = trial.value
    shared = sorted(set.intersection(*(set(scores) for scores in done.values())))
    return {
        side: Point(best[side].alpha, best[side].learning_rate, tuple(done[side][seed] for seed in shared))
        for side in SIDES
    }


def report(points: dict[str, list[Point]], confirmed: dict[str, Point], args: Namespace) -> None:
    folder = Path(args.output_dir)
    columns = ["phase", "side", "alpha", "learning_rate", "seeds", "top1_mean", "top1_half_width_95"]
    rows = [row("confirm", side, confirmed[side]) for side in SIDES]
    rows += [row("search", side, point) for side in SIDES for point in points[side]]
    with open(folder / "results.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    table = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    table += ["| " + " | ".join(str(cell) for cell in cells) + " |" for cells in rows]
    verdict = str(compare(confirmed["pgt"].scores, confirmed["baseline"].scores))
    pruned = {side: args.trials - len(points[side]) for side in SIDES}
    told = f"{args.trials} trials a side ({args.sampler}), of which pruned: {json.dumps(pruned)}; seeds: {args.seeds}"
    (folder / "results.md").write_text("\n".join([verdict, "", told, "", *table, ""]), encoding="utf-8")
    title = f"{args.model_name} on {Path(args.dataset_name).name}, {args.epochs:g} epochs, {args.seeds} seed(s)"
    plot_heat_map([*points["baseline"], *points["pgt"]], folder / "heat_map.png", title)
    print("\n".join(["", *table[: 2 + len(SIDES)], "", verdict, "", told]))
    print(f"Written to {folder}: results.md, results.csv, heat_map.png")


def row(phase: str, side: str, point: Point) -> list[Any]:
    mean, half = interval(point.scores)
    return [
        phase,
        side,
        f"{point.alpha:.4g}",
        f"{point.learning_rate:.4g}",
        len(point.scores),
        f"{mean:.4f}",
        f"{half:.4f}" if len(point.scores) > 1 else "-",
    ]


if __name__ == "__main__":
    main()
