"""Checks bundles on a GPU and measures them, stage by stage; needs neither a network nor PyTorch.

    python -m benchmarks.first_gpu --bundles DIR --out DIR

The folder of bundles holds one per folder and, where `benchmarks/carry.py` has prepared it, NAME.json, what a CPU
computes of bundle NAME; else that is computed here. Each stage is a process of its own under a time limit, and
results.json is written after each: a run that is cut short has told what it knew. A stage that lacks something says
what, and the others go on. The exit code is 1 when a stage failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMITS_S = {
    "machine": 30,
    "fill": 120,
    "reference": 120,
    "open": 60,
    "passes": 60,
    "conformance": 120,
    "answers": 180,
    "captures": 60,
    "agents": 60,
    "real-model": 120,
    "widths": 120,
    "hugging-face": 60,
    "bench": 240,
    "soak": 180,
}
"""Of each stage, in the order in which they run: what the later ones rest on comes first."""
OF_THE_MACHINE = ("machine", "conformance")
"""Stages that take no bundle."""
OF_NO_GPU = ("machine", "fill", "reference")
COMPARED = ("passes", "answers")
"""Stages that need what a CPU computes."""
FILLING = "filling.json"
"""In a bundle whose weights were left behind, see carry.py."""

Record = dict[str, Any]


@dataclass
class Bundle:
    """One folder of --bundles."""

    folder: Path
    engine: str
    """of its last target on a GPU"""
    reference: Path
    """what a CPU computes of it"""
    why_not: str | None = None
    """it cannot be run"""
    doubt: str | None = None
    """why no figure of it counts"""


def find_bundles(folder: Path) -> list[Bundle]:
    """The bundles of a folder, smaller ones first."""
    found = []
    for path in sorted(folder.glob("*/manifest.json")):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            size = sum(entry["size_bytes"] for entry in manifest["files"].values())
            engine = ["cpu", *(target for target in manifest["targets"] if target != "cpu")][-1]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise SystemExit(refused(f"{path} is not a bundle's manifest ({error}): remove its folder")) from None
        reference = folder / f"{path.parent.name}.json"
        found.append((size, Bundle(path.parent.absolute(), engine, reference.absolute())))
    if not found:
        raise SystemExit(refused(f"no folder in {folder} is a bundle: write one with mara-export --out"))
    return [bundle for _, bundle in sorted(found, key=lambda one: one[0])]


def refused(why: str) -> int:
    """Say so on one line; returns the exit code."""
    print(f"first_gpu: {why}", file=sys.stderr)
    return 2


class Run:
    """The stages of all bundles, and what was found so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._out = args, args.out.absolute()
        self._out.mkdir(parents=True)
        self._end = time.monotonic() + 60 * args.minutes
        self._environment = environment(args.packages)
        self._records: list[Record] = []

    def all(self, bundles: Sequence[Bundle]) -> bool:
        """Every stage on every bundle; whether none failed."""
        for stage in LIMITS_S:
            for bundle in bundles[:1] if stage in OF_THE_MACHINE else bundles:
                if stage in self._args.stages:
                    self._stage(stage, bundle)
        self._write(ended=True)
        return not any("failed" in record for record in self._records)

    def _stage(self, stage: str, bundle: Bundle) -> None:
        """A stage, and what follows from it for later ones."""
        if stage == "fill":
            if (bundle.folder / FILLING).exists():
                filled = self._out / bundle.folder.name
                ended = self._run(stage, bundle, "-m", "benchmarks.carry", "--fill", bundle.folder, "--out", filled)
                bundle.folder = filled
                bundle.why_not = None if right(ended) else "its weights could not be filled in"
        elif stage == "reference":
            if not bundle.reference.exists():
                record = self._run(stage, bundle, *self._own(stage, bundle))
                if right(record):
                    bundle.reference = self._out / f"{bundle.folder.name}.json"
                    bundle.reference.write_text(json.dumps(record.pop("result")), encoding="utf-8")
        elif stage == "open":
            record = self._run(stage, bundle, *self._own(stage, bundle))
            if record["result"].pop("does_nothing", False):
                bundle.doubt = record["failed"]
            elif not right(record):
                bundle.why_not = "it does not open"
        else:
            self._run(stage, bundle, *self._command(stage, bundle))

    def _own(self, stage: str, bundle: Bundle) -> list[object]:
        command: list[object] = ["-m", "benchmarks.gpu_stages", stage]
        command += [] if stage == "machine" else [bundle.folder]
        command += ["--reference", bundle.reference] if stage in COMPARED else []
        return [*command, "--smoke"] if self._args.smoke else command

    def _command(self, stage: str, bundle: Bundle) -> list[object]:
        """The arguments of Python."""
        steps, size = ("200", ("16", "3")) if self._args.smoke else ("2000", ("96", "9"))
        measures = ("--measure", "steps,prefill,width,profiles", "--profile", "1", "--profile", "2", "--profile", "4")
        if stage == "bench":
            sizes = ("--tokens", size[0], "--rounds", size[1])
            where = ("-m", "mara_deploy.commands.bench", bundle.folder, "--engine", bundle.engine)
            return [*where, *measures, *sizes]
        if stage == "soak":
            return ["-m", "benchmarks.soak", bundle.folder, "--engine", bundle.engine, "--steps", steps]
        if stage in ("conformance", "real-model"):
            test = f"tests/gpu/test_{stage.replace('-', '_')}.py"
            options = ["-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", "-k", "not steps"]
            options += ["--maxfail", "3"] if self._args.smoke else []
            return ["-m", "pytest", *options, test]
        return self._own(stage, bundle)

    def _run(self, stage: str, bundle: Bundle, *words: object) -> Record:
        """Run the process of a stage and record it: its result, why it failed, or why it had to be skipped."""
        record: Record = {"stage": stage, "result": {}}
        if stage not in OF_THE_MACHINE:
            record["bundle"] = bundle.folder.name
        left_s = self._end - time.monotonic()
        if bundle.why_not and stage not in OF_THE_MACHINE:
            record["skipped"] = bundle.why_not
        elif stage in COMPARED and not bundle.reference.exists():
            record["skipped"] = "there is nothing to compare with: the stage reference has no result"
        elif left_s < 5:
            record["skipped"] = f"the {self._args.minutes:g} minutes are over"
        else:
            self._measure(record, bundle, words, min(LIMITS_S[stage] * self._args.patience, left_s))
        self._records.append(record)
        print(told(record), flush=True)
        self._write()
        return record

    def _measure(self, record: Record, bundle: Bundle, words: Sequence[object], limit_s: float) -> None:
        stage = record["stage"]
        output = self._out / f"{len(self._records):02}-{stage}-{record.get('bundle', 'machine')}.txt"
        junit = output.with_suffix(".xml")
        if "pytest" in words:
            words = (*words, "--junitxml", junit)
        variables = {**self._environment, "MARA_GPU_BUNDLE": str(bundle.folder)}
        started = time.monotonic()
        wrong = limited([sys.executable, *map(str, words)], variables, output, limit_s)
        record["seconds"] = round(time.monotonic() - started, 1)
        result = tests(junit) if junit.exists() else last_object(output.read_text("utf-8", "replace")) or {}
        for why in ("failed", "skipped"):
            if why in result:
                record[why] = result.pop(why)
        if wrong and "failed" not in record:
            record["failed"] = wrong
        if bundle.doubt and stage not in OF_NO_GPU and "skipped" not in record:
            record["doubt"] = bundle.doubt
            record.setdefault("failed", bundle.doubt)
        record["result"] = result

    def _write(self, ended: bool = False) -> None:
        """Replace results.json."""
        path = self._out / "results.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"ended": ended, "stages": self._records}, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def right(record: Record) -> bool:
    """Whether a stage ran and had nothing to object to."""
    return "failed" not in record and "skipped" not in record


def told(record: Record) -> str:
    """A record on one line."""
    how = next((f"{why}: {record[why]}" for why in ("failed", "skipped") if why in record), "ok")
    what = " ".join(record[key] for key in ("stage", "bundle") if key in record)
    return f"{what:44} {record.get('seconds', 0):6.1f} s  {how}"


def environment(packages: Sequence[Path]) -> dict[str, str]:
    """Variables of the stages. packages: folders with packages that precede the installed ones."""
    places = [path.absolute() for path in packages]
    libraries = [lib for place in (*places, Path(sysconfig.get_path("purelib"))) for lib in place.glob("nvidia/*/lib")]
    paths = {
        "PYTHONPATH": (*places, ROOT, ROOT / "export", ROOT / "runtime", os.environ.get("PYTHONPATH")),
        "LD_LIBRARY_PATH": (os.environ.get("LD_LIBRARY_PATH"), *libraries),
    }
    joined = {name: os.pathsep.join(str(path) for path in parts if path) for name, parts in paths.items()}
    return {**os.environ, **joined, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def limited(command: Sequence[str], variables: Mapping[str, str], output: Path, limit_s: float) -> str | None:
    """Run a command with its output in a file; why it failed, or None. What is left of it at the limit is killed."""
    with output.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=variables, start_new_session=True
        )
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # also where this process is interrupted
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    lines = [line for line in output.read_text("utf-8", "replace").splitlines() if line.strip() and line[0] != "{"]
    return (lines[-1][:400] if lines else f"exit code {code}") if code else None


def last_object(text: str) -> dict[str, Any] | None:
    """The last line that is a JSON object."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                found: dict[str, Any] = json.loads(line)
                return found
    return None


def tests(junit: Path) -> dict[str, Any]:
    """Of a JUnit file of tests/gpu: how many passed by target, what failed, why others were skipped."""
    passed, wrong, skipped = Counter[str](), [], Counter[str]()
    for case in ElementTree.parse(junit).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            wrong.append(case.get("name"))
        elif (skip := case.find("skipped")) is not None:
            skipped[skip.get("message", "")] += 1
        else:
            passed.update(p.get("value", "") for p in case.iter("property") if p.get("name") == "target")
    found: dict[str, Any] = {"passed": dict(passed), "not_passed": wrong, "not_run": dict(skipped)}
    if wrong:
        found["failed"] = f"{len(wrong)} tests, the first {wrong[0]}"
    elif not passed:
        found["skipped"] = f"no test could run: {'; '.join(skipped) or 'none was found'}"
    return found


def positive(text: str) -> float:
    """A number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise ValueError
    return number


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--bundles", type=Path, required=True, help="folder of bundles")
    options.add_argument("--out", type=Path, required=True, help="folder to write, must be new")
    packages = "folder with Python packages, as `pip install --target` makes it (can be repeated)"
    options.add_argument("--packages", type=Path, action="append", default=[], metavar="DIR", help=packages)
    options.add_argument("--minutes", type=positive, default=1e6, help="for all stages together (default: no limit)")
    options.add_argument(
        "--patience", type=positive, default=1.0, help="multiplies the limit of each stage (default 1)"
    )
    stages = f"run these alone, of {', '.join(LIMITS_S)}"
    options.add_argument("--stages", nargs="+", default=[*LIMITS_S], choices=LIMITS_S, metavar="STAGE", help=stages)
    options.add_argument("--smoke", action="store_true", help="few repetitions, to see whether everything runs")
    return options


def main() -> int:
    args = parser().parse_args()
    bundles = find_bundles(args.bundles)
    if args.out.exists():
        return refused(f"{args.out} exists already: remove it, or choose another --out")
    try:
        return int(not Run(args).all(bundles))
    except KeyboardInterrupt:
        return refused(f"stopped; what was found by then is in {args.out / 'results.json'}")


if __name__ == "__main__":
    sys.exit(main())
