"""`ExportOptions`: what is left out is the target's own. test_refusals.py has what is rejected."""

import pytest

from mara_deploy.commands import export
from mara_export.hf.catalogue import ALIASES
from mara_export.hf.families import FAMILIES
from mara_export.options import ExportOptions, Quantisation
from mara_export.targets import COLUMN


@pytest.mark.parametrize(
    ("given", "lowering", "precision", "cache", "runs_on"),
    [
        ({}, "ort", "fp32", "float32", ("cpu",)),
        ({"precision": "fp16", "lowering": "portable"}, "portable", "fp16", "float32", ("cpu",)),
        ({"target": "cuda"}, "ort", "fp16", "float16", ("cuda", "cpu")),
        ({"target": "tensorrt"}, "portable", "fp16", "float16", ("tensorrt", "cpu")),
        ({"target": "tensorrt", "precision": "fp32"}, "portable", "fp32", "float32", ("tensorrt", "cpu")),
        (
            {"target": "tensorrt-rtx", "precision": "bf16", "gate": False},
            *("portable", "bf16", "bfloat16", ("tensorrt-rtx",)),
        ),
    ],
)
def test_what_is_left_out_becomes_the_targets_own(given, lowering, precision, cache, runs_on):
    options = ExportOptions(**given)
    assert (options.lowering, options.precision, options.cache) == (lowering, precision, cache)
    assert options.runs_on == runs_on
    assert options.quantisation is None


@pytest.mark.parametrize(
    ("target", "precision", "how"),
    [
        ("cpu", "int4", Quantisation(4, 32)),
        ("cuda", "int8", Quantisation(8, 32)),
        ("tensorrt", "int4", Quantisation(4, 64)),
        ("tensorrt-rtx", "int4", Quantisation(4, 32)),
        ("tensorrt", "int8", Quantisation(8, COLUMN)),
    ],
)
def test_blocks_are_the_targets_own(target, precision, how):
    assert ExportOptions(target, precision=precision).quantisation == how
    kept = ExportOptions(target, precision=precision, keep=("*/lm_head/*",)).quantisation
    assert kept.to_json() == {**how.to_json(), "keep": ["*/lm_head/*"]}


def test_the_models_with_an_alias_are_listed(capsys) -> None:
    with pytest.raises(SystemExit) as left:
        export.main(["--list-models"])
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1 : 1 + len(ALIASES)]] == [[a, m.hub_id] for a, m in ALIASES.items()]
    assert {line.split()[0] for line in lines if line.endswith("yes")} == {
        "llama3", "llama3.1", "llama3.2-1b", "llama3.2-3b", "mistral",
    }  # fmt: skip
    assert set(FAMILIES) <= set(lines[-2].rstrip(".").split(", "))
