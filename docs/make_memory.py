"""Write docs/reference/memory.md from the memory model; tests/unit/test_memory.py checks that it is current.

make docs
"""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parent / "reference" / "memory.md"
TEXT = Path(__file__).with_name("memory.in.md")
"""The text above the tables."""


def page() -> str:
    """The text of memory.md."""
    from mara_deploy.memory import CONTEXTS, JETSONS_GB, Setting, estimate
    from mara_export.hf.catalogue import ALIASES
    from mara_export.targets import TARGETS

    aliases: dict[str, list[str]] = {}
    for alias, known in ALIASES.items():
        aliases.setdefault(repr(known.decoder), []).append(f"`{alias}`")
    models = {repr(known.decoder): known.decoder for known in ALIASES.values()}  # each shape once
    parts = [TEXT.read_text(encoding="utf-8")]
    boards = " | ".join(f"{gb} GB" for gb in JETSONS_GB)
    for target in ("tensorrt", "cuda", "cpu"):
        parts.append(f"## {target}\n")
        for key, model in models.items():
            parts.append(f"{', '.join(aliases[key])}: {model.parameters / 1e9:.2f} · 10⁹ parameters\n")
            parts.append(f"| precision | context | engine | KV | workspace | host | sum, MB | {boards} |")
            parts.append("|---|" + "--:|" * (6 + len(JETSONS_GB)))
            for precision in TARGETS[target].precisions:
                for context in CONTEXTS:
                    cells = estimate(model, Setting(target, precision, context)).cells()
                    parts.append(f"| {precision} | {context} | {' | '.join(cells)} |")
            parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
