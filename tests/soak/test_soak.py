"""The soak's short form: kills, resumes, NaN, missing gradients, overflows."""

import re
from types import SimpleNamespace

import pytest

from soak import __main__ as program
from soak.__main__ import main
from soak.plan import EXCHANGES, Life


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


LIVES = [Life(4, "fresh", 6), Life(4, "average", 10), Life(4, "checkpoint", 8)]


@pytest.mark.parametrize("first,bits,holds", [
    (5, {5: 5, 6: 6, 7: -7, 8: -8}, True),  # from before the average: other steps 7 and 8
    (5, {5: 5, 6: -6, 7: -7, 8: -8}, False),
    (8, {8: 8}, True),
    (8, {8: -8}, False),
])  # fmt: skip
def test_steps_made_again_are_compared_with_those_of_the_same_past(monkeypatch, first, bits, holds):
    made = [{step: step for step in steps} for steps in (range(1, 7), range(7, 11))] + [bits]
    reports = iter(SimpleNamespace(weights=weights) for weights in made)
    monkeypatch.setattr(program, "run", lambda *_: next(reports))
    monkeypatch.setattr(program, "describe", lambda *_: "")
    monkeypatch.setattr(program, "figures", lambda *_: [])
    plan = SimpleNamespace(steps=10 if first == 8 else 8, lives=lambda: LIVES)
    if holds:
        program.soak(plan)
    else:
        with pytest.raises(SystemExit, match="made again, gave other weights"):
            program.soak(plan)
