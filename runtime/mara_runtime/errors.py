"""The errors that this project raises on purpose.

A message is one line: what is wrong, what was found, and how to fix it. Commands print it on stderr and exit with
code 2; any other exception is a bug and shows a traceback.
"""

from __future__ import annotations

_PART = 200
"""Letters of a long message that are kept at its beginning, and at its end, where the reason often is."""


class MaraError(Exception):
    """Something the user can fix; `str(error)` says how."""


class OptionError(MaraError, ValueError):
    """An option outside its range; the message names flag, value and range."""


class BundleError(MaraError):
    """A bundle that is missing, damaged, or has another schema version."""


class EngineError(MaraError):
    """No engine can run the bundle here, or the named one cannot."""


class PromptError(MaraError):
    """A prompt that is empty, malformed, or longer than the bundle's capacity."""


class NumericsError(MaraError):
    """A hidden state, logit or margin that is not finite; the message names the position."""


def first_line(error: BaseException) -> str:
    """First line of a third-party error's message, with the next if it is a heading; its type if there is none.

    Of a long one, as a library may quote a whole file, the beginning and the end.
    """
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = f"{first} {others[0]}" if first.endswith(":") and others else first
    return line if len(line) <= 2 * _PART else f"{line[:_PART]} … {line[-_PART:]}"
