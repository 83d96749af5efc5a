"""Signatures: who wrote a bundle's manifest, and by the checksums in it every other file.

`manifest.sig` is the Ed25519 signature (RFC 8032) of the bytes of `manifest.json`. Keys are PEM files as OpenSSL writes
them. Only who signs or asks for a signature needs the package cryptography.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mara_runtime.errors import BundleError, MaraError, OptionError
from mara_runtime.files import read_file, write_atomic, writing
from mara_runtime.manifest import MANIFEST_FILE

SIGNATURE_FILE = "manifest.sig"
_MOST_BYTES = 1 << 16
"""Of a key or a signature."""


def new_key(path: Path) -> Path:
    """Make a key that signs, which its owner alone can read, and beside it PATH.pub, which checks. Returns the second.

    Raises MaraError, also where one of them exists.
    """
    _, serialization, ed25519 = _cryptography()
    key, pem = ed25519.Ed25519PrivateKey.generate(), serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    beside = path.with_name(f"{path.name}.pub")
    for file in (path, beside):
        if os.path.lexists(file):
            raise OptionError(f"{file} exists already: remove it, or choose another --new-key")
    for file, content, mode in ((path, private, 0o600), (beside, public, 0o644)):
        with writing(file), os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as opened:
            opened.write(content)
    return beside


def sign(folder: Path, key: Path) -> None:
    """Sign a bundle's manifest, or sign it again. key: a private one. Raises MaraError."""
    private = _key(key, "private")
    with writing(folder / SIGNATURE_FILE):
        write_atomic(folder / SIGNATURE_FILE, private.sign((folder / MANIFEST_FILE).read_bytes()))


def check_signature(manifest: bytes, folder: Path, key: Path) -> None:
    """Raise BundleError unless the manifest of `folder` was signed by the owner of `key`, a public one."""
    public = _key(key, "public")
    try:
        signature = read_file(folder / SIGNATURE_FILE, _MOST_BYTES)
    except OSError as error:
        raise BundleError(
            f"{folder} has no signature: {SIGNATURE_FILE} cannot be read ({error.strerror}); sign it with mara-sign"
        ) from None
    exceptions, _, _ = _cryptography()
    try:
        public.verify(signature, manifest)
    except exceptions.InvalidSignature:
        raise BundleError(
            f"the manifest of {folder} is not the one that the owner of {key} signed; if mara-build or "
            "mara-agent has changed it, sign it again with mara-sign"
        ) from None


def _key(path: Path, kind: str) -> Any:
    """A key from a file. kind: private or public. Raises OptionError."""
    exceptions, serialization, ed25519 = _cryptography()
    try:
        content = read_file(path, _MOST_BYTES)
        if kind == "private":
            key, expected = serialization.load_pem_private_key(content, None), ed25519.Ed25519PrivateKey
        else:
            key, expected = serialization.load_pem_public_key(content), ed25519.Ed25519PublicKey
    except OSError as error:
        raise OptionError(f"the key {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, exceptions.UnsupportedAlgorithm):  # TypeError: it has a password
        key, expected = None, ed25519.Ed25519PublicKey
    if not isinstance(key, expected):
        raise OptionError(f"{path} is not a {kind} Ed25519 key in PEM form without a password: see mara-sign --help")
    return key


def _cryptography() -> tuple[Any, Any, Any]:
    try:
        from cryptography import exceptions
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError:
        raise MaraError("signatures need the package cryptography: pip install 'mara-deploy[sign]'") from None
    return exceptions, serialization, ed25519
