"""API keys."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from mara_runtime.errors import OptionError


class Keys:
    """The keys that open the server. How long a comparison takes tells nothing about them."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Keys of a file, one per line; empty lines and those that begin with # do not count. Raises OptionError."""
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise OptionError(f"--api-keys: {path} cannot be read: {reason}") from None
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise OptionError(f"--api-keys: {path} has no key; write one per line")
        return cls(keys)

    def admit(self, authorization: str) -> bool:
        """Whether a header `Authorization: Bearer KEY` has one of the keys."""
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        found = [hmac.compare_digest(digest, each) for each in self._digests]  # all, whichever it is
        return scheme.lower() == "bearer" and any(found)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
