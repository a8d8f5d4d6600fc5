"""Trains everything that the study's tables need; started again, it goes on with what is missing.

    python -m studies.run                                   # the small scale, in its order, from the Hub
    python -m studies.run --source FOLDER                   # from a folder
    python -m studies.run --only ladder/bn --seeds 2        # a part of it
    python -m studies.run --scale noise-40 --seeds 3        # a pilot: fine-tuning with wrong labels
    python -m studies.run --scale noise-40 --again          # what looked like a gain, on other seeds
    python -m studies.run --scale fashion                   # another data set
    python -m studies.run --scale large --device cuda       # ResNet-18
    python -m studies.report                                # tables and figures

Each training adds a line to ``results.jsonl``, on one core: for two, start it twice with different ``--only``. A
search is Optuna's (TPE, with a pruner), on images that the tables do not show. Its best two trials get a second seed,
and the better mean is taken. It is rebuilt from the lines of its trials, so it can be stopped at any time.
"""

import json
import logging
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from . import images, language
from .settings import (
    AGAIN_SEEDS,
    HIGH_DECAY,
    SCALE,
    SCALES,
    SEARCH_SEEDS,
    SEEDS,
    SOURCE,
    Row,
    Search,
    Setting,
    TextScale,
    plan,
)
from .train import Stop, Task, never, train

__all__ = ["Lab", "main", "read_rows", "winner"]

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
KEPT = 50.0  # percent of the trials that the pruner lets pass at each epoch,
WARMUP = 1 / 3  # after this share of the epochs
GIVEN_RATE, GIVEN_DECAY = 0.2, 4e-3  # of the networks that pilots start from or learn from
logger = logging.getLogger(__name__)


def main() -> None:
    """The plan of a scale, or what ``--only`` names of it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    args = parse()
    lab = Lab(task_of(args.scale, args), args.results)
    groups: dict[str, list[Row | Search]] = {}
    for item in plan(args.scale):
        if f"{item.group}/{item.setting.alpha:g}/{item.setting.weight_decay:g}".startswith(args.only):
            groups.setdefault(item.group, []).append(item)
    for items in groups.values():
        for seed in (AGAIN_SEEDS if args.again else SEEDS)[: args.seeds]:  # so that all have one before any has two
            for item in items:
                lab.carry_out(item, seed)


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    scales = [name for name in SCALES if name != SOURCE]
    add("--scale", choices=scales, default=SCALE, help="data, network and epochs")
    add("--device", default="cpu", help="cpu or cuda")
    add("--source", help="a folder to read the data set from; by default the Hub's")
    add("--cache", type=Path, default=Path("runs/study"), help="where the decoded images go: one file for each scale")
    add("--results", type=Path, default=RESULTS, help="the file that gets the lines")
    add("--only", default="", help="the beginning of GROUP/ALPHA/DECAY, such as search/sgd/bn/0.3")
    add("--seeds", type=int, default=len(SEEDS), help="trainings of each setting of the tables")
    add("--again", action="store_true", help="train on other seeds than the tables do")
    return parser.parse_args()


def task_of(name: str, args: Namespace) -> Task:
    """The task of a scale; what it needs is prepared, or trained, where it is not there."""
    scale = SCALES[name]
    if isinstance(scale, TextScale):
        return language.Text(scale, language.read(scale, args.device))
    path = args.cache / f"{scale.data}_{name}.npz"
    images.prepare(scale, args.source, path)
    given = scale.start or scale.teacher
    weights = _given(given, args) if given else None
    return images.Images(scale, images.read(path, args.device), weights)


def _given(name: str, args: Namespace) -> dict[str, torch.Tensor]:
    """The weights of a scale's network, trained once with plain cross-entropy."""
    path = args.cache / f"{name}.pt"
    if not path.is_file():
        setting = Setting("tiny-imagenet", "bn", weight_decay=GIVEN_DECAY, scale=name)
        row = train(setting, GIVEN_RATE, SEARCH_SEEDS[0], task_of(name, args), weights=path)
        logger.info("%s: %.2f%%, %.0f s", path, 100 * row["test_top1"], row["seconds"])
    weights: dict[str, torch.Tensor] = torch.load(path, args.device, weights_only=True)
    return weights


def read_rows(results: Path = RESULTS) -> list[dict[str, Any]]:
    """All trainings so far: a setting, its learning rate and seed, and what was measured."""
    if not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True)
class Lab:
    """Where trainings are carried out: their task, and the file with a line for each of them."""

    task: Task
    results: Path

    def carry_out(self, item: Row | Search, seed: int) -> None:
        """One seed of the tables; a search is brought to its end before."""
        if isinstance(item, Row):
            self.fetch(item.setting, item.learning_rate, seed, item.group, "plan")
            return
        setting, learning_rate = self.search(item)
        self.fetch(setting, learning_rate, seed, item.group, item.name)

    def search(self, search: Search) -> tuple[Setting, float]:
        """The setting with the weight decay that was found, and the learning rate."""
        space = {"learning_rate": search.rates, "weight_decay": search.decays}
        distributions = {key: FloatDistribution(*bounds, log=True) for key, bounds in space.items()}
        epochs = SCALES[search.setting.scale].epochs
        while len(done := trials(search, read_rows(self.results))) < search.trials:
            study = optuna.create_study(
                direction="maximize",
                sampler=optuna.samplers.TPESampler(n_startup_trials=8, multivariate=True, seed=len(done)),
                pruner=optuna.pruners.PercentilePruner(KEPT, n_startup_trials=3, n_warmup_steps=int(WARMUP * epochs)),
            )
            for row in done:
                study.add_trial(_as_trial(row, distributions))
            if len(done) < len(search.anchors):
                study.enqueue_trial(dict(zip(space, search.anchors[len(done)], strict=True)))
            trial = study.ask(distributions)
            self.fetch(
                replace(search.setting, weight_decay=trial.params["weight_decay"]),
                trial.params["learning_rate"],
                SEARCH_SEEDS[0],
                search.group,
                search.name,
                _pruner(trial),
            )
        for row in finalists(done):
            self.fetch(Setting.from_row(row), row["learning_rate"], SEARCH_SEEDS[1], search.group, search.name)
        found = winner(search, read_rows(self.results))
        assert found is not None
        return found

    def fetch(
        self, setting: Setting, learning_rate: float, seed: int, group: str, chosen_by: str, stop: Stop = never
    ) -> dict[str, Any]:
        """The line of a training: the one that is there, or a new one."""
        row = setting.as_row() | {"learning_rate": learning_rate, "seed": seed, "group": group, "chosen_by": chosen_by}
        for other in read_rows(self.results):
            if all(other.get(key) == value for key, value in row.items()):
                if other["device"] != self.task.device:
                    raise ValueError(f"{self.results} holds trainings on {other['device']}: give others a --results")
                return other
        high = setting.weight_decay == HIGH_DECAY.get(setting.network) and group.startswith(("ladder", "agc"))
        watched = seed == SEEDS[0] and (high or chosen_by != "plan") and setting.scale == SCALE
        name = f"{setting.scale}_{group.replace('/', '_')}_{setting.alpha:g}.npz"
        watch = self.results.parent / "diagnostics" / name if watched else None
        row |= train(setting, learning_rate, seed, self.task, stop, watch)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        logger.info(
            "%s/%s/%g %slr %.4g wd %.4g seed %d: %s %.2f%%, %.0f s", setting.scale, group, setting.alpha,
            setting.parts or "", learning_rate, setting.weight_decay, seed, row["verdict"] or "",
            100 * row["curve"][-1], row["seconds"],
        )  # fmt: skip
        return row


def trials(search: Search, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a search's trials, in their order; those of its finalists' second seed are not among them."""
    return [row for row in rows if row.get("chosen_by") == search.name and row["seed"] == SEARCH_SEEDS[0]]


def score(row: dict[str, Any]) -> float:
    """What a search maximises: top-1 on its images, or one over the perplexity of its text."""
    return float(row["select_top1"] if "select_top1" in row else row["curve"][-1])


def finalists(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The two best trials that were trained to the end."""
    return sorted((row for row in done if row["verdict"] is None), key=lambda row: -score(row))[:2]


def winner(search: Search, rows: list[dict[str, Any]]) -> tuple[Setting, float] | None:
    """The setting and learning rate that a search has chosen; None before its end."""
    done = trials(search, rows)
    again = {
        (row["learning_rate"], row["weight_decay"]): score(row)
        for row in rows
        if row.get("chosen_by") == search.name and row["seed"] == SEARCH_SEEDS[1]
    }
    pairs = [(row, again.get((row["learning_rate"], row["weight_decay"]))) for row in finalists(done)]
    if len(done) < search.trials or any(second is None for _, second in pairs):
        return None
    best, _ = max(pairs, key=lambda pair: score(pair[0]) + (pair[1] or 0.0))
    return Setting.from_row(best), best["learning_rate"]


def _as_trial(row: dict[str, Any], distributions: dict[str, Any]) -> optuna.trial.FrozenTrial:
    pruned = row["verdict"] == "pruned"
    return optuna.trial.create_trial(
        params={key: row[key] for key in distributions},
        distributions=distributions,
        intermediate_values=dict(enumerate(row["curve"], start=1)),
        value=row["curve"][-1] if pruned else score(row),
        state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
    )


def _pruner(trial: optuna.Trial) -> Stop:
    def stop(epoch: int, score: float) -> bool:
        trial.report(score, epoch)
        return trial.should_prune()

    return stop


if __name__ == "__main__":
    main()
