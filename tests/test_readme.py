"""Every Python block of the README and the docs runs as it stands, on its own, offline."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start(1))
            # Leading newlines make tracebacks name the page's own lines.
            yield pytest.param(page, "\n" * line + match.group(1), id=f"{page.relative_to(ROOT)}:{line + 1}")


@pytest.mark.parametrize(("page", "code"), list(blocks()))
def test_documented_code_runs(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "onnxruntime" in code:
        pytest.importorskip("onnxscript", reason="ONNX needs pip install 'pgt_hf[onnx]'")
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


def test_relative_links_lead_somewhere():
    broken = [
        f"{page.name}: {target}"
        for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not broken


def test_commands_name_recipes_and_targets_that_exist():
    texts = "\n".join(page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "CONTRIBUTING.md"])
    assert not [name for name in set(re.findall(r"recipes/[\w/]+\.\w+", texts)) if not (ROOT / name).is_file()]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", texts, re.MULTILINE)) <= targets
