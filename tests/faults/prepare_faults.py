"""``recipes/prepare.py`` under every fault: kills at each file event, and damage to each file that it left unfinished.

    python tests/faults/prepare_faults.py              # all of it, minutes; prints: tried, survived, lost
    python tests/faults/prepare_faults.py --every 20   # each twentieth case

After each fault the same command is started again. It must end well, with the bytes of a run without a fault.
"""

import argparse
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.extend([str(Path(__file__).parent), str(Path(__file__).parents[1])])
from kill_at_file_events import kill_at, tear
from launch import ROOT, load_recipe

PREPARE = ROOT / "recipes" / "prepare.py"
OUTPUT = "out"  # every case runs in a folder of its own, with the same arguments


def write_source(folder: Path) -> None:
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as Pictures

    features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
    folder.mkdir()
    for split, count in (("train", 10), ("validation", 3)):
        rng, files = np.random.default_rng(count), []
        for number in range(count):
            file = io.BytesIO()
            Pictures.fromarray(rng.integers(256, size=(12, 9 + number, 3), dtype=np.uint8)).save(file, "JPEG")
            files.append({"bytes": file.getvalue(), "path": f"{number}.jpg"})
        rows = {"image": files, "label": [number % 2 for number in range(count)]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def program(module: Any, source: Path, folder: Path, processes: int = 1) -> Callable[[], None]:
    words = ["--dataset-name", str(source), "--output-dir", OUTPUT, "--size", "8", "--images-per-shard", "3"]

    def call() -> None:
        os.chdir(folder)
        sys.argv = [str(PREPARE), *words, "--num-proc", str(processes)]
        module.main()

    return call


def damages(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    content = path.read_bytes()
    half = len(content) // 2
    yield "deleted", path.unlink
    for what, damaged in (("emptied", b""), ("cut", content[:half]), ("zeroed", bytes(len(content)))):
        yield what, partial(path.write_bytes, damaged)
    yield "half zeroed", partial(path.write_bytes, content[:half] + bytes(len(content) - half))
    yield "longer", partial(path.write_bytes, content + b"?")
    for place in (0, len(content) // 3, half, 2 * len(content) // 3, len(content) - 1):
        if content:
            flipped = bytes([content[place] ^ 1])
            yield f"bit {place} flipped", partial(path.write_bytes, content[:place] + flipped + content[place + 1 :])


def cases(module: Any, source: Path, folder: Path) -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """What each fault is called, and a function that brings a folder into the state that it leaves."""

    def kill(number: int, processes: int, torn: bool, again: int | None, case: Path) -> None:
        run = program(module, source, case, processes)
        assert kill_at(number, run, case).returncode in (-9, 0)
        if torn and (case / f"{OUTPUT}.incomplete").exists():
            tear(case / f"{OUTPUT}.incomplete")
        if again:
            kill_at(again, run, case)

    for processes in (1, 2):
        whole = kill_at(None, program(module, source, folder / f"whole-{processes}", processes), folder)
        assert whole.returncode == 0, whole.output
        for number, event in enumerate(whole.events, 1):
            name = f"{processes} process(es), killed before event {number}, {event}"
            yield name, partial(kill, number, processes, False, None)
            yield f"{name}, torn", partial(kill, number, processes, True, None)
            if processes == 1:
                for again in (3, 8):
                    yield f"{name}, then before event {again}", partial(kill, number, 1, False, again)

    events = kill_at(None, program(module, source, folder / "count"), folder / "count").events
    last = next(
        n for n, event in enumerate(events, 1) if event.startswith("os.rename") and event.endswith(f" {OUTPUT}")
    )
    unfinished = folder / "unfinished"
    unfinished.mkdir()
    assert kill_at(last, program(module, source, unfinished), unfinished).returncode == -9
    for path in sorted((unfinished / f"{OUTPUT}.incomplete").iterdir()):
        for what, _ in damages(path):

            def damage(case: Path, name: str = path.name, what: str = what) -> None:
                shutil.copytree(unfinished, case, dirs_exist_ok=True)
                dict(damages(case / f"{OUTPUT}.incomplete" / name))[what]()

            yield f"{path.name} {what}", damage


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def campaign(every: int) -> tuple[int, list[str]]:
    """How many faults were tried, and what was wrong after those that were not survived."""
    module, tried, lost = load_recipe("prepare"), 0, []
    with tempfile.TemporaryDirectory() as own:
        folder, source = Path(own), Path(own, "source")
        write_source(source)
        for name in ("reference", "whole-1", "whole-2", "count"):
            (folder / name).mkdir()
        assert kill_at(None, program(module, source, folder / "reference"), folder).returncode == 0
        right = contents(folder / "reference" / OUTPUT)
        for number, (name, fault) in enumerate(cases(module, source, folder)):
            if number % every:
                continue
            case = folder / "case"
            case.mkdir()
            fault(case)
            done = kill_at(None, program(module, source, case), case)
            left = sorted(path.name for path in case.iterdir())
            if done.returncode != 0 or left != [OUTPUT] or contents(case / OUTPUT) != right:
                lost.append(f"{name}: exit {done.returncode}, left {left}: {done.output.strip().splitlines()[-1:]}")
            tried += 1
            shutil.rmtree(case)
    return tried, lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="try each n-th case only")
    tried, lost = campaign(parser.parse_args().every)
    print("\n".join(lost))
    print(f"prepare.py: {tried} faults tried, {tried - len(lost)} survived, {len(lost)} lost")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
