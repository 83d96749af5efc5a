"""DecodeConfig: the paper's defaults, and which options go together. test_options.py has what holds for all options."""

import pytest

from mara_runtime.config import DecodeConfig
from mara_runtime.errors import OptionError
from mara_runtime.tensors import DRAFT_ROWS


def test_defaults_are_those_of_the_papers_evaluation():
    config = DecodeConfig()
    assert (config.align, config.top_k, config.top_p, config.strategy) == (True, 40, 0.95, "top1")
    assert (config.order, config.threshold, config.fallback) == ("ranked", 0.0, None)
    assert (config.schedule, config.draft) == ("adaptive", None)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"sample": True}, ("--sample", "--no-align", "--strategy random")),
        ({"temperature": 0.5}, ("--temperature is 0.5", "--sample")),
        ({"align": False, "sample": True, "temperature": 0.0}, ("--temperature is 0.0", "above 0")),
        ({"draft": DRAFT_ROWS + 1}, (f"--draft is {DRAFT_ROWS + 1}", f"from 0 to {DRAFT_ROWS}")),
        ({"stop": "END"}, ("--stop is 'END'", "tuple")),  # else each of its letters would end the answer
        ({"threshold": float("nan")}, ("--threshold is nan", "finite")),
    ],
)
def test_a_rejected_combination_names_the_flags(values, named):
    with pytest.raises(OptionError) as caught:
        DecodeConfig(**values)
    assert all(text in str(caught.value) for text in named)


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 1, "top_p": 0.0, "max_new_tokens": 1, "seed": 0, "draft": 0},
        {"top_p": 1, "threshold": -3, "draft": DRAFT_ROWS},
        {"align": False, "sample": True, "temperature": 1e-9},
        {"align": False, "draft": 3, "schedule": "one-by-one"},
    ],
    ids=str,
)
def test_values_within_range_are_kept(values):
    config = DecodeConfig(**values)
    assert {name: getattr(config, name) for name in values} == values
