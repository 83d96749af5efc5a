"""Does the test suite notice defects? Apply each mutation of mutations.toml to a copy of the checkout, and run tests.

    python tests/mutations.py                     every mutation, by the test files that it names
    python tests/mutations.py runtime export.step those whose ids begin so
    python tests/mutations.py --wide              survivors also meet tests/unit, tests/export and tests/tensorrt
    python tests/mutations.py --check             is each anchor still there? takes a second
    python tests/mutations.py --against old.json  fail where an earlier run caught what this one does not

A mutation is caught when a test fails that passes without it, or when tests exceed the time limit. Run it on a checkout
whose tests pass. Before tests are deleted or merged, compare a run with one of the suite as it was.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
MUTATIONS = Path(__file__).with_suffix(".toml")
PRODUCT = ("mara_deploy", "export/mara_export", "runtime/mara_runtime")
WIDE = ("unit", "export", "tensorrt")
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "bundles", "build", "dist"
)


@dataclass(frozen=True)
class Mutation:
    """A defect: in `file`, `old` (which occurs once) becomes `new`."""

    id: str
    breaks: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """files or pytest node ids under tests/, most likely first"""

    def applied(self, text: str) -> str:
        """The mutated source. Raises ValueError when the anchor is not unique, or the result is not Python."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.id}: {self.file} has {count} of {self.old!r}")
        text = text.replace(self.old, self.new)
        try:
            ast.parse(text)
        except SyntaxError as error:
            raise ValueError(f"{self.id}: {self.file} is no Python any more: {error}") from None
        return text


@dataclass(frozen=True)
class Verdict:
    """What became of a mutation."""

    status: str
    """caught, survived, or error: the mutation or the tests could not be run"""
    by: str
    """the test that failed"""
    seconds: float


def read(path: Path, prefixes: Sequence[str] = ()) -> list[Mutation]:
    """The mutations of a file whose ids begin with one of `prefixes`, or all."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]
    mutations = [Mutation(**{**row, "tests": tuple(row["tests"])}) for row in rows]
    ids = [mutation.id for mutation in mutations]
    if repeated := sorted({name for name in ids if ids.count(name) > 1}):
        sys.exit(f"{path}: ids occur twice: {', '.join(repeated)}")
    chosen = [m for m in mutations if not prefixes or m.id.startswith(tuple(prefixes))]
    if not chosen:
        sys.exit(f"{path} has no mutation that begins with {' or '.join(prefixes)}")
    return chosen


def problems(mutations: Sequence[Mutation], root: Path) -> list[str]:
    """What keeps mutations from being applied to a checkout; one line each."""
    sources = {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for folder in PRODUCT
        for path in (root / folder).rglob("*.py")
    }
    found = []
    for mutation in mutations:
        try:
            mutation.applied(sources.get(mutation.file, ""))
        except ValueError as error:
            elsewhere = [name for name, text in sources.items() if mutation.old in text and name != mutation.file]
            found.append(f"{error}" + f"; it is in {', '.join(elsewhere)}" * bool(elsewhere))
        missing = [name for name in mutation.tests if not (root / "tests" / name.partition("::")[0]).exists()]
        if missing:
            found.append(f"{mutation.id}: tests/{', tests/'.join(missing)} is missing")
    return found


SERVER = """
import contextlib, importlib, json, os, signal, sys, tempfile, time
for name in "torch transformers optimum onnx onnx_ir onnxruntime matplotlib hypothesis".split():
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
import pytest
for line in sys.stdin:
    request = json.loads(line)
    output = tempfile.TemporaryFile("w+")
    code = 3
    child = os.fork()
    if not child:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
        for stream, target in enumerate((os.open(os.devnull, os.O_RDONLY), output.fileno(), output.fileno())):
            os.dup2(target, stream)
        try:
            code = int(pytest.main(request["argv"]))
            sys.stdout.flush()
        finally:
            os._exit(code)
    end, code = time.monotonic() + request["limit_s"], None
    while code is None and time.monotonic() < end:
        time.sleep(0.05)
        done, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if done else None
    if code is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    output.seek(0)
    print(json.dumps({"code": code, "text": output.read()}), flush=True)
"""
"""Runs pytest in processes forked from one that has imported what is slow to import, and nothing of the product."""


class Checkout:
    """A copy of a checkout that is mutated and tested."""

    def __init__(self, source: Path, folder: Path, python: str, limit_s: float) -> None:
        self.root = Path(shutil.copytree(source, folder / "checkout", ignore=NOT_COPIED))
        self._limit_s = limit_s
        paths = os.pathsep.join(str(self.root / part) for part in ("", "export", "runtime"))
        # no bytecode: files are told apart by time and size, which a mutation may leave unchanged
        environment = {
            "PYTHONPATH": paths,
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(folder),
        }
        self._server = subprocess.Popen(
            [python, "-c", SERVER],
            cwd=self.root,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @contextmanager
    def mutated(self, mutation: Mutation) -> Iterator[None]:
        path = self.root / mutation.file
        before = path.read_text(encoding="utf-8")
        path.write_text(mutation.applied(before), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(before, encoding="utf-8")

    def first_failure(self, tests: Sequence[str]) -> str | None:
        """The first test that fails, or None. Raises ValueError when no tests run."""
        argv = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-m", "not long and not gpu"]
        request = {"argv": [*argv, *(f"tests/{name}" for name in tests)], "limit_s": self._limit_s}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        result = json.loads(self._server.stdout.readline())
        code, text = result["code"], result["text"]
        if code is None:
            return f"(more than {self._limit_s:.0f} s)"
        if code == 0:
            return None
        failed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", text, re.MULTILINE)
        if code in (1, 2) and failed:
            return failed[1]
        raise ValueError(f"pytest ended with {code}: {' '.join(text.split())[-300:]}")

    def close(self) -> None:
        self._server.kill()
        self._server.wait()


def judge(mutation: Mutation, checkout: Checkout, sound: set[str], wide: bool, trust: bool) -> Verdict:
    """Run tests against a mutation. sound: tests known to pass without any; trust: all tests are."""
    started = time.monotonic()
    stages = [mutation.tests, *((name,) for name in WIDE * wide)]

    def verdict(status: str, by: str = "") -> Verdict:
        return Verdict(status, by, round(time.monotonic() - started, 1))

    try:
        for tests in stages:
            with checkout.mutated(mutation):
                failed = checkout.first_failure(tests)
            if failed is None:
                continue
            if not trust and "::" in failed and failed not in sound:
                if checkout.first_failure([failed]) is not None:
                    return verdict("error", f"{failed} fails without the mutation, too")
                sound.add(failed)
            return verdict("caught", failed)
    except ValueError as error:
        return verdict("error", str(error))
    return verdict("survived")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("ids", nargs="*", metavar="PREFIX", help="mutations whose ids begin so (default: all)")
    options.add_argument("--check", action="store_true", help="check the anchors and run no tests")
    options.add_argument("--wide", action="store_true", help="run survivors against all of the suite")
    options.add_argument("--trust", action="store_true", help="do not check that a failed test passes without mutation")
    options.add_argument("--limit", type=float, default=600, metavar="S", help="seconds per pytest run (default 600)")
    options.add_argument("--jobs", type=int, default=1, metavar="N", help="mutations at a time (default 1)")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts, after each one")
    options.add_argument("--resume", action="store_true", help="keep the verdicts that --json has, except errors")
    options.add_argument(
        "--against", type=Path, metavar="FILE", help="verdicts of another suite, as --json writes them"
    )
    options.add_argument("--checkout", type=Path, default=ROOT, metavar="DIR", help="mutate another checkout")
    options.add_argument("--mutations", type=Path, default=MUTATIONS, metavar="FILE", help="other mutations")
    options.add_argument("--python", default=sys.executable, help="interpreter for the tests (default: this one)")
    args = options.parse_args()

    mutations = read(args.mutations, args.ids)
    wrong = problems(mutations, args.checkout)
    if args.check or wrong:
        print("\n".join(wrong) or f"{len(mutations)} mutations apply")
        sys.exit(bool(wrong))
    verdicts: dict[str, Verdict] = {}
    if args.resume and args.json and args.json.exists():
        kept = json.loads(args.json.read_text(encoding="utf-8"))
        verdicts = {name: Verdict(**values) for name, values in kept.items() if values["status"] != "error"}
    sound: set[str] = set()
    width = max(len(mutation.id) for mutation in mutations)
    with tempfile.TemporaryDirectory(prefix="mutations.") as scratch:
        copies: queue.Queue[Checkout] = queue.Queue()
        for number in range(args.jobs):
            folder = Path(scratch, str(number))
            folder.mkdir()
            copies.put(Checkout(args.checkout, folder, args.python, args.limit))

        def run(mutation: Mutation) -> None:
            checkout = copies.get()
            try:
                found = judge(mutation, checkout, sound, args.wide, args.trust)
            finally:
                copies.put(checkout)
            verdicts[mutation.id] = found
            print(f"{found.status:<8} {mutation.id:<{width}} {found.seconds:6.1f} s  {found.by}", flush=True)
            if args.json:
                text = json.dumps({name: asdict(verdicts[name]) for name in sorted(verdicts)}, indent=1)
                args.json.write_text(text + "\n", encoding="utf-8")

        try:
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(run, [mutation for mutation in mutations if mutation.id not in verdicts]))
        finally:
            for checkout in copies.queue:
                checkout.close()

    counts = {
        status: [m for m in mutations if verdicts[m.id].status == status] for status in ("caught", "survived", "error")
    }
    print(", ".join(f"{len(those)} {status}" for status, those in counts.items()))
    for mutation in counts["survived"]:
        print(f"survived: {mutation.id}: {mutation.breaks}")
    lost = []
    if args.against:
        before = json.loads(args.against.read_text(encoding="utf-8"))
        caught = [m for m in mutations if before.get(m.id, {}).get("status") == "caught"]
        lost = [m.id for m in caught if verdicts[m.id].status != "caught"]
        print(f"{args.against} caught {len(caught)} of these; not caught now: {', '.join(lost) or 'none'}")
    sys.exit(bool(lost if args.against else counts["survived"] + counts["error"]))


if __name__ == "__main__":
    main()
