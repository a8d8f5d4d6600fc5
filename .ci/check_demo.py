"""What `make demo` ends with: 2 processes, more than 95% test accuracy, and the training curve is shown."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

PROCESSES = 2
ACCURACY = 0.95


def main(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    curve = folder / "training_curve.png"
    if not curve.is_file():
        sys.exit(f"{curve} was not written")
    print(f"{metrics['top1']:.2%} test accuracy with {metrics['world_size']} processes; the training curve: {curve}")
    show(curve)
    if metrics["top1"] <= ACCURACY:
        sys.exit(f"the test accuracy should exceed {ACCURACY:.0%}")
    if metrics["world_size"] != PROCESSES:
        sys.exit(f"there should have been {PROCESSES} processes")


def show(picture: Path) -> None:
    """Opens the picture where a person sits at a desktop; elsewhere, its path has been printed."""
    desktop = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    opener = shutil.which("open" if sys.platform == "darwin" else "xdg-open")
    if not (desktop and opener and sys.stdout.isatty()) or "CI" in os.environ:
        return
    with contextlib.suppress(OSError):
        quiet = subprocess.DEVNULL
        subprocess.Popen([opener, picture], stdin=quiet, stdout=quiet, stderr=quiet)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
