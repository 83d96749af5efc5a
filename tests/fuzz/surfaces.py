"""What comes from outside, each as a function of a bundle's folder that returns the function of one case."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random

from mara_deploy.commands import inspect, memory, run
from mara_deploy.commands.decoding import EngineOptions, decode_config, template_variables
from mara_deploy.commands.options import from_args
from mara_deploy.commands.process import unusable
from mara_runtime.agents import AgentStack
from mara_runtime.bundle import Bundle
from mara_runtime.chat import ChatTemplate
from mara_runtime.config import DecodeConfig
from mara_runtime.errors import OptionError
from mara_runtime.graph_file import check_graph
from mara_runtime.manifest import MANIFEST_FILE, checksum
from mara_runtime.text import TextSide, TextStream
from tests.fuzz.changes import HOSTILE, as_json, changed_bytes, changed_json

Case = Callable[[Random], object]
TEXTS = (
    "How do I oil a squeaky door?",
    "o" * 300,
    " \t\n" * 50,
    "日本語 — ä̈ 🙂\u200d\u202e",
    "<|end|><s></s>",
    "a" * 40 + "!",
)


def files(folder: Path) -> Case:
    """A changed file of the bundle, or another in its place: refused, or what it was."""
    bundle = Bundle.open(folder)
    contents = {name: bundle.path(name).read_bytes() for name in sorted(bundle.manifest.files)}

    def case(rng: Random) -> None:
        name = rng.choice([*contents] * 3 + [n for n in contents if len(contents[n]) < 10**6] * 7)
        path, whole = folder / name, contents[name]
        how = rng.randrange(20)
        try:
            if how == 0:
                path.unlink()
            elif how == 1:
                path.write_bytes(contents[rng.choice([*contents])])
            else:
                path.write_bytes(changed_bytes(rng, whole))
            now = path.read_bytes() if path.exists() else None
            Bundle.open(folder)
            assert now == whole, f"{name} was changed unnoticed"
        finally:
            path.write_bytes(whole)

    return case


def manifest_bytes(folder: Path) -> Case:
    """A manifest with changed bytes: refused, or one that says the same."""
    whole, bundle = (folder / MANIFEST_FILE).read_bytes(), Bundle.open(folder)

    def case(rng: Random) -> None:
        (folder / MANIFEST_FILE).write_bytes(changed_bytes(rng, whole))
        assert Bundle.open(folder, verify=False).manifest == bundle.manifest, "a manifest was changed unnoticed"

    return case


def manifest(folder: Path) -> Case:
    """Changed fields, with a checksum that fits, as an attacker makes it."""
    whole = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    memory_options = memory.parser()

    def case(rng: Random) -> None:
        value = changed_json(rng, whole)
        with contextlib.suppress(TypeError, ValueError, AttributeError):
            value["sha256"] = checksum(value)
        (folder / MANIFEST_FILE).write_bytes(as_json(rng, value))
        bundle = Bundle.open(folder, verify=False)
        "\n".join(inspect.summary(bundle)).encode()
        memory.of_bundle(bundle, memory_options.parse_args([str(folder)]))
        bundle.verify()

    return case


def graph(folder: Path) -> Case:
    """Changed bytes of the step graph, with a checksum that fits."""
    bundle = Bundle.open(folder)
    path = bundle.path(bundle.manifest.step.file)
    whole = path.read_bytes()

    def case(rng: Random) -> None:
        path.write_bytes(changed_bytes(rng, whole))
        check_graph(path, bundle.manifest)

    return case


def agent(folder: Path) -> Case:
    """Changed bytes of an agent's file, read as an engine takes it into memory."""
    bundle = Bundle.open(folder)
    facts = bundle.manifest.agents[0]
    path = bundle.path(facts.file)
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")  # the changes are to come where they are structure

    def case(rng: Random) -> None:
        path.write_bytes(changed_bytes(rng, whole[:head]) + whole[head:])
        AgentStack(bundle).use([facts.name], lambda stacked: None)

    return case


def tokenizer(folder: Path) -> Case:
    """A changed tokenizer.json, used for a prompt and an answer."""
    bundle = Bundle.open(folder)
    assert bundle.manifest.tokenizer is not None
    path = bundle.path(bundle.manifest.tokenizer.file)
    whole = json.loads(path.read_bytes())
    small = {**whole, "model": {**whole["model"], "vocab": {}, "merges": []}}

    def case(rng: Random) -> None:
        value = changed_json(rng, small)  # the changes are to come where there are few fields
        if isinstance(value, dict) and isinstance(value.get("model"), dict):
            value["model"] = {**value["model"], "vocab": whole["model"]["vocab"], "merges": whole["model"]["merges"]}
        path.write_bytes(as_json(rng, changed_json(rng, whole) if rng.random() < 0.2 else value))
        side = TextSide(bundle)
        ids = side.encode_raw(rng.choice(TEXTS))
        stream = TextStream(side, ("\n\n",))
        for token in [*ids[:20], *(rng.randrange(1024) for _ in range(8))]:
            stream.push(token)
        stream.finish()

    return case


PIECES = re.findall(
    "{.*?[%}]}",
    """
    {% for m in messages %}; {% endfor %}; {{ m.content }}; {{ messages }}; {% if m %}; {% endif %};
    {% set x = x ~ x %}; {% for i in range(99999) %}; {{ 'x' * 99999999 }}; {{ '%099999d' % 1 }};
    {{ messages | tojson(indent=9999) }};
    {% macro f(x) %}; {% endmacro %}; {{ f(f) }}; {{ ''.__class__ }}; {{ raise_exception('no') }}; {% break %};
    {{ strftime_now('%Y' * 999999) }}; {% include 'x' %}; {% generation %}; {% endgeneration %}; {{ namespace(a=1) }};
    {{ messages | map('upper') | list }}; {{ 9**9**9 }}; {{ x[::-1] | replace('', messages|string) }}
    """,
)


def template(folder: Path) -> Case:
    """A changed chat template, or a heap of pieces, on changed messages."""
    text_side = TextSide(Bundle.open(folder))
    source = (folder / "chat_template.jinja").read_bytes()
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]

    def case(rng: Random) -> None:
        pieces = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 8)))
        text = pieces if rng.random() < 0.5 else changed_bytes(rng, source).decode(errors="replace")
        talk = changed_json(rng, messages) if rng.random() < 0.5 else messages
        text_side.__dict__["template"] = ChatTemplate(text, {"bos_token": "<s>"})
        text_side.encode_chat(talk if isinstance(talk, list) else [talk])

    return case


VALUES = (
    *("0", "1", "-1", "nan", "inf", "1e999", "9" * 20, "x", "", "=", "true", "a=1", 'a={"b":[1]}', "a=[" * 30, "top1"),
    *("random", "last", "\0", "日", "--", "-", "1,2", "0x10", "1_0", " 1 "),
)


def options(folder: Path) -> Case:
    """Options of mara-run, and of the library."""
    parser = run.parser()
    flags = [flag for action in parser._actions for flag in action.option_strings]

    def case(rng: Random) -> None:
        names = [*DecodeConfig.__dataclass_fields__]
        values = {name: rng.choice([*HOSTILE, *VALUES, (), ("x",), 3]) for name in rng.sample(names, rng.randrange(4))}
        with contextlib.suppress(OptionError):
            DecodeConfig(**values).to_json()
        given = [f"{rng.choice(flags)}={rng.choice(VALUES)}" for _ in range(rng.randrange(4))]
        if reason := unusable(given):
            raise OptionError(reason)
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                args: argparse.Namespace = parser.parse_args([str(folder), *given])
        except SystemExit as left:
            raise OptionError("refused") if left.code else OptionError("help") from None
        chosen = from_args(run.RunArguments, args)
        decode_config(args), from_args(EngineOptions, args), template_variables(chosen.template)

    return case


SURFACES: dict[str, Callable[[Path], Case]] = {
    each.__name__: each for each in (files, manifest_bytes, manifest, graph, agent, tokenizer, template, options)
}
