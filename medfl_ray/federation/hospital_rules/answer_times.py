"""When an answer about private data leaves: at a time that is computed from declared figures, not from the data.

How long a hospital reads or scores its patients tells how many there are and what their images are like. So the answer
waits for the next tick of a clock whose step follows from the declared number of patients; where the work takes longer
than a step, the step doubles, so that at most the order of magnitude of an overrun shows. Training is charged and
takes its time: docs/privacy.md says what that tells.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from medfl_ray.config.site import SitePolicy

MIN_STEP_S = 0.25
SECONDS_PER_PATIENT = 0.02


def answer_step_s(policy: SitePolicy, passes: int = 1) -> float:
    """Return the first step in seconds: of the declared number of patients, for each pass over them."""
    return max(MIN_STEP_S, SECONDS_PER_PATIENT * policy.num_patients * max(passes, 1))


@dataclass
class AnswerTimes:
    """The clock of one hospital's answers; `now` and `sleep` in seconds.

    A step that was too short stays doubled for the next answer of the kind, so that each overrun shows once, however
    often is asked; `doublings` is then kept durably.
    """

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    doublings: MutableMapping[str, int] = field(default_factory=dict)

    @contextmanager
    def padded(self, kind: str, step_s: float) -> Iterator[None]:
        """Leave the block at a multiple of the step that depends on the step alone, whatever happens inside.

        Args:
          kind: what is answered; each kind remembers how often its step was doubled.
          step_s: first step in seconds, from declared figures.
        """
        started, known = self.now(), self.doublings.get(kind, 0)
        try:
            yield
        finally:
            doublings = known
            while self.now() - started > step_s * 2**doublings:
                doublings += 1
            try:
                if doublings != known:
                    self.doublings[kind] = doublings
            finally:
                self.sleep(max(0.0, started + step_s * 2**doublings - self.now()))
