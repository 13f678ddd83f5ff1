"""Work spread over processes: the same results in the same order, and no process left behind however the run ends."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stages.run import workers

ROOT = Path(__file__).resolve().parent.parent
PARENT = """
import os, signal, sys, time
from stages.run import preemption, workers
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the suite runs in the background it is ignored
workers.ALONE_S = -1
preemption.listen(sys.argv[1])

def work(item):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(0 if item < 2 else float(sys.argv[2]))

try:
    for _ in workers.spread(work, range(20), 2):
        pass
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Processes at once, and none of them left afterwards; other tests' may still be there."""
    monkeypatch.setattr(workers, "ALONE_S", -1)
    before = psutil.Process().children()
    yield
    assert set(psutil.Process().children()) <= set(before)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_results_come_in_order_with_what_each_is_of(count):
    known = {}

    def work(item):
        time.sleep(0.02 * (item % 3))  # later ones are done sooner
        known.setdefault("first", item)
        return item * item, known["first"], os.getpid()

    found = list(workers.spread(work, iter(range(20)), count))
    assert [(item, result[0]) for item, result in found] == [(i, i * i) for i in range(20)]
    assert {result[1] for _, result in found} == {0}  # a worker begins with what was learned before it
    assert len({result[2] for _, result in found} - {os.getpid()}) == (count if count > 1 else 0)


def test_little_work_starts_no_process(monkeypatch):
    monkeypatch.setattr(workers, "ALONE_S", 5)
    assert {pid for _, pid in workers.spread(lambda item: os.getpid(), range(50), 2)} == {os.getpid()}


def test_no_more_is_read_than_is_soon_worked_on():
    read = []
    for item, _ in workers.spread(lambda item: item, (read.append(i) or i for i in range(1000)), 2):
        assert read[-1] - item <= 2 * workers.AHEAD + 1


def test_a_killed_worker_is_one_clear_line():
    def work(item):
        if item == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ValueError, match=r"^a worker process was killed, .*: give fewer with --workers \(1: none\)$"):
        list(workers.spread(work, range(20), 2))


def test_what_work_raises_is_raised_here():
    def work(item):
        raise ValueError(f"bad row {item}")

    with pytest.raises(ValueError, match="bad row 1"):
        for _ in workers.spread(lambda item: item and work(item), range(20), 2):
            pass


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_no_worker_outlives_its_parent(tmp_path, sent, code):
    seconds = "3" if sent == signal.SIGINT else "60"  # Ctrl-C lets them end what is begun
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "run"), seconds], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                              start_new_session=True)
    pids = {int(parent.stdout.readline()) for _ in range(4)} - {parent.pid}
    assert pids
    (os.killpg if sent == signal.SIGINT else os.kill)(parent.pid, sent)  # a terminal sends it to the whole group
    assert parent.wait(timeout=60) == code
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.1)
