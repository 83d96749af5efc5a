"""Write docs/reference/families.md: what each tested family passes, in every lowering and precision, by both tracers.

python docs/make_families.py [FAMILY …]

It takes some twenty minutes, and prints a line for each family. Tiny random models, as tests/families.py describes
them. Those that only transformers 5 knows are tried in an environment of its own, which is made for it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "reference" / "families.md"
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
CONTEXT, CANDIDATES = 128, 64
PROMPTS, TOKENS = 8, 48
LOWERINGS = ("ort", "portable", "decomposed")
LOW = (("fp16", "portable"), ("int8", "ort"), ("int8", "portable"), ("int4", "ort"), ("int4", "portable"))
HEAD = """\
# Families

What each tested family passes. A tiny model of it with random weights, its peculiarities switched on and its windows of
16 tokens shorter than the gate's prompts, is traced by both tracers and exported in every lowering; the parity gate
compares it with Hugging Face: prompts in one pass and row by row, and eight siblings after each.
`python docs/make_families.py` writes this page (with {versions}).

- **tracers:** `optimum` with transformers 4, `torch` with either; a family with `torch` alone needs transformers 5.
- **fp32:** the largest difference from Hugging Face, of hidden states and logits relative to the largest value, over
  the tracers. The gate's bound is 1e-4.
- **tokens:** of eight prompts, each decoded aligned up to 48 tokens in each lowering and compared with the sequential
  algorithm on Hugging Face, its candidates and decisions, too. One whose gap there is less than float32's rounding is
  counted apart; any other difference fails.
- **others:** precisions that pass their gates, int8 and int4 in `ort` and `portable`, fp16 in `portable`. With random
  weights and sizes this small, some lose too much to rounding.
- **TensorRT for RTX:** does NVIDIA's builder make an engine of the fp16 graph? No engine has run.

| family | switched on | tracers | fp32 `ort` | `portable` | `decomposed` | tokens | others | RTX `portable` |\
 `decomposed` |
|---|---|---|--:|--:|--:|--:|---|---|---|
"""


def row(name: str, root: Path) -> str:
    """A family's row of the table. root: an empty folder."""
    from safetensors.torch import save_file

    from mara_deploy.agent import load
    from mara_export.agents import NamedAgent
    from mara_export.options import ExportOptions
    from mara_runtime.errors import MaraError, first_line
    from tests import checkpoints, families

    checkpoints.make(name, root / "checkpoint")
    model = checkpoints.load(root / "checkpoint")
    states = checkpoints.sample_states(model, seed=1)
    random = checkpoints.make_agent(model.config.hidden_size, seed=1, sample_states=states)
    save_file(random.state_dict(), root / "agent.safetensors")
    agent = load(root / "agent.safetensors")
    worst = dict.fromkeys(LOWERINGS, 0.0)
    tracers = [*usable_tracers()]
    for tracer in tracers:
        traced = trace(root / "checkpoint", root / tracer, tracer, [NamedAgent("agent", "random", agent)])
        for lowering in LOWERINGS:
            report = finish(traced, root / f"{tracer}-{lowering}", lowering=lowering)
            found = max(report[what]["greatest_difference"] for what in ("hidden", "logits"))
            worst[lowering] = max(worst[lowering], found)
    tokens = followed(model, agent, [root / f"{tracer}-{lowering}" for lowering in LOWERINGS])
    passed: list[str] = []
    for precision, lowering in LOW:
        try:
            finish(traced, root / f"{precision}-{lowering}", lowering=lowering, precision=precision)
        except MaraError as error:
            print(f"{name} {precision} {lowering}: {first_line(error)}", file=sys.stderr)
        else:
            passed.append(f"{precision} `{lowering}`")
    sizes = {"max_context": CONTEXT, "max_candidates": CANDIDATES}
    built = [
        engine(
            traced,
            root / f"rtx-{lowering}",
            ExportOptions(target="tensorrt-rtx", precision="fp16", lowering=lowering, gate=False, **sizes),
        )
        for lowering in ("portable", "decomposed")
    ]
    what = ", ".join(families.peculiarities(name)) or "–"
    figures = " | ".join(f"{worst[lowering]:.1e}" for lowering in LOWERINGS)
    cells = (f"`{name}`", what, ", ".join(tracers), figures, tokens, ", ".join(passed), *built)
    return f"| {' | '.join(cells)} |"


def usable_tracers() -> Iterator[str]:
    """Those that run with this transformers."""
    from mara_export.graph.trace import choose_tracer
    from mara_runtime.errors import OptionError

    for tracer in ("optimum", "torch"):
        try:
            yield choose_tracer(tracer)
        except OptionError as error:
            print(f"left out: {error}", file=sys.stderr)


def trace(checkpoint: Path, folder: Path, tracer: str, agents: list[Any]) -> Any:
    """A checkpoint, traced for all bundles."""
    from mara_export import tracing
    from mara_export.hf.sources import resolve_model

    folder.mkdir()
    return tracing.trace(
        resolve_model(str(checkpoint)), agents, folder, max_context=CONTEXT, max_candidates=CANDIDATES, tracer=tracer
    )


def finish(traced: Any, out: Path, **options: str) -> Any:
    """The gate's report of a bundle. Raises ParityError."""
    from mara_export import export
    from mara_export.options import ExportOptions

    made = export.finish(traced, ExportOptions(max_context=CONTEXT, max_candidates=CANDIDATES, **options), out)
    return made.manifest.parity


def followed(model: Any, agent: Any, bundles: list[Path]) -> str:
    """How many tokens of bundles are the oracle's. Raises AssertionError for one that is neither that nor excused."""
    from mara_runtime import AlignedDecoder, DecodeConfig
    from tests import checkpoints, oracle
    from tests.export.following import Tally, follow_all, rounding_of

    drawn = [prompt for n in (1, 2, 5, 17, 40) for prompt in checkpoints.random_prompts(4, seed=n, length=n)]
    prompts = drawn[::2][:PROMPTS]  # those of tests/export/test_families.py
    options: dict[str, Any] = {"max_new_tokens": TOKENS, "fallback": "first"}
    ends = model.generation_config.eos_token_id
    cases = [(prompt, oracle.decode(model, agent, prompt, eos_ids=ends, **options)) for prompt in prompts]
    tallies = [Tally(bundle.name, rounding_of(model, drawn[-8:])) for bundle in bundles]
    for bundle, tally in zip(bundles, tallies, strict=True):
        follow_all(AlignedDecoder(bundle, threads=1), DecodeConfig(**options), cases, tally)
    positions, excused = sum(tally.positions for tally in tallies), sum(len(tally.excused) for tally in tallies)
    return f"{positions - excused}" + (f" + {excused} by rounding" if excused else "")


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


def rows(names: list[str]) -> Iterator[str]:
    """The families' rows, which are printed."""
    for name in names:
        folder = Path(tempfile.mkdtemp())
        try:
            line = row(name, folder)
        finally:
            shutil.rmtree(folder)
        print(line, flush=True)
        yield line


def rows_of_5(names: list[str]) -> Iterator[str]:
    """The rows of families that need transformers 5, from an environment with that."""
    from tests.transformers5 import environment

    with environment() as (python, variables):
        command = [str(python), str(Path(__file__)), *names]
        with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("| `"):
                    print(line, end="", flush=True)
                    yield line.rstrip("\n")
        if process.returncode:
            sys.exit(process.returncode)


def main() -> None:
    """Write the page, or print the rows of some families."""
    from mara_export.hf.families import FAMILIES
    from mara_runtime.versions import installed
    from tests import families

    if asked := sys.argv[1:]:
        for _ in rows(asked):
            pass
        return
    here = [name for name in FAMILIES if name not in families.LISTED or name in families.NAMES]
    found = [*rows(here), *rows_of_5([name for name in FAMILIES if name not in here])]
    packages = installed("torch", "transformers", "optimum-onnx", "onnxruntime", "tensorrt-rtx-cu13-bindings")
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    PAGE.write_text(HEAD.format(versions=versions) + "\n".join(sorted(found)) + "\n")


if __name__ == "__main__":
    main()
