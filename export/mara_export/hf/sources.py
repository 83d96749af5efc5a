"""Where models and files come from: a folder, the Hugging Face Hub, or its local cache."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mara_export.errors import ModelError
from mara_export.hf.catalogue import ALIASES, hub_id_of
from mara_runtime.errors import first_line

_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
_UNWANTED = ["original/*", "onnx/*", "consolidated*"]
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OF_ADAPTER = [ADAPTER_CONFIG, ADAPTER_WEIGHTS, "tokenizer_config.json", "*.jinja"]


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine and how to name it to others."""

    folder: Path
    name: str
    """Hub id, or the folder's own name; never a path of this machine"""
    revision: str | None
    """commit of a Hub model"""


def resolve_model(
    model: str, vet: Callable[[ModelSource], object] | None = None, revision: str | None = None
) -> ModelSource:
    """Resolve an alias, a Hub id or a folder. A folder of that name wins; a Hub model is fetched unless it is cached.

    vet: called when only the configuration is there, to reject it before gigabytes of weights are fetched;
    revision: commit of a Hub model, None for the newest. Raises ModelError.
    """
    folder = local_path(model)
    if folder is not None and folder.is_dir():
        _refuse_adapter(folder, folder.resolve().name)
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} is not a Hugging Face model folder: it has no config.json")
        if not any(folder.glob("*.safetensors")):
            raise ModelError(f"{folder} has no .safetensors weights; other formats are not loaded")
        return ModelSource(folder, folder.resolve().name, None)
    hub_id = hub_id_of(model)
    if not is_hub_id(hub_id):
        raise ModelError(
            f"there is no model {model!r}: give a folder, a Hub id (owner/name), or one of " + ", ".join(ALIASES)
        )

    if vet is not None:
        snapshot = _snapshot(hub_id, model, ["config.json", ADAPTER_CONFIG], revision)
        _refuse_adapter(snapshot, hub_id)
        if (snapshot / "config.json").is_file():
            vet(ModelSource(snapshot, hub_id, snapshot.name))
    snapshot = _snapshot(hub_id, model, _WANTED, revision)
    _refuse_adapter(snapshot, hub_id)
    if not (snapshot / "config.json").is_file() or not any(snapshot.glob("*.safetensors")):
        raise ModelError(f"{hub_id} is not complete here: config.json or .safetensors weights are missing")
    return ModelSource(snapshot, hub_id, snapshot.name)


def resolve_adapter(adapter: str, revision: str | None = None) -> ModelSource:
    """Resolve a Hub id or a folder with a LoRA adapter. A folder of that name wins. revision: commit, None: the newest.

    Raises ModelError.
    """
    folder = local_path(adapter)
    if folder is not None and folder.is_dir():
        source = ModelSource(folder, folder.resolve().name, None)
    elif is_hub_id(adapter):
        snapshot = _snapshot(adapter, adapter, _OF_ADAPTER, revision)
        source = ModelSource(snapshot, adapter, snapshot.name)
    else:
        raise ModelError(f"adapter not found: {adapter!r} is neither a folder nor a Hub id (owner/name)")
    if not (source.folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{source.name} holds no adapter: it has no {ADAPTER_CONFIG}")
    if not (source.folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"{source.name} has no {ADAPTER_WEIGHTS}; pickles (adapter_model.bin) are not loaded: load it with PEFT "
            "where you trust it, and save_pretrained writes that file"
        )
    return source


def _refuse_adapter(folder: Path, name: str) -> None:
    """Whether transformers loads an adapter depends on what else is installed."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{name} holds an adapter ({ADAPTER_CONFIG}): name its base with --model, and the adapter with --lora"
        )


def is_hub_id(name: str) -> bool:
    """Has a name the form of a Hub id, owner/name? (Not a path that begins with a dot.)"""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def local_path(name: str) -> Path | None:
    """The file or folder of that name on this machine, `~` expanded; None if there is none."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # longer than paths may be, an unknown user, a NUL
        return None


def resolve_file(hub_id: str, file: str) -> Path:
    """A single file of a Hub repository, fetched unless it is cached. Raises ModelError."""
    if any(part in ("", ".", "..") for part in file.split("/")):
        raise ModelError(f"{hub_id}:{file}: a file of a repository is named by its path inside it")
    path = _snapshot(hub_id, f"{hub_id}:{file}", [file]) / file
    if not path.is_file():
        raise ModelError(f"{hub_id}:{file}: the repository has no such file, or it is not in the Hub cache")
    return path


def _snapshot(hub_id: str, asked: str, patterns: list[str], revision: str | None = None) -> Path:
    """The Hub client's errors become one line with a remedy."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=_UNWANTED))
    except errors.GatedRepoError:
        reason = "it is gated: accept its licence on the Hub, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "there is no such folder here and no such repository on the Hub"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = "there is no such folder here, it is not in the Hub cache, and the Hub cannot be reached"
    except (errors.HFValidationError, OSError) as error:  # all others of an HTTP client are OSErrors
        reason = first_line(error)
    name = asked if asked.startswith(hub_id) else f"{asked} ({hub_id})"
    raise ModelError(f"{name}: {reason}")
