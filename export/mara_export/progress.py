"""What is going on, on stderr: a line a stage with its time, a bar where a stage has parts."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Progress:
    """Prints unless `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    @contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Announce a stage and say how long it took."""
        start = time.perf_counter()
        live = not self.quiet and sys.stderr.isatty()
        if live:
            sys.stderr.write(f"  {what} …")
            sys.stderr.flush()
        try:
            yield
        except BaseException:
            if live:  # what went wrong is said on a line of its own
                sys.stderr.write("\n")
            raise
        if not self.quiet:
            sys.stderr.write(f"{chr(13) if live else ''}  {what:<44} {time.perf_counter() - start:6.1f} s\n")

    def parts(self, items: Iterable[T]) -> Iterator[T]:
        """The items of a stage, with a bar on a terminal."""
        bar = tqdm(items, file=sys.stderr, leave=False, disable=True if self.quiet else None, ncols=72)
        yield from bar
