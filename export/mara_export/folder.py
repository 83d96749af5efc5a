"""Folders that are written whole or not at all, and bundles that grow without ever being half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mara_runtime.bundle import Bundle, sha256
from mara_runtime.errors import MaraError
from mara_runtime.manifest import MANIFEST_FILE, EngineFacts, FileEntry, Manifest


@contextlib.contextmanager
def whole_or_absent(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` on success and vanishes otherwise."""
    out = out.absolute()
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise MaraError(f"{out} exists already and is not an empty folder: remove it, or choose another --out")
    new_parents = [parent for parent in out.parents if not parent.exists()]  # the deepest first
    folder = None
    try:
        with _in_one_line(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        yield folder
        with _in_one_line(out):
            _open_to_others(folder)
            folder.replace(out)
        new_parents = []
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise MaraError(f"cannot write {out}: {error.strerror}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)  # gone already when it was renamed
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()


@contextlib.contextmanager
def _in_one_line(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MaraError(f"cannot write {out}: {error}") from error


def _open_to_others(folder: Path) -> None:
    """Undo the private modes of temporary files: what a user makes follows their umask."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


@contextlib.contextmanager
def additions(bundle: Bundle) -> Iterator[Path]:
    """A temporary folder inside a bundle, for files that `extend` will move into it; it vanishes in the end."""
    with _in_one_line(bundle.folder):
        folder = Path(tempfile.mkdtemp(prefix=".new.", suffix=".partial", dir=bundle.folder))
    try:
        yield folder
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise MaraError(f"cannot write to {bundle.folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def extend(bundle: Bundle, staged: Path, engines: Sequence[EngineFacts]) -> Bundle:
    """Move the engines' files from `staged` into the bundle and enter them in its manifest.

    An entry of the same target and number of slots is replaced; one of the same target for another TensorRT, GPU or
    system than the new ones goes, as it could not run beside them. At every moment the bundle is whole: what is to be
    replaced leaves the manifest before its file changes, and new files enter it when they are in place.
    """
    names = [engine.file for engine in engines]
    new = {(engine.target, engine.slots) for engine in engines}
    before = bundle.manifest
    fits = {(e.target, e.version, e.compute_capability, e.platform) for e in engines}
    targets = {engine.target for engine in engines}
    kept = tuple(
        e
        for e in before.engines
        if (e.target, e.slots) not in new
        and (e.target not in targets or (e.target, e.version, e.compute_capability, e.platform) in fits)
    )
    gone = {engine.file for engine in before.engines} - {engine.file for engine in kept} | set(names)
    manifest = replace(
        before, engines=kept, files={name: entry for name, entry in before.files.items() if name not in gone}
    )
    entries = file_entries(staged)
    moved: list[str] = []
    with _in_one_line(bundle.folder):
        if manifest != before:
            write_manifest(bundle.folder, manifest)
        try:
            for name in names:
                path = bundle.path(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                if not path.parent.resolve().is_relative_to(bundle.folder.resolve()):
                    raise MaraError(f"{path.parent} is a link out of the bundle: remove it")
                moved.append(name)
                (staged / name).replace(path)
            manifest = replace(
                manifest,
                engines=(*kept, *engines),
                targets=tuple(dict.fromkeys((*before.targets, *(engine.target for engine in engines)))),
                files=dict(sorted({**manifest.files, **{name: entries[name] for name in names}}.items())),
            )
            write_manifest(bundle.folder, manifest)
        except BaseException:
            listed = Bundle.open(bundle.folder, verify=False).manifest.files
            for name in moved:
                if name not in listed:
                    bundle.path(name).unlink(missing_ok=True)
            raise
    for name in gone - set(names):
        bundle.path(name).unlink(missing_ok=True)
    return Bundle(bundle.folder, manifest)


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Size and checksum of every file in a folder, by its path in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): FileEntry(p.stat().st_size, sha256(p)) for p in paths}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write or replace `manifest.json`: a reader sees the old one or the new one, also after a loss of power."""
    part = folder / f".{MANIFEST_FILE}.{os.getpid()}.partial"
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(manifest.to_json())
            file.flush()
            os.fsync(file.fileno())
        part.replace(folder / MANIFEST_FILE)
    finally:
        part.unlink(missing_ok=True)
