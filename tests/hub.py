"""The Hugging Face Hub's local cache, laid out by hand."""

from __future__ import annotations

from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = "http://127.0.0.1:9"
"""A Hub that refuses at once."""


def lay_out(
    home: Path, repository: str, files: Path | dict[str, bytes], revision: str = REVISION, main: bool = True
) -> Path:
    """Put files, or those of a folder, into the cache under `home` (HF_HOME). Returns the snapshot."""
    root = home / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / revision
    if isinstance(files, Path):
        files = {path.name: path.read_bytes() for path in files.iterdir()}
    for name, data in files.items():
        path = snapshot / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    if main:
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(revision)
    return snapshot
