"""Markdown tables, and their places in a page."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from pgt_hf.analysis import Comparison, interval

__all__ = ["accuracy", "difference", "header", "line", "loss", "mean", "place"]

SIGNIFICANT = 3


def place(page: Path, tables: dict[str, Iterable[str]]) -> None:
    """Puts each table between the comments ``<!-- name -->`` and ``<!-- end -->`` of a page."""
    text = page.read_text(encoding="utf-8")
    for name, lines in tables.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise ValueError(f"{page.name} must have a place for the table {name!r}, has none")
        text = before + mark + "\n".join([*lines, end]) + after
    page.write_text(text, encoding="utf-8")


def header(*columns: str) -> list[str]:
    """The first two lines of a table."""
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]


def line(*cells: str) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def mean(values: Sequence[float], scale: float = 1.0) -> str:
    """To three digits; "-" of nothing."""
    if not values:
        return "-"
    centre = scale * statistics.fmean(values)
    return f"{centre:.0f}" if abs(centre) >= 10**SIGNIFICANT else f"{centre:.{SIGNIFICANT}g}"


def accuracy(values: Sequence[float], scale: float = 100.0, digits: int = 2) -> str:
    """The mean with its 95% interval; of a single value, without."""
    if not values:
        return "-"
    centre, half = interval(values)
    return f"{scale * centre:.{digits}f}" + (f" +- {scale * half:.{digits}f}" if len(values) > 1 else "")


def loss(values: Sequence[float]) -> str:
    """The same of a loss, in nats."""
    return accuracy(values, 1.0, 3)


def difference(found: Comparison | None, scale: float = 100.0) -> str:
    """In bold where 0 lies outside the interval."""
    if found is None:
        return "-"
    digits = 2 if scale > 1 else 3
    text = f"{scale * found.difference:+.{digits}f} +- {scale * found.half_width:.{digits}f}"
    return f"**{text}**" if found.found else text
