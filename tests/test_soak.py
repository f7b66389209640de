"""benchmarks/soak.py in its short form: kills, resumes, NaN, missing gradients, overflows."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_short_form_holds():
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--steps", "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lives = re.findall(r"^life \d: (\d) workers, (.*?), steps", done.stdout, re.M)
    assert {how for _, how in lives} == {"new", "from a checkpoint", "from averaged memory"}
    assert {size for size, _ in lives} == {"3", "4"}
    assert len(re.findall("was killed", done.stdout)) == 3
    (error,) = re.findall(r"mass equation: largest relative error +([\d.e-]+)", done.stdout)
    assert float(error) < 1e-6
