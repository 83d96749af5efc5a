"""Commands and examples of README and docs: they run, in process, on the demo's model under the names of the page.

What needs a GPU, the network or hours is parsed by the command's own parser instead; training runs with fewer episodes.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tomllib
from transformers import dynamic_module_utils

from mara_deploy.demo import AGENT_FILE, MODEL_FOLDER
from mara_deploy.demo import __main__ as demo
from mara_export.parity import reference
from tests.adapters import make_adapter

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
RUN_ON = ("README.md", "export.md", "run.md", "train.md", "evaluate.md", "python.md")
"""Pages whose commands run; those of the others are parsed."""
LONG = ("export.md",)
"""Of these, pages left to `test-long`."""
SERVED = ("serve.md",)
"""Pages whose Python examples need a server: tests/serve runs them."""
AT_HAND = ("qwen2",)
"""Models that are in the working directory; others would have to be downloaded."""
SMALLER = {
    "mara-run": "--max-new-tokens 24 --schedule together",  # which needs no measurement of each new bundle
    "mara-eval": "--max-new-tokens 24 --schedule together --quiet",
    "mara-train": "--episodes 6 --prompts-at-once 3 --max-new-tokens 12 --start-transitions 8 --batch 16 "
    "--replay-transitions 4000 --widths 16 8 --updates-per-episode 1 --quiet",
    "mara-train --resume": "--episodes 9 --quiet",
}
"""Options that are appended; the last one counts."""
OTHERS = ("cat", "cp", "curl", "docker", "grep", "hf", "mkdir", "pip", "python3", "rsync", "source", "sudo")
"""Programs that are not ours."""


def fenced(page: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced code blocks, in order."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, text) for language, text in blocks if language in languages]


def commands(block: str) -> list[list[str]]:
    """Words of each command of a shell block; continued lines joined, variables that it sets replaced."""
    words, values = [], {}
    for line in block.replace("\\\n", " ").splitlines():
        if assignment := re.fullmatch(r"(\w+)='(.*)'", line):
            values[assignment[1]] = assignment[2]
            continue
        for name, value in values.items():
            line = line.replace(f'"${name}"', shlex.quote(value))
        if words_of_line := shlex.split(line, comments=True):
            words.append(words_of_line)
    return words


def ours(words: list[str]) -> list[str] | None:
    """The part of a line that calls one of our commands; None if it calls none."""
    start = next((i for i, word in enumerate(words) if re.fullmatch(r"mara-[a-z]+", word)), None)
    return None if start is None else words[start:]


def parser(name: str):
    return importlib.import_module(f"mara_deploy.commands.{name.removeprefix('mara-')}").parser()


def runs_here(page: Path, words: list[str]) -> bool:
    """False for what needs a GPU, a download, or hours."""
    name, *arguments = words
    if page.name not in RUN_ON or name == "mara-bench" or "--lm-eval" in arguments:
        return False
    if name in ("mara-build", "mara-run") and {"tensorrt", "tensorrt-rtx"} & set(arguments):
        return False
    return "--model" not in arguments or arguments[arguments.index("--model") + 1] in AT_HAND


@dataclass
class Place:
    """A working directory with the model `qwen2`, agents, prompts and a score; shared by all pages."""

    folder: Path
    done: set[tuple[str, ...]] = field(default_factory=set)
    """commands that have run: several pages have the same first line"""

    def provide(self, names: Iterable[str], bundle: Callable[..., Path]) -> None:
        """Bundles that a page uses and does not export: the demo's, under that name."""
        for name in names:
            if not (self.folder / name).exists():
                shutil.copytree(bundle("demo"), self.folder / name)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    shutil.copytree(MODEL_FOLDER, folder / "qwen2")
    for name in ("agent", "polite", "brief"):
        shutil.copy(AGENT_FILE, folder / f"{name}.safetensors")
    make_adapter(MODEL_FOLDER, folder / "my-adapter", target_modules=["q_proj", "v_proj"])
    (folder / "prompts.txt").write_text("How do I keep bread fresh?\nAnd cheese?\n", encoding="utf-8")
    score, *_ = (block for _, block in fenced(ROOT / "docs/guide/train.md", "python"))
    (folder / score.split()[1]).write_text(score, encoding="utf-8")
    return Place(folder)


@pytest.fixture
def place(directory, monkeypatch):
    monkeypatch.chdir(directory.folder)
    monkeypatch.syspath_prepend(str(directory.folder))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(directory.folder / "modules"))
    yield directory
    sys.modules.pop("my_scores", None)


@contextlib.contextmanager
def short_gate():
    """The parity gate of an export compares one prompt instead of four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "PROMPTS", 1)
        patch.setattr(reference, "TEXTS", reference.TEXTS[:1])
        yield


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.long if page.name in LONG else (), id=str(page.relative_to(ROOT)))
        for page in PAGES
    ],
)
def test_commands_and_examples_run(page, place, command, bundle):
    names: dict[str, object] = {}  # a page's later examples use what earlier ones define
    for language, block in fenced(page, "sh", "python", "json", "toml"):
        if language == "python":
            place.provide(re.findall(r"""(?:AlignedDecoder|Bundle\.open)\("([^"]+)"\)""", block), bundle)
            example = compile(block, str(page), "exec")
            if page.name not in SERVED:
                with short_gate():
                    exec(example, names)
        elif language == "json":
            json.loads(block)
        elif language == "toml":
            tomllib.loads(block)
        else:
            for words in commands(block):
                check(page, words, place, command, bundle)


def check(page, words, place, command, bundle):
    """Run a line, or parse it; a program that is not ours must at least be known."""
    call = ours(words)
    if call is None:
        check_other(words)
        return
    name, *arguments = call
    parser(name).parse_args(arguments)  # exits on an unknown option
    if not runs_here(page, call) or tuple(call) in place.done:
        return
    if name in ("mara-run", "mara-agent", "mara-inspect", "mara-eval"):
        place.provide([word for word in arguments if word.startswith("qwen2-")], bundle)
    smaller = SMALLER.get(f"{name} --resume" if "--resume" in arguments else name, "")
    stdin = words[1] if words[0] == "echo" else ""
    with short_gate():
        result = command(name.removeprefix("mara-"), *arguments, *shlex.split(smaller), stdin=stdin)
    assert result.code == 0, f"{page.name}: {shlex.join(call)}\n{result.err}"
    assert result.out.strip() or "--quiet" in smaller
    place.done.add(tuple(call))


def check_other(words):
    if words[0] == "python" or words[0].startswith("benchmarks/"):
        module = words[2].replace(".", "/") + ".py" if words[1:2] == ["-m"] else None
        script = ROOT / (module or next(word for word in words if "/" in word))
        assert script.is_file(), script
    elif words[0] == "make":
        subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
    else:
        assert words[0] in OTHERS or "/bin/" in words[0], shlex.join(words)


def test_the_demo_prints_what_the_readme_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    shown = README.read_text(encoding="utf-8").split("<!-- demo output")[1].split("```text\n")[1].split("```")[0]
    assert demo.main(["--prompts", "1", "--out", str(tmp_path / "demo")]) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert "\n".join(line.rstrip() for line in shown.splitlines()) in printed
