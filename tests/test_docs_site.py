"""The documentation site builds in strict mode, where a broken link or reference fails; the notebooks run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def build(config, target):
    pytest.importorskip("mkdocs", reason="the site needs pip install 'pgt_hf[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", target]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    result = build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert result.returncode == 0, result.stderr
    pages = {str(page.parent.relative_to(tmp_path / "site")) for page in (tmp_path / "site").rglob("index.html")}
    assert {".", "method", "study", "reference/pgt_hf", "notebooks/trainer"} <= pages
    reference = (tmp_path / "site" / "reference" / "pgt_hf" / "index.html").read_text(encoding="utf-8")
    assert 0 < reference.index('id="pgt_hf.attach_powergrad"') < reference.index('id="pgt_hf.PowerGradTrainer"')
    pages = "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "site" / "reference").rglob("index.html"))
    assert not [rule for rule in ("Annotated[", "OneOf(", "Positive", "WritableFolder") if rule in pages]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "link"),
    [
        pytest.param("docs/trainer.md", "no_such_page.md", marks=pytest.mark.long),
        ("docs/trainer.md", "method.md#no-such-heading"),
        pytest.param("docs/trainer.md", "../no_such_file.py", marks=pytest.mark.long),
        pytest.param("README.md", "docs/no_such_page.md", marks=pytest.mark.long),
        pytest.param("docs/notebooks/trainer.ipynb", "no_such_notebook.ipynb", marks=pytest.mark.long),
    ],
)
def test_broken_link_fails_the_build(page, link, tmp_path):
    for name in ("docs", ".ci", "src", "studies", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*ROOT.glob("*.md"), ROOT / "LICENSE", ROOT / "mkdocs.yml"]:
        shutil.copy(file, tmp_path)
    text = (tmp_path / page).read_text(encoding="utf-8")
    broken = (
        text.replace("(worth_it.ipynb)", f"({link})") if page.endswith(".ipynb") else f"{text}\n[broken]({link})\n"
    )
    assert broken != text
    (tmp_path / page).write_text(broken, encoding="utf-8")
    result = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert result.returncode != 0
    assert Path(link).name in result.stderr


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    found = (ROOT / "docs").rglob("*")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in found if path.suffix in (".md", ".ipynb")]
    assert [page for page in pages if f": {page}\n" not in navigation] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem == "trainer" else pytest.mark.long) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_notebook_runs(path, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="notebooks need pip install 'pgt_hf[docs]'")
    nbclient = pytest.importorskip("nbclient", reason="notebooks need pip install 'pgt_hf[docs]'")
    pytest.importorskip("ipykernel", reason="notebooks need pip install 'pgt_hf[docs]'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
