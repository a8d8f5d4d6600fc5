"""How programs read their arguments, end with an error, and say what they did."""

import ast
import json
import sys
from dataclasses import dataclass, field
from typing import Annotated

import pytest
from launch import ROOT, as_program

from pgt_hf import ImageTrainingArguments
from pgt_hf.atomic import WriteError
from pgt_hf.images import BadImageError
from pgt_hf.limits import Count, Needs, Share, WritableFolder, WrongRunError
from pgt_hf.programs import RunArguments, errors_in_one_line, parse, tell


@dataclass
class Numbers:
    size: Count = 4
    shares: list[Share] = field(default_factory=lambda: [0.5])
    name: str | None = None
    far_end: Annotated[Count | None, Needs("name", ("b",))] = None
    folder: Annotated[str, WritableFolder()] = "."


@pytest.fixture(autouse=True)
def program():
    """``parse`` changes what holds for the whole process; the tests after this file start as without it."""
    with as_program("program.py"):
        yield


def read(monkeypatch, *words, **options):
    monkeypatch.setattr(sys, "argv", ["program.py", *words])
    return parse(Numbers, RunArguments, description="A program.", **{"defaults": {}} | options)


def test_flags_win_over_smoke_and_smoke_over_defaults(monkeypatch):
    options = {"defaults": {"size": 8, "name": "a"}, "smoke": {"size": 2, "name": "b"}}
    assert read(monkeypatch, **options)[0] == Numbers(8, [0.5], "a")
    assert read(monkeypatch, "--smoke", **options)[0] == Numbers(2, [0.5], "b")
    numbers, run, config = read(monkeypatch, "--smoke", "--size", "3", "--shares", "0.1", "0.2", **options)
    assert numbers == Numbers(3, [0.1, 0.2], "b") and run.smoke
    assert config == {
        "size": 3,
        "shares": [0.1, 0.2],
        "name": "b",
        "smoke": True,
        "far_end": None,
        "folder": ".",
    }  # --resume belongs to one run


def test_defaults_may_depend_on_what_was_asked_first(monkeypatch):
    def defaults(early):
        return {"size": 16 if early.name == "large" else 1}

    assert read(monkeypatch, "--name", "large", defaults=defaults, early=("name",))[0].size == 16
    assert read(monkeypatch, defaults=defaults, early=("name",))[0].size == 1


@pytest.mark.parametrize(
    "error",
    [WriteError("a.json could not\nbe written"), BadImageError("image 3: is\nbad"), WrongRunError("another\nrun's")],
)
def test_error_that_comes_in_the_midst_of_a_program_is_one_line_if_it_is_the_users_to_mend(error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", None)
    read(monkeypatch)
    sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"
    sys.excepthook(OSError, OSError("a bug"), None)
    assert "OSError: a bug" in capsys.readouterr().err


def test_first_word_may_stand_without_its_flag(monkeypatch):
    assert read(monkeypatch, "folder", "--size", "2", positional="name")[0] == Numbers(2, [0.5], "folder")
    assert read(monkeypatch, "--name", "folder", positional="name")[0].name == "folder"


def adjust(namespace, given):
    assert given == {"size"}
    if namespace.size == 7:
        raise ValueError("--size must not be 7")
    namespace.size *= 2


def test_adjusted_values_reach_the_dataclasses_and_the_record_keeps_what_was_asked(monkeypatch):
    numbers, _, config = read(monkeypatch, "--size", "3", adjust=adjust)
    assert (numbers.size, config["size"]) == (6, 3)


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["--size", "7"], {"adjust": adjust}, "error: --size must not be 7"),
        (["--size", "0"], {}, "error: --size must be a whole number of at least 1, got 0"),
        (["--size", "1.5"], {}, "error: --size must be a whole number of at least 1, got '1.5' of type str"),
        (["--siz", "2"], {}, "error: --siz is no argument of this program; near: --size"),
        (["--size"], {}, "error: --size must be followed by a value, got none"),
        (["--size", "-inf"], {}, "error: --size must be followed by a value, got '-inf'"),
        (["2"], {}, "error: 2 is no argument of this program; see --help"),
        (["--shares", "0.5", "nan"], {}, r"error: --shares must be a number in \[0, 1\], got nan"),
        (["--smoke", "perhaps"], {}, "error: --smoke must be true or false, got 'perhaps' of type str"),
        (["--name", ""], {}, "error: --name must not be empty, got ''"),
        (["--far-end", "2"], {}, "error: --far-end counts only with name b, got 2 with name None"),
        (["--far-end", "2", "--name", "a"], {}, "error: --far-end counts only with name b, got 2 with name 'a'"),
        (
            ["--folder", "/dev/null/x"],
            {},
            "error: --folder must be a folder that can be written to, got '/dev/null/x'.*",
        ),
        (["--resume", "no-such"], {}, "error: --resume must be 'auto' or a folder that exists, got 'no-such'"),
        ([], {"defaults": {"sice": 3}}, "error: the arguments must be those of this program, got sice"),
    ],
)
def test_bad_argument_is_one_line(monkeypatch, words, options, message):
    with pytest.raises(SystemExit, match=f"^{message}$"):
        read(monkeypatch, *words, **options)


def test_launchers_summary_repeats_the_error_and_other_processes_leave_it_to_the_first(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit, match="error: --size must be"):
        read(monkeypatch, "--size", "0")
    reason = json.loads((tmp_path / "error.json").read_text())["message"]["extraInfo"]["py_callstack"]
    assert reason == "error: --size must be a whole number of at least 1, got 0"
    monkeypatch.setattr("pgt_hf.programs.command_line._PATIENCE", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as silent:
        read(monkeypatch, "--size", "0")
    assert silent.value.code == 1


def test_typed_epochs_win_over_the_steps_of_a_smoke_run(monkeypatch):
    @dataclass
    class Length:
        max_steps: int = -1
        num_train_epochs: float = 3.0

    monkeypatch.setattr(sys, "argv", ["program.py", "--smoke", "--num-train-epochs", "2"])
    length = parse(Length, RunArguments, description="A program.", defaults={}, smoke={"max_steps": 20})[0]
    assert (length.max_steps, length.num_train_epochs) == (-1, 2.0)


def test_help_shows_ours_first_and_trainers_rest_on_request(monkeypatch, capsys):
    def shown(flag):
        monkeypatch.setattr(sys, "argv", ["program.py", flag])
        with pytest.raises(SystemExit):
            parse(ImageTrainingArguments, description="program:\n\n    program.py --alpha 1", defaults={"seed": 1})
        return capsys.readouterr().out

    short, long = shown("--help"), shown("--help-all")
    assert "\n    program.py --alpha 1\n" in short  # an example keeps its line
    assert "--mixup" in short and "--seed" in short and "--adam-beta1" not in short
    assert "--adam-beta1" in long


PROGRAMS = [path for path in sorted((ROOT / "recipes").glob("*.py")) if path.stem != "minimal"]  # a loop to copy


@pytest.mark.parametrize("recipe", PROGRAMS, ids=lambda path: path.stem)
def test_recipes_listen_first(recipe):
    """Else a process whose launcher is killed while they start would wait for the others."""
    parsed = ast.parse(recipe.read_text(encoding="utf-8"))
    (main,) = (node for node in parsed.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert ast.unparse(main.body[0]).endswith("StopOnSigterm().listen()")


def test_errors_of_the_program_itself_keep_their_traceback():
    with pytest.raises(SystemExit, match="error: no file"), errors_in_one_line():
        raise OSError("no file")
    with pytest.raises(KeyError), errors_in_one_line():
        raise KeyError("a fault")


def test_what_is_told_is_what_there_is(tmp_path, capsys):
    (tmp_path / "metrics.json").touch()
    (tmp_path / "mine.png").touch()
    tell("net on data", {"top1": 0.5, "nll": 1.25, "ece": None}, tmp_path, {"use": "now"}, {"mine.png": "a picture"})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line]
    assert lines == [
        "net on data",
        "top1 50.00%",
        "nll 1.25",
        f"Written to {tmp_path}",
        "metrics.json the results, and what they were made with",
        "mine.png a picture",
        "What next",
        "use now",
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "momentum=0.9"),
        (["--optim", "powergrad_sgd"], "momentum=0.9"),
        (["--optim", "powergrad_adamw"], None),
        (["--optim", "powergrad_adamw", "--optim-args", "eps=1e-6"], "eps=1e-6"),
        (["--optim-args", "momentum=0"], "momentum=0"),
    ],
)
def test_default_options_of_one_optimizer_are_not_given_to_another(monkeypatch, words, expected):
    @dataclass
    class Arguments:
        optim: str = "adamw_torch"
        optim_args: str | None = None

    monkeypatch.setattr(sys, "argv", ["program.py", *words])
    defaults = {"optim": "powergrad_sgd", "optim_args": "momentum=0.9"}
    assert parse(Arguments, description="A program.", defaults=defaults)[0].optim_args == expected
