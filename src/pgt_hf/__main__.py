"""Publish, report, plot and use trained runs; list presets and installed versions."""

import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__

__all__ = ["app", "main"]

app = typer.Typer(help=__doc__, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"pgt_hf {__version__}")
        raise typer.Exit


@app.callback(help=__doc__)
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options before a command."""


Run = Annotated[Path, typer.Argument(help="The run's folder.")]
RepoId = Annotated[
    str | None, typer.Option(help="owner/name; default: the one recorded in the run, or the folder's name.")
]
Fold = Annotated[bool, typer.Option("--fold", help="Multiply alpha into the head, for calibrated probabilities.")]
Ema = Annotated[bool, typer.Option(help="Use the averaged weights (EMA), if there are any.")]
License = Annotated[str | None, typer.Option(help="Licence of the weights, such as apache-2.0.")]
BaseModel = Annotated[str | None, typer.Option(help="Hub id of the model that training started from.")]
Pictures = Annotated[
    bool, typer.Option("--pictures", help="Show images in the report even if their licence is unknown or forbids it.")
]


@app.command()
def push(
    run: Run,
    repo_id: RepoId = None,
    fold: Fold = False,
    ema: Ema = True,
    license: License = None,
    base_model: BaseModel = None,
    pictures: Pictures = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to, created if needed.")] = None,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload model",
) -> None:
    """Push a run's model, card, curve and report to the Hub."""
    from .hub import push_run

    release = _release(fold, ema, license, base_model, pictures)
    commit = push_run(run, repo_id, private=private or None, revision=revision, message=message, **release)
    print(commit.commit_url)


@app.command()
def export(
    run: Run,
    target: Annotated[Path, typer.Argument(help="The folder to write to.")],
    repo_id: RepoId = None,
    fold: Fold = False,
    ema: Ema = True,
    license: License = None,
    base_model: BaseModel = None,
    pictures: Pictures = False,
) -> None:
    """Write what push would upload to a folder, for review."""
    from .hub import prepare_release

    if target.is_dir() and any(target.iterdir()) and not (target / "README.md").is_file():
        raise ValueError(f"target must be a new or empty folder, or an earlier release, got {str(target)!r}")
    release = _release(fold, ema, license, base_model, pictures)
    name = re.sub(r"[^\w.]+", "-", run.resolve().name).strip("-.") or "model"
    print(prepare_release(run, target, repo_id or f"you/{name}", **release))


@app.command()
def pull(
    repo_id: Annotated[str, typer.Argument(help="owner/name")],
    run: Run,
    checkpoint: Annotated[str, typer.Option(help="The checkpoint's folder in the repository.")] = "last-checkpoint",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
) -> None:
    """Download a pushed checkpoint, to resume from it."""
    from .hub import pull_checkpoint

    print(pull_checkpoint(repo_id, run, checkpoint=checkpoint, revision=revision))


@app.command()
def report(
    run: Run,
    dataset_name: Annotated[
        str | None, typer.Option(help="Data set to evaluate on; default: the one the run was trained on.")
    ] = None,
    max_images: Annotated[int | None, typer.Option(help="Use at most this many evaluation images.")] = None,
    mistakes: Annotated[int, typer.Option(help="How many of the worst mistakes to show.")] = 24,
) -> None:
    """Evaluate a run's predictions and write report.html."""
    from .programs import quiet_libraries
    from .runs import report_run

    quiet_libraries()
    print(report_run(run, dataset_name, mistakes=mistakes, max_images=max_images))


@app.command()
def plot(runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="The runs' folders.")]) -> None:
    """Plot everything recorded in one or more runs."""
    from .runs import draw_runs

    for path in draw_runs(runs):
        print(path)


@app.command()
def predict(
    run: Run,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files or folders.")],
    top: Annotated[int, typer.Option(help="How many classes to print per image.")] = 3,
    picture: Annotated[Path | None, typer.Option(help="Save the images with their classes as this picture.")] = None,
) -> None:
    """Classify images with a run's model."""
    from .analysis import plot_images
    from .analysis.figures import check_target
    from .images import read_upright
    from .limits import WritableFile
    from .programs import quiet_libraries
    from .runs import predict_images

    if picture is not None:
        WritableFile().check("picture", picture)
        check_target(picture, "picture")
    quiet_libraries()
    found = predict_images(run, images, top=top)
    lines = {path: [f"{name}, {share:.1%}" for name, share in classes] for path, classes in found.items()}
    for path, classes in lines.items():
        print(f"{path}: {'; '.join(classes)}")
    if picture is not None:
        pixels = [read_upright(path.read_bytes()) for path in lines]
        plot_images(pixels, ["\n".join(classes) for classes in lines.values()], picture)
        print(picture)


@app.command()
def presets() -> None:
    """List the presets of recipes/imagenet.py with their published accuracies."""
    from .images import preset_table

    print(preset_table())


@app.command()
def info() -> None:
    """Print versions, device and registered optimizers."""
    from .runs import describe_environment
    from .trainer import TRAINER_OPTIMIZERS

    here = describe_environment(processes=1)
    for name, version in {"python": here["python"], **here["packages"], "device": here["device"]}.items():
        print(f"{name:16}{version}")
    print(f"{'optimizers':16}{' '.join(TRAINER_OPTIMIZERS)}")


def _release(fold: bool, ema: bool, license: str | None, base_model: str | None, pictures: bool) -> dict[str, Any]:
    """Options of ``prepare_release``; without ``pictures``, the data set's licence decides."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading and saving, which take no time
    return {"fold": fold, "ema": ema, "license": license, "base_model": base_model, "pictures": pictures or None}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; errors are messages without a traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = [word.partition("=")[0].replace("--no-", "--") for word in words if word.startswith("--")]
    if twice := next((flag for flag in flags if flags.count(flag) > 1), None):
        sys.exit(f"error: {twice} must be given once, got it {flags.count(twice)} times")
    for before, word in zip(("", *words), words, strict=False):
        flag, _, value = word.partition("=") if word.startswith("--") else (before, "", word)
        if not value.strip() and (not word.startswith("--") or "=" in word):
            sys.exit(f"error: {flag if flag.startswith('--') else 'an argument'} must not be empty, got {value!r}")
    try:
        app(args=words or ["--help"], prog_name="pgt-hf", standalone_mode=False)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    except Exception as error:  # of typer's parser, which has a copy of click's in some versions
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        known = [getattr(command.callback, "__name__", "") for command in app.registered_commands]
        if wrong := re.match(r"Invalid value for '(--[\w-]+)'", message):
            got = dict(pairwise(words)).get(wrong[1])
            message = f"{wrong[1]} must be a number, got {got!r}: {message.partition(': ')[2]}"
        sys.exit(f"error: {message} See pgt-hf {words[0] + ' ' if words[0] in known else ''}--help.")


if __name__ == "__main__":
    main()
