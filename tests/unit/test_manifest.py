"""manifest.json: the round trip, and what is refused, field by field."""

import copy
import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from mara_runtime.errors import BundleError, OptionError
from mara_runtime.manifest import AgentFacts, EngineFacts, Manifest, Noise, checksum, is_agent_name
from mara_runtime.manifest_reader import parse
from tests.unit import helpers, manifests

ENGINE = "engines/tensorrt/step-64.engine"
AGENTS = [f"agents/{name}.safetensors" for name in ("polite", "b.2_-")]
FILES = dict.fromkeys(("step.onnx", "tokenizer.json", "chat_template.jinja", ENGINE, *AGENTS), b"x")
VALID = manifests.manifest_json(FILES, has_tokenizer=True, special_tokens={"bos_token": "<bos>"})
VALID["model"]["adapter"] = {
    "source": "example/tuned", "revision": "89ab", "base": "example/tiny", "rank": 4, "weights": 14, "sha256": "f00d",
}  # fmt: skip
VALID["agents"][0] |= {"training": helpers.TRAINING, "noise": 0.5}
VALID["agents"][1]["parity"] = None
VALID["engines"] = [manifests.engine_json(ENGINE)]
VALID["sha256"] = checksum(VALID)
TEXT = json.dumps(VALID)
MISSING = object()
Path = tuple[str, ...]


def at(holder: Any, path: Path) -> Any:
    """The value at a path; in a list, keys are numbers."""
    for key in path:
        holder = holder[int(key) if isinstance(holder, list) else key]
    return holder


def changed(path: Path, value: object) -> dict[str, Any]:
    """The valid manifest with one value replaced, or removed."""
    manifest = copy.deepcopy(VALID)
    holder = at(manifest, path[:-1])
    key = int(path[-1]) if isinstance(holder, list) else path[-1]
    if value is MISSING:
        del holder[key]
    else:
        holder[key] = value
    if path[0] != "sha256":
        manifest["sha256"] = checksum(manifest)
    return manifest


OPEN = {
    ("made_with",), ("tokenizer", "special_tokens"), ("engines", "0", "options"),
    ("agents", "0", "training", "template"),
}  # fmt: skip
"""Whose content the format leaves open."""
NULLABLE = {
    ("model", "revision"), ("step", "quantisation"), ("tokenizer",), ("tokenizer", "chat_template"), ("parity",),
    ("noise",), ("structure",), ("model", "adapter"), ("model", "adapter", "revision"), ("model", "adapter", "base"),
    *((gate, name) for gate in ("parity", "structure") for name in ("perplexity", "largest_activation")),
    *(("agents", "0", name) for name in ("training", "parity", "noise")), ("agents", "0", "training", "chat_template"),
}  # fmt: skip


def paths(value: object, prefix: Path = ()) -> Iterator[Path]:
    """Every field of the valid manifest."""
    if prefix:
        yield prefix
    if isinstance(value, dict) and prefix not in OPEN:
        for key, inner in value.items():
            yield from paths(inner, (*prefix, key))
    if prefix in (("engines",), ("agents",)):
        yield from (path for path in paths(VALID[prefix[0]][0], (*prefix, "0")) if path[-1] != "0")


FIELDS = [path for path in paths(VALID) if path[0] != "files"]
FILE_FIELDS = [path for path in paths(VALID) if path[0] == "files"]


def refused(text: str) -> str:
    """The message for a text that must not be read: one line of moderate length that says where."""
    with pytest.raises(BundleError) as caught:
        parse(text, "somewhere/manifest.json")
    message = str(caught.value)
    assert message.startswith("somewhere/manifest.json")
    assert message.isprintable()  # so it is one line
    assert len(message) < 1000
    return message


def read_or_refused(text: str) -> Manifest | None:
    """A manifest that survives a round trip, or None where `refused` holds."""
    try:
        manifest = parse(text, "here")
    except BundleError:
        refused(text)
        return None
    assert parse(manifest.to_json(), "there") == manifest
    return manifest


def test_every_field_is_read() -> None:
    manifest = parse(json.dumps(VALID), "here")
    assert json.loads(manifest.to_json()) == VALID
    assert (manifest.model.source, manifest.model.eos_token_ids) == ("example/tiny", (0,))
    assert [(agent.name, agent.file) for agent in manifest.agents] == [*zip(("polite", "b.2_-"), AGENTS, strict=True)]
    assert (manifest.agents[0].widths, manifest.agents[0].noise) == ((3, 2), 0.5)
    assert (manifest.step.lowering, manifest.step.cache, manifest.noise) == ("ort", "float32", 0.0025)
    for path in NULLABLE:
        manifest = parse(json.dumps(changed(path, None)), "here")
        assert json.loads(manifest.to_json()) == changed(path, None)


def test_the_tests_below_miss_no_field() -> None:
    assert {f.name for f in dataclasses.fields(Manifest)} == set(VALID) - {"schema_version", "sha256"}
    for name in ("model", "step", "tokenizer"):
        kind = type(getattr(parse(json.dumps(VALID), "here"), name))
        assert {f.name for f in dataclasses.fields(kind)} == set(VALID[name])
    for kind, name in ((AgentFacts, "agents"), (EngineFacts, "engines")):
        assert {f.name for f in dataclasses.fields(kind)} == set(VALID[name][0])


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────

OTHERS = (None, True, 1.5, "text", -3, [], [1.5], ["x", 2], {}, {"x": []})


def is_allowed(path: Path, other: object) -> bool:
    """Whether a value may be one of the field's own kind."""
    value = at(VALID, path)
    if other is None:
        return path in NULLABLE
    return (type(other) is type(value) and type(value) not in (list, int)) or (other == [] and isinstance(value, list))


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_a_field_that_is_missing_or_of_another_kind_is_named(path: Path) -> None:
    assert ".".join(path) in refused(json.dumps(changed(path, MISSING)))
    for other in OTHERS:
        if path != ("schema_version",) and not is_allowed(path, other):
            assert f"field {'.'.join(path)}" in refused(json.dumps(changed(path, other)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "shape", "caches", "0", "head_dim"), -64),
        (("model", "shape", "caches"), []),
        (("model", "shape", "caches"), 2 * VALID["model"]["shape"]["caches"]),  # for one layer
        (("model", "shape", "caches"), [{"count": 2, "kv_heads": 1, "head_dim": 4}]),
        (("max_context",), 0),
        (("max_candidates",), -1),
        (("model", "eos_token_ids"), [-1]),
        (("model", "eos_token_ids"), [True]),
        *((("agents", "0", "widths"), widths) for widths in ([0, 1], [8], [8, 4, 2], [])),
        (("agents", "0", "hidden_size"), 3),  # that of the model is 2
        (("agents", "0", "fallback"), "middle"),
        *((("agents", "0", "name"), name) for name in ("other", "", ".", "../polite", "b.2_-")),
        (("agents", "0", "file"), "agents/none.safetensors"),
        (("agents", "0", "parity", "passed"), False),
        (("agents", "0", "parity", "decisions", "changed"), -1),
        (("agents", "0", "noise"), -0.001),
        (("targets",), ["cpu", None]),
        (("targets",), []),
        (("targets",), ["cpu", "tpu"]),
        *(
            ((*path,), 2**31)
            for path in (("max_context",), ("model", "shape", "num_layers"), ("engines", "0", "slots"))
        ),
        (("model", "eos_token_ids"), [2**31]),
        *((("model", *name), "a\x1b[2J") for name in (["source"], ["adapter", "source"], ["adapter", "base"])),
        (("model", "adapter", "rank"), 0),
        (("agents", "0", "source"), "line\nbreak"),
        (("made_with",), {"numpy\x9b": "2"}),
        (("step", "quantisation", "block_size"), 0),
        (("step", "quantisation", "block_size"), -2),
        (("parity", "passed"), False),
        (("parity", "rows"), -1),
        (("structure", "passed"), False),
        (("structure", "layers"), 0),
        (("structure", "windows"), [-1]),
        *((("engines", "0", "options"), {name: "3"}) for name in ("layers", "seconds", "version_compatible")),
        (("engines", "0", "options"), {"layers": "all"}),
        (("engines", "0", "options"), {"decomposable": 3}),
        (("made_with",), {"numpy": 2}),
        (("tokenizer", "special_tokens"), {"bos_token": None}),
        (("tokenizer", "message_rules"), ["shout"]),
        (("tokenizer", "file"), "/etc/passwd"),
        (("tokenizer", "chat_template"), "nothing.jinja"),
        (("step", "file"), "other.onnx"),
        (("step", "file"), "../step.onnx"),
        (("step", "cache"), "int8"),
        (("noise",), -0.001),
        (("noise",), {"margins": 0.1, "logits": 0.1}),
        (("engines", "0", "target"), "cpu"),
        (("engines", "0", "file"), "engines/tensorrt/other.engine"),
        (("engines", "0", "file"), "../../secret"),
        (("engines", "0", "file"), "step.onnx"),  # whoever replaces an engine deletes its file
        *((("engines", "0", name), 0) for name in ("slots", "decode_rows", "head_rows", "places", "shared_rows")),
        *((("engines", "0", "agent_widths"), widths) for widths in ([8], [8, 0])),
        (("engines", "0", "in_place"), 1),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named(path: Path, value: object) -> None:
    assert f"field {'.'.join(path)}" in refused(json.dumps(changed(path, value)))


def test_engines_have_a_folder_per_target_and_one_size_each() -> None:
    assert "engines/tensorrt-rtx/" in refused(json.dumps(changed(("engines", "0", "target"), "tensorrt-rtx")))
    twice = changed(("engines",), [*VALID["engines"], manifests.engine_json(ENGINE, version="10.3.0")])
    assert "field engines.1.slots is 64" in refused(json.dumps(twice))
    value = copy.deepcopy(VALID)
    others = [("tensorrt", 128), ("tensorrt-rtx", 64)]
    for target, slots in others:
        name = f"engines/{target}/step-{slots}.engine"
        value["files"][name] = {"size_bytes": 1, "sha256": "0" * 64}
        value["engines"].append(manifests.engine_json(name, target=target, slots=slots))
    engines = parse(helpers.signed(value), "here").engines
    assert [(engine.target, engine.slots) for engine in engines] == [("tensorrt", 64), *others]


@pytest.mark.parametrize("name", ["a b", "-a", ".a", "a" * 65, "ä", "a=b"])
def test_an_agent_is_called_what_files_and_options_can_be_called(name: str) -> None:
    assert (is_agent_name(name), is_agent_name("Z9._-" * 12)) == (False, True)
    value, facts = copy.deepcopy(VALID), manifests.agent_json(name)
    value["files"][facts["file"]], value["agents"][1] = {"size_bytes": 1, "sha256": "0" * 64}, facts
    assert "field agents.1.name" in refused(helpers.signed(value))


def test_agents_have_names_of_their_own_and_may_be_none() -> None:
    elsewhere = changed(("agents", "0", "file"), "step.onnx")  # whoever removes an agent deletes its file
    assert "agents.0.name is 'polite', which does not go with the file 'step.onnx'" in refused(json.dumps(elsewhere))
    twice = changed(("agents",), [VALID["agents"][1]] * 2)
    assert "field agents.1.name is b.2_-" in refused(json.dumps(twice))
    none = parse(json.dumps(changed(("agents",), [])), "here")
    assert none.agents == ()
    with pytest.raises(OptionError, match=r"--agent is 'polite'; .* none: add one with mara-agent"):
        none.agent("polite")


def test_what_is_known_of_a_mix_of_agents() -> None:
    """Noise adds up; nothing is known where one was not measured."""
    manifest = parse(json.dumps(VALID), "here")
    assert manifest.agent("b.2_-") == manifest.agents[1]
    with pytest.raises(OptionError, match=r"--agent is 'rude'; the bundle has polite, b\.2_-"):
        manifest.mixed_noise({"polite": 1.0, "rude": 1.0})
    for mix, margins in (({}, 0.0), ({"polite": -3.0}, 1.5), ({"b.2_-": 2.0, "polite": 1.0}, 0.502)):
        assert manifest.mixed_noise(mix) == Noise(pytest.approx(margins), 0.0025)
    assert parse(json.dumps(changed(("noise",), None)), "here").mixed_noise({}) is None
    unknown = parse(json.dumps(changed(("agents", "1", "noise"), None)), "here")
    assert unknown.mixed_noise({"polite": 1.0, "b.2_-": 1.0}) is None
    assert unknown.mixed_noise({"polite": 1.0}) == Noise(0.5, 0.0025)


@pytest.mark.parametrize("path", FILE_FIELDS, ids="/".join)
def test_a_file_entry_of_another_kind_is_named(path: Path) -> None:
    for other in (MISSING, None, 1.5, True, [], {}, 5 if path[-1] == "sha256" else "text", -1, 10**400):
        message = refused(json.dumps(changed(path, other)))
        assert "files" in message or path[1] in message


NAMES = (
    "../secret", "..", ".", "", "a/../../secret", "a/./b", "a//b", "a/", "/etc/passwd", "//host/share",
    "\\windows\\system32", "a\\..\\..\\secret", "C:/secret", "C:secret", "file:stream", "line\nbreak", "nul\0l",
    "escape\x1b[2J", "lone \ud800 surrogate",
)  # fmt: skip


def test_a_file_name_that_could_lead_elsewhere_is_refused() -> None:
    for name in (*NAMES, "engines/cpu/plan v1.2.bin"):
        value = copy.deepcopy(VALID)
        value["files"][name] = {"size_bytes": 1, "sha256": "0" * 64}
        if name in NAMES:
            assert re.search("files|surrogate", refused(json.dumps(value)))
        else:
            assert name in parse(helpers.signed(value), "here").files


def test_a_field_that_nobody_knows_is_named() -> None:
    """At every level, also one that a path would spell."""
    for path in {path[:-1] for path in FIELDS + FILE_FIELDS} - {("files",)}:
        if isinstance(at(VALID, path), dict):
            message = refused(json.dumps(changed((*path, "new"), 1)))
            assert "new" in message
            assert "not known to this release" in message
    assert "model.source" in refused(json.dumps(changed(("model.source",), 1)))


@pytest.mark.slow
@pytest.mark.parametrize("other", '0"-')
def test_no_single_byte_can_be_changed_unnoticed(other: str) -> None:
    """Refused, or the manifest says the same: a space for another, say."""
    valid = parse(TEXT, "here")
    for at, byte in enumerate(TEXT):
        changed_byte = other if byte != other else "1"
        manifest = read_or_refused(TEXT[:at] + changed_byte + TEXT[at + 1 :])
        assert manifest is None or manifest == valid, TEXT[max(0, at - 40) : at + 40]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        *((text, "JSON") for text in ("", "{", "not json", '{"a": 1,}', "\x00", "{'a': 1}", "\ufeff{}")),
        *((text, "schema_version") for text in ("[]", "3", "null", '"text"', "{}", '{"version": 1}')),
        (TEXT.replace('"max_context": 32', '"max_context": 32, "max_context": 64'), "max_context"),
        *((TEXT.replace('"rows": 40', f'"rows": {number}'), number) for number in ("NaN", "Infinity", "-Infinity")),
        (TEXT.replace('"noise": 0.5', '"noise": NaN'), "NaN"),
        (TEXT.replace('"noise": 0.5', '"noise": 1e999'), "agents.0.noise"),
        (TEXT.replace('"noise": 0.0025', '"noise": 1' + "0" * 400), "field noise"),
        (TEXT.replace('"max_context": 32', '"max_context": ' + "9" * 10_000), "JSON"),
        (TEXT.replace("example/tiny", "\\ud800"), "half of a surrogate pair"),
        (TEXT.replace("bos_token", "\\udfff"), "half of a surrogate pair"),
        (json.dumps(changed(("max_context",), "x" * 1_000_000)), "max_context"),
        (json.dumps(changed(("agents", "0", "fallback"), "x" * 1_000_000)), "agents.0.fallback"),
        (json.dumps(changed(("agents", "0", "name"), "x" * 1_000_000)), "agents.0.name"),
        (json.dumps(changed(("targets",), [0] * 1_000_000)), "targets"),
        (json.dumps(changed(("schema_version",), "x" * 1_000_000)), "schema version"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_a_text_that_is_no_manifest_is_refused(text: str, named: str) -> None:
    assert text != TEXT
    assert named in refused(text)


def test_another_schema_version_is_named_before_any_field() -> None:
    for version in (0, 2, 3, 5, -2, "3", None, [4], {}, True, 4.0):
        message = refused(json.dumps({**changed(("step",), MISSING), "schema_version": version}))
        assert f"schema version {version!r}" in message
        assert "reads version 4" in message
        assert "export" in message


@pytest.mark.parametrize("path", [("model", "revision"), ("parity",), ("unknown",)], ids=".".join)
def test_deep_nesting_is_read_or_refused(path: Path) -> None:
    for depth in (500, 900, 950, 980, 990, 1000, 100_000):
        nest = '{"nest": ' + "[" * depth + "]" * depth + "}"
        manifest = read_or_refused(json.dumps(changed(path, "NEST")).replace('"NEST"', nest))
        assert manifest is None or path != ("model", "revision")
