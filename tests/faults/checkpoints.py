"""Kills a training at every file event, damages every file of its checkpoints, and resumes: nothing may be lost.

    python tests/faults/checkpoints.py            # all of it, with a score; some minutes
    python tests/faults/checkpoints.py --every 9  # a part of the kills

A fault is survived if the same training, resumed with "auto", ends with the bits of the one that was left alone.
"""

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file

from pgt_hf.runs import RunFolder
from pgt_hf.trainer import DiagnosticsCallback, latest_checkpoint
from pgt_hf.trainer.checkpoints import STAGING

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "trainer")]
from kill_at_file_events import kill_at, tear  # noqa: E402
from small import DAMAGE, build  # noqa: E402

STEPS = 8


def train(run: Path) -> None:
    """A training in one folder, as a recipe would start it with ``--resume auto``."""
    record = RunFolder(run, {"arguments": {}, "data": {}, "seed": 0})
    trainer = build(
        run,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=2,
        ema_decay=0.9,
        callbacks=(record, DiagnosticsCallback(interval=2)),
    )
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()
    record.finish(trainer, {})


def weights(run: Path) -> dict[str, torch.Tensor]:
    names = ("model.safetensors", "ema/model.safetensors")
    return {f"{name}:{key}": value for name in names for key, value in load_file(run / name).items()}


def resumes(run: Path, expected: dict[str, torch.Tensor]) -> str:
    """Trains on after a fault; what became of the run."""
    done = kill_at(None, lambda: train(run), run)
    if done.returncode:
        return "lost: " + done.output.strip().splitlines()[-1]
    found = weights(run)
    same = found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    return "survived" if same else "lost: other weights"


def kills(folder: Path, expected: dict[str, torch.Tensor], every: int) -> Iterator[tuple[str, str]]:
    """Kills before each event; and again, with the file that was written last cut short."""
    whole = kill_at(None, lambda: train(folder / "events"), folder / "events")
    for number in range(1, len(whole.events) + 1, every):
        for torn in (False, True):
            run = folder / f"kill-{number}-{torn}"
            kill_at(number, lambda run=run: train(run), run)
            if torn:  # a checkpoint was flushed before it got its name: only one without a name can be torn
                tear(run / STAGING)
            yield f"kill before {whole.events[number - 1]}{', torn' if torn else ''}", resumes(run, expected)
            shutil.rmtree(run, ignore_errors=True)


def damages(folder: Path, expected: dict[str, torch.Tensor], every: int) -> Iterator[tuple[str, str]]:
    """Damages each file of the newest checkpoint in each way."""
    stopped = folder / "stopped"
    kill_at(None, lambda: train(stopped), stopped)
    newest = Path(str(latest_checkpoint(stopped)))
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    for file, name in list(product(files, DAMAGE))[::every]:
        run = Path(shutil.copytree(stopped, folder / "damaged"))
        DAMAGE[name](run / newest.name / file)
        yield f"{file} {name}", resumes(run, expected)
        shutil.rmtree(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="try only every n-th file event")
    every = parser.parse_args().every
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kill_at(None, lambda: train(folder / "whole"), folder / "whole")
        expected = weights(folder / "whole")
        for kind, faults in (("kills", kills(folder, expected, every)), ("damage", damages(folder, expected, every))):
            score: Counter[str] = Counter()
            for fault, result in faults:
                score[result.partition(":")[0]] += 1
                if result != "survived":
                    print(f"  {fault}: {result}", flush=True)
            print(f"{kind}: {score.total()} tried, {score['survived']} survived, {score['lost']} lost", flush=True)


if __name__ == "__main__":
    main()
