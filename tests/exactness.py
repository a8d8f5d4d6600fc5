"""Writes the table of docs/attach.md from what the tests try: ``python tests/exactness.py``."""

import re
import sys
from pathlib import Path

from programs import EXACT, PROGRAMS, REFUSED
from transformers_models import COMPILED as COMPILED_MODELS
from transformers_models import MODELS

PAGE = Path(__file__).parents[1] / "docs" / "attach.md"
BEGIN, END = "<!-- made by tests/exactness.py -->\n", "<!-- end -->"
COMPILED = [name for name in PROGRAMS if "compiled" in name]


def table() -> str:
    """Markdown, one row for each kind of program that the tests try."""
    eager = [name for name in PROGRAMS if name not in COMPILED and name != "loss in a checkpoint, reentrant"]
    rows = [
        ("losses over a softmax", "exact", "exact", ", ".join(EXACT)),
        ("losses without one", "refused", "refused", ", ".join(REFUSED)),
        ("programs around them", "exact", "", ", ".join(eager)),
        ("compiled programs", "", "exact", ", ".join(COMPILED)),
        ("a reentrant checkpoint around the loss alone", "refused", "", "it detaches the logits: use_reentrant=False"),
        ("models of transformers that compute their loss", "exact", "", ", ".join(f"`{name}`" for name in MODELS)),
        ("the same, compiled whole", "", "exact", ", ".join(f"`{name}`" for name in COMPILED_MODELS)),
    ]
    lines = ["| what | eager | compiled | tried |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows]) + "\n"


def replaced(text: str) -> str:
    """The page with the table of today."""
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: BEGIN + table() + END, text, flags=re.DOTALL)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
