"""Wrong input is met with one clear error: a sample of the calls and command lines that ``make bad-input`` tries."""

import pytest
from calls import calls
from commands import commands
from judge import CLEAR, UNCLEAR, judge, run_call, run_command, score

pytestmark = pytest.mark.slow
CALLS, COMMANDS = 400, 60


def check(verdicts):
    print(score(verdicts))
    wrong = [str(verdict) for verdict in verdicts if verdict.kind not in (CLEAR, UNCLEAR)]
    assert not wrong, "\n".join(wrong)
    assert sum(verdict.kind == UNCLEAR for verdict in verdicts) <= 0.02 * len(verdicts), score(verdicts)


def test_every_wrong_call_is_a_clear_error_and_every_right_one_is_taken():
    tried = list(calls())
    assert len(tried) >= 800
    check(judge(tried[3 :: len(tried) // CALLS], run_call))


def test_wrong_command_lines_are_clear_errors_that_leave_nothing_behind(tmp_path):
    lines = commands(tmp_path / "bad")
    assert len(lines) >= 500
    check(judge(lines[3 :: len(lines) // COMMANDS], run_command))
