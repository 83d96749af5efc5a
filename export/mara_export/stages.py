"""The stages of an export, each in a folder of its own, which a work folder keeps for the next run of the same export.

    DIR/mara-export.json   what the export is; another one is refused
        NAME/              a finished stage: the files that it wrote, facts.json, arrays.npz; files.json: checksums
        .NAME.partial/     one that is being run
        graph-….json       the manifest of a bundle with that graph, written before the bundle gets its name

A stage gets its name in one rename, so a run that is killed leaves whole ones only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mara_export.folder import claim, destination, disk_errors, file_entries, may_stay
from mara_export.options import ExportOptions
from mara_export.progress import Progress
from mara_runtime.errors import MaraError, OptionError
from mara_runtime.files import write_atomic
from mara_runtime.manifest import MANIFEST_FILE

KEY, FACTS, ARRAYS, FILES = "mara-export.json", "facts.json", "arrays.npz", "files.json"

Arrays = Mapping[str, NDArray[Any]]
Make = Callable[[Path], tuple[Any, Arrays]]
"""Runs a stage: writes files into an empty folder, and returns facts, as JSON has them, and arrays by name."""
Stage = tuple[Path, Any, Arrays]
"""What a stage left: the folder with its files, facts, arrays."""


def graph_name(options: ExportOptions) -> str:
    """The name of the stage that writes a bundle's graph: it differs where the options do."""
    digest = hashlib.sha256(json.dumps(asdict(options)).encode()).hexdigest()
    return f"graph-{options.target}-{options.precision}-{digest[:16]}"


def is_written(work: Path | None, out: Path, name: str = "graph-*") -> bool:
    """Whether an export with this work folder has written the bundle `out`. name: of the stage of its graph."""
    with contextlib.suppress(OSError):
        records = [] if work is None else destination(work).glob(f"{name}.json")
        return (destination(out) / MANIFEST_FILE).read_bytes() in [record.read_bytes() for record in records]
    return False


class Stages:
    """Runs stages in a folder; in a work folder, those that no earlier run has finished."""

    def __init__(self, folder: Path, kept: bool = False, made: bool = False) -> None:
        """folder: an existing one; kept: it is a work folder, which no other process uses; made: for this export."""
        self.folder, self.made, self._kept, self._export = folder, made, kept, dict[str, Any]()

    def begin(self, export: Mapping[str, Any]) -> None:
        """Say, before the first stage, what the export is. Raises MaraError where the folder holds another one."""
        if self._kept and (self.folder / KEY).exists():
            there = self._object(self.folder / KEY)
            self.made = there.pop("made", None) is True
            for name, asked, found in _pairs(json.loads(json.dumps(export)), there):
                if asked != found:
                    raise MaraError(
                        f"{self.folder} holds another export: {name} was {found}, and is {asked} now: choose another "
                        f"--work, or remove {self.folder}"
                    )
        self._export = {"made": self.made, **export}

    def run(self, name: str, what: str, make: Make, progress: Progress) -> Stage:
        """Run a stage, or take what an earlier run made of it. what: the stage, for people.

        Raises MaraError where what was kept is damaged, or cannot be written.
        """
        if (earlier := self._take(name, what, progress)) is not None:
            return earlier
        with progress.stage(what):
            return self._make(name, make)

    def write(self, out: Path, name: str, what: str, make: Make, progress: Progress) -> None:
        """As `run`, for a stage that reports its own progress and whose files are to be in the folder `out`.

        Kept ones are linked there, or copied to another disk.
        """
        if not self._kept:
            make(out)
            return
        kept, *_ = self._take(name, what, progress) or self._make(name, make)
        for path in kept.iterdir():
            if path.name not in (FACTS, ARRAYS, FILES):
                try:
                    (out / path.name).hardlink_to(path)
                except OSError:  # another disk, or one without links
                    shutil.copyfile(path, out / path.name)

    def will_write(self, name: str, folder: Path) -> None:
        """Note, for `is_written`, that the bundle in a temporary folder is about to get its name."""
        if self._kept:
            with disk_errors(self.folder):
                write_atomic(self.folder / f"{name}.json", (folder / MANIFEST_FILE).read_bytes())

    def size(self, name: str) -> int:
        """Bytes of a stage that is kept; 0: it is not."""
        return sum(path.stat().st_size for path in (self.folder / name).glob("*"))

    def clear(self) -> None:
        """Remove what exports have put into the work folder."""
        with disk_errors(self.folder):
            for path in self.folder.glob(f"*/{FILES}"):
                shutil.rmtree(path.parent.replace(_partial(path.parent)), ignore_errors=True)
            for path in (*self.folder.glob("graph-*.json"), self.folder / KEY):
                path.unlink(missing_ok=True)

    def _take(self, name: str, what: str, progress: Progress) -> Stage | None:
        folder = self.folder / name
        if not self._kept or not folder.exists():
            return None
        said, found = self._object(folder / FILES), _checksums(folder)
        for file in sorted({*said, *found}):
            if said.get(file) != found.get(file):
                raise self._damaged(folder / file)
        progress.note(f"{what:<44} from {self.folder}")
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
            return folder, facts, dict(arrays)

    def _make(self, name: str, make: Make) -> Stage:
        folder = self.folder / name
        if not self._kept:
            folder.mkdir(exist_ok=True)
            return (folder, *make(folder))
        partial = _partial(folder)
        try:
            with disk_errors(self.folder, only_in=self.folder):
                partial.mkdir()
                facts, arrays = make(partial)
                (partial / FACTS).write_text(json.dumps(facts), encoding="utf-8")
                np.savez(partial / ARRAYS, allow_pickle=False, **arrays)
                (partial / FILES).write_text(json.dumps(_checksums(partial)), encoding="utf-8")
                write_atomic(self.folder / KEY, json.dumps(self._export, indent=1))
                partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return folder, facts, arrays

    def _object(self, path: Path) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return found
        raise self._damaged(path)

    def _damaged(self, path: Path) -> MaraError:
        return MaraError(f"{path} is damaged: remove {self.folder}, and export again")


def _partial(stage: Path) -> Path:
    return stage.with_name(f".{stage.name}.partial")


def _checksums(folder: Path) -> dict[str, Any]:
    return {name: asdict(entry) for name, entry in file_entries(folder).items() if name != FILES}


def _pairs(one: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, value, value) of what two objects hold, and the objects in both."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys((*one, *other)):
            yield from _pairs(one.get(key), other.get(key), key)
    else:
        yield name, one, other


@contextlib.contextmanager
def work_folder(work: Path, outs: Sequence[Path]) -> Iterator[Stages]:
    """The stages in a work folder, which is made if it is missing. An empty one that was made is removed in the end.

    outs: where the bundles go. Raises MaraError for a folder that holds something else, or that another export uses.
    """
    folder = destination(work)
    for out in map(destination, outs):
        if out.is_relative_to(folder) or folder.is_relative_to(out):
            raise OptionError(f"--work is {work}, and a bundle goes to {out}: choose folders that lie side by side")
    ours = not folder.exists() or (folder / KEY).is_file() or (folder.is_dir() and all(map(may_stay, folder.iterdir())))
    if not ours:
        raise MaraError(f"{folder} is not empty and not a work folder: choose another --work")
    busy = f"another export is using {folder}: wait until it has ended, or choose another --work"
    stages = Stages(folder, kept=True, made=not folder.exists())
    with claim(folder / ".work.lock", folder, busy):
        for partial in folder.glob(".*.partial"):  # of runs that were killed
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        yield stages
    with contextlib.suppress(OSError):
        if stages.made:
            folder.rmdir()
