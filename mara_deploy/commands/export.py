"""`mara-export`: a Hugging Face model and an agent into a bundle."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mara_deploy.commands.shared import Parser, guarded, prompt_options
from mara_export.options import ExportOptions
from mara_export.targets import LOWERINGS, PRECISIONS, QUANTISERS, TARGETS
from mara_runtime.bundle import Bundle
from mara_runtime.errors import MaraError, OptionError
from mara_runtime.manifest import ENGINE_TARGETS

if TYPE_CHECKING:
    from mara_deploy.agent import Agent
    from mara_export.hf.sources import ModelSource

EPILOG = """\
examples:
  mara-export --model demo --agent demo
  mara-export --model qwen2 --agent agent.safetensors --out qwen2-polite
  mara-export --model ./my-llama --agent IAAR-Shanghai/MARA_AGENTS:FILE.pth --max-context 2048
"""


def parser() -> Parser:
    """The command's options."""
    options = Parser(
        "mara-export",
        "Export a frozen LLM and its accept/reject agent to a bundle that mara-run decodes without PyTorch.\n"
        "Ends with the parity gate: a bundle that does not compute what Hugging Face computes is not written.",
        EPILOG,
    )
    options.add_argument(
        "--model", required=True, metavar="M", help="demo, an alias (qwen2, llama3.2-1b, …), a Hub id, or a folder"
    )
    options.add_argument(
        "--agent", required=True, metavar="A", help="demo, a .pth or .safetensors file, or hub-id:file"
    )
    options.add_argument("--out", metavar="DIR", help="default: bundles/<model>-<agent>-<target>-<precision>")
    options.add_argument(
        "--target",
        default="cpu",
        choices=TARGETS,
        help="engine to export for (default cpu); cuda: ONNX Runtime on a GPU; TensorRT engines are built here if that "
        "is possible, else by mara-build on the device",
    )
    options.add_argument(
        "--precision",
        default="",
        choices=PRECISIONS,
        help="what the LLM's weights are stored as (default fp32 on cpu, else fp16). On cpu it computes in float32, "
        "elsewhere in float16, with bf16 in bfloat16 (TensorRT only)",
    )
    options.add_argument(
        "--block-size",
        type=int,
        metavar="N",
        help="int8, int4: weights that share a scale "
        "(default 32; tensorrt: int4 64 or 128, int8 a scale for each column)",
    )
    options.add_argument(
        "--quantiser",
        default="",
        choices=QUANTISERS,
        help="int8, int4: rtn rounds to nearest (default); hqq (int4) and k-quant choose scales by their error",
    )
    options.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="NODE",
        help="int8, int4: leave the weights of this node in fp32; * stands for anything (may be repeated)",
    )
    options.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="tokens of prompt and answer together (default 4096, or the model's own if smaller)",
    )
    options.add_argument(
        "--max-candidates", type=int, default=64, metavar="K", help="candidates of a position at most (default 64)"
    )
    options.add_argument(
        "--lowering",
        default="",
        choices=LOWERINGS,
        help="ort: ONNX Runtime's fused attention (default on cpu and cuda); portable: standard ONNX operators (default"
        " for TensorRT; 10.15 and later); decomposed: basic operators, for the TensorRT of JetPack 6 to 7.1",
    )
    options.add_argument(
        "--no-build",
        action="store_true",
        help="TensorRT: build no engine now; mara-build does it on the device that will run it",
    )
    options.add_argument("--no-gate", action="store_true", help="skip the parity gate; the manifest says so")
    options.add_argument("--quiet", action="store_true", help="no progress, no summary")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return guarded(parser(), _export, argv)


def _export(args: argparse.Namespace) -> None:
    _refuse_what_says_nothing(args)
    options = _options(args)
    if not args.quiet:
        print("mara-export: loading PyTorch and Optimum …", file=sys.stderr)
    try:
        from mara_export.export import export, vet
        from mara_export.folder import require_free
        from mara_export.hf.checkpoint import silence_transformers
        from mara_export.progress import Progress
    except ImportError as error:
        raise MaraError(
            f"the export needs packages that are not installed ({error}): pip install 'mara-deploy[cpu,export]'"
        ) from None

    silence_transformers()
    if args.out is not None:
        require_free(Path(args.out))
    agent, agent_name = _agent(args.agent, args.model)

    def destination(source: ModelSource) -> Path:
        return Path("bundles") / _default_name(source, agent_name, options) if args.out is None else Path(args.out)

    def refuse_before_weights(config_only: ModelSource) -> None:
        vet(config_only, agent, agent_name, options.max_context)
        require_free(destination(config_only))

    source = _model(args.model, refuse_before_weights)
    out = destination(source)
    bundle = export(source, agent, agent_name, out, options, Progress(args.quiet))
    to_build = _build(bundle, args) if args.target in ENGINE_TARGETS else None
    if args.quiet:
        return

    from mara_deploy.commands.inspect import summary

    print("\n".join(summary(Bundle.open(out, verify=False))))
    if to_build is not None:
        print(f"engine not built: {to_build}. Build it on the device that will run it:")
        print(f"mara-build {shlex.quote(str(out))} --target {args.target}")
    print(f"\nmara-run {shlex.quote(str(out))} {prompt_options(bundle.manifest)}")


def _refuse_what_says_nothing(args: argparse.Namespace) -> None:
    """What would be ignored, before PyTorch is loaded."""
    for flag in ("model", "agent", "out"):
        if getattr(args, flag) == "":
            raise OptionError(f"--{flag} is empty" + ("; leave it out for the default" if flag == "out" else ""))
    if args.no_build and args.target not in ENGINE_TARGETS:
        raise OptionError(f"--no-build is for {' and '.join(ENGINE_TARGETS)}; --target {args.target} builds nothing")


def _options(args: argparse.Namespace) -> ExportOptions:
    return ExportOptions(
        target=args.target,
        lowering=args.lowering,
        precision=args.precision,
        block_size=args.block_size,
        quantiser=args.quantiser,
        keep=tuple(args.keep),
        max_context=args.max_context,
        max_candidates=args.max_candidates,
        gate=not args.no_gate,
    )


def _build(bundle: Bundle, args: argparse.Namespace) -> str | None:
    """Build an engine here, if that can be. Returns why it was not built."""
    from mara_export.progress import Progress
    from mara_export.tensorrt.build import build, why_cannot_build

    reason = "--no-build was given" if args.no_build else why_cannot_build(args.target)
    if reason is None:
        try:
            build(bundle, args.target, progress=Progress(args.quiet))
        except MaraError as error:
            raise MaraError(f"the bundle {bundle.folder} is written, but without an engine: {error}") from error
    return reason


def _model(name: str, vet: Callable[[ModelSource], object]) -> ModelSource:
    from mara_deploy.demo import MODEL_FOLDER
    from mara_export.hf.sources import ModelSource, resolve_model

    return ModelSource(MODEL_FOLDER, "demo", None) if name == "demo" else resolve_model(name, vet)


def _agent(name: str, model: str) -> tuple[Agent, str]:
    """The agent and its name for others: never a path of this machine."""
    from mara_deploy import agent as agents
    from mara_deploy.demo.__main__ import DEMO_AGENT, demo_agent
    from mara_export.hf.sources import is_hub_id, local_path, resolve_file

    if name == "demo":
        if model != "demo":
            raise MaraError(
                f"the demo's agent goes with the demo's model, not with {Path(model).name}: name an agent file"
            )
        return demo_agent(), DEMO_AGENT
    path = local_path(name)
    hub_id, colon, file = name.partition(":")
    if path is None and colon and is_hub_id(hub_id):
        return agents.load(resolve_file(hub_id, file)), name
    path = path or Path(name)
    return agents.load(path), path.name


def _default_name(source: ModelSource, agent_name: str, options: ExportOptions) -> str:
    model = source.name.rpartition("/")[2]
    return f"{model}-{Path(agent_name.rpartition(':')[2]).stem}-{options.target}-{options.precision}"


if __name__ == "__main__":
    sys.exit(main())
