"""Trains everything that the study's tables need; started again, it goes on with what is missing.

    python -m studies.run                                                    # from the Hub
    python -m studies.run --tiny-imagenet FOLDER --fashion-mnist FOLDER      # from folders
    python -m studies.run --only tiny-imagenet/bn --seeds 3                  # a part of it
    python -m studies.report                                                 # tables and figures

Each training adds a line to ``results.jsonl``. A learning rate is searched on images that the tables do not show:
three neighbours, a factor 2 apart, and on from the better end until the best has a worse one on either side; the best
two are trained with a second seed, and the better mean is taken.
"""

import json
import logging
import os
import sys
from argparse import ArgumentParser, Namespace
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .images import CLASSES, Split, prepare, read
from .settings import PLAN, RATIO, SEARCH_SEEDS, SEEDS, Job, Setting
from .train import train

__all__ = ["carry_out", "main", "read_rows"]

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
LONGEST_SEARCH = 9


def main() -> None:
    """The whole plan, or what ``--only`` names of it."""
    args = parse()
    for data in CLASSES:
        prepare(data, getattr(args, data.replace("-", "_")), args.cache)
    jobs = [job for job in PLAN if f"{job.setting.data}/{job.setting.network}".startswith(args.only)]
    failed = 0
    with ProcessPoolExecutor(args.workers, initializer=begin) as pool:
        waiting = [pool.submit(carry_out, job, args.seeds, args.cache, RESULTS) for job in jobs]
        for job, done in tqdm(list(zip(jobs, waiting, strict=True)), desc="settings"):
            try:
                done.result()
            except Exception:  # the others go on; started again, this one is tried again
                logging.exception("failed: %s", job.setting)
                failed += 1
    if failed:
        sys.exit(f"error: {failed} of {len(jobs)} settings failed, see above")


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tiny-imagenet", help="a folder that load_dataset reads; by default the Hub's")
    add("--fashion-mnist", help="the same, or a folder with the four *-ubyte.gz; by default the Hub's")
    add("--cache", type=Path, default=Path("runs/study"), help="where the decoded images go")
    add("--only", default="", help="the beginning of data/network, such as tiny-imagenet/bn")
    add("--seeds", type=int, default=len(SEEDS), help="trainings of each setting after the search")
    add("--workers", type=int, default=os.cpu_count(), help="trainings at a time, one thread each")
    return parser.parse_args()


def begin() -> None:
    torch.set_num_threads(1)
    logging.getLogger("pgt_hf").setLevel(logging.CRITICAL)  # what diverges in a search is noted in its row


def carry_out(job: Job, seeds: int, cache: Path, results: Path) -> None:
    """Searches the learning rate, then trains the setting, and its followers on three seeds at most."""
    rate = search(job, cache, results)
    for seed in SEEDS[:seeds]:
        fetch(job.setting, rate, seed, cache, results)
    for (setting, factor), seed in product(job.followers, SEEDS[: min(seeds, 3)]):
        fetch(setting, rate * factor, seed, cache, results)


def search(job: Job, cache: Path, results: Path) -> float:
    """The best learning rate: by the first seed, and between its best two by the second as well."""

    def score(rate: float, seed: int) -> float:
        return fetch(job.setting, rate, seed, cache, results)["select_top1"]

    first, second = SEARCH_SEEDS
    scores = {rate: score(rate, first) for rate in (job.start / RATIO, job.start, job.start * RATIO)}
    while len(scores) < LONGEST_SEARCH:
        best, lowest, highest = max(scores, key=lambda rate: scores[rate]), min(scores), max(scores)
        if lowest < best < highest:
            break
        further = lowest / RATIO if best == lowest else highest * RATIO
        scores[further] = score(further, first)
    finalists = sorted(scores, key=lambda rate: -scores[rate])[:2]
    return max(finalists, key=lambda rate: scores[rate] + score(rate, second))


def fetch(setting: Setting, rate: float, seed: int, cache: Path, results: Path) -> dict[str, Any]:
    """The row of a training: the one that is there, or a new one."""
    for row in read_rows(results):
        if (Setting.from_row(row), row["learning_rate"], row["seed"]) == (setting, rate, seed):
            return row
    watched = setting == Setting(setting.data, "norm-free", setting.alpha) and seed == SEEDS[0]
    name = f"{setting.data}_{setting.network}_{setting.alpha:g}.npz"
    watch = results.parent / "diagnostics" / name if watched else None
    row = setting.as_row() | {"learning_rate": rate, "seed": seed}
    row |= train(setting, rate, seed, _splits(setting.data, cache), watch)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def read_rows(results: Path = RESULTS) -> list[dict[str, Any]]:
    """All trainings so far: a setting, its learning rate and seed, and what was measured."""
    if not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


@lru_cache(maxsize=2)
def _splits(data: str, cache: Path) -> dict[str, Split]:
    return read(data, cache)


if __name__ == "__main__":
    main()
