"""The soak's short form: kills, resumes, NaN, missing gradients, overflows."""

import re

import pytest

from soak.__main__ import main
from soak.plan import EXCHANGES


@pytest.mark.slow
def test_the_short_form_holds(capsys):
    assert main(["--steps", "60"]) == 0
    said = capsys.readouterr().out
    lives = re.findall(r"^life \d+: (\d) workers, (.*?), steps", said, re.M)
    assert {how for _, how in lives} == {"new", "from a checkpoint", "from averaged memory"}
    assert {size for size, _ in lives} == {"3", "4"}
    assert len(re.findall("was killed", said)) == 3 + 4  # one more with owners
    errors = re.findall(r"mass equation: largest relative error +([\d.e-]+)", said)
    assert len(errors) == len(EXCHANGES)
    assert max(map(float, errors)) < 1e-6
