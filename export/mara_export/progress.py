"""Progress on stderr: a line per stage with its time, a bar where a stage has parts."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

try:
    from tqdm import tqdm
except ImportError:  # on devices that build engines, only the runtime is installed
    tqdm = None

T = TypeVar("T")
REFRESH_S = 0.1


class Progress:
    """Prints unless `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Announce a stage, and report how long it took."""
        start = time.perf_counter()
        live = not self.quiet and sys.stderr.isatty()
        if live:
            sys.stderr.write(f"  {what} …")
            sys.stderr.flush()
        try:
            yield
        except BaseException:
            if live:  # the error gets a line of its own
                sys.stderr.write("\n")
            raise
        if not self.quiet:
            sys.stderr.write(f"{chr(13) if live else ''}  {what:<44} {time.perf_counter() - start:6.1f} s\n")

    def note(self, what: str) -> None:
        """Print a message for the user."""
        if not self.quiet:
            sys.stderr.write(f"{chr(13) if sys.stderr.isatty() else ''}  {what}\n")

    def parts(self, items: Iterable[T]) -> Iterator[T]:
        """The items of a stage, with a bar on a terminal."""
        if tqdm is None:
            yield from items
            return
        yield from tqdm(items, file=sys.stderr, leave=False, disable=True if self.quiet else None, ncols=72)

    @contextmanager
    def phases(self) -> Iterator[Callable[[str, int, int], None]]:
        """Yield a function (phase, steps done, steps) to call during work with nested phases.

        On a terminal it moves a bar or, without tqdm, writes a line for each new phase. Any thread may call it.
        """
        live = not self.quiet and sys.stderr.isatty()
        if tqdm is None:
            printed: set[str] = set()

            def line(phase: str, done: int, steps: int) -> None:
                if live and phase not in printed:
                    printed.add(phase)
                    sys.stderr.write(f"\n    {phase}")
                    sys.stderr.flush()

            yield line
            if printed:
                sys.stderr.write("\n")
            return
        with tqdm(file=sys.stderr, leave=False, disable=not live, ncols=100, mininterval=REFRESH_S) as bar:
            shown, moved = "", 0.0

            def move(phase: str, done: int, steps: int) -> None:
                nonlocal shown, moved
                if phase == shown and time.monotonic() - moved < REFRESH_S:
                    return
                shown, moved = phase, time.monotonic()
                bar.total, bar.n = steps, done
                bar.set_description_str(f"    {phase}"[:60])

            yield move


@contextmanager
def no_logs(level: int) -> Iterator[None]:
    """Suppress what libraries log up to a level."""
    previous = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(previous)
