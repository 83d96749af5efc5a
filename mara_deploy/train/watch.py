"""What a person sees while an agent trains: a line on the terminal, and TensorBoard event files."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from mara_deploy.train.loop import Row

_ROLLOUT = (
    *("score", "reward", "kl", "entropy", "alpha", "accept_rate", "forced_rate", "intervention_rate"),
    *("decision_share", "answer_tokens", "finished_share"),
)
_LEARNER = ("critic_loss", "actor_loss", "batch_entropy", "return")


class Watch:
    """Shows each round. A context: it ends what it has begun.

    episodes: of the whole run; begun: of them already made; tensorboard: folder of the event files; quiet: no line.
    """

    def __init__(self, episodes: int, begun: int, tensorboard: Path, quiet: bool) -> None:
        from tensorboardX import SummaryWriter

        # what an interrupted run wrote after its checkpoint is made again: TensorBoard drops it at purge_step
        self._writer = SummaryWriter(str(tensorboard), purge_step=begun + 1)
        self._bar = tqdm(
            total=episodes, initial=begun, unit="episode", disable=quiet, file=sys.stderr, dynamic_ncols=True
        )

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()
        self._writer.close()

    def __call__(self, row: Row) -> None:
        """Show a row of the log."""
        at = row["episodes"]
        for group, names in (("rollout", _ROLLOUT), ("learner", _LEARNER)):
            for name in names:
                if name in row:
                    self._writer.add_scalar(f"{group}/{name}", row[name], at)
        if len(row["scores"]) > 1:
            for name, value in row["scores"].items():
                self._writer.add_scalar(f"score/{name}", value, at)
        for name in ("rollout_seconds", "update_seconds"):
            self._writer.add_scalar(f"time/{name}", row[name], at)
        self._bar.set_postfix_str(line(row), refresh=False)
        self._bar.update(at - self._bar.n)


def line(row: Row) -> str:
    """A round in one line."""
    return (
        f"score {row['score']:+.3f}, reward {row['reward']:+.3f}, KL {row['kl']:.2f}, H {row['entropy']:.2f}, "
        f"α {row['alpha']:.4f}, accepts {row['accept_rate']:.0%}, forced {row['forced_rate']:.0%}, "
        f"intervenes {row['intervention_rate']:.0%}"
    )


@contextmanager
def first_interrupt_waits(note: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask the loop to end after its round; the second one ends it at once.

    note: called with a line for the user. Gives a function that says whether the loop shall end.
    """
    asked = False
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
        yield lambda: asked
        return

    def handler(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        note("interrupted: finishing the round and saving; once more leaves at once, with the last checkpoint")

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
