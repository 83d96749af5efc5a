"""A bundle is self-contained: it runs where it is moved to, without any package that exported it.

`make test-lowest` runs one in an environment that never had those packages.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from mara_runtime import AlignedDecoder, DecodeConfig

EXPORTERS = ["torch", "transformers", "onnx", "optimum", "huggingface_hub", "mara_export"]
PROMPT = "How do I cook rice?"
BLOCK = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not here")

BLOCKED = set(sys.argv.pop(1).split(","))
sys.meta_path.insert(0, Blocker())
for name in BLOCKED:
    try:
        __import__(name)
    except ImportError as error:
        assert "is not here" in str(error)
    else:
        raise AssertionError(name)
"""
COMMAND = """
from mara_deploy.commands.run import main
sys.exit(main([".", "--prompt", sys.argv[1], "--max-new-tokens", "40", "--json", "--threads", "1"]))
"""
LIBRARY = """
from mara_runtime import AlignedDecoder, DecodeConfig
result = AlignedDecoder(".", threads=1).generate(sys.argv[1], DecodeConfig(max_new_tokens=40))
print(json.dumps(result.to_json()))
"""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="modes of files are those of POSIX")
@pytest.mark.parametrize(
    ("script", "blocked"), [(COMMAND, EXPORTERS), (LIBRARY, [*EXPORTERS, "mara_deploy"])], ids=["command", "library"]
)
def test_a_moved_bundle_that_nobody_may_change_runs_as_before(bundle, tmp_path, script, blocked) -> None:
    first, moved = tmp_path / "first" / "bundle", tmp_path / "another name"
    shutil.copytree(bundle("qwen2"), first)
    expected = AlignedDecoder(first, threads=1).generate(PROMPT, DecodeConfig(max_new_tokens=40)).to_json()
    assert len(expected["token_ids"]) > 3
    assert expected["stats"]["decisions"] > 0
    shutil.move(first, moved)
    first.parent.rmdir()
    before = {path: path.stat().st_mtime_ns for path in moved.rglob("*")}
    for path in (*before, moved):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        outcome = subprocess.run(
            [sys.executable, "-c", BLOCK + script, ",".join(blocked), PROMPT],
            cwd=moved,
            env={**os.environ, "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert {path: path.stat().st_mtime_ns for path in moved.rglob("*")} == before
    finally:
        for folder in (moved, moved / "agents"):
            folder.chmod(0o755)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    found = json.loads(outcome.stdout)
    for name in ("token_ids", "text", "finish_reason"):
        assert found[name] == expected[name]
    for name in ("decisions", "examined", "forced", "accepted_rank", "candidate_counts"):
        assert found["stats"][name] == expected["stats"][name]


@pytest.mark.parametrize("layout", ["blobs/{0}", "bundle/..data/{0}", "objects/{0}/{0}"])
def test_a_bundle_of_links_runs_as_before(bundle, tmp_path, layout) -> None:
    """As in the Hub's cache, in a volume of Kubernetes, in an annex of git."""
    expected = AlignedDecoder(bundle("qwen2"), threads=1).generate(PROMPT, DecodeConfig(max_new_tokens=20))
    folder = tmp_path / "bundle"
    shutil.copytree(bundle("qwen2"), folder)
    for path in list(folder.iterdir()):
        target = tmp_path / layout.format(path.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        path.symlink_to(os.path.relpath(target, folder))
    answer = AlignedDecoder(folder, threads=1).generate(PROMPT, DecodeConfig(max_new_tokens=20))
    assert answer.token_ids == expected.token_ids
