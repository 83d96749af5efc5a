"""Signatures of bundles, compared with OpenSSL's."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mara_deploy.commands import inspect, run
from mara_deploy.commands import sign as command
from mara_runtime.bundle import Bundle
from mara_runtime.decoder import AlignedDecoder
from mara_runtime.errors import BundleError, MaraError, OptionError
from mara_runtime.manifest import MANIFEST_FILE
from mara_runtime.signature import SIGNATURE_FILE, new_key, sign
from tests.unit import helpers

pytest.importorskip("cryptography", reason="signatures need the package cryptography")
OPENSSL = shutil.which("openssl")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return helpers.make_bundle(tmp_path / "bundle")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    new_key(tmp_path / "mine.pem")
    return tmp_path / "mine.pem"


def public(key: Path) -> Path:
    return key.with_name(f"{key.name}.pub")


def refused(folder: Path, key: Path, kind: type[MaraError] = BundleError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        Bundle.open(folder, require_signature=key, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_only_what_the_owner_of_the_key_signed_is_opened(folder: Path, key: Path, tmp_path: Path) -> None:
    assert "no signature" in refused(folder, public(key))
    sign(folder, key)
    assert Bundle.open(folder, require_signature=public(key)) == Bundle.open(folder)
    assert Bundle.open(folder).unlisted() == []
    new_key(tmp_path / "other.pem")
    assert "is not the one that the owner" in refused(folder, tmp_path / "other.pem.pub")
    signature = (folder / SIGNATURE_FILE).read_bytes()
    for wrong in (b"", signature[:-1], signature + b"x", bytes(64)):
        (folder / SIGNATURE_FILE).write_bytes(wrong)
        refused(folder, public(key))
    (folder / SIGNATURE_FILE).write_bytes(signature)
    manifest = helpers.read_manifest(folder)
    manifest["max_context"] += 1
    helpers.write_manifest(folder, manifest)  # with a checksum that fits
    assert Bundle.open(folder).manifest.max_context == 33
    assert "mara-build" in refused(folder, public(key))
    sign(folder, key)
    Bundle.open(folder, require_signature=public(key))


def test_nothing_is_read_before_the_signature(folder: Path, key: Path) -> None:
    sign(folder, key)
    (folder / MANIFEST_FILE).write_bytes(b"{")
    assert "is not the one that the owner" in refused(folder, public(key))


def test_a_file_that_was_changed_is_found_by_the_signed_checksum(folder: Path, key: Path) -> None:
    sign(folder, key)
    (folder / "step.onnx.data").write_bytes(bytes(256))
    assert "damaged" in refused(folder, public(key))
    assert "--no-verify" in refused(folder, public(key), OptionError, verify=False)


def test_a_key_that_cannot_be_used_is_named(folder: Path, key: Path, tmp_path: Path) -> None:
    sign(folder, key)
    (tmp_path / "garbage").write_bytes(b"-----BEGIN PUBLIC KEY-----\nxxxx\n-----END PUBLIC KEY-----\n")
    for wrong in (key, tmp_path / "nothing", tmp_path / "garbage", tmp_path, Path("/dev/zero")):
        assert str(wrong) in refused(folder, wrong, OptionError)
    with pytest.raises(OptionError, match="not a private Ed25519 key"):
        sign(folder, public(key))
    with pytest.raises(OptionError, match="open already"):
        AlignedDecoder(Bundle.open(folder), require_signature=public(key))


def test_a_key_is_its_owners_alone_and_replaces_none(key: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes(), public(key).read_bytes()
    for path in (key, public(key)):
        with pytest.raises(MaraError, match=f"{path} exists already"):
            new_key(path)
    with pytest.raises(MaraError, match="cannot write"):
        new_key(key / "below a file")
    assert before == (key.read_bytes(), public(key).read_bytes())
    assert len(list(key.parent.iterdir())) == 2


@pytest.mark.skipif(OPENSSL is None, reason="there is no openssl")
def test_openssl_makes_the_same_keys_and_signatures(folder: Path, key: Path, tmp_path: Path) -> None:
    def openssl(*arguments: object) -> None:
        subprocess.run([str(OPENSSL), *map(str, arguments)], check=True, capture_output=True)

    sign(folder, key)
    files = ("-in", folder / MANIFEST_FILE, "-sigfile", folder / SIGNATURE_FILE)
    openssl("pkeyutl", "-verify", "-pubin", "-inkey", public(key), "-rawin", *files)
    theirs = tmp_path / "theirs.pem"
    openssl("genpkey", "-algorithm", "ed25519", "-out", theirs)
    openssl("pkey", "-in", theirs, "-pubout", "-out", public(theirs))
    sign(folder, theirs)
    Bundle.open(folder, require_signature=public(theirs))
    rsa = tmp_path / "rsa.pem"
    openssl("genpkey", "-algorithm", "rsa", "-out", rsa)
    with pytest.raises(OptionError, match="not a private Ed25519 key"):
        sign(folder, rsa)


def test_the_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "key.pem"
    assert command.main(["--new-key", str(key)]) == 0
    check = ["--require-signature", str(public(key))]
    assert inspect.main([str(folder), *check]) == 2
    assert run.main([str(folder), *check, "--input-ids", "1"]) == 2
    assert capsys.readouterr().err.count("has no signature") == 2
    assert command.main([str(folder), "--key", str(key)]) == 0
    assert inspect.main([str(folder), *check]) == 0
    assert "intact" in capsys.readouterr().out


def test_without_the_package_only_signatures_are_refused(
    folder: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    Bundle.open(folder)
    assert "pip install 'mara-deploy[sign]'" in refused(folder, public(key), MaraError)
