"""What people see while they wait."""
import os
import subprocess
import sys
from pathlib import Path

from stages.run import console

ROOT = Path(__file__).resolve().parent.parent
BAR = """
import time
from stages.run import console
bar = console.progress(range(3), "scoring", total=3)
bar.mininterval, bar.delay, bar.miniters = 0.0, 0.0, 1
for _ in bar:
    time.sleep(0.01)
print("model  task", flush=True)
"""


def test_in_a_log_a_bar_is_lines_of_its_own():
    said = subprocess.run([sys.executable, "-c", BAR], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True,
                          env={**os.environ, "RANK": "0"}).stdout
    assert "\r" not in said and said.splitlines()[-1] == "model  task"
    assert any(line.startswith("scoring: ") and "3/3" in line for line in said.splitlines())


def test_processor_time_counts_children_that_have_ended():
    before = console.processor_s()
    subprocess.run([sys.executable, "-c", "sum(range(3_000_000))"], check=True)
    assert console.processor_s() - before > 0.02
