"""`mara-inspect --memory`: what a model or a bundle takes, by precision and context, and which Jetson has it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

from mara_deploy import memory
from mara_deploy.memory import CONTEXTS, JETSONS_GB, SYSTEM_BYTES, Memory, Setting
from mara_export.errors import ModelError
from mara_export.hf.families import (
    ALIASES,
    KNOWN_MODELS,
    Decoder,
    decoder_of,
    decoder_sizes,
    hub_id_of,
    longest_context,
)
from mara_export.hf.sources import local_path, resolve_file
from mara_export.targets import COLUMN, TARGETS
from mara_runtime.bundle import Bundle
from mara_runtime.errors import OptionError
from mara_runtime.manifest import MANIFEST_FILE

Row = tuple[Setting, Memory]
OF_A_MODEL = {
    "--precision": "precision",
    "--lowering": "lowering",
    "--max-candidates": "max_candidates",
    "--block-size": "block_size",
}
"""Options that a bundle has answered, and their attributes."""


def show(args: argparse.Namespace) -> None:
    """Print the table, or with --json one object."""
    folder = local_path(args.bundle)
    if folder is not None and (folder / MANIFEST_FILE).is_file():
        title, rows = of_bundle(Bundle.open(folder), args)
    else:
        title, rows = of_model(args.bundle, args)
    if args.json:
        found = [{**asdict(setting), "slots": setting.slots, **sizes.to_json()} for setting, sizes in rows]
        print(json.dumps({"model": title, "system_bytes": SYSTEM_BYTES, "settings": found}, ensure_ascii=False))
    else:
        print("\n".join([title, "", *table(rows), "", *NOTES]))


def of_model(name: str, args: argparse.Namespace) -> tuple[str, list[Row]]:
    """An alias, a Hub id or a folder, in every precision of the target, or in the one asked for."""
    target = "tensorrt" if args.target is None else args.target
    if target not in TARGETS:
        raise OptionError(f"--target is {target!r}; it must be one of {', '.join(TARGETS)}")
    if args.block_size is not None and args.precision is None:
        raise OptionError(f"--block-size is {args.block_size}; say of which --precision, int8 or int4")
    hub_id, model, most = find(name)
    contexts = args.context or sorted({min(context, most or context) for context in CONTEXTS})
    for context in contexts:
        if most is not None and context > most:
            raise OptionError(f"--context is {context}; {hub_id} was made for at most {most} tokens")
    precisions = TARGETS[target].precisions if args.precision is None else (args.precision,)
    rows = [
        (setting, memory.estimate(model, setting))
        for precision in precisions
        for context in contexts
        for setting in [_setting(args, target, precision, context)]
    ]
    return f"{hub_id} ({model.parameters / 1e9:.2f} · 10⁹ parameters) on {target}", rows


def of_bundle(bundle: Bundle, args: argparse.Namespace) -> tuple[str, list[Row]]:
    """A bundle as it is: the sizes of its own files in place of estimates."""
    manifest = bundle.manifest
    target, step = manifest.targets[0] if args.target is None else args.target, manifest.step
    for flag, value in OF_A_MODEL.items():
        if (given := getattr(args, value)) is not None:
            raise OptionError(f"{flag} is {given!r}, but {bundle.folder} is a bundle already: leave it out")
    if target not in manifest.targets:
        raise OptionError(f"--target is {target!r}; {bundle.folder} was made for {', '.join(manifest.targets)}")
    stored = sum(e.size_bytes for name, e in manifest.files.items() if name.startswith(step.file))
    block = (step.quantisation or {}).get("block_size")

    def setting(context: int) -> Setting:
        return Setting(target, step.precision, context, manifest.max_candidates, step.lowering, block)

    whole = setting(manifest.max_context)
    facts = manifest.model
    model = decoder_of(facts.shape, facts.architecture, facts.intermediate_size, facts.tied)
    beyond = memory.engine_memory_bytes(model, whole) - memory.weight_bytes(model, whole)
    built = {e.slots: manifest.files[e.file].size_bytes for e in manifest.engines if e.target == target}
    contexts = args.context or sorted({*(c for c in CONTEXTS if c < manifest.max_context), manifest.max_context})
    rows = []
    for context in contexts:
        if context > manifest.max_context:
            raise OptionError(f"--context is {context}; {bundle.folder} was made for {manifest.max_context} tokens")
        one = setting(context)
        engine = next((size for slots, size in sorted(built.items()) if slots >= one.slots), stored + beyond)
        rows.append((one, memory.estimate(model, one, engine)))
    return f"{bundle.folder}: {manifest.model.source} on {target}", rows


def find(name: str) -> tuple[str, Decoder, int | None]:
    """What others call the model of that name, its sizes by its configuration alone, and the tokens it was made for.

    The last is None where the configuration does not say. Raises ModelError.
    """
    folder = local_path(name)
    if name == "demo":
        from mara_deploy.demo import MODEL_FOLDER

        folder = Path(MODEL_FOLDER)
    hub_id = hub_id_of(name)
    if folder is None and hub_id in KNOWN_MODELS:
        return hub_id, KNOWN_MODELS[hub_id].decoder, KNOWN_MODELS[hub_id].context
    if folder is None:
        if hub_id.count("/") != 1:
            raise ModelError(
                f"there is no bundle or model {name!r}: give a folder, a Hub id (owner/name), or one of "
                + ", ".join(ALIASES)
            )
        path = resolve_file(hub_id, "config.json")
    else:
        path, hub_id = folder / "config.json", folder.resolve().name
        if not path.is_file():
            raise ModelError(f"{folder} is neither a bundle nor a Hugging Face model: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a Hugging Face configuration")
    decoder = decoder_sizes(config, hub_id)
    try:  # a configuration without the switch has it off, in the architectures that have one
        most = longest_context(SimpleNamespace(**{"use_sliding_window": False, **config}))
    except (TypeError, ValueError):
        most = 0
    if most is not None and most < 2:
        raise ModelError(f"{hub_id}: its config.json has a max_position_embeddings or sliding_window that is no size")
    return hub_id, decoder, most


def table(rows: list[Row]) -> Iterator[str]:
    """Lines: megabytes of each part, gigabytes that each Jetson has left."""
    boards = "".join(f"{f'{gb} GB':>9}" for gb in JETSONS_GB)
    yield f"{'':24}{'MB':>8}{'left for the system, GB, of':>59}"
    yield f"{'precision':<10}{'context':>8}{'engine':>9}{'KV':>8}{'workspace':>11}{'host':>7}{'sum':>9}{boards}"
    for setting, sizes in rows:
        parts = (sizes.engine_bytes, sizes.kv_bytes, sizes.workspace_bytes, sizes.host_bytes, sizes.total_bytes)
        engine, kv, workspace, host, total = (f"{part / 1e6:.0f}" for part in parts)
        left = "".join(f"{f'{sizes.left_bytes(gb) / 1e9:.1f}' if sizes.fits(gb) else 'no':>9}" for gb in JETSONS_GB)
        yield (f"{setting.precision:<10}{setting.context:>8}{engine:>9}{kv:>8}{workspace:>11}{host:>7}{total:>9}{left}")


NOTES = (
    f"no: less than {SYSTEM_BYTES / 1e9:.1f} GB would be left, which Linux, CUDA and its libraries are taken to need.",
    "MB and GB are 10⁶ and 10⁹ bytes. What the figures rest on: docs/memory.md.",
)


def _setting(args: argparse.Namespace, target: str, precision: str, context: int) -> Setting:
    candidates = {} if args.max_candidates is None else {"max_candidates": args.max_candidates}
    setting = Setting(target, precision, context, lowering=args.lowering, block_size=args.block_size, **candidates)
    sizes = TARGETS[target].block_sizes.get(precision, ())
    if args.block_size is not None and args.block_size not in sizes:
        takes = " or ".join(map(str, sizes))
        what = "has no blocks" if not sizes else "has a scale a column" if sizes == (COLUMN,) else f"takes {takes}"
        raise OptionError(f"--block-size is {args.block_size}; {precision} for --target {target} {what}")
    return setting
