"""`mara-memory`: the memory that a model or a bundle needs, by precision and context, and which Jetson has enough."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from mara_deploy import demo, memory
from mara_deploy.commands.options import add_options, from_args, given, reject, values_of
from mara_deploy.commands.shared import Parser, guarded, print_json
from mara_deploy.memory import CONTEXTS, JETSONS_GB, SYSTEM_BYTES, Memory, Setting
from mara_export.errors import ModelError
from mara_export.hf.catalogue import ALIASES, KNOWN_MODELS, hub_id_of
from mara_export.hf.families import Decoder, decoder_of, decoder_sizes
from mara_export.hf.multimodal import text_settings
from mara_export.hf.sources import local_path, resolve_file
from mara_export.hf.supported import longest_context
from mara_export.targets import TARGETS
from mara_runtime.bundle import Bundle
from mara_runtime.errors import OptionError
from mara_runtime.manifest import MANIFEST_FILE
from mara_runtime.options import Options, option, options_of, required

Row = tuple[Setting, Memory]
EPILOG = """\
A bundle is shown for its first target, unless --target is given, and as it was exported.

examples:
  mara-memory qwen2
  mara-memory llama3.2-1b --target tensorrt-rtx --precision int4 --context 4096
  mara-memory BUNDLE --context 1024
"""


@dataclass(frozen=True)
class MemoryArguments(Options):
    """What to estimate."""

    model: str = required(
        "bundle folder, an alias (qwen2, llama3.2-1b, …), a Hub id, or a folder with a config.json",
        metavar="MODEL",
        positional=True,
    )
    json: bool = option(False, "print the figures as one JSON object")


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "mara-memory",
        "Estimate the memory of a bundle, or of a model once it is exported: engine, KV cache, workspace and host\n"
        "process, and which Jetson has enough.",
        EPILOG,
    )
    add_options(options, MemoryArguments)
    add_options(options.add_argument_group("export"), Setting, several=("precision", "context"))
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _memory, argv)


def _memory(args: argparse.Namespace) -> None:
    arguments = from_args(MemoryArguments, args)
    folder = local_path(arguments.model)
    if folder is not None and (folder / MANIFEST_FILE).is_file():
        title, rows = of_bundle(Bundle.open(folder), args)
    else:
        title, rows = of_model(arguments.model, args)
    if arguments.json:
        settings = [{**setting.to_json(), "slots": setting.slots, **sizes.to_json()} for setting, sizes in rows]
        print_json({"model": title, "system_bytes": SYSTEM_BYTES, "settings": settings})
    else:
        print("\n".join([title, "", *table(rows), "", *NOTES]))


def of_model(name: str, args: argparse.Namespace) -> tuple[str, list[Row]]:
    """A title and a row for each precision and context: those given, or all of the target."""
    options = given(Setting, args)
    if "block_size" in options and "precision" not in options:
        raise OptionError(f"--block-size is {options['block_size']}, but it needs --precision int8 or int4")
    target = Setting(options.get("target", Setting.target)).target
    hub_id, model, limit = find(name)
    precisions = values_of(Setting, "precision", args) if "precision" in options else TARGETS[target].precisions
    standard = sorted({min(context, limit or context) for context in CONTEXTS})
    contexts = values_of(Setting, "context", args) if "context" in options else standard
    rows = []
    for precision in precisions:
        for context in contexts:
            setting = from_args(Setting, args, precision=precision, context=context)
            if limit is not None and context > limit:
                raise OptionError(f"--context is {context}; {hub_id} supports at most {limit} tokens")
            rows.append((setting, memory.estimate(model, setting)))
    return f"{hub_id} ({model.parameters / 1e9:.2f} · 10⁹ parameters) on {target}", rows


def of_bundle(bundle: Bundle, args: argparse.Namespace) -> tuple[str, list[Row]]:
    """A title and a row for each context; sizes of files that the bundle has replace estimates."""
    manifest, step = bundle.manifest, bundle.manifest.step
    fixed = [each.name for each in options_of(Setting) if each.name not in ("target", "context", "conversations")]
    reject(args, Setting, fixed, f"{bundle.folder} is a bundle, which has it fixed")
    target = given(Setting, args).get("target", manifest.targets[0])
    if target not in manifest.targets:
        raise OptionError(f"--target is {target!r}; {bundle.folder} was exported for {', '.join(manifest.targets)}")
    block_size: Any = (step.quantisation or {}).get("block_size")

    def setting(context: int) -> Setting:
        sizes = {"max_candidates": manifest.max_candidates, "lowering": step.lowering, "block_size": block_size}
        return from_args(Setting, args, target=target, precision=step.precision, context=context, **sizes)

    limit, facts = manifest.max_context, manifest.model
    model = decoder_of(facts.shape, facts.architecture, facts.intermediate_size, facts.tied, facts.experts)
    stored = sum(entry.size_bytes for name, entry in manifest.files.items() if name.startswith(step.file))
    code = memory.engine_memory_bytes(model, setting(limit)) - memory.weight_bytes(model, setting(limit))
    built = {e.slots: manifest.files[e.file].size_bytes for e in manifest.engines if e.target == target}
    contexts = given(Setting, args).get("context", sorted({*(c for c in CONTEXTS if c < limit), limit}))
    rows = []
    for context in contexts:
        at_context = setting(context)
        if context > limit:
            raise OptionError(f"--context is {context}; {bundle.folder} was exported for {limit} tokens")
        engine = next((size for slots, size in sorted(built.items()) if slots >= at_context.slots), stored + code)
        rows.append((at_context, memory.estimate(model, at_context, engine)))
    return f"{bundle.folder}: {manifest.model.source} on {target}", rows


def find(name: str) -> tuple[str, Decoder, int | None]:
    """A model's public name, its sizes, and its maximum number of tokens, all from its configuration.

    The last is None where the configuration does not say. Raises ModelError.
    """
    folder = demo.MODEL_FOLDER if name == demo.NAME else local_path(name)
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
        path, hub_id = folder / "config.json", name if name == demo.NAME else folder.resolve().name
        if not path.is_file():
            raise ModelError(f"{folder} is neither a bundle nor a Hugging Face model: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a Hugging Face configuration")
    config = text_settings(config)
    decoder = decoder_sizes(config, hub_id)
    try:
        limit = longest_context(SimpleNamespace(**config))
    except (TypeError, ValueError, AttributeError):
        limit = 0
    if limit is not None and limit < 2:
        raise ModelError(f"{hub_id}: max_position_embeddings in its config.json is not a valid size")
    return hub_id, decoder, limit


def table(rows: list[Row]) -> Iterator[str]:
    """Lines: megabytes of each part, gigabytes left on each Jetson."""
    boards = "".join(f"{f'{gb} GB':>9}" for gb in JETSONS_GB)
    yield f"{'':24}{'MB':>8}{'left for the system, GB, of':>59}"
    yield f"{'precision':<10}{'context':>8}{'engine':>9}{'KV':>8}{'workspace':>11}{'host':>7}{'sum':>9}{boards}"
    for setting, sizes in rows:
        engine, kv, workspace, host, *sum_and_left = sizes.cells()
        others = "".join(f"{cell:>9}" for cell in sum_and_left)
        yield f"{setting.precision:<10}{setting.context:>8}{engine:>9}{kv:>8}{workspace:>11}{host:>7}{others}"


NOTES = (
    f"no: less than {SYSTEM_BYTES / 1e9:.1f} GB would be left, the assumed need of Linux, CUDA and its libraries.",
    "MB and GB are 10⁶ and 10⁹ bytes. docs/reference/memory.md explains the figures.",
)


if __name__ == "__main__":
    sys.exit(main())
