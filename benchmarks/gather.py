"""What benchmarks/gpu.sh found, in one file.

python -m benchmarks.gather DIR     writes DIR/results.json
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.board import NoBoard, find
from mara_runtime.versions import installed

PACKAGES = (
    *("mara-deploy", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    *("tensorrt-rtx", "cuda-bindings", "torch", "transformers"),
)
MEASURED = ("bench", "soak")
"""Steps whose output ends in a JSON object."""


def gather(folder: Path) -> dict[str, Any]:
    """The results in a folder of gpu.sh."""
    failed = _failures(folder / "failed.tsv")
    targets: dict[str, dict[str, Any]] = {}
    for step in MEASURED:
        for path in sorted(folder.glob(f"*-{step}.txt")):
            target = path.name.removesuffix(f"-{step}.txt")
            targets.setdefault(target, {})[step] = last_object(path.read_text(encoding="utf-8"))
    return {
        "board": {"before": _json(folder / "board-before.json"), "after": _board()},
        "versions": {"python": platform.python_version(), "system": platform.platform(), **installed(*PACKAGES)},
        "revision": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain", "--untracked-files=no"),
        "tests": _tests(folder / "tests.xml"),
        "targets": targets,
        "failed": failed,
    }


def last_object(text: str) -> dict[str, Any] | None:
    """The last line that is a JSON object."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                found: dict[str, Any] = json.loads(line)
            except ValueError:
                continue
            return found
    return None


def _failures(path: Path) -> dict[str, str]:
    """Last line of what each failed step said."""
    if not path.exists():
        return {}
    return dict(line.split("\t", 1) for line in path.read_text(encoding="utf-8").splitlines())


def _tests(path: Path) -> dict[str, Any] | None:
    """Of a JUnit file of tests/gpu: how many passed by target, what failed, why others were skipped."""
    if not path.exists():
        return None
    passed, failed, skipped = Counter[str](), [], Counter[str]()
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(case.get("name"))
        elif (skip := case.find("skipped")) is not None:
            skipped[skip.get("message", "")] += 1
        else:
            passed.update(p.get("value", "") for p in case.iter("property") if p.get("name") == "target")
    return {"passed": dict(passed), "failed": failed, "skipped": dict(skipped)}


def untested(found: dict[str, Any]) -> list[str]:
    """Targets with figures, of which no test has passed."""
    passed = found["tests"]["passed"] if found["tests"] else {}
    return [target for target in found["targets"] if target not in passed]


def _board() -> dict[str, Any] | None:
    try:
        return find().facts()
    except NoBoard:
        return None


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> int:
    folder = Path(sys.argv[1])
    path = folder / "results.json"
    found = gather(folder)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(path)
    for target in untested(found):
        print(f"no test of tests/gpu has passed on {target}", file=sys.stderr)
    return int(bool(untested(found)))


if __name__ == "__main__":
    sys.exit(main())
