"""Opening a bundle, the folder that `mara-export` writes and every other command reads (docs/reference/bundle.md)."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from mara_runtime.errors import BundleError, MaraError, OptionError
from mara_runtime.files import read_file
from mara_runtime.graph_file import check_graph
from mara_runtime.manifest import MANIFEST_FILE, FileEntry, Manifest
from mara_runtime.manifest_reader import parse
from mara_runtime.signature import SIGNATURE_FILE, check_signature

_MOST_MANIFEST_BYTES = 1 << 24


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk. Paths in the manifest are relative to `folder`, so it can be moved."""

    folder: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Path of a file in the manifest."""
        return self.folder / name

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = True, require_signature: str | Path | None = None) -> Bundle:
        """Read the manifest and, with `verify`, compare every file with its size and checksum; look through the graph.

        require_signature: file of a public key; its owner must have signed the manifest, which nothing precedes.
        Raises BundleError for a folder that is not a bundle, another schema version, a missing or changed file, a graph
        that no export writes, a missing or wrong signature; OptionError for a key that cannot be used.
        """
        if require_signature is not None and not verify:
            raise OptionError("--require-signature needs the checksums of the files: leave out --no-verify")
        folder = Path(folder)
        path = folder / MANIFEST_FILE
        try:
            if not folder.is_dir():
                raise BundleError(f"no bundle found at {folder}: make one with mara-export --out {folder}")
            content = read_file(path, _MOST_MANIFEST_BYTES)
            if require_signature is not None:
                check_signature(content, folder, Path(require_signature))
            text = content.decode()
        except MaraError:
            raise
        except FileNotFoundError:
            raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST_FILE}") from None
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not a valid path
            why = error.strerror if isinstance(error, OSError) else error
            raise BundleError(f"{ascii(str(path))[:200]} cannot be read: {why}"[:400]) from None
        bundle = cls(folder.absolute(), parse(text, str(path)))  # whatever the working directory is later
        if verify:
            bundle.verify()
        check_graph(bundle.path(bundle.manifest.step.file), bundle.manifest)
        return bundle

    def verify(self) -> None:
        """Compare every file with the manifest. Raises BundleError with the first that differs.

        The content decides: a file may be a link to anywhere, as in the cache of the Hugging Face Hub.
        """
        for name, entry in self.manifest.files.items():
            try:
                self._verify_file(name, entry)
            except OSError as error:
                raise BundleError(f"{self.folder}: {name} cannot be read: {error.strerror}") from None

    def scattered(self, name: str) -> list[str]:
        """Files below the folder of file `name` that are links to elsewhere than that folder and what `name` leads to.

        ONNX Runtime reads no weights from them. Relative to that folder; without empty files.
        """
        path = self.path(name)
        near = path.parent.resolve(), path.resolve().parent
        below = [file for file in map(self.path, self.manifest.files) if file.is_relative_to(path.parent)]
        return [
            file.relative_to(path.parent).as_posix()
            for file in below
            if not any(file.resolve().is_relative_to(folder) for folder in near) and file.stat().st_size
        ]

    def unlisted(self) -> list[str]:
        """Files in the folder that the manifest does not list: no command reads them."""
        found = (
            os.path.relpath(Path(where, name), self.folder)
            for where, _, names in os.walk(self.folder)
            for name in names
        )
        return sorted(name for name in found if name not in {*self.manifest.files, MANIFEST_FILE, SIGNATURE_FILE})

    def _verify_file(self, name: str, entry: FileEntry) -> None:
        path = self.path(name)
        if not path.is_file():
            raise BundleError(f"{self.folder}: {name} is missing; copy or export the bundle again")
        size = path.stat().st_size
        if size != entry.size_bytes:
            raise BundleError(
                f"{self.folder}: {name} has {size} bytes, the manifest says {entry.size_bytes}; "
                "copy or export the bundle again"
            )
        if sha256(path) != entry.sha256:
            raise BundleError(
                f"{self.folder}: {name} is damaged: its sha256 differs from the manifest's; "
                "copy or export the bundle again"
            )


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
