"""`mara-eval` killed at random moments: the same command ends with the result of a run that was left alone."""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

from mara_deploy.commands.eval import main
from mara_deploy.demo.prompts import prompts


@pytest.fixture
def processes() -> Any:
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mara_deploy.commands.eval", "mara_runtime.decoder", "onnxruntime", "jinja2"])
    return context


def result(out: Path) -> dict[str, Any]:
    """What an evaluation found, without times."""

    def timeless(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: timeless(v) for k, v in value.items() if not re.fullmatch("command|.*_ms|tokens_per_second", k)}

    found: dict[str, Any] = timeless(json.loads((out / "result.json").read_text(encoding="utf-8")))
    return found


def kept(out: Path) -> dict[str, dict[str, Any]]:
    """The texts and scores in the stores."""
    stores = {}
    for file in sorted((out / "answers").iterdir()) + sorted((out / "scores").iterdir()):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[1:]]
        records = {line["key"]: line["record"] for line in lines}
        assert len(records) == len(lines)
        stores[file.name] = {k: [a["text"] for a in r] if isinstance(r, list) else r for k, r in records.items()}
    return stores


@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.long)])
def test_a_killed_evaluation_ends_like_one_that_was_left_alone(bundle, tmp_path, processes, kills) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([prompt.text for prompt in prompts(4, seed=5, held_out_split=True)]))
    options = ["--prompts", file, "--score", "demo", "--max-new-tokens", 16, "--threads", 1, "--baseline", "greedy"]
    options += ["--baseline", "sample", "--schedule", "together", "--quiet"]

    def start(out: Path) -> Any:
        process = processes.Process(
            target=main, args=([str(part) for part in (bundle("demo"), *options, "--out", out)],)
        )
        process.start()
        return process

    start(tmp_path / "warm").join()  # the import of everything
    begun = time.monotonic()
    start(tmp_path / "whole").join()
    seconds = time.monotonic() - begun
    expected = result(tmp_path / "whole"), kept(tmp_path / "whole")

    rng, killed = random.Random(kills), 0
    for trial in range(10 * kills):
        out = tmp_path / f"out{trial}"
        for _ in range(min(3, kills - killed)):
            process = start(out)
            time.sleep(rng.uniform(0, seconds))
            process.kill()
            process.join()
            killed += process.exitcode == -9
        start(out).join()
        assert (result(out), kept(out)) == expected
        assert sorted(path.name for path in out.iterdir()) == ["answers", "report.html", "result.json", "scores"]
        if killed == kills:
            break
    assert killed == kills
