"""manifest.json: the round trip, and what is refused, field by field."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mara_runtime.errors import BundleError
from mara_runtime.manifest import EngineFacts, Manifest, Noise, parse
from tests.unit import helpers

ENGINE = "engines/tensorrt/step-64.engine"
FILES = dict.fromkeys(("step.onnx", "tokenizer.json", "chat_template.jinja", ENGINE), b"x")
VALID = helpers.manifest_json(FILES, has_tokenizer=True, special_tokens={"bos_token": "<bos>"})
VALID["engines"] = [helpers.engine_json(ENGINE)]
MISSING = object()


def at(holder: Any, path: tuple[str, ...]) -> Any:
    """The value at a place; in a list, keys are numbers."""
    for key in path:
        holder = holder[int(key) if isinstance(holder, list) else key]
    return holder


def changed(path: tuple[str, ...], value: object) -> dict[str, Any]:
    """The valid manifest with one value replaced, or taken out."""
    manifest = copy.deepcopy(VALID)
    holder = at(manifest, path[:-1])
    key = int(path[-1]) if isinstance(holder, list) else path[-1]
    if value is MISSING:
        del holder[key]
    else:
        holder[key] = value
    return manifest


def paths(value: object, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every place of the valid manifest, except inside what the format leaves open."""
    if prefix:
        yield prefix
    if isinstance(value, dict) and prefix not in {
        ("parity",),
        ("io",),
        ("made_with",),
        ("tokenizer", "special_tokens"),
        ("step", "quantisation"),
        ("engines", "0", "options"),
    }:
        for key, inner in value.items():
            yield from paths(inner, (*prefix, key))
    if prefix == ("engines",):
        for key in value[0]:
            yield (*prefix, "0", key)


ALL_PATHS = [path for path in paths(VALID) if path != ("files",) and path[:1] != ("files",)]
FILE_PATHS = [path for path in paths(VALID) if path[:1] == ("files",)]
NULLABLE = {
    ("model", "revision"),
    ("step", "quantisation"),
    ("tokenizer",),
    ("tokenizer", "chat_template"),
    ("parity",),
    ("noise",),
}


def refused(text: str) -> str:
    """The message for a text that must not be read: one line of moderate length that says where."""
    with pytest.raises(BundleError) as caught:
        parse(text, "somewhere/manifest.json")
    message = str(caught.value)
    assert message.startswith("somewhere/manifest.json")
    assert "\n" not in message
    assert len(message) < 1000
    return message


def read_or_refused(text: str) -> Manifest | None:
    """A manifest that can be written and read again, or None where `refused` holds."""
    try:
        manifest = parse(text, "here")
    except BundleError:
        refused(text)
        return None
    assert parse(manifest.to_json(), "there") == manifest
    return manifest


def test_reads_every_field() -> None:
    manifest = parse(json.dumps(VALID), "here")
    assert manifest.model.shape.num_kv_heads == 1
    assert (manifest.model.source, manifest.model.revision) == ("example/tiny", "0123abc")
    assert (manifest.model.eos_token_ids, manifest.agent.widths) == ((0,), (8, 4))
    assert (manifest.agent.fallback, manifest.max_context, manifest.max_candidates) == ("first", 32, 8)
    assert manifest.tokenizer is not None
    assert manifest.tokenizer.special_tokens == {"bos_token": "<bos>"}
    assert (manifest.step.file, manifest.step.lowering, manifest.step.precision) == ("step.onnx", "ort", "int4")
    assert manifest.step.quantisation == {"bits": 4, "block_size": 32, "quantiser": "rtn", "keep": []}
    assert manifest.noise == Noise(margins=0.001, logits=0.0025)
    assert manifest.step.cache == "float32"
    (engine,) = manifest.engines
    assert (engine.target, engine.file, engine.slots, engine.in_place) == ("tensorrt", ENGINE, 64, True)
    assert (engine.decode_rows, engine.prefill_rows, engine.head_rows) == (26, 64, 17)
    assert (engine.version, engine.compute_capability, engine.platform) == ("10.16.1.11", "8.7", "linux-aarch64")
    assert engine.options == {"decomposable": "all"}
    assert manifest.files["step.onnx"].size_bytes == 1
    assert json.loads(manifest.to_json()) == VALID


def test_the_round_trip_of_every_optional_part() -> None:
    for path in NULLABLE:
        manifest = parse(json.dumps(changed(path, None)), "here")
        assert parse(manifest.to_json(), "there") == manifest
        assert json.loads(manifest.to_json()) == changed(path, None)


texts = st.text(max_size=20)
counts = st.integers(1, 10**12)
amounts = st.floats(0, allow_nan=False, allow_infinity=False)


@given(
    st.builds(
        dict,
        source=texts,
        revision=st.none() | texts,
        architecture=texts,
        eos=st.lists(st.integers(0, 10**6), max_size=4),
        size=counts,
        special=st.dictionaries(texts, texts, max_size=3),
        noise=st.none() | st.fixed_dictionaries({"margins": amounts, "logits": amounts}),
        quantisation=st.none() | st.dictionaries(texts, counts | texts, max_size=3),
        parity=st.none() | st.dictionaries(texts, st.floats(allow_nan=False, allow_infinity=False) | texts, max_size=3),
    )
)
def test_round_trip(drawn: dict[str, Any]) -> None:
    value = copy.deepcopy(VALID)
    value["model"].update(source=drawn["source"], revision=drawn["revision"], architecture=drawn["architecture"])
    value["model"].update(eos_token_ids=drawn["eos"])
    value["files"]["step.onnx"]["size_bytes"] = value["max_context"] = drawn["size"]
    value["tokenizer"]["special_tokens"] = drawn["special"]
    value["parity"], value["noise"] = drawn["parity"], drawn["noise"]
    value["step"]["quantisation"] = drawn["quantisation"]
    manifest = parse(json.dumps(value), "here")
    assert json.loads(manifest.to_json()) == value
    assert parse(manifest.to_json(), "there") == manifest


def test_the_valid_manifest_has_every_field_of_the_dataclasses() -> None:
    # So that the parametrised tests below miss none.
    assert {f.name for f in dataclasses.fields(Manifest)} == set(VALID) - {"schema_version"}
    for name in ("model", "agent", "step", "tokenizer"):
        kind = type(getattr(parse(json.dumps(VALID), "here"), name))
        assert {f.name for f in dataclasses.fields(kind)} == set(VALID[name])
    assert {f.name for f in dataclasses.fields(EngineFacts)} == set(VALID["engines"][0])


@pytest.mark.parametrize("path", ALL_PATHS, ids=".".join)
def test_a_missing_field_is_named(path: tuple[str, ...]) -> None:
    message = refused(json.dumps(changed(path, MISSING)))
    assert ".".join(path) in message


def wrong_values() -> Iterator[tuple[tuple[str, ...], object]]:
    for path in ALL_PATHS:
        if path == ("schema_version",):
            continue  # has a test of its own
        value = at(VALID, path)
        for other in (None, True, 1.5, "text", -3, [], [1.5], ["x", 2], {}, {"x": []}):
            if other is None and path in NULLABLE:
                continue
            if type(other) is type(value) and type(value) not in (list, int):
                continue  # another text, another mapping: the tests below
            if other == [] and isinstance(value, list):
                continue  # empty lists are allowed
            yield path, other


@pytest.mark.parametrize(
    ("path", "other"), list(wrong_values()), ids=lambda x: ".".join(x) if isinstance(x, tuple) else repr(x)
)
def test_a_field_of_another_kind_is_named(path: tuple[str, ...], other: object) -> None:
    # A group that is none is named by the first field that it lacks.
    assert f"field {'.'.join(path)}" in refused(json.dumps(changed(path, other)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "shape", "num_layers"), 0),
        (("model", "shape", "head_dim"), -64),
        (("max_context",), 0),
        (("max_candidates",), -1),
        (("model", "eos_token_ids"), [-1]),
        (("model", "eos_token_ids"), [True]),
        (("agent", "widths"), [0]),
        (("agent", "fallback"), "middle"),
        (("targets",), ["cpu", None]),
        (("made_with",), {"numpy": 2}),
        (("tokenizer", "special_tokens"), {"bos_token": None}),
        (("step", "file"), "other.onnx"),
        (("step", "file"), "../step.onnx"),
        (("step", "cache"), "int8"),
        (("engines", "0", "target"), "cpu"),
        (("engines", "0", "file"), "engines/tensorrt/other.engine"),
        (("engines", "0", "file"), "../../secret"),
        (("engines", "0", "file"), "step.onnx"),
        (("engines", "0", "file"), "/etc/passwd"),
        (("engines", "0", "slots"), 0),
        (("engines", "0", "decode_rows"), -1),
        (("engines", "0", "prefill_rows"), 0),
        (("engines", "0", "head_rows"), 0),
        (("engines", "0", "in_place"), 1),
        (("noise", "margins"), -0.001),
        (("noise", "logits"), -1),
        (("tokenizer", "file"), "/etc/passwd"),
        (("tokenizer", "chat_template"), "nothing.jinja"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named(path: tuple[str, ...], value: object) -> None:
    message = refused(json.dumps(changed(path, value)))
    assert f"field {'.'.join(path)} " in message


def test_an_engine_lies_in_the_folder_of_its_target() -> None:
    # What replaces an engine deletes its file: that must not be another part of the bundle.
    message = refused(json.dumps(changed(("engines", "0", "target"), "tensorrt-rtx")))
    assert "field engines.0.file" in message
    assert "engines/tensorrt-rtx/" in message


def test_two_engines_of_one_target_and_size_are_refused() -> None:
    value = changed(("engines",), [*VALID["engines"], helpers.engine_json(ENGINE, version="10.3.0")])
    assert "field engines.1.slots is 64, as that of another engine for tensorrt" in refused(json.dumps(value))


def test_engines_of_several_sizes_and_targets_are_fine() -> None:
    value = copy.deepcopy(VALID)
    for target, slots in (("tensorrt", 128), ("tensorrt-rtx", 64)):
        name = f"engines/{target}/step-{slots}.engine"
        value["files"][name] = {"size_bytes": 1, "sha256": "0" * 64}
        value["engines"].append(helpers.engine_json(name, target=target, slots=slots))
    engines = parse(json.dumps(value), "here").engines
    assert [(engine.target, engine.slots) for engine in engines] == [
        ("tensorrt", 64),
        ("tensorrt", 128),
        ("tensorrt-rtx", 64),
    ]


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", [p for p in FILE_PATHS if len(p) > 1], ids="/".join)
@pytest.mark.parametrize(
    "other",
    [MISSING, None, 1.5, True, [], {}, "text"],
    ids=lambda other: "missing" if other is MISSING else repr(other),
)
def test_a_file_entry_of_another_kind(path: tuple[str, ...], other: object) -> None:
    if path[-1] == "sha256" and other == "text":
        other = 5
    message = refused(json.dumps(changed(path, other)))
    assert "files" in message or path[1] in message


@pytest.mark.parametrize("files", [None, [], ["step.onnx"], "step.onnx", 3, {}], ids=repr)
def test_files_of_another_kind(files: object) -> None:
    refused(json.dumps(changed(("files",), files)))


@pytest.mark.parametrize("size", [-1, -(2**63), 1e3, "12", None, True])
def test_a_size_that_is_none(size: object) -> None:
    message = refused(json.dumps(changed(("files", "step.onnx", "size_bytes"), size)))
    assert "step.onnx" in message


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "..",
        ".",
        "",
        "a/../../secret",
        "a/./b",
        "a//b",
        "a/",
        "/etc/passwd",
        "//host/share",
        "\\windows\\system32",
        "a\\..\\..\\secret",
        "C:/secret",
        "C:secret",
        "file:stream",
        "line\nbreak",
        "nul\0l",
        "escape\x1b[2J",
        "lone \ud800 surrogate",
    ],
    ids=ascii,
)
def test_a_file_name_that_could_lead_elsewhere(name: str) -> None:
    value = copy.deepcopy(VALID)
    value["files"][name] = {"size_bytes": 1, "sha256": "0" * 64}
    message = refused(json.dumps(value))
    assert "files" in message
    assert message.isprintable()


def test_a_file_in_a_folder_of_the_bundle_is_fine() -> None:
    value = copy.deepcopy(VALID)
    value["files"]["engines/cpu/plan v1.2.bin"] = {"size_bytes": 0, "sha256": "0" * 64}
    assert "engines/cpu/plan v1.2.bin" in parse(json.dumps(value), "here").files


# ── texts that are no manifest ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text", ["", "{", "not json", '{"a": 1,}', '{"schema_version": 1', "\x00", "{'a': 1}", "\ufeff{}"]
)
def test_not_json(text: str) -> None:
    assert "is not valid manifest JSON" in refused(text)


@pytest.mark.parametrize("text", ["[]", "[1, 2]", "3", "null", '"text"', "true", "{}", '{"version": 1}'])
def test_json_that_is_no_manifest(text: str) -> None:
    assert "schema_version" in refused(text)


@pytest.mark.parametrize("version", [0, 1, 2, 4, -2, "3", None, [3], {}, 3.5, True, 3.0], ids=repr)
def test_another_schema_version_is_named(version: object) -> None:
    message = refused(json.dumps(changed(("schema_version",), version)))
    assert f"schema version {version!r}" in message
    assert "reads version 3" in message


def test_a_key_given_twice_is_refused() -> None:
    # Readers differ on which of two they take; a manifest that can be read two ways is none.
    text = json.dumps(VALID)
    twice = text.replace('"max_context": 32', '"max_context": 32, "max_context": 64')
    assert twice != text
    assert "max_context" in refused(twice)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("place", ['"rows": 40', '"margins": 0.001'])
def test_numbers_that_json_does_not_have(constant: str, place: str) -> None:
    text = json.dumps(VALID)
    assert place in text
    refused(text.replace(place, place.split(":")[0] + f": {constant}"))


@pytest.mark.parametrize("number", ["1e999", "1" + "0" * 400], ids=["1e999", "10**400"])
def test_a_noise_beyond_all_numbers_is_refused(number: str) -> None:
    assert "noise.margins" in refused(json.dumps(VALID).replace('"margins": 0.001', f'"margins": {number}'))


def test_a_manifest_of_the_first_version_is_refused_by_its_version() -> None:
    # Not by a field that it lacks: what mends it is another export, or the release that made it.
    old = {**changed(("step",), MISSING), "schema_version": 1, "llm": {"file": "llm.onnx"}}
    assert "schema version 1; this release reads version 3: export the bundle again" in refused(json.dumps(old))


def test_noise_that_is_a_whole_number_is_read_as_a_number() -> None:
    manifest = parse(json.dumps(changed(("noise",), {"margins": 0, "logits": 1})), "here")
    assert manifest.noise == Noise(margins=0.0, logits=1.0)


@pytest.mark.parametrize("depth", [500, 900, 950, 980, 990, 1000, 100_000])
@pytest.mark.parametrize("path", [("model", "revision"), ("parity",), ("unknown",)], ids=".".join)
def test_deep_nesting(depth: int, path: tuple[str, ...]) -> None:
    nest = '{"nest": ' + "[" * depth + "]" * depth + "}"
    text = json.dumps(changed(path, "NEST")).replace('"NEST"', nest)
    manifest = read_or_refused(text)
    assert (manifest is None) or path != ("model", "revision")


def test_numbers_of_thousands_of_digits() -> None:
    refused(json.dumps(VALID).replace('"max_context": 32', '"max_context": ' + "9" * 10_000))


def test_a_long_value_is_cut_in_the_message() -> None:
    refused(json.dumps(changed(("max_context",), "x" * 1_000_000)))
    refused(json.dumps(changed(("agent", "fallback"), "x" * 1_000_000)))
    refused(json.dumps(changed(("targets",), [0] * 1_000_000)))
    refused(json.dumps(changed(("schema_version",), "x" * 1_000_000)))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(ALL_PATHS + FILE_PATHS), json_values)
def test_any_value_anywhere_is_read_or_refused(path: tuple[str, ...], value: object) -> None:
    read_or_refused(json.dumps(changed(path, value)))


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda b: b.decode("latin-1")))
def test_any_text_is_refused(text: str) -> None:
    with pytest.raises(BundleError):
        parse(text, "here")
