"""Every benchmark in small: what is measured by hand now and then must still run."""

import importlib

import pytest
from launch import ROOT, as_program

REHEARSALS = [
    "large_vocabulary --tokens 16 --features 8 --rounds 1",
    "loss --rounds 1",
    "startup --rounds 1 --only torch",
    "step --steps 30",
    "training --model test_resnet --sizes 32 --batch 4 --steps 1 --rounds 1",
    "input_pipeline --images 8 --batch-size 4 --rounds 1 --sizes 32 --prepared 48 --jitter 0 --sides timm",
    "input_pipeline --images 8 --batch-size 4 --rounds 1 --sizes 32 --rows 100",
]
ELSEWHERE = {"gpu", "page"}  # with tests of their own
PARTS = {"__init__", "__main__", "images", "peers"}


def test_every_benchmark_is_rehearsed():
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} == {*map(_name, REHEARSALS), *ELSEWHERE, *PARTS}


@pytest.mark.slow
@pytest.mark.parametrize("command", REHEARSALS)
def test_rehearsal_prints_its_tables(command, monkeypatch, capsys):
    name = _name(command)
    benchmark = importlib.import_module(f"benchmarks.{name}")
    if name == "loss":
        monkeypatch.setattr(benchmark, "SHAPES", [(8, 10)])
    if name == "large_vocabulary":
        monkeypatch.setattr(benchmark, "VOCABULARIES", (300,))
    if name == "step":
        monkeypatch.setattr(benchmark, "NETWORKS", {"one block": benchmark.smallest})
    with as_program(*command.split()):
        benchmark.main()
    blocks = capsys.readouterr().out.split("\n\n")
    tables = [[line for line in block.splitlines() if line.startswith("|")] for block in blocks if "\n|---" in block]
    assert len(tables) == (2 if name == "step" else 1)
    for table in tables:
        assert len(table) > 2 and table[1].startswith("|---")
        assert len({line.count("|") for line in table}) == 1 and not any("nan" in line for line in table)


def _name(command: str) -> str:
    return command.split()[0]
