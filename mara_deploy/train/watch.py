"""What a person sees while an agent trains: a line on the terminal, and TensorBoard event files."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX.event_file_writer import EventsWriter  # SummaryWriter's thread waits for ever on a full disk
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import scalar
from tqdm import tqdm

from mara_deploy.files import in_one_line
from mara_deploy.train.loop import Row

_ROLLOUT = (
    *("score", "reward", "kl", "entropy", "alpha", "accept_rate", "forced_rate", "intervention_rate"),
    *("decision_share", "answer_tokens", "finished_share"),
)
_LEARNER = ("critic_loss", "actor_loss", "batch_entropy", "return")
_TIME = ("rollout_seconds", "update_seconds")


class Watch:
    """Shows each round. A context manager, which closes what it opened.

    episodes: of the whole run; begun: of them already made; tensorboard: folder of the event files; quiet: no line.
    """

    def __init__(self, episodes: int, begun: int, tensorboard: Path, quiet: bool) -> None:
        self.episodes = begun
        """answered so far"""
        self._folder = tensorboard
        with in_one_line(tensorboard):
            tensorboard.mkdir(parents=True, exist_ok=True)
            self._events = EventsWriter(str(tensorboard / "events"))
        # what an interrupted run wrote after its checkpoint is made again: TensorBoard drops it at this step
        self._write(begun + 1, session_log=SessionLog(status=SessionLog.START))
        self._bar = tqdm(
            total=episodes, initial=begun, unit="episode", disable=quiet, file=sys.stderr, dynamic_ncols=True
        )

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()
        with suppress(OSError):  # of what is written already; `_write` has said it
            self._events.close()

    def __call__(self, row: Row) -> None:
        """Show a row of the log."""
        at = self.episodes = row["episodes"]
        groups = (("rollout", _ROLLOUT), ("learner", _LEARNER), ("time", _TIME))
        shown = {f"{group}/{name}": row[name] for group, names in groups for name in names if name in row}
        if len(row["scores"]) > 1:
            shown |= {f"score/{name}": value for name, value in row["scores"].items()}
        self._write(at, summary=Summary(value=[v for item in shown.items() for v in scalar(*item).value]))
        self._bar.set_postfix_str(line(row), refresh=False)
        self._bar.update(at - self._bar.n)

    def _write(self, step: int, **what: Any) -> None:
        with in_one_line(self._folder):
            self._events.write_event(Event(step=step, wall_time=time.time(), **what))
            self._events.flush()


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

    note: called with a line for the user. Yields a function that says whether the loop should end.
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
        note("interrupted: finishing the round and saving; interrupt again to leave at once, with the last checkpoint")

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
