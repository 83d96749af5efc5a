"""The memory model's arithmetic, and `mara-memory`. test_refusals.py has what the command rejects."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mara_deploy import memory
from mara_deploy.commands.memory import main
from mara_deploy.memory import Setting, estimate
from mara_export.hf.catalogue import KNOWN_MODELS
from mara_export.hf.families import Decoder, LayerGroup, decoder_of, decoder_sizes
from mara_export.targets import PLACES, TARGETS
from tests.unit import helpers

ROOT = Path(__file__).resolve().parents[2]
SIGLIP = 416_866_032
"""Parameters of the vision tower of Gemma 3; its projector has a matrix and a norm besides."""
PUBLISHED = {
    "Qwen/Qwen2-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3.5-mini-instruct": 3_821_079_552,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "microsoft/phi-4": 14_659_507_200,
    "google/gemma-7b-it": 8_537_680_896,
    "google/gemma-2b-it": 2_506_172_416,
    "google/gemma-2-2b-it": 2_614_341_888,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-3-270m-it": 268_098_176,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-it": 4_300_079_472 - SIGLIP - 1152 * (2560 + 1),
    "google/gemma-3-12b-it": 12_187_325_040 - SIGLIP - 1152 * (3840 + 1),
    "google/gemma-3-27b-it": 27_432_406_640 - SIGLIP - 1152 * (5376 + 1),
    "allenai/OLMo-2-0425-1B-Instruct": 1_484_916_736,
    "allenai/OLMo-2-1124-7B-Instruct": 7_298_617_344,
    "allenai/Olmo-3-7B-Instruct": 7_298_011_136,
    "ibm-granite/granite-3.3-2b-instruct": 2_533_539_840,
    "ibm-granite/granite-3.3-8b-instruct": 8_170_864_640,
    "LGAI-EXAONE/EXAONE-4.0-1.2B": 1_279_391_488,
    "tencent/Hunyuan-1.8B-Instruct": 1_791_080_448,
    "zai-org/GLM-4-9B-0414": 9_400_279_040,
    "bigcode/starcoder2-3b": 3_030_371_328,
    "CohereLabs/c4ai-command-r7b-12-2024": 8_028_033_024,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "mistralai/Mixtral-8x7B-Instruct-v0.1": 46_702_792_704,
    "ibm-granite/granite-3.1-1b-a400m-instruct": 1_334_628_352,
    "ibm-granite/granite-3.1-3b-a800m-instruct": 3_298_793_472,
}
"""Parameters of the checkpoints, shared ones once, as the Hub and whoever has loaded them report; of a model that takes
images, those of its text part."""
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
LONGROPE = {"model_type": "phi3", "rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 256}
SMALL = Decoder(64, 512, 4, (LayerGroup(2, 2, 16, 160),), tied=True)


def test_every_alias_has_its_sizes_and_their_parameters_are_the_published_ones():
    assert {hub_id: model.decoder.parameters for hub_id, model in KNOWN_MODELS.items()} == PUBLISHED


def test_sizes_come_from_a_configuration():
    assert decoder_sizes(LLAMA_1B, "x") == KNOWN_MODELS["meta-llama/Llama-3.2-1B-Instruct"].decoder
    qwen3 = {**LLAMA_1B, "model_type": "qwen3", "head_dim": 128}
    assert decoder_sizes(qwen3, "x").small == 16 * (2 * 2048 + 2 * 128) + 2048
    assert decoder_sizes(qwen3, "x").layers[0].head_dim == 128
    olmo2, starcoder2 = ({**LLAMA_1B, "model_type": kind} for kind in ("olmo2", "starcoder2"))
    assert decoder_sizes(olmo2, "x").small == 16 * (2 * 2048 + (32 + 8) * 64) + 2048
    assert sum(count for count, *_ in decoder_sizes(starcoder2, "x").matrices) == 16 * 6  # q, k, v, o, up, down
    assert decoder_sizes({**LLAMA_1B, "model_type": "gemma", "tie_word_embeddings": None}, "x").tied
    assert decoder_sizes({**LLAMA_1B, "model_type": "of tomorrow"}, "x").parameters  # one that nobody has listed
    whole = decoder_sizes({**LLAMA_1B, "num_key_value_heads": None, "tie_word_embeddings": False}, "x")
    assert (whole.layers[0].kv_heads, whole.tied) == (32, False)
    biased = decoder_sizes({**LLAMA_1B, "attention_bias": True, "mlp_bias": True}, "x")
    assert biased.layers[0].biases == (32 + 16) * 64 + 2048 + 2 * 8192 + 2048
    assert decoder_sizes({**LLAMA_1B, "model_type": "qwen2"}, "x").layers[0].biases == (32 + 16) * 64


def test_layers_of_several_sizes():
    """A small Gemma 4, in the words of released checkpoints and in those of transformers 5.24."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "num_hidden_layers": 4}
    sizes |= {"num_kv_shared_layers": 1, "use_double_wide_mlp": True, "attention_k_eq_v": True}
    kinds = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]}
    config = {**LLAMA_1B, "model_type": "gemma4_text", **sizes, **kinds}
    released = decoder_sizes({**config, "global_head_dim": 32, "num_global_key_value_heads": 2}, "x")
    assert released.layers == (
        LayerGroup(2, 4, 16, 8192),
        LayerGroup(1, 2, 32, 8192, 1),
        LayerGroup(1, 2, 32, 16384, 0),
    )
    own = {"head_dim": 32, "num_key_value_heads": 2}
    assert decoder_sizes({**config, "per_layer_config": {"2": own, "3": own}}, "x") == released
    at_2k = Setting("tensorrt", "fp16", 2048, max_candidates=64)
    assert estimate(released, at_2k).kv_bytes == 2144 * 2 * 2 * (2 * 4 * 16 + 2 * 32)  # of three layers, not of four
    assert decoder_of(released.shape, "gemma4_text", 8192, True).shape == released.shape  # as of a bundle


def test_the_cache_holds_keys_and_values_of_every_slot():
    at_2k = Setting("tensorrt", "fp16", 2048, max_candidates=64)
    assert at_2k.slots == 2144  # 2048 + 64 + 16 + 1, in sixteens
    a_slot = 2 * 2 * 2 * 16 * 2
    assert estimate(SMALL, at_2k).kv_bytes == 2144 * a_slot
    assert estimate(SMALL, replace(at_2k, lowering="decomposed")).kv_bytes == 2 * 2144 * a_slot
    assert estimate(SMALL, replace(at_2k, conversations=3)).kv_bytes == 3 * 2144 * a_slot
    on_cpu = Setting("cpu", "fp32", 2048)
    assert on_cpu.slots == 2129
    assert estimate(SMALL, on_cpu).kv_bytes == 2129 * 2 * a_slot
    # the cache of 2016 is held while that of 2129 is filled; for 256 tokens that of 320, while that of 337 is
    grown = estimate(SMALL, on_cpu).host_bytes - estimate(SMALL, Setting("cpu", "fp32", 256)).host_bytes
    assert grown == (2016 - 320) * 2 * a_slot
    assert memory.outgrown_bytes(SMALL, Setting("cuda", "fp16", 2048)) == 2048 * a_slot


def test_an_engine_has_room_for_the_outputs_of_as_many_conversations_as_it_is_built_for():
    def workspace(target: str, conversations: int) -> int:
        setting = Setting(target, "fp16", 64, conversations=conversations)
        return memory.workspace_bytes(replace(SMALL, vocab_size=200_000), setting)

    assert workspace("tensorrt", 1) == workspace("tensorrt", PLACES) < workspace("tensorrt", PLACES + 1)
    assert workspace("cuda", 1) < workspace("cuda", 2)


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


def test_what_a_board_has_left():
    sizes = memory.Memory(4_000_000_000, 1_000_000_000, 300_000_000, 200_000_000)
    assert sizes.total_bytes == 5_500_000_000
    assert sizes.left_bytes(8) == 2_500_000_000
    assert sizes.fits(8)
    assert not replace(sizes, host_bytes=200_000_001).fits(8)
    assert sizes.to_json()["jetson"]["8 GB"] == {"left_bytes": 2_500_000_000, "fits": True}


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def figures(capsys: pytest.CaptureFixture[str], *argv: object) -> list[dict[str, Any]]:
    assert main([*map(str, argv), "--json"]) == 0
    settings: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["settings"]
    return settings


def test_an_alias_in_every_precision(capsys):
    assert main(["llama3.2-3b"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith(("fp", "bf", "int"))]
    assert [(r[0], r[1]) for r in rows] == [(p, c) for p in TARGETS["tensorrt"].precisions for c in ("2048", "8192")]
    for row in rows:
        assert sum(int(part) for part in row[2:6]) == pytest.approx(int(row[6]), abs=2)
    assert rows[4][7] == "no"  # fp32 on 8 GB


def test_json_has_the_same_figures(capsys):
    (only,) = figures(capsys, "qwen2", "--precision", "int4", "--context", 1024)
    assert (only["precision"], only["context"], only["slots"], only["block_size"]) == ("int4", 1024, 1120, 64)
    assert only["total_bytes"] == sum(only[f"{part}_bytes"] for part in ("engine", "kv", "workspace", "host"))
    several = figures(capsys, "qwen2", "--precision", "int8", "--precision", "int4", "--context", 1024, "--context", 64)
    assert [(s["precision"], s["context"]) for s in several] == [
        *(("int8", 1024), ("int8", 64), ("int4", 1024), ("int4", 64))
    ]
    assert several[2] == only


def test_a_folder_with_a_configuration_is_a_model(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_1B), encoding="utf-8")
    assert figures(capsys, tmp_path) == figures(capsys, "llama3.2-1b")


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({}, 512),
        ({"model_type": "mistral", "sliding_window": 256}, 512),
        ({"model_type": "mistral", "sliding_window": None}, 512),
        (LONGROPE, 256),
    ],
)
def test_a_models_own_limit_is_the_largest_context(capsys, tmp_path, config, limit):
    text = json.dumps({**LLAMA_1B, "max_position_embeddings": 512, **config})
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert {setting["context"] for setting in figures(capsys, tmp_path)} == {limit}
    assert figures(capsys, tmp_path, "--context", limit)
    assert main([str(tmp_path), "--context", str(limit + 1)]) == 2
    assert str(limit) in capsys.readouterr().err


def test_a_bundle_is_shown_as_it_is(capsys, tmp_path):
    folder = helpers.make_bundle(tmp_path / "bundle", max_context=32, max_candidates=8)
    (only,) = figures(capsys, folder)
    assert (only["target"], only["context"], only["max_candidates"]) == ("cpu", 32, 8)
    (shorter,) = figures(capsys, folder, "--context", 16)
    assert shorter["kv_bytes"] < only["kv_bytes"]


def test_the_page_is_current():
    spec = importlib.util.spec_from_file_location("make_memory", ROOT / "docs" / "make_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run `make docs`"
