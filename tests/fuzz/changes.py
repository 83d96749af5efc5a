"""Changes to bytes and JSON values, chosen by a random generator: what damage and attackers do."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

HOSTILE: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        7,
        2**31,
        2**63,
        10**400,
        0.5,
        -0.0,
        1e308,
        "",
        "0",
        "x",
        "x" * 5000,
        "\ud800",
        "\0",
    ),
    *("\x1b[2J", "../../etc/passwd", "/dev/zero", "{{ 9**9**9 }}", "%n" * 50, "(a+)+$", "日本\u202e", [], {}, [[]]),
)


def changed_bytes(rng: Random, content: bytes) -> bytes:
    """One to three changes: flips, cuts, insertions, swaps, repetitions."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        first, second = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        second = min(second, first + rng.choice((1, 8, 200)))
        before, piece, after = content[:first], content[first:second], content[second:]
        how = rng.randrange(7)
        if how == 0 and piece:
            piece = bytes([piece[0] ^ 1 << rng.randrange(8)]) + piece[1:]
        elif how == 1 and piece:
            piece = bytes([rng.randrange(256)]) + piece[1:]
        elif how == 2:
            after = b""
        elif how == 3:
            piece = rng.choice((b"\xff" * 9, b"\x80" * 20, b"0" * 400, b'"', b"}", b"{%", rng.randbytes(6)))
        elif how == 4:
            piece *= rng.choice((0, 2, 50))
        elif how == 5:
            before, after = after, before
        else:
            piece = piece[::-1]
        content = before + piece + after
    return content


def changed_json(rng: Random, value: Any) -> Any:
    """A copy with one to three changes anywhere: values replaced, fields renamed, lost, added, doubled."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder: Any = root
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(holder[key], (dict, list)) and holder[key] and rng.random() < 0.8:
                holder = holder[key]
                continue
            how = rng.randrange(6)
            if how == 0 and holder is not root:
                del holder[key]
            elif how == 1 and isinstance(holder, dict):
                holder[rng.choice(("new", "a.b", "", str(key) * 2, "\udfff"))] = holder.pop(key)
            elif how == 2 and holder is not root:
                other = rng.choice(keys)
                holder[key], holder[other] = holder[other], holder[key]
            elif how == 3 and isinstance(holder, list) and holder is not root:
                holder *= rng.choice((2, 30))
            elif how == 4 and isinstance(holder[key], int):
                holder[key] = holder[key] * rng.choice((-1, 2, 10**6)) + rng.choice((-1, 0, 1))
            else:
                holder[key] = copy.deepcopy(rng.choice(HOSTILE))
            break
    return root[0]


def as_json(rng: Random, value: Any) -> bytes:
    """As a file's content: sometimes damaged once more, as text."""
    text = json.dumps(value).encode()
    return changed_bytes(rng, text) if rng.random() < 0.1 else text
