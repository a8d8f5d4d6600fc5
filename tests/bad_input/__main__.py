"""``python tests/bad_input``: all wrong command lines and calls, and the score. ``commands`` or ``calls``: only those.

A second word is a pattern: only the cases that match it.
"""

import re
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from calls import calls
from commands import commands
from datasets import disable_progress_bars
from judge import CLEAR, Verdict, judge, run_call, run_command, score


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else "all"
    pattern = re.compile(sys.argv[2] if len(sys.argv) > 2 else "")
    warnings.simplefilter("ignore")
    disable_progress_bars()
    verdicts: list[Verdict] = []
    if wanted in ("all", "calls"):
        found = judge([call for call in calls() if pattern.search(str(call))], run_call)
        print(f"calls: {score(found)}\n", flush=True)
        verdicts += found
    if wanted in ("all", "commands"):
        with tempfile.TemporaryDirectory() as folder:
            lines = [line for line in commands(Path(folder, "bad")) if pattern.search(str(line))]
            found = judge(lines, run_command)
        print(f"command lines: {score(found)}", flush=True)
        verdicts += found
    wrong = [verdict for verdict in verdicts if verdict.kind not in (CLEAR, "unclear")]
    unclear = [verdict for verdict in verdicts if verdict.kind == "unclear"]
    return int(bool(wrong) or len(unclear) > 0.02 * len(verdicts))


if __name__ == "__main__":
    sys.exit(main())
