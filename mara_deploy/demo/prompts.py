"""The demo's prompts in three sets that share no group of related prompts.

| set | groups | used for |
|---|---|---|
| `demo` | neither of the others | training the LM, training the agent |
| `demo-dev` | held out of the LM's training | every choice: recipe, fallback, when to stop |
| `demo-final` | reserved: in the LM's training, not in the agent's | reported figures; no choice is made on them |
"""

from __future__ import annotations

import hashlib

from mara_deploy.demo.corpus import Group, Prompt, every_prompt, held_out

SETS = ("demo", "demo-dev", "demo-final")


def reserved(group: Group) -> bool:
    """Whether the group belongs to `demo-final` (by hash, as the held-out split)."""
    return not held_out(group) and hashlib.sha256("|".join(("final", *group)).encode()).digest()[0] < 38  # of 256


def demo_prompts(name: str = "demo") -> tuple[Prompt, ...]:
    """All prompts of a set, by group."""
    if name not in SETS:
        raise ValueError(f"{name!r} is none of {', '.join(SETS)}")
    if name == "demo-dev":
        return every_prompt(held_out_split=True)
    wanted = name == "demo-final"
    return tuple(p for p in every_prompt(held_out_split=False) if reserved(p.group) == wanted)
