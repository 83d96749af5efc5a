"""Loading a Hugging Face checkpoint from this machine, complete or not at all."""

from __future__ import annotations

import codecs
import fnmatch
import json
from collections.abc import Mapping, Sequence
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from mara_export.errors import ModelError
from mara_export.hf.families import FAMILIES
from mara_export.hf.multimodal import TEXT_NAMES, has_text_part, text_config, text_name, text_settings
from mara_export.hf.packed import StoredWeights
from mara_export.hf.packing import Packing, packing_of
from mara_export.hf.rope import check_rope, complete_rope, kept_together, missing_rope
from mara_export.hf.sources import ModelSource
from mara_export.hf.weights import empty_model, fill_model, placement
from mara_runtime.errors import OptionError, first_line
from mara_runtime.files import read_file

_GENERATION, _INDEX, _CUSTOM_GENERATE = "generation_config.json", "model.safetensors.index.json", "custom_generate"
_HEAD = "lm_head.weight"
_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_MOST_BYTES = 1 << 26
"""Of a configuration."""
_FLOATS = ("F64", "F32", "F16", "BF16")
_RENAMES = transformers.__version__ >= "5"
"""Version 4 takes weights none of which is `model.…` in the file for those of a model without a head."""
_NO_VALUE = "meta device"
"""In accelerate's message for a weight that was not in the files."""
_MAX_MESSAGE = 300
"""Length at which messages of other libraries are cut: some list every model there is."""


def silence_transformers() -> None:
    """Turn off its warnings and progress bars for this process, and those of accelerate, which it loads with."""
    getLogger("accelerate").setLevel(ERROR)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def from_pretrained(kind: Any, source: ModelSource, *, part: str = "", **options: Any) -> Any:
    """Call `kind.from_pretrained` and turn its errors into one line. Code in a model's folder is never run.

    part: of the model, for messages. Raises ModelError.
    """
    _check_folder(source)
    try:
        return kind.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:
        subject = f"the {part} of {source.name}" if part else source.name
        raise ModelError(f"{subject} cannot be loaded: {_why(error, source)}") from error


def load_weights(kind: Any, source: ModelSource, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """A model with the weights of a folder, from files that hold nothing else, and what transformers says of them.

    Raises ModelError, also for a weight of another shape.
    """
    options |= {"output_loading_info": True, "use_safetensors": True}  # never a pickle
    model, loading = from_pretrained(kind, source, ignore_mismatched_sizes=True, **options)
    mismatched = sorted(key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"])  # 5 adds shapes
    _check_shapes(source, {name: [*model.get_parameter(name).shape] for name in mismatched})
    return model, loading


def _check_shapes(source: ModelSource, mismatched: Mapping[str, list[int]]) -> None:
    """Reject weights of other shapes. mismatched: those by config.json."""
    if mismatched:
        raise ModelError(
            f"{source.name} cannot be loaded: size mismatch for {some([*mismatched])}: "
            f"{next(iter(mismatched.values()))} by config.json, which is not as it is stored"
        )


def _check_folder(source: ModelSource) -> None:
    """Reject a folder that runs code of its own in spite of `trust_remote_code`, or reads files from elsewhere."""
    folder, name = source.folder, source.name
    if (folder / _CUSTOM_GENERATE).exists():
        raise ModelError(
            f"{name} has a folder {_CUSTOM_GENERATE}, whose code transformers would run: remove the folder"
        )
    inside = folder.resolve(), (folder.parent.parent / "blobs").resolve()  # where the Hub's cache keeps its files
    for path in folder.iterdir():
        target = path.resolve()
        if path.suffix != ".safetensors" and path.is_symlink() and not any(map(target.is_relative_to, inside)):
            raise ModelError(f"{name}: its {path.name} is a link to outside the folder: copy the file it stands for")
        if target.exists() and not target.is_file() and not target.is_dir():
            raise ModelError(f"{name}: its {path.name} is not a regular file")
        if path.suffix in (".json", ".jinja") and target.is_file():
            with target.open("rb") as file:
                if file.read(3).startswith(_BYTE_ORDER_MARKS):
                    raise ModelError(f"{name}: its {path.name} begins with a byte order mark: save it as UTF-8 without")
    index = read_json(folder / _INDEX)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    for shard in set(shards.values()) if isinstance(shards, dict) else ():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(
                f"{name}: its {_INDEX} names {str(shard)[:80]!r}, which is not a .safetensors file in the folder"
            )


def _why(error: Exception, source: ModelSource) -> str:
    """One line: the damaged file if there is one, else the error, cut to a readable length."""
    shards = sorted(source.folder.glob("*.safetensors")) if isinstance(error, SafetensorError) else []
    for path in shards:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as damage:
            return f"{path.name} is damaged ({first_line(damage)}): fetch or copy it again"
    text = first_line(error)
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]} …"


def load_config(source: ModelSource) -> Any:
    """The model's configuration. Raises ModelError."""
    values = read_json(source.folder / "config.json")
    if isinstance(values, dict) and not values.get("model_type"):  # transformers would guess from the folder's name
        raise ModelError(
            f"{source.name}: its config.json has no model_type, which names the architecture; tested are "
            + ", ".join(FAMILIES)
        )
    return read_config(source)


def read_config(source: ModelSource, whole: bool = False) -> Any:
    """The configuration of a model of any architecture, saved by any transformers. Raises ModelError.

    whole: also of a model that takes more than text, not of its text part.
    """
    said = _said(source, whole)
    check_rope(said, source.name)
    read_packing(source)
    config = _config(source, whole)
    complete_rope(config, said, source.name)
    if (source.folder / _GENERATION).is_file() and "eos_token_id" not in said:
        config.eos_token_id = None  # not the default of its class
    return config


def reference_config(source: ModelSource) -> Any:
    """The configuration as transformers itself reads it, for the gate: `read_config` has no part in it.

    What only transformers 5 says is handed over to version 4 under its old name; a value under that name stays. Raises
    ModelError.
    """
    config = _config(source)
    missing = {} if kept_together(config) else missing_rope(_said(source))
    return _config(source, **missing) if missing else config


def read_packing(source: ModelSource) -> Packing | None:
    """How a checkpoint's matrices are packed; None: they are not. Raises ModelError for what is not read."""
    return packing_of(_said(source), source.name)


def open_stored(source: ModelSource) -> StoredWeights:
    """The weights in a checkpoint's files. Raises ModelError, also for a file that is damaged."""
    try:
        rename = text_name if takes_more_than_text(source) else str
        return StoredWeights(source.folder, read_packing(source), rename)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{source.name} cannot be loaded: {_why(error, source)}") from error


def takes_more_than_text(source: ModelSource) -> bool:
    """Whether it is a checkpoint of a model that takes images or sound, too, of which the text part is read."""
    return has_text_part(_said(source, whole=True))


def _said(source: ModelSource, whole: bool = False) -> dict[str, Any]:
    """What config.json says of the text part; nothing if it is no JSON object, which transformers refuses."""
    values = read_json(source.folder / "config.json")
    values = values if isinstance(values, dict) else {}
    return values if whole else text_settings(values)


def _config(source: ModelSource, whole: bool = False, **values: Any) -> Any:
    """As transformers reads it, of a model of floats: packed matrices are not its affair."""
    part, said = takes_more_than_text(source) and not whole, _said(source)
    if part and said["model_type"] not in CONFIG_MAPPING:
        raise ModelError(
            f"{source.name}: its text part is {said['model_type']!r}, which this version of transformers does not have"
        )
    config = from_pretrained(AutoConfig, source, **({"text_config": values} if part and values else values))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return text_config(config, said) if part else config


def load_model(
    source: ModelSource,
    attention: str = "eager",
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    ignore_weights: Sequence[str] = (),
    streamed: Path | None = None,
) -> Any:
    """The LLM, ready to run. attention: a name that transformers knows; config: default as `read_config` reads it;
    ignore_weights: patterns of surplus weights to leave out; streamed: a folder for what transformers converts, if
    weights shall stay in their files, from which each module reads its own whenever it runs.

    Rejects a checkpoint with missing weights, which transformers would initialise at random, and one with unexpected
    weights, which it would ignore. Raises ModelError, and OptionError for a pattern that no surplus weight has.
    """
    _check_generation_config(source)
    config = read_config(source) if config is None else config
    stored = open_stored(source)
    _check_floats(source, stored)
    by_transformers = stored.packing is None and (_RENAMES or not takes_more_than_text(source))
    load = _load_floats if by_transformers else _load_filled
    model, missing, surplus = load(source, stored, config, attention, dtype, streamed)
    if missing:
        raise ModelError(f"{source.name} is not a whole causal LM: it lacks {some(missing)}")
    surplus = [key for key in surplus if not key.endswith("rotary_emb.inv_freq")]
    for pattern in ignore_weights:
        if not fnmatch.filter(surplus, pattern):
            has = f"those of {source.name} are {some(surplus)}" if surplus else f"{source.name} has none"
            raise OptionError(f"--ignore-weights is {pattern!r}, which matches no surplus weight; {has}")
    if unknown := [key for key in surplus if not any(fnmatch.fnmatchcase(key, pattern) for pattern in ignore_weights)]:
        raise ModelError(
            f"{source.name} has weights that {model.config.model_type} has no place for: {some(unknown)}; leave out "
            f"those that it works without, a value head say, with --ignore-weights '{unknown[0].partition('.')[0]}*'"
        )
    _check_head(source, stored, model)
    return model.eval()


_Loaded = tuple[Any, list[str], list[str]]
"""A model, and the names of missing and of surplus weights."""


def _load_floats(
    source: ModelSource, stored: StoredWeights, config: Any, attention: str, dtype: torch.dtype, streamed: Path | None
) -> _Loaded:
    """By transformers."""
    options: dict[str, Any] = {"config": config, "dtype": dtype, "attn_implementation": attention}
    if takes_more := takes_more_than_text(source):
        options["key_mapping"] = TEXT_NAMES
    expected: set[str] = set()
    on_disk: set[str] = set()
    if streamed is not None:
        empty = empty_model(config)
        places, expected = placement(empty), {name for name, _ in empty.named_parameters()}
        options |= {"device_map": places, "offload_folder": str(streamed)}
        on_disk = {name for name, device in places.items() if device == "disk"}
    try:
        model, loading = load_weights(AutoModelForCausalLM, source, **options)
    except ModelError as error:
        if _NO_VALUE in str(error) and (absent := expected - {*stored}):
            return None, sorted(absent), []
        raise
    unread = [  # tied to a missing one
        name for name, weight in model.named_parameters() if weight.is_meta and name.rpartition(".")[0] not in on_disk
    ]
    surplus = [key for key in loading["unexpected_keys"] if not takes_more or text_name(key)]
    return model, sorted({*loading["missing_keys"], *unread}), sorted(surplus)


def _load_filled(
    source: ModelSource, stored: StoredWeights, config: Any, attention: str, dtype: torch.dtype, streamed: Path | None
) -> _Loaded:
    """By names in the files: packed matrices, which transformers leaves to kernels for GPUs, as floats; text parts."""
    model = empty_model(config, attention, dtype)
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers()) if name in wanted}
    shapes = {name: wanted[name] for name in sorted(own & {*stored})}
    _check_shapes(source, {name: [*shape] for name, shape in shapes.items() if stored.shape(name) != shape})
    fill_model(model, stored, in_memory=streamed is None)
    if (source.folder / _GENERATION).is_file():
        model.generation_config = from_pretrained(GenerationConfig, source)
    surplus = sorted(name for name in stored if name not in wanted and not stored.is_idle(name))
    return model, sorted(own - {*stored}), surplus


def _check_head(source: ModelSource, stored: StoredWeights, model: Any) -> None:
    """Reject a head of its own, or one alone, in a model whose configuration says that the head is the embedding."""
    table = model.get_input_embeddings().weight
    if model.get_output_embeddings().weight is not table and not model.config.tie_word_embeddings:
        return
    (name,) = (name for name, weight in model.named_parameters() if weight is table)
    if _HEAD in stored and not torch.equal(stored[_HEAD].to(table), table):
        raise ModelError(
            f"{source.name}: its {_HEAD} is not its embedding, though config.json has tie_word_embeddings: set that to "
            "false, or remove the weight"
        )
    if _HEAD in stored and not any(map(name.endswith, stored)):  # transformers 5 takes the one for the other
        raise ModelError(f"{source.name} is not a whole causal LM: it lacks {name}")


def _check_floats(source: ModelSource, stored: StoredWeights) -> None:
    """Reject weights, but for packed ones, that are stored as anything but floating-point numbers."""
    for name in stored:
        if name.endswith("weight") and not stored.is_packed(name) and (dtype := stored.dtype(name)) not in _FLOATS:
            raise ModelError(
                f"{source.name} is quantised: its {name} is stored as {dtype}; export the checkpoint that it was made "
                "from, in float16, bfloat16 or float32"
            )


def some(names: Sequence[str]) -> str:
    """Names for a message: the first ones, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_generation_config(source: ModelSource) -> None:
    """Transformers ignores a file that it cannot read; answers would then not end where they should."""
    if (source.folder / _GENERATION).is_file() and not isinstance(read_json(source.folder / _GENERATION), dict):
        raise ModelError(
            f"{source.name}: its {_GENERATION}, which lists the tokens that end an answer, is not a JSON object: "
            "correct it, or remove it to use those of config.json"
        )


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if it cannot be read."""
    try:
        return json.loads(read_file(path, _MOST_BYTES).decode())
    except (OSError, ValueError, RecursionError):
        return None


def eos_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends an answer: the generation config's list, else the model's, else the tokenizer's.

    Raises ModelError for an id outside the vocabulary.
    """
    holders = (model.generation_config, model.config, tokenizer)
    value = next((ids for holder in holders if (ids := getattr(holder, "eos_token_id", None)) is not None), ())
    ids = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    size = model.config.vocab_size
    for token in ids:
        if type(token) is not int or not 0 <= token < size:
            raise ModelError(
                f"the model's eos_token_id is {token!r}, which is not in its vocabulary, 0 to {size - 1}: correct its "
                "generation_config.json, or config.json where there is none"
            )
    return ids
