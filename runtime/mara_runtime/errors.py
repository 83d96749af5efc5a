"""The one family of errors that this project raises on purpose.

A message is one line: what is wrong, what was found, and what mends it. The commands print it on
stderr and exit with code 2; anything else that escapes is a defect of ours and shows a traceback.
"""

from __future__ import annotations


class MaraError(Exception):
    """Something the user can mend; `str(error)` says how."""


class OptionError(MaraError, ValueError):
    """An option outside its range; the message names the flag, the value and the range."""


class BundleError(MaraError):
    """A bundle that is missing, damaged, or of another schema version."""


class EngineError(MaraError):
    """No engine can run the bundle here, or the named one cannot."""


class PromptError(MaraError):
    """A prompt that is empty, malformed or longer than the bundle's capacity."""


class NumericsError(MaraError):
    """A hidden state or logit that is not finite; the message names the position."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of others says, with the next if it is a heading; else its type."""
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{first} {others[0]}" if first.endswith(":") and others else first
