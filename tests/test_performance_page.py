import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = "<!-- measured: {} -->\nold figures\n<!-- end -->\n"


def make(page: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.page", "--page", str(page), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_measured_block_becomes_what_its_command_prints(tmp_path):
    page = tmp_path / "page.md"
    first, second = "python -c 'print(6 * 7)'", "python -c 'print(1)'"
    page.write_text(f"# Title\n\n{BLOCK.format(first)}\nprose\n\n{BLOCK.format(second)}\nthe end\n")
    assert make(page, "--only", "6 * 7").returncode == 0
    text = page.read_text()
    assert (
        f"<!-- measured: {first} -->\n```bash\nOMP_NUM_THREADS=1 {first}\n```\n\n42\n<!-- end -->\n\nprose\n" in text
    )
    assert BLOCK.format(second) in text and text.endswith("\nthe end\n")


def test_a_command_that_fails_leaves_its_block(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(BLOCK.format("python -c 'print(1); raise SystemExit(3)'"))
    before = page.read_text()
    found = make(page)
    assert found.returncode == 1 and "exit status 3" in found.stderr
    assert page.read_text() == before
    assert "no measured block" in make(page, "--only", "nothing like it").stderr
