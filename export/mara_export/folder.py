"""Folders that are written whole or not at all, and bundles that grow without ever being half of one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mara_runtime.bundle import Bundle, sha256
from mara_runtime.errors import MaraError
from mara_runtime.files import locked
from mara_runtime.manifest import MANIFEST_FILE, EngineFacts, FileEntry, Manifest, parse

OF_A_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
"""What goes wrong in the middle of a file; the system then names no file."""


@contextlib.contextmanager
def whole_or_absent(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` on success and vanishes otherwise."""
    out = out.absolute()
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise MaraError(f"{out} exists already and is not an empty folder: remove it, or choose another --out")
    new_parents = _missing(out.parent)
    folder = None
    try:
        with _in_one_line(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        with _in_one_line(out, of=folder):
            yield folder
        with _in_one_line(out):
            _open_to_others(folder)
            folder.replace(out)
        new_parents = []
    finally:
        _remove(folder, new_parents)


class _Tried(Exception):
    """Leaves `whole_or_absent` before anything is written."""


def require_free(out: Path) -> None:
    """Refuse now what `whole_or_absent` would refuse later, and leave no trace. Raises MaraError."""
    with contextlib.suppress(_Tried), whole_or_absent(out):
        raise _Tried


@contextlib.contextmanager
def _in_one_line(out: Path, of: Path | None = None) -> Iterator[None]:
    """Errors of the system say that `out` cannot be written; with `of`, only those of writing in that folder do."""
    try:
        yield
    except OSError as error:
        if of is not None and not _of_writing(error, of):
            raise
        raise MaraError(f"cannot write {out}: {error if of is None else error.strerror}") from error


def _of_writing(error: OSError, folder: Path) -> bool:
    """Whether an error came from writing in a folder: it names a file there, or none and is one of a disk."""
    names = [os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, (str, bytes, os.PathLike))]
    if not names:
        return error.errno in OF_A_DISK
    return any(Path(name).absolute().is_relative_to(folder.absolute()) for name in names)


def _missing(folder: Path) -> list[Path]:
    """The folder and its parents that do not exist yet, the deepest first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _remove(temporary: Path | None, made: Sequence[Path]) -> None:
    """Leave no trace: a temporary folder, where it was not renamed, and the folders made for it that are empty."""
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _open_to_others(folder: Path) -> None:
    """Undo the private modes of temporary files: what a user makes follows their umask."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


@contextlib.contextmanager
def additions(bundle: Bundle, into: str) -> Iterator[Path]:
    """A temporary folder inside a bundle, for files that `extend` will move to `into` there; it vanishes in the end.

    First it makes sure that `into` can be written to, as it may take long to make what goes there.
    """
    place, folder = bundle.path(into), None
    made = _missing(place)
    try:
        with _in_one_line(bundle.folder):
            _make_inside(bundle.folder, place)
            with tempfile.NamedTemporaryFile(prefix=".new.", suffix=".partial", dir=place):
                pass
            folder = Path(tempfile.mkdtemp(prefix=".new.", suffix=".partial", dir=bundle.folder))
        with _in_one_line(bundle.folder, of=folder):
            yield folder
    finally:
        _remove(folder, made)


def _make_inside(root: Path, folder: Path) -> None:
    if not folder.resolve().is_relative_to(root.resolve()):
        raise MaraError(f"{folder} is a link out of the bundle: remove it")
    folder.mkdir(parents=True, exist_ok=True)


def extend(bundle: Bundle, staged: Path, engines: Sequence[EngineFacts]) -> Bundle:
    """Move the engines' files from `staged` into the bundle and enter them in its manifest.

    An entry of the same target and number of slots is replaced; one of the same target for another TensorRT, GPU or
    system than the new ones goes, as it could not run beside them. What others have added since `bundle` was opened
    stays. At every moment the bundle is whole: what is to be replaced leaves the manifest before its file changes, and
    new files enter it when they are in place. Raises MaraError; then, if the disk lets it, the bundle is as it was.
    """
    root, names = bundle.folder, [engine.file for engine in engines]
    with _in_one_line(root):
        entries = {name: _entry(staged / name) for name in names}
    with _in_one_line(root), locked(root, wait=True):
        before = Bundle.open(root, verify=False).manifest
        if _exported(before) != _exported(bundle.manifest):
            raise MaraError(f"{root} was exported anew while its engine was built: build it again")
        kept = _beside(before.engines, engines)
        gone = {engine.file for engine in before.engines} - {engine.file for engine in kept} | set(names)
        files = {name: entry for name, entry in before.files.items() if name not in gone}
        without = replace(before, engines=kept, files=files)
        after = replace(
            before,
            engines=(*kept, *engines),
            targets=tuple(dict.fromkeys((*before.targets, *(engine.target for engine in engines)))),
            files=dict(sorted({**files, **entries}.items())),
        )
        replaced = staged / "replaced"
        try:
            if without != before:
                write_manifest(root, without)
            for name in names:
                _make_inside(root, (root / name).parent)
                if (root / name).is_file():
                    (replaced / name).parent.mkdir(parents=True, exist_ok=True)
                    (root / name).replace(replaced / name)
                (staged / name).replace(root / name)
            write_manifest(root, after)
        except BaseException:
            with contextlib.suppress(OSError, MaraError):  # what went wrong first is what the user has to know
                now = Bundle.open(root, verify=False).manifest
                if now.files != after.files:  # an interrupt may come when all is done
                    _put_back(root, staged, replaced, names, now, before)
            raise
        for name in gone - set(names):
            with contextlib.suppress(OSError):  # no entry leads to it any more
                (root / name).unlink(missing_ok=True)
    return Bundle(root, after)


def _exported(manifest: Manifest) -> object:
    """What a manifest says, as JSON has it, of all that `extend` leaves alone."""
    of_engines = {engine.file for engine in manifest.engines}
    files = {name: entry for name, entry in manifest.files.items() if name not in of_engines}
    return json.loads(replace(manifest, engines=(), targets=(), files=files).to_json())


def _beside(engines: Sequence[EngineFacts], new: Sequence[EngineFacts]) -> tuple[EngineFacts, ...]:
    """Those of a bundle's engines that stay when others are added."""
    slots, names = {(e.target, e.slots) for e in new}, {e.file for e in new}
    targets, fits = {e.target for e in new}, {(e.target, e.version, e.compute_capability, e.platform) for e in new}
    return tuple(
        e
        for e in engines
        if (e.target, e.slots) not in slots
        and e.file not in names
        and (e.target not in targets or (e.target, e.version, e.compute_capability, e.platform) in fits)
    )


def _put_back(root: Path, staged: Path, replaced: Path, names: Sequence[str], now: Manifest, before: Manifest) -> None:
    """Undo what `extend` has done to the files, and enter in the manifest again those that are in place."""
    for name in names:
        with contextlib.suppress(OSError):
            if (replaced / name).exists():
                (replaced / name).replace(root / name)
            elif not (staged / name).exists():
                (root / name).unlink(missing_ok=True)
    lost = {name for name in names if (replaced / name).exists()}
    manifest = replace(
        before,
        engines=tuple(engine for engine in before.engines if engine.file not in lost),
        files={name: entry for name, entry in before.files.items() if name not in lost},
    )
    if manifest != now:
        write_manifest(root, manifest)


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Size and checksum of every file in a folder, by its path in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _entry(path) for path in paths}


def _entry(path: Path) -> FileEntry:
    return FileEntry(path.stat().st_size, sha256(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write or replace `manifest.json`: a reader sees the old one or the new one, also after a loss of power.

    Raises BundleError, and writes nothing, for one that could not be read back.
    """
    text = manifest.to_json()
    parse(text, str(folder / MANIFEST_FILE))
    part = folder / f".{MANIFEST_FILE}.{os.getpid()}.partial"
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(folder / MANIFEST_FILE)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
