"""Where the time of an iteration goes: functions timed where they stand, for benchmarks."""
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch


class Phases:
    """Seconds in each of `phases` of an iteration, of functions that are timed where they stand; what one calls counts for itself alone."""

    def __init__(self, phases: Sequence[str], wait: Callable[[], None] = lambda: None, clock: Callable[[], float] | None = None):
        self.phases, self.wait, self.clock = phases, wait, clock or time.perf_counter
        self.open, self.lengths, self.undo = [], set(), contextlib.ExitStack()
        self.restart()

    open: list[str]
    lengths: set[int]  # of the responses, in tokens

    def restart(self) -> None:
        now = self.clock()
        self.seconds, self.since, self.ends = dict.fromkeys(self.phases, 0.0), now, [now]

    def turn(self) -> float:
        self.wait()
        now = self.clock()
        if self.open:
            self.seconds[self.open[-1]] += now - self.since
        self.since = now
        return now

    def start(self, phase: str) -> None:
        self.turn()
        self.open.append(phase)

    def stop(self) -> None:
        self.turn()
        self.open.pop()

    def time(self, owner: Any, name: str, phase: str | Callable[..., str], lengths: Callable[..., Any] | None = None) -> None:
        """Time `owner.name` as `phase`, or what it says of the arguments. `lengths(result, *arguments)`: those of responses."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.start(phase if isinstance(phase, str) else phase(*args))
            try:
                result = function(*args, **kwargs)
            finally:
                self.stop()
            if lengths:
                self.lengths.update(lengths(result, *args))
            return result

        self.undo.enter_context(patch.object(owner, name, timed))
