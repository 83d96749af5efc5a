"""Folders that are written whole or not at all, and bundles that grow without ever being incomplete."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from mara_runtime.bundle import Bundle, sha256
from mara_runtime.errors import MaraError
from mara_runtime.files import locked, umask, write_atomic
from mara_runtime.graph_file import check_graph
from mara_runtime.manifest import MANIFEST_FILE, EngineFacts, FileEntry, Manifest, parse

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
"""Errors while a file is written, which name no file."""


@contextlib.contextmanager
def working_folder(out: Path) -> Iterator[Path]:
    """A temporary folder next to `out`, removed in the end together with the parents made for it that stay empty.

    It lies in `out` where that cannot be replaced: a mount point, as a container's volume is, the working directory, or
    the only folder that the user may write to.
    """
    out = destination(out)
    parent = _parent(out)
    with _temporary(parent, out, prefix=f".{out.name}.", needs=parent) as folder:
        yield folder


def destination(out: Path) -> Path:
    """Where a path leads, which need not exist: without links and `..`."""
    return Path(os.path.realpath(out))


def _parent(out: Path) -> Path:
    """Where the temporary folders of `out` lie."""
    stays = out.is_dir() and (out.is_mount() or out == Path.cwd() or not os.access(out.parent, os.W_OK))
    return out if stays else out.parent


@contextlib.contextmanager
def whole_or_absent(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` on success and vanishes otherwise. Raises MaraError if `out` is taken."""
    out = destination(out)
    _reject_taken(out)
    with working_folder(out) as folder:
        yield folder
        with _disk_errors(out):
            _apply_umask(folder)
            if folder.parent != out:
                folder.replace(out)
                return
            for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST_FILE):  # which comes last
                path.replace(out / path.name)


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Keep other exports from `out`. Raises MaraError where `whole_or_absent` would, and while another one has it."""
    out = destination(out)
    _reject_taken(out)
    busy = f"another export is writing {out}: wait until it has ended, or choose another --out"
    with _claim(_parent(out) / f".{out.name}.lock", out, busy):
        yield


def require_free(out: Path) -> None:
    """Raise now the MaraError that `claimed` would raise later, and leave no trace."""
    with claimed(out):
        pass


@contextlib.contextmanager
def _claim(lock: Path, out: Path, busy: str) -> Iterator[None]:
    """Hold a lock folder, and remove it in the end: a process that is killed leaves an empty one that nobody holds.

    Raises MaraError: `busy`, or that `out` cannot be written.
    """
    with _made(lock.parent, out), contextlib.ExitStack() as held:
        while True:
            with _disk_errors(out):
                lock.mkdir(exist_ok=True)
                try:
                    held.enter_context(locked(lock, wait=False))
                    break
                except BlockingIOError:
                    raise MaraError(busy) from None
                except FileNotFoundError:  # another one has just ended
                    continue
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.rmdir()


@contextlib.contextmanager
def _made(folder: Path, out: Path) -> Iterator[None]:
    """Make a folder and its parents where they are missing; in the end remove those of them that stay empty."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]  # deepest first
    try:
        with _disk_errors(out):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()


def _reject_taken(out: Path) -> None:
    if out.exists() and (not out.is_dir() or not all(map(_may_stay, out.iterdir()))):
        raise MaraError(f"{out} exists already and is not an empty folder: remove it, or choose another --out")


def _may_stay(path: Path) -> bool:
    """Whether a folder counts as empty in spite of this: a temporary folder of ours, or what comes with a volume."""
    return path.name == "lost+found" or (path.name.startswith(".") and path.suffix in (".partial", ".lock"))


@contextlib.contextmanager
def _temporary(parent: Path, out: Path, *, prefix: str, needs: Path) -> Iterator[Path]:
    """A temporary folder in `parent`. needs: folder that is made if it does not exist, and removed if it stays empty.

    Raises MaraError, which names `out`, where either cannot be written.
    """
    folder, lock = None, contextlib.ExitStack()
    with _made(needs, out):
        try:
            with _disk_errors(out):
                _remove_abandoned(parent, prefix)
                while folder is None:
                    made = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=parent))
                    with contextlib.suppress(BlockingIOError, FileNotFoundError):  # another one is removing it
                        lock.enter_context(locked(made, wait=False))
                        folder = made
            with _disk_errors(out, only_in=folder):
                yield folder
        finally:
            with lock:
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the temporary folders of processes that were killed: those that nobody has locked."""
    for folder in parent.glob(f"{glob.escape(prefix)}*.partial"):
        if "." in folder.name.removeprefix(prefix).removesuffix(".partial") or folder.is_symlink():
            continue  # of another destination, whose name begins with this one's
        with contextlib.suppress(OSError), locked(folder, wait=False) as supported:  # BlockingIOError: in use
            if supported:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors(out: Path, only_in: Path | None = None) -> Iterator[None]:
    """Turn an OSError into a MaraError that names `out`. only_in: other errors than of writing there pass through."""
    try:
        yield
    except OSError as error:
        if only_in is not None and not _is_write_error(error, only_in):
            raise
        raise MaraError(f"cannot write {out}: {error if only_in is None else error.strerror}") from error


def _is_write_error(error: OSError, folder: Path) -> bool:
    """Did an error come from writing in a folder? It names a file there, or none and is one of a disk."""
    names = [os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, (str, bytes, os.PathLike))]
    if not names:
        return error.errno in DISK_ERRORS
    return any(Path(name).absolute().is_relative_to(folder.absolute()) for name in names)


def _apply_umask(folder: Path) -> None:
    """Temporary files are private; a bundle has the modes that the user's umask gives."""
    mask = umask()
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


@contextlib.contextmanager
def staging_folder(bundle: Bundle, target: str) -> Iterator[Path]:
    """A temporary folder inside a bundle for files that `add_engines` takes from there; removed in the end.

    Raises MaraError if the target's engine folder cannot be written: better before a long build than after it.
    """
    root, engines = bundle.folder, bundle.path(f"engines/{target}")
    _reject_link(root, engines)
    busy = f"another mara-build is adding engines for {target} to {root}: wait until it has ended"
    with _claim(root / f".{target}.lock", root, busy), _temporary(root, root, prefix=".new.", needs=engines) as folder:
        if not os.access(engines, os.W_OK):
            raise MaraError(f"cannot write {engines}: make it writable")
        yield folder


def _reject_link(root: Path, folder: Path) -> None:
    if not folder.resolve().is_relative_to(root.resolve()):
        raise MaraError(f"{folder} is a link out of the bundle: remove it")


def add_engines(bundle: Bundle, staged: Path, engines: Sequence[EngineFacts]) -> Bundle:
    """Move engine files from `staged` into the bundle and list them in its manifest.

    A new engine replaces the one of the same target and slots, and those of the target for another TensorRT, GPU or
    platform, which could not run together with it. Engines that others have added since `bundle` was opened stay.
    File names contain the checksum, so no existing file changes: the manifest is the one switch between before and
    after. Raises MaraError, and leaves the bundle as it was.
    """
    root = bundle.folder
    with _disk_errors(root):
        entries = {engine.file: _entry(staged / engine.file) for engine in engines}
    added = [replace(engine, file=_unique_name(engine.file, entries[engine.file])) for engine in engines]
    with _disk_errors(root), locked(root, wait=True):
        before = Bundle.open(root, verify=False).manifest
        if _without_engines(before) != _without_engines(bundle.manifest):
            raise MaraError(f"{root} was exported again while its engine was built: build the engine again")
        kept = _compatible(before.engines, added)
        removed = {engine.file for engine in before.engines} - {engine.file for engine in kept}
        files = {name: entry for name, entry in before.files.items() if name not in removed}
        files |= {new.file: entries[old.file] for new, old in zip(added, engines, strict=True)}
        after = replace(
            before,
            engines=(*kept, *added),
            targets=tuple(dict.fromkeys((*before.targets, *(engine.target for engine in added)))),
            files=dict(sorted(files.items())),
        )
        try:
            for new, old in zip(added, engines, strict=True):
                path = root / new.file
                _reject_link(root, path.parent)
                path.parent.mkdir(parents=True, exist_ok=True)
                (staged / old.file).replace(path)
            write_manifest(root, after)
        finally:
            _remove_unlisted(root)
    return Bundle(root, after)


def _unique_name(name: str, entry: FileEntry) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(f"{path.stem}-{entry.sha256[:12]}{path.suffix}"))


def _without_engines(manifest: Manifest) -> object:
    """What a manifest says, as JSON has it, of all that `add_engines` leaves alone."""
    engine_files = {engine.file for engine in manifest.engines}
    files = {name: entry for name, entry in manifest.files.items() if name not in engine_files}
    return json.loads(replace(manifest, engines=(), targets=(), files=files).to_json())


def _compatible(engines: Sequence[EngineFacts], added: Sequence[EngineFacts]) -> tuple[EngineFacts, ...]:
    """Those of a bundle's engines that stay when others are added."""

    def machine(engine: EngineFacts) -> tuple[str, ...]:
        return engine.target, engine.version, engine.compute_capability, engine.platform

    replaced = {(engine.target, engine.slots) for engine in added}
    targets, machines = {engine.target for engine in added}, {machine(engine) for engine in added}
    return tuple(
        engine
        for engine in engines
        if (engine.target, engine.slots) not in replaced
        and (engine.target not in targets or machine(engine) in machines)
    )


def _remove_unlisted(root: Path) -> None:
    """Delete what the manifest does not list: replaced engine files, and leftovers of builds that were killed."""
    with contextlib.suppress(OSError, MaraError):
        listed = Bundle.open(root, verify=False).manifest.files
        for path in (*(root / "engines").glob("*/*.engine"), *root.glob(f".{MANIFEST_FILE}.*.partial")):
            inside = path.parent.resolve().is_relative_to(root.resolve())
            if inside and path.relative_to(root).as_posix() not in listed:
                path.unlink(missing_ok=True)


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Size and checksum of every file in a folder, by its relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _entry(path) for path in paths}


def _entry(path: Path) -> FileEntry:
    return FileEntry(path.stat().st_size, sha256(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write or replace `manifest.json` atomically: a reader sees the old one or the new one, even after a power loss.

    Raises BundleError, and writes nothing, for a bundle that could not be opened.
    """
    path = folder / MANIFEST_FILE
    text = manifest.to_json()
    parse(text, str(path))
    check_graph(folder / manifest.step.file, manifest)
    write_atomic(path, text)
