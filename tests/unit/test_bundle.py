"""Opening and verifying a bundle: whatever is wrong with it is one BundleError of one line."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mara_runtime import bundle as bundle_module
from mara_runtime.bundle import Bundle, sha256
from mara_runtime.errors import BundleError
from mara_runtime.manifest import MANIFEST_FILE
from tests.unit import helpers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return helpers.make_bundle(
        tmp_path / "bundle", tokenizer=helpers.byte_level_tokenizer(), chat_template=helpers.CHAT_TEMPLATE
    )


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_opens_and_verifies(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.manifest.model.source == "example/tiny"
    assert bundle.path("step.onnx").read_bytes() == b"a graph"
    assert Bundle.open(str(folder)) == bundle
    assert len(bundle.manifest.files) == 4


def test_may_be_moved(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    folder.rename(moved)
    assert Bundle.open(moved).path("step.onnx") == moved / "step.onnx"


def test_files_that_the_manifest_does_not_know_are_left_alone(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    assert "notes.txt" not in Bundle.open(folder).manifest.files


def test_sha256_of_a_file_longer_than_a_piece(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000  # 1.28 MB
    (tmp_path / "large").write_bytes(content)
    assert sha256(tmp_path / "large") == hashlib.sha256(content).hexdigest()


NAMES = ["step.onnx", "step.onnx.data", "tokenizer.json", "chat_template.jinja"]


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    message = refused(folder)
    assert name in message
    assert "damaged" in message
    assert Bundle.open(folder, verify=False).manifest.files[name].size_bytes == len(content)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_too_short_or_too_long(folder: Path, name: str, change: int) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] if change < 0 else content + b"x")
    message = refused(folder)
    assert name in message
    assert f"has {len(content) + change} bytes where the manifest says {len(content)}" in message


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"{name} is missing" in refused(folder)


def test_a_folder_in_the_place_of_a_file(folder: Path) -> None:
    (folder / "step.onnx").unlink()
    (folder / "step.onnx").mkdir()
    assert "step.onnx" in refused(folder)


# ── no bundle at all ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_folder(tmp_path: Path) -> None:
    message = refused(tmp_path / "nothing")
    assert str(tmp_path / "nothing") in message
    assert "mara-export" in message


def test_a_file_instead_of_a_folder(folder: Path) -> None:
    assert "mara-export" in refused(folder / "step.onnx")


@pytest.mark.parametrize("name", ["x" * 5000, "nul\0l", "lone \ud800 surrogate"], ids=["long", "nul", "surrogate"])
def test_a_path_that_no_file_system_has(name: str) -> None:
    refused(Path(name))


def test_an_empty_folder(tmp_path: Path) -> None:
    assert f"it has no {MANIFEST_FILE}" in refused(tmp_path)


def test_a_folder_in_the_place_of_the_manifest(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).mkdir()
    assert MANIFEST_FILE in refused(tmp_path)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "is not valid manifest JSON"),
        (b"\x80\x02}q", "cannot be read"),
        (b'{"schema_version": 3, "model": "\xe9"}', "cannot be read"),
        (b"\xff\xfe{\x00}\x00", "cannot be read"),
        (b"[]", "schema_version"),
        (b'{"schema_version": 1}', "schema version 1"),
        (b'{"schema_version": 4}', "schema version 4"),
        (b'{"schema_version": 3}', "is missing"),
        (b"[" * 200_000, "JSON"),
    ],
    ids=["empty", "pickle", "latin-1", "utf-16", "list", "version", "later version", "no fields", "deep"],
)
@pytest.mark.parametrize("verify", [True, False])
def test_a_manifest_that_is_none(folder: Path, content: bytes, found: str, verify: bool) -> None:
    (folder / MANIFEST_FILE).write_bytes(content)
    message = refused(folder, verify=verify)
    assert found in message
    assert str(folder / MANIFEST_FILE) in message


# ── manifests that mean harm ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["../outside.onnx", "sub/../../outside.onnx", "ABSOLUTE", "..\\outside.onnx"])
def test_a_graph_outside_the_bundle(folder: Path, name: str, verify: bool) -> None:
    outside = folder.parent / "outside.onnx"
    outside.write_bytes(b"elsewhere")
    (folder / "sub").mkdir()
    name = str(outside) if name == "ABSOLUTE" else name
    manifest = helpers.read_manifest(folder)
    manifest["files"][name] = {"size_bytes": 9, "sha256": hashlib.sha256(b"elsewhere").hexdigest()}
    manifest["step"]["file"] = name
    helpers.write_manifest(folder, manifest)
    assert "does not lie inside the bundle" in refused(folder, verify=verify)


@pytest.mark.parametrize("name", ["step.onnx", "tokenizer.json", "chat_template.jinja"])
def test_a_link_that_leads_out(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    (folder / name).rename(outside)  # the same content, so that size and checksum agree
    (folder / name).symlink_to(outside)
    message = refused(folder)
    assert name in message
    assert "link" in message


def test_a_linked_folder_that_leads_out(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / "engines").symlink_to(outside, target_is_directory=True)
    helpers.add_file(folder, "engines/plan.bin", b"plan")
    assert "link" in refused(folder)


def test_a_link_inside_the_bundle_and_to_the_bundle_are_fine(folder: Path, tmp_path: Path) -> None:
    (folder / "step.onnx.data").rename(folder / "weights")
    (folder / "step.onnx.data").symlink_to("weights")
    (tmp_path / "latest").symlink_to(folder, target_is_directory=True)
    assert Bundle.open(tmp_path / "latest").manifest == Bundle.open(folder).manifest


@pytest.mark.parametrize("target", ["step.onnx", "nowhere"], ids=["to itself", "to nothing"])
def test_a_link_to_nothing(folder: Path, target: str) -> None:
    (folder / "step.onnx").unlink()
    (folder / "step.onnx").symlink_to(target)
    assert "step.onnx" in refused(folder)


@pytest.mark.parametrize("size", [-1, -7, 10**30])
def test_a_size_that_no_file_has(folder: Path, size: int) -> None:
    manifest = helpers.read_manifest(folder)
    manifest["files"]["step.onnx"]["size_bytes"] = size
    helpers.write_manifest(folder, manifest)
    message = refused(folder)
    assert "step.onnx" in message
    assert str(size) in message


@pytest.mark.parametrize("checksum", ["", "0" * 64, "x" * 64, "\n"])
def test_a_checksum_that_is_none(folder: Path, checksum: str) -> None:
    manifest = helpers.read_manifest(folder)
    manifest["files"]["step.onnx"]["sha256"] = checksum
    helpers.write_manifest(folder, manifest)
    assert "step.onnx" in refused(folder)


def test_a_file_name_longer_than_file_systems_allow(folder: Path) -> None:
    manifest = helpers.read_manifest(folder)
    manifest["files"]["x" * 5000] = {"size_bytes": 1, "sha256": "0" * 64}
    helpers.write_manifest(folder, manifest)
    refused(folder)


def test_a_named_pipe_is_not_read(folder: Path) -> None:
    (folder / "step.onnx").unlink()
    os.mkfifo(folder / "step.onnx")
    assert "step.onnx" in refused(folder)


def test_a_file_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By its effect: permissions do not stop a test that runs as root.
    def fail(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(bundle_module, "sha256", fail)
    message = refused(folder)
    assert "step.onnx" in message
    assert "Permission denied" in message


def test_deep_nesting_where_a_text_belongs(folder: Path) -> None:
    manifest = helpers.read_manifest(folder)
    manifest["model"]["source"] = "NEST"
    for depth in (300, 900, 980, 5000):
        text = json.dumps(manifest).replace('"NEST"', "[" * depth + "]" * depth)
        (folder / MANIFEST_FILE).write_text(text)
        refused(folder)
