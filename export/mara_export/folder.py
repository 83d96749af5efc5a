"""Folders that are written whole or not at all, and bundles that grow without ever being incomplete."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path, PurePosixPath

from mara_runtime.bundle import Bundle, sha256
from mara_runtime.errors import MaraError
from mara_runtime.files import locked, umask, write_atomic
from mara_runtime.graph_file import check_graph
from mara_runtime.manifest import MANIFEST_FILE, EngineFacts, FileEntry, Manifest
from mara_runtime.manifest_reader import parse

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
        with disk_errors(out):
            _apply_umask(folder)
            if folder.parent != out:
                folder.replace(out)
                return
            for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST_FILE):  # which comes last
                path.replace(out / path.name)


@contextlib.contextmanager
def claimed(out: Path, written: bool = False) -> Iterator[None]:
    """Keep other exports from `out`. Raises MaraError where `whole_or_absent` would, and while another one has it.

    written: the bundle is already there.
    """
    out = destination(out)
    if not written:
        _reject_taken(out)
    busy = f"another export is writing {out}: wait until it has ended, or choose another --out"
    with claim(_parent(out) / f".{out.name}.lock", out, busy):
        yield


@contextlib.contextmanager
def claim(lock: Path, out: Path, busy: str) -> Iterator[None]:
    """Hold a lock folder, and remove it in the end: a process that is killed leaves an empty one that nobody holds.

    Raises MaraError: `busy`, or that `out` cannot be written.
    """
    with _made(lock.parent, out), contextlib.ExitStack() as held:
        while True:
            with disk_errors(out):
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
        with disk_errors(out):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()


def _reject_taken(out: Path) -> None:
    if out.exists() and (not out.is_dir() or not all(map(may_stay, out.iterdir()))):
        raise MaraError(f"{out} exists already and is not an empty folder: remove it, or choose another --out")


def may_stay(path: Path) -> bool:
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
            with disk_errors(out):
                _remove_abandoned(parent, prefix)
                while folder is None:
                    made = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=parent))
                    with contextlib.suppress(BlockingIOError, FileNotFoundError):  # another one is removing it
                        lock.enter_context(locked(made, wait=False))
                        folder = made
            with disk_errors(out, only_in=folder):
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
def disk_errors(out: Path, only_in: Path | None = None) -> Iterator[None]:
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
def folder_inside(bundle: Bundle, part: str) -> Iterator[Path]:
    """A temporary folder inside a bundle for files that go to its folder `part`; removed in the end.

    Raises MaraError if `part` cannot be written: better before long work than after it.
    """
    root, goal = bundle.folder, bundle.path(part)
    _reject_link(root, goal)
    with _temporary(root, root, prefix=".new.", needs=goal) as folder:
        if not os.access(goal, os.W_OK):
            raise MaraError(f"cannot write {goal}: make it writable")
        yield folder


@contextlib.contextmanager
def staging_folder(bundle: Bundle, target: str) -> Iterator[Path]:
    """A temporary folder inside a bundle for files that `add_engines` takes from there; removed in the end.

    Raises MaraError if the target's engine folder cannot be written, or another build is adding to it.
    """
    root, part = bundle.folder, f"engines/{target}"
    _reject_link(root, bundle.path(part))
    busy = f"another mara-build is adding engines for {target} to {root}: wait until it has ended"
    with claim(root / f".{target}.lock", root, busy), folder_inside(bundle, part) as folder:
        yield folder


def _reject_link(root: Path, folder: Path) -> None:
    if not folder.resolve().is_relative_to(root.resolve()):
        raise MaraError(f"{folder} is a link out of the bundle: remove it")


def add_engines(bundle: Bundle, staged: Path, engines: Sequence[EngineFacts]) -> Bundle:
    """Move engine files from `staged` into the bundle and list them in its manifest.

    A new engine replaces the one of the same target and slots, and those of the target for another TensorRT, GPU or
    platform, which could not run together with it. Engines and agents that others have added since `bundle` was opened
    stay. File names contain the checksum, so no existing file changes. Raises MaraError, and leaves the bundle as it
    was.
    """
    with disk_errors(bundle.folder):
        entries = [entry_of(staged / engine.file) for engine in engines]
    added = [
        replace(engine, file=unique_name(engine.file, entry)) for engine, entry in zip(engines, entries, strict=True)
    ]
    with changing(bundle, "its engine was built: build the engine again") as before:
        targets = dict.fromkeys((*before.targets, *(engine.target for engine in added)))
        after = replace(before, engines=(*_compatible(before.engines, added), *added), targets=tuple(targets))
        sources = (staged / engine.file for engine in engines)
        moved = {new.file: pair for new, pair in zip(added, zip(sources, entries, strict=True), strict=True)}
        return switch(bundle.folder, before, after, moved)


@contextlib.contextmanager
def changing(bundle: Bundle, meanwhile: str) -> Iterator[Manifest]:
    """Keep others from changing a bundle; yields its manifest as it is now.

    Raises MaraError where the bundle was exported again since it was opened. meanwhile: what was done then, and what to
    do now.
    """
    root = bundle.folder
    with disk_errors(root), locked(root, wait=True):
        now = Bundle.open(root, verify=False).manifest
        if _exported(now) != _exported(bundle.manifest):
            raise MaraError(f"{root} was exported again while {meanwhile}")
        yield now


def switch(root: Path, before: Manifest, after: Manifest, moved: Mapping[str, tuple[Path, FileEntry]]) -> Bundle:
    """Make `after` the manifest of a bundle, within `changing`; `files` follow from its agents and engines.

    moved: where new files come from, by name. The manifest is the one switch between before and after: new files
    precede it, and those that it no longer lists are removed after it. Where that fails, `before` holds.
    """
    gone = _added(before) - _added(after)
    files = {name: entry for name, entry in before.files.items() if name not in gone}
    after = replace(after, files=dict(sorted({**files, **{name: entry for name, (_, entry) in moved.items()}}.items())))
    try:
        for name, (source, _) in moved.items():
            path = root / name
            _reject_link(root, path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
            source.replace(path)
        write_manifest(root, after)
    finally:
        _remove_unlisted(root, {*gone, *moved})
    return Bundle(root, after)


def unique_name(name: str, entry: FileEntry) -> str:
    """A file's name with its checksum in it."""
    path = PurePosixPath(name)
    return str(path.with_name(f"{path.stem}-{entry.sha256[:12]}{path.suffix}"))


def _added(manifest: Manifest) -> set[str]:
    """Files that come and go after the export."""
    return {agent.file for agent in manifest.agents} | {engine.file for engine in manifest.engines}


def _exported(manifest: Manifest) -> object:
    """What a manifest says, as JSON has it, of what an export alone decides."""
    files = {name: entry for name, entry in manifest.files.items() if name not in _added(manifest)}
    return json.loads(replace(manifest, agents=(), engines=(), targets=(), files=files).to_json())


def _compatible(engines: Sequence[EngineFacts], added: Sequence[EngineFacts]) -> tuple[EngineFacts, ...]:
    """Those of a bundle's engines that stay when others are added: of their target, for the same machine and agents."""

    def machine(engine: EngineFacts) -> tuple[object, ...]:
        built_for = engine.target, engine.version, engine.compute_capability, engine.platform
        return *built_for, engine.agents, engine.agent_widths

    replaced = {(engine.target, engine.slots) for engine in added}
    targets, machines = {engine.target for engine in added}, {machine(engine) for engine in added}
    return tuple(
        engine
        for engine in engines
        if (engine.target, engine.slots) not in replaced
        and (engine.target not in targets or machine(engine) in machines)
    )


def _remove_unlisted(root: Path, names: Set[str]) -> None:
    """Delete those of these files that the manifest does not list, and leftovers of changes that were killed.

    An agent's file without a checksum in its name stays: it may be the user's own.
    """
    with contextlib.suppress(OSError, MaraError):
        listed = Bundle.open(root, verify=False).manifest.files.keys()
        patterns = "engines/*/*.engine", f"agents/*-{'[0-9a-f]' * 12}.safetensors"
        ours = {path.relative_to(root).as_posix() for pattern in patterns for path in root.glob(pattern)}
        unlisted = [root / name for name in (names | ours) - listed]
        for path in (*unlisted, *root.glob(f".{MANIFEST_FILE}.*.partial")):
            if path.parent.resolve().is_relative_to(root.resolve()):
                path.unlink(missing_ok=True)
        (root / "agents").rmdir()  # if it is empty


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Size and checksum of every file in a folder, by its relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): entry_of(path) for path in paths}


def entry_of(path: Path) -> FileEntry:
    """Size and checksum of a file."""
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
