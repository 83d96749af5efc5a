"""Opening and verifying a bundle: whatever is wrong with it is one BundleError of one line."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mara_deploy.commands import inspect
from mara_runtime import bundle as bundle_module
from mara_runtime.bundle import Bundle, sha256
from mara_runtime.errors import BundleError
from mara_runtime.manifest import MANIFEST_FILE
from tests.unit import helpers, tiny_tokenizers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return helpers.make_bundle(
        tmp_path / "bundle",
        tokenizer=tiny_tokenizers.byte_level_tokenizer(),
        chat_template=tiny_tokenizers.CHAT_TEMPLATE,
    )


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_opens_and_verifies_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.manifest.model.source == "example/tiny"
    assert bundle.path("step.onnx").read_bytes() == helpers.GRAPH
    assert Bundle.open(str(folder)) == bundle
    (folder / "notes.txt").write_text("mine")  # a file of the user's
    assert len(Bundle.open(folder).manifest.files) == 5
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    folder.rename(moved)
    assert Bundle.open(moved).path("step.onnx") == moved / "step.onnx"


def link(path: Path, target: Path) -> None:
    """Move a file to `target`, and leave a relative link to it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    path.symlink_to(os.path.relpath(target, path.parent))


def test_what_links_lead_to_is_verified(folder: Path, tmp_path: Path) -> None:
    """As in the Hub's cache, in a volume of Kubernetes, in an annex of git, and with a link to the folder."""
    whole = Bundle.open(folder).manifest
    for layout in ("blobs/{0}", "bundle/..data/{0}", "objects/{0}/{0}"):
        copy = Path(shutil.copytree(folder, tmp_path / layout[:2] / "bundle", symlinks=True))
        for path in list(copy.iterdir()):
            link(path, copy.parent / layout.format(path.name))
        (copy.parent / "latest").symlink_to("bundle", target_is_directory=True)
        assert Bundle.open(copy.parent / "latest").manifest == whole
        target = (copy / "step.onnx.data").resolve()
        os.link(target, tmp_path / f"{layout[:2]} hard")
        assert Bundle.open(copy).manifest == whole
        target.write_bytes(bytes(256))
        assert "step.onnx.data is damaged" in refused(copy)


def test_files_that_the_manifest_does_not_list_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("engines/cpu/stray.so", "new\nline", ".hidden"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert Bundle.open(folder).unlisted() == [".hidden", "engines/cpu/stray.so", "new\nline"]
    assert inspect.main([str(folder)]) == 0
    named = [line.split(" ")[1] for line in capsys.readouterr().err.splitlines()]
    assert named == ["'.hidden'", "'engines/cpu/stray.so'", r"'new\nline'"]


def test_sha256_of_a_file_longer_than_a_piece(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000  # 1.28 MB
    (tmp_path / "large").write_bytes(content)
    assert sha256(tmp_path / "large") == hashlib.sha256(content).hexdigest()


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def replaced(make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: (path.unlink(), make(path))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (rewrite(lambda content: content[:-1] + bytes([content[-1] ^ 1])), "damaged"),
    "shorter": (rewrite(lambda content: content[:-1]), r"\d bytes"),
    "longer": (rewrite(lambda content: content + b"x"), r"\d bytes"),
    "missing": (Path.unlink, "missing"),
    "a folder": (replaced(Path.mkdir), ""),
    "a pipe": (replaced(os.mkfifo), ""),
    "a link to another file": (replaced(lambda path: path.symlink_to("tokenizer.json")), r"\d bytes"),
    "a link to a device": (replaced(lambda path: path.symlink_to("/dev/zero")), ""),
    "a link to a folder": (replaced(lambda path: path.symlink_to(path.parent)), ""),
    "a link to itself": (replaced(lambda path: path.symlink_to(path.name)), ""),
    "a link to nothing": (replaced(lambda path: path.symlink_to("nowhere")), ""),
}
"""What happens to a file, and what must be named beside it."""


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(folder: Path, damage: str) -> None:
    (happens, named), name = DAMAGE[damage], "step.onnx.data"
    happens(folder / name)
    with pytest.raises(BundleError, match=f"{name}.*{named}"):
        Bundle.open(folder)
    assert name in Bundle.open(folder, verify=False).manifest.files


def test_a_file_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By its effect: permissions do not stop a test that runs as root.
    def fail(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(bundle_module, "sha256", fail)
    message = refused(folder)
    assert "step.onnx" in message
    assert "Permission denied" in message


# ── folders and manifests ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_path_without_a_bundle_is_refused(folder: Path, tmp_path: Path) -> None:
    assert "mara-export" in refused(tmp_path / "nothing")
    assert "mara-export" in refused(folder / "step.onnx")
    for name in ("x" * 5000, "nul\0l", "lone \ud800 surrogate"):
        refused(Path(name))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert MANIFEST_FILE in refused(empty)
    (empty / MANIFEST_FILE).mkdir()
    assert MANIFEST_FILE in refused(empty)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("content", "named"), [(b"\x80\x02}q", "cannot be read"), (b"[]", "schema_version"), (b"[" * 200_000, "JSON")]
)
def test_a_manifest_that_cannot_be_read_is_named(folder: Path, content: bytes, named: str, verify: bool) -> None:
    (folder / MANIFEST_FILE).write_bytes(content)
    message = refused(folder, verify=verify)
    assert named in message
    assert str(folder / MANIFEST_FILE) in message


@pytest.mark.parametrize("verify", [True, False])
def test_a_graph_outside_the_bundle_is_refused(folder: Path, verify: bool) -> None:
    outside = folder.parent / "outside.onnx"
    outside.write_bytes(b"elsewhere")
    for name in ("../outside.onnx", str(outside)):
        manifest = helpers.read_manifest(folder)
        manifest["files"][name] = {"size_bytes": 9, "sha256": hashlib.sha256(b"elsewhere").hexdigest()}
        manifest["step"]["file"] = name
        helpers.write_manifest(folder, manifest)
        assert "inside the bundle" in refused(folder, verify=verify)


def test_a_file_name_longer_than_file_systems_allow_is_refused(folder: Path) -> None:
    manifest = helpers.read_manifest(folder)
    manifest["files"]["x" * 5000] = {"size_bytes": 1, "sha256": "0" * 64}
    helpers.write_manifest(folder, manifest)
    refused(folder)
