"""The memory model's arithmetic, and `mara-inspect --memory`."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from mara_deploy import memory
from mara_deploy.commands import inspect
from mara_deploy.commands.memory import find
from mara_deploy.memory import Setting, estimate
from mara_export.errors import ModelError
from mara_export.hf.families import KNOWN_MODELS, Decoder, decoder_sizes
from mara_export.targets import TARGETS
from mara_runtime.errors import OptionError
from tests.unit import helpers

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = {
    "Qwen/Qwen2-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
}
"""Parameters of the checkpoints, shared ones once, as the Hub and whoever has loaded them report."""
LLAMA_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
SMALL = Decoder(64, 160, 2, 4, 2, 16, 512, tied=True)


def test_every_alias_has_its_sizes_and_their_parameters_are_the_published_ones():
    assert {hub_id: model.decoder.parameters for hub_id, model in KNOWN_MODELS.items()} == PUBLISHED


def test_sizes_come_from_a_configuration():
    assert decoder_sizes(LLAMA_1B, "x") == KNOWN_MODELS["meta-llama/Llama-3.2-1B-Instruct"].decoder
    qwen3 = {**LLAMA_1B, "model_type": "qwen3", "head_dim": 128}
    assert decoder_sizes(qwen3, "x").qk_norm
    assert decoder_sizes(qwen3, "x").head_dim == 128
    whole = decoder_sizes({**LLAMA_1B, "num_key_value_heads": None, "tie_word_embeddings": False}, "x")
    assert (whole.num_kv_heads, whole.tied) == (32, False)
    biased = decoder_sizes({**LLAMA_1B, "attention_bias": True, "mlp_bias": True}, "x")
    assert biased.biases == (32 + 16) * 64 + 2048 + 2 * 8192 + 2048
    assert decoder_sizes({**LLAMA_1B, "model_type": "qwen2"}, "x").biases == (32 + 16) * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "architecture 'gemma'"),
        ({"hidden_size": None}, "hidden_size = None"),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"num_hidden_layers": "16"}, "num_hidden_layers = '16'"),
    ],
)
def test_a_configuration_without_sizes_is_refused(change, message):
    with pytest.raises(ModelError, match=message):
        decoder_sizes({**LLAMA_1B, **change}, "x")


def test_the_cache_holds_keys_and_values_of_every_slot():
    at_2k = Setting("tensorrt", "fp16", 2048, max_candidates=64)
    assert at_2k.slots == 2144  # 2048 + 64 + 16 + 1, in sixteens
    a_slot = 2 * SMALL.num_layers * SMALL.num_kv_heads * SMALL.head_dim * 2
    assert estimate(SMALL, at_2k).kv_bytes == 2144 * a_slot
    assert estimate(SMALL, replace(at_2k, lowering="decomposed")).kv_bytes == 2 * 2144 * a_slot
    on_cpu = Setting("cpu", "fp32", 2048)
    assert on_cpu.slots == 2129
    assert estimate(SMALL, on_cpu).kv_bytes == 2129 * 2 * a_slot
    # the cache of 2016 is held while that of 2129 is filled; for 256 tokens that of 320, while that of 337 is
    grown = estimate(SMALL, on_cpu).host_bytes - estimate(SMALL, Setting("cpu", "fp32", 256)).host_bytes
    assert grown == (2016 - 320) * 2 * a_slot
    assert memory._outgrown_bytes(SMALL, Setting("cuda", "fp16", 2048)) == 2048 * a_slot


def test_weights_by_precision():
    """By hand: 2 layers of 64·(64+32+32+64) + 3·64·160 numbers, a table of 512·64; the rest is the same in all."""
    matrices, table = 2 * (64 * 192 + 3 * 64 * 160), 512 * 64

    def stored(target: str, precision: str, model: Decoder = SMALL) -> int:
        return memory.weight_bytes(model, Setting(target, precision, 2048))

    rest = stored("tensorrt", "fp16") - 2 * (matrices + table)
    assert stored("tensorrt", "bf16") - rest == 2 * (matrices + table)
    numbers = matrices + table
    assert stored("tensorrt-rtx", "int4") - rest == numbers // 2 + numbers // 32 * 2 + 2 * table
    columns = 2 * (64 + 32 + 32 + 64 + 2 * 160 + 64) + 512  # with a scale each
    assert stored("tensorrt", "int8") - rest == numbers + 2 * columns + 2 * table
    lookup_of_its_own = 2 * table  # in Q/DQ; ONNX Runtime's reads what the head multiplies by
    assert stored("cuda", "int4") == stored("tensorrt-rtx", "int4") - lookup_of_its_own
    untied = replace(SMALL, tied=False)
    assert stored("tensorrt", "fp16", untied) - stored("tensorrt", "fp16") == 2 * table
    assert stored("tensorrt", "int4", untied) == stored("tensorrt", "int4")
    assert stored("cpu", "fp32", untied) - stored("cpu", "fp32") == 4 * table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tpu"}, "--target is 'tpu'"),
        ({"target": "cpu", "precision": "bf16"}, "--precision is 'bf16'; --target cpu has"),
        ({"context": 1}, "--context is 1"),
        ({"lowering": "ort"}, "--lowering is 'ort'; --target tensorrt takes portable or decomposed"),
        ({"lowering": ""}, "--lowering is ''"),
        ({"block_size": 0}, "--block-size is 0"),
        ({"max_candidates": 0}, "--max-candidates is 0; it must lie between 1 and 1024"),
        ({"max_candidates": 1025}, "--max-candidates is 1025"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Setting(**options)


def test_what_a_board_has_left():
    sizes = memory.Memory(4_000_000_000, 1_000_000_000, 300_000_000, 200_000_000)
    assert sizes.total_bytes == 5_500_000_000
    assert sizes.left_bytes(8) == 2_500_000_000
    assert sizes.fits(8)
    assert not replace(sizes, host_bytes=200_000_001).fits(8)
    assert sizes.to_json()["jetson"]["8 GB"] == {"left_bytes": 2_500_000_000, "fits": True}


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = inspect.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_an_alias_in_every_precision(capsys):
    code, out, _ = run(capsys, "--memory", "llama3.2-3b")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.startswith(("fp", "bf", "int"))]
    assert [(r[0], r[1]) for r in rows] == [(p, c) for p in TARGETS["tensorrt"].precisions for c in ("2048", "8192")]
    for row in rows:
        assert sum(int(part) for part in row[2:6]) == pytest.approx(int(row[6]), abs=2)
    assert rows[4][7] == "no"  # fp32 on 8 GB


def test_json_says_the_same(capsys):
    code, out, _ = run(capsys, "--memory", "qwen2", "--precision", "int4", "--context", 1024, "--json")
    (found,) = json.loads(out)["settings"]
    assert code == 0
    assert (found["precision"], found["context"], found["slots"]) == ("int4", 1024, 1120)
    parts = ("engine_bytes", "kv_bytes", "workspace_bytes", "host_bytes")
    assert found["total_bytes"] == sum(found[part] for part in parts)


def test_a_folder_with_a_configuration(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_1B), encoding="utf-8")
    _, by_folder, _ = run(capsys, "--memory", tmp_path, "--json")
    _, by_alias, _ = run(capsys, "--memory", "llama3.2-1b", "--json")
    assert json.loads(by_folder)["settings"] == json.loads(by_alias)["settings"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory", "nobody"), "there is no bundle or model 'nobody'"),
        (("--memory", "qwen2", "--target", "tpu"), "--target is 'tpu'"),
        (("--memory", "qwen2", "--target", "cuda", "--precision", "fp32"), "--target cuda has fp16, int8, int4"),
        (("--memory", "qwen2", "--context", "0"), "--context is 0"),
        (("--memory", "qwen2", "--context", "-1"), "--context is -1; it must be at least 2"),
        (("--memory", "qwen2", "--target", ""), "--target is ''; it must be one of"),
        (("--memory", "qwen2", "--precision", ""), "--precision is ''; --target tensorrt has"),
        (("--memory", "qwen2", "--lowering", ""), "--lowering is ''; --target tensorrt takes"),
        (("--memory", "qwen2", "--max-candidates", "0"), "--max-candidates is 0; it must lie between 1 and 1024"),
        (("--memory", "qwen2", "--block-size", "64"), "--block-size is 64; say of which --precision, int8 or int4"),
        (("--memory", "qwen2", "--block-size", "0", "--precision", "int4"), "--block-size is 0"),
        (
            ("--memory", "qwen2", "--block-size", "32", "--precision", "int4"),
            "--block-size is 32; int4 for --target tensorrt takes 64 or 128",
        ),
        (
            ("--memory", "qwen2", "--block-size", "64", "--precision", "int8"),
            "--block-size is 64; int8 for --target tensorrt has a scale a column",
        ),
        (
            ("--memory", "qwen2", "--block-size", "64", "--precision", "fp16"),
            "--block-size is 64; fp16 for --target tensorrt has no blocks",
        ),
        (("qwen2", "--target", "cpu"), "acts on --memory only"),
        (("qwen2", "--target", ""), "--target is '', but it acts on --memory only"),
        (("qwen2", "--context", "1024"), "--context is 1024, but it acts on --memory only"),
        (("qwen2", "--max-candidates", "64"), "--max-candidates is 64, but it acts on --memory only"),
        (("qwen2", "--block-size", "0"), "--block-size is 0, but it acts on --memory only"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_the_tokens_that_a_model_was_made_for_are_the_most(capsys, tmp_path):
    config = {**LLAMA_1B, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    code, out, err = run(capsys, "--memory", tmp_path, "--context", 100000)
    assert (code, out) == (2, "")
    assert f"--context is 100000; {tmp_path.name} was made for at most 512 tokens" in err
    _, out, _ = run(capsys, "--memory", tmp_path, "--json")
    assert {setting["context"] for setting in json.loads(out)["settings"]} == {512}
    assert run(capsys, "--memory", tmp_path, "--context", 512)[0] == 0
    assert "at most 8192 tokens" in run(capsys, "--memory", "llama3", "--context", 8193)[2]
    assert run(capsys, "--memory", "demo", "--context", 100000)[0] == 2


@pytest.mark.parametrize(
    ("config", "most"),
    [
        ({"model_type": "mistral", "sliding_window": 4096}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, 32768),
        ({"model_type": "qwen2", "sliding_window": 4096}, 32768),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True}, 4096),
    ],
)
def test_a_sliding_window_is_the_most_too(tmp_path, config, most):
    text = json.dumps({**LLAMA_1B, "max_position_embeddings": 32768, **config})
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert find(str(tmp_path))[2] == most


@pytest.mark.parametrize("size", [0, "many", [1], {}])
def test_a_number_of_tokens_that_is_none_is_one_line(capsys, tmp_path, size):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_1B, "max_position_embeddings": size}), encoding="utf-8")
    code, _, err = run(capsys, "--memory", tmp_path)
    assert code == 2
    assert "max_position_embeddings or sliding_window that is no size" in err


def test_damaged_configurations_are_one_line(capsys, tmp_path):
    for text, message in (("{", "is not JSON"), ("[]", "is not a Hugging Face configuration")):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        code, _, err = run(capsys, "--memory", tmp_path)
        assert code == 2
        assert message in err


def test_a_bundle_is_asked_for_what_it_is(capsys, tmp_path):
    folder = helpers.make_bundle(tmp_path / "bundle", max_context=32)
    for flag, value in (("precision", "int4"), ("lowering", ""), ("block-size", 32), ("max-candidates", 64)):
        code, out, err = run(capsys, "--memory", folder, f"--{flag}", value)
        assert (code, out) == (2, "")
        assert f"--{flag} is {value!r}, but {folder} is a bundle already: leave it out" in err
    for target in ("cuda", ""):
        assert (
            f"--target is {target!r}; {folder} was made for cpu"
            in run(capsys, "--memory", folder, "--target", target)[2]
        )
    assert "was made for 32 tokens" in run(capsys, "--memory", folder, "--context", 64)[2]


def test_the_page_is_current():
    spec = importlib.util.spec_from_file_location("make_memory", ROOT / "docs" / "make_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run `make docs`"
