"""Write docs/reference/families.md: what each tested family passes, in every lowering and precision, by both tracers.

python docs/make_families.py [FAMILY …]

It takes some ten minutes, and prints a line for each family. Tiny random models, as tests/families.py describes them.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "reference" / "families.md"
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
CONTEXT, CANDIDATES = 128, 16
LOWERINGS = ("ort", "portable", "decomposed")
LOW = (("fp16", "portable"), ("int8", "ort"), ("int8", "portable"), ("int4", "ort"), ("int4", "portable"))
HEAD = """\
# Families

What each tested family passes. A tiny model of it with random weights, its peculiarities switched on and its windows of
16 tokens shorter than the gate's prompts, is traced by both tracers and exported in every lowering; the parity gate
compares it with Hugging Face: prompts in one pass and row by row, and eight siblings after each.
`python docs/make_families.py` writes this page (with {versions}).

- **fp32:** the largest difference from Hugging Face, of hidden states and logits relative to the largest value, over
  both tracers. The gate's bound is 1e-4.
- **others:** precisions that pass their gates, int8 and int4 in `ort` and `portable`, fp16 in `portable`. With random
  weights and sizes this small, some lose too much to rounding.
- **TensorRT for RTX:** does NVIDIA's builder make an engine of the fp16 graph? No engine has run.

Families that need transformers 5 are missing here: `gemma4_text`, `ministral3`, `granite_swa` and those with experts.
`tests/export/test_families.py` decodes eight prompts of each in every lowering: token for token the
sequential algorithm's.

| family | switched on | fp32 `ort` | `portable` | `decomposed` | others | RTX `portable` | `decomposed` |
|---|---|--:|--:|--:|---|---|---|
"""


def rows(names: list[str]) -> Iterator[str]:
    """A row of the table for each family."""
    from mara_export.graph.trace import choose_tracer
    from mara_export.options import ExportOptions
    from mara_runtime.errors import MaraError, OptionError, first_line
    from tests import checkpoints, families

    def tracers() -> Iterator[str]:
        for tracer in ("optimum", "torch"):
            try:
                yield choose_tracer(tracer)
            except OptionError as error:
                print(f"left out: {error}", file=sys.stderr)

    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            checkpoints.make(name, root / "checkpoint")
            worst = dict.fromkeys(LOWERINGS, 0.0)
            passed: list[str] = []
            built: list[str] = []
            for tracer in tracers():
                traced = trace(root / "checkpoint", root / tracer, tracer)
                for lowering in LOWERINGS:
                    report = finish(traced, root / f"{tracer}-{lowering}", lowering=lowering)
                    found = max(report[what]["greatest_difference"] for what in ("hidden", "logits"))
                    worst[lowering] = max(worst[lowering], found)
            for precision, lowering in LOW:
                try:
                    finish(traced, root / f"{precision}-{lowering}", lowering=lowering, precision=precision)
                except MaraError as error:
                    print(f"{name} {precision} {lowering}: {first_line(error)}", file=sys.stderr)
                else:
                    passed.append(f"{precision} `{lowering}`")
            for lowering in ("portable", "decomposed"):
                built.append(
                    engine(
                        traced,
                        root / f"rtx-{lowering}",
                        ExportOptions(
                            target="tensorrt-rtx",
                            precision="fp16",
                            lowering=lowering,
                            max_context=CONTEXT,
                            max_candidates=CANDIDATES,
                            gate=False,
                        ),
                    )
                )
        what = ", ".join(families.peculiarities(name)) or "–"
        figures = " | ".join(f"{worst[lowering]:.1e}" for lowering in LOWERINGS)
        line = f"| `{name}` | {what} | {figures} | {', '.join(passed)} | {' | '.join(built)} |"
        print(line, flush=True)
        yield line


def trace(checkpoint: Path, folder: Path, tracer: str) -> Any:
    """A checkpoint, traced for all bundles."""
    from mara_export import tracing
    from mara_export.hf.sources import resolve_model

    folder.mkdir()
    return tracing.trace(
        resolve_model(str(checkpoint)), [], folder, max_context=CONTEXT, max_candidates=CANDIDATES, tracer=tracer
    )


def finish(traced: Any, out: Path, **options: str) -> Any:
    """The gate's report of a bundle. Raises ParityError."""
    from mara_export import export
    from mara_export.options import ExportOptions

    made = export.finish(traced, ExportOptions(max_context=CONTEXT, max_candidates=CANDIDATES, **options), out)
    shutil.rmtree(out)
    return made.manifest.parity


def engine(traced: Any, out: Path, options: Any) -> str:
    """What becomes of a graph in NVIDIA's builder."""
    from mara_export import export
    from mara_export.tensorrt.build import build
    from mara_runtime.errors import MaraError, first_line

    try:
        build(export.finish(traced, options, out), "tensorrt-rtx")
    except MaraError as error:
        return first_line(error).replace("|", "/")
    return "builds"


def main() -> None:
    """Write the page, or print the rows of some families."""
    from mara_export.hf.families import FAMILIES
    from mara_runtime.versions import installed
    from tests import families

    asked = sys.argv[1:]
    here = [name for name in FAMILIES if name not in families.LISTED or name in families.NAMES]
    found = [*rows(asked or here)]
    if not asked:
        packages = installed("torch", "transformers", "optimum-onnx", "onnxruntime", "tensorrt-rtx-cu13-bindings")
        versions = ", ".join(f"{name} {version}" for name, version in packages.items())
        PAGE.write_text(HEAD.format(versions=versions) + "\n".join(found) + "\n")


if __name__ == "__main__":
    main()
