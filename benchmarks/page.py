"""Makes the measured parts of docs/performance.md from the benchmarks' own output, in place.

    python -m benchmarks.page                                  # or: make performance; hours for all of it
    python -m benchmarks.page --only input_pipeline            # the blocks whose command has these words in it

A block of the page begins with ``<!-- measured: COMMAND -->`` and ends with ``<!-- end -->``; what is between them is
what the command prints. A command that fails leaves its block as it was.
"""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BLOCK = re.compile(r"<!-- measured: (?P<command>.+?) -->\n.*?<!-- end -->\n", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--only", default="", help="run the commands that contain this")
    args = parser.parse_args()
    commands = [block["command"] for block in BLOCK.finditer(args.page.read_text(encoding="utf-8"))]
    chosen = [command for command in commands if args.only in command]
    if not chosen:
        sys.exit(f"error: {args.page} has no measured block whose command contains {args.only!r}")
    failed = []
    for command in chosen:
        print(command, file=sys.stderr, flush=True)
        try:
            printed = run(command)
        except subprocess.CalledProcessError as error:
            failed.append(f"{command} (exit status {error.returncode})")
            continue
        args.page.write_text(replaced(args.page.read_text(encoding="utf-8"), command, printed), encoding="utf-8")
    if failed:
        sys.exit("error: these failed, and their blocks are as they were: " + "; ".join(failed))


def run(command: str) -> str:
    """What the command prints; the environment is this process's."""
    words = shlex.split(command)
    words = [sys.executable, *words[1:]] if words[0] == "python" else words
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def replaced(page: str, command: str, printed: str) -> str:
    block = f"<!-- measured: {command} -->\n```bash\nOMP_NUM_THREADS=1 {command}\n```\n\n{printed}\n<!-- end -->\n"
    return BLOCK.sub(lambda found: block if found["command"] == command else found[0], page)


if __name__ == "__main__":
    main()
