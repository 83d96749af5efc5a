"""`mara-build`: TensorRT engines into a bundle, on the device that will run it."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from mara_deploy.commands.shared import Parser, guarded, prompt_options
from mara_runtime.bundle import Bundle
from mara_runtime.manifest import ENGINE_TARGETS, EngineFacts

TELLING = ("ATTENTION_INPUT", "KV_CACHE_UPDATE", "ROTARY_EMBEDDING", "MATRIX_MULTIPLY", "DEQUANTIZE", "SCATTER", "TOPK")
"""Kinds of layers worth a word."""
EPILOG = """\
examples:
  mara-build BUNDLE --target tensorrt
  mara-build BUNDLE --target tensorrt --capacity 1024,2048
  mara-build BUNDLE --target tensorrt-rtx --compute-capability 8.9,12.0

tensorrt builds for the GPU of this machine, and with the TensorRT that will run the engine. tensorrt-rtx needs no GPU.
Neither needs PyTorch.
"""


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "mara-build",
        "Build TensorRT engines from the graph of a bundle, and add them to it. The bundle is one that\n"
        "mara-export made with --target tensorrt or tensorrt-rtx.",
        EPILOG,
    )
    options.add_argument("bundle", metavar="BUNDLE", help="folder made by mara-export")
    options.add_argument("--target", required=True, choices=ENGINE_TARGETS, help="engine to build")
    options.add_argument(
        "--capacity",
        type=_numbers,
        action="extend",
        default=[],
        metavar="N[,N…]",
        help="also build engines for these context lengths, beside the one for the bundle's own: decoding starts in "
        "the smallest and grows into the next, as attention costs by capacity",
    )
    options.add_argument(
        "--compute-capability",
        type=_texts,
        action="extend",
        default=[],
        metavar="X[,X…]",
        help="tensorrt-rtx: of the GPUs to build for, as 8.9 (default: 8.0 and later)",
    )
    options.add_argument(
        "--hardware",
        default="none",
        metavar="WHICH",
        help="tensorrt: other GPUs that may run the engine: none (default), ampere-plus, same-compute-capability",
    )
    options.add_argument(
        "--version-compatible",
        action="store_true",
        help="tensorrt: later versions of the same major may run the engine; slower",
    )
    options.add_argument(
        "--weight-streaming",
        action="store_true",
        help="weights that do not fit into the GPU's memory may stay outside; without CUDA graphs then",
    )
    options.add_argument(
        "--workspace", type=int, metavar="MIB", help="memory that kernels may use at most (default: all there is)"
    )
    options.add_argument(
        "--optimisation-level", type=int, metavar="N", help="0 to 5: how long kernels are searched for (default 3)"
    )
    options.add_argument(
        "--timing-cache",
        metavar="FILE",
        help="tensorrt: kernel timings that later builds reuse (default: in the user's cache folder)",
    )
    options.add_argument(
        "--no-verify", action="store_true", help="do not compare the bundle's files with their checksums first"
    )
    options.add_argument("--quiet", action="store_true", help="no progress, no summary")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _build, argv)


def _build(args: argparse.Namespace) -> None:
    from mara_export.options import BuildOptions
    from mara_export.progress import Progress
    from mara_export.tensorrt.build import build

    options = BuildOptions(
        capacities=tuple(args.capacity),
        timing_cache=None if args.timing_cache is None else Path(args.timing_cache),
        weight_streaming=args.weight_streaming,
        version_compatible=args.version_compatible,
        hardware=args.hardware,
        compute_capabilities=tuple(args.compute_capability),
        workspace_mib=args.workspace,
        optimisation_level=args.optimisation_level,
    )
    before = Bundle.open(args.bundle, verify=not args.no_verify)
    bundle = build(before, args.target, options, Progress(args.quiet))
    if not args.quiet:
        print("\n".join(summary(bundle, args.target)))


def summary(bundle: Bundle, target: str) -> list[str]:
    """The engines that a bundle has for a target, and the line that uses them."""
    lines = [line for engine in bundle.manifest.engines if engine.target == target for line in _facts(bundle, engine)]
    return [
        *lines,
        "",
        f"mara-run {shlex.quote(str(bundle.folder))} --engine {target} {prompt_options(bundle.manifest)}",
    ]


def _facts(bundle: Bundle, engine: EngineFacts) -> list[str]:
    size = bundle.manifest.files[engine.file].size_bytes
    layers = engine.options.get("layers", {})
    kinds = ", ".join(f"{count} {kind.lower()}" for kind, count in layers.items() if kind in TELLING)
    apart = engine.options.get("decomposable")
    return [
        f"engine    {engine.file}  ({size / 1e6:.1f} MB, built in {engine.options.get('seconds')} s)",
        f"          {engine.slots} KV slots, passes of 1 to {engine.decode_rows} and to {engine.prefill_rows} rows, "
        f"{'TensorRT' if engine.target == 'tensorrt' else 'TensorRT for RTX'} {engine.version}, "
        f"compute capability {engine.compute_capability}",
        f"          {sum(layers.values())} layers, among them {kinds}",
        *([f"          attention not fused: {apart if isinstance(apart, str) else ', '.join(apart)}"] if apart else []),
    ]


def _texts(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between them, as 1024,2048") from None


if __name__ == "__main__":
    sys.exit(main())
