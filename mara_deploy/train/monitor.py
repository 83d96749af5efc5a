"""Progress of a training run: a line on the terminal, and TensorBoard event files."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX.event_file_writer import EventsWriter  # SummaryWriter's thread blocks forever on a full disk
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import scalar
from tqdm import tqdm

from mara_deploy.train.loop import Row
from mara_runtime.files import writing

_GROUPS = {
    "rollout": (
        *("score", "reward", "kl", "entropy", "alpha", "accept_rate", "forced_rate", "intervention_rate"),
        *("decision_share", "answer_tokens", "finished_share"),
    ),
    "learner": ("critic_loss", "actor_loss", "batch_entropy", "return"),
    "time": ("rollout_seconds", "update_seconds"),
}


class Monitor:
    """Shows every round. A context manager, which closes what it opened.

    total: episodes of the whole run; done: episodes before this start; tensorboard: folder for event files; quiet: no
    progress line. Raises MaraError if the event files cannot be written.
    """

    def __init__(self, total: int, done: int, tensorboard: Path, quiet: bool) -> None:
        self.episodes = done
        """episodes so far"""
        self._folder = tensorboard
        with writing(tensorboard):
            tensorboard.mkdir(parents=True, exist_ok=True)
            self._events = EventsWriter(str(tensorboard / "events"))
        # TensorBoard drops what an interrupted run wrote after its checkpoint
        self._write(done + 1, session_log=SessionLog(status=SessionLog.START))
        self._bar = tqdm(total=total, initial=done, unit="episode", disable=quiet, file=sys.stderr, dynamic_ncols=True)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()
        with suppress(OSError):  # already reported by `_write`
            self._events.close()

    def __call__(self, row: Row) -> None:
        """Show a row of the log."""
        self.episodes = row["episodes"]
        scalars = {f"{group}/{name}": row[name] for group, names in _GROUPS.items() for name in names if name in row}
        if len(row["scores"]) > 1:
            scalars |= {f"score/{name}": value for name, value in row["scores"].items()}
        values = [value for item in scalars.items() for value in scalar(*item).value]
        self._write(self.episodes, summary=Summary(value=values))
        self._bar.set_postfix_str(_line(row), refresh=False)
        self._bar.update(self.episodes - self._bar.n)

    def _write(self, step: int, **content: Any) -> None:
        with writing(self._folder):
            self._events.write_event(Event(step=step, wall_time=time.time(), **content))
            self._events.flush()


def _line(row: Row) -> str:
    return (
        f"score {row['score']:+.3f}, reward {row['reward']:+.3f}, KL {row['kl']:.2f}, H {row['entropy']:.2f}, "
        f"α {row['alpha']:.4f}, accepts {row['accept_rate']:.0%}, forced {row['forced_rate']:.0%}, "
        f"intervenes {row['intervention_rate']:.0%}"
    )
