"""DecodeConfig: what it refuses, and that each refusal names the flag, the value and the range."""

import dataclasses
import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from mara_runtime.config import FALLBACKS, ORDERS, SCHEDULES, STRATEGIES, DecodeConfig
from mara_runtime.errors import MaraError, OptionError
from mara_runtime.tensors import DRAFT_ROWS


def test_defaults_are_those_of_the_paper_s_evaluation() -> None:
    config = DecodeConfig()
    assert (config.align, config.top_k, config.top_p, config.strategy) == (True, 40, 0.95, "top1")
    assert (config.order, config.threshold, config.fallback) == ("ranked", 0.0, None)


def test_the_default_schedule_adapts_and_drafts_what_pays() -> None:
    config = DecodeConfig()
    assert (config.schedule, config.draft) == ("adaptive", None)
    assert SCHEDULES == ("adaptive", "one-by-one", "together")


@pytest.mark.parametrize(
    ("options", "flag", "value", "allowed"),
    [
        ({"top_k": 0}, "--top-k", "0", "at least 1"),
        ({"top_k": -5}, "--top-k", "-5", "at least 1"),
        ({"top_k": 2.5}, "--top-k", "2.5", "whole number"),
        ({"top_k": True}, "--top-k", "True", "whole number"),
        ({"top_k": "40"}, "--top-k", "'40'", "whole number"),
        ({"top_p": -0.01}, "--top-p", "-0.01", "from 0 to 1"),
        ({"top_p": 1.01}, "--top-p", "1.01", "from 0 to 1"),
        ({"top_p": math.nan}, "--top-p", "nan", "from 0 to 1"),
        ({"max_new_tokens": 0}, "--max-new-tokens", "0", "at least 1"),
        ({"max_new_tokens": 1.0}, "--max-new-tokens", "1.0", "whole number"),
        ({"strategy": "top2"}, "--strategy", "'top2'", "top1, max_prob, random"),
        ({"order": "Ranked"}, "--order", "'Ranked'", "ranked, best_last, reversed"),
        ({"fallback": "middle"}, "--fallback", "'middle'", "first, last"),
        ({"fallback": ""}, "--fallback", "''", "first, last"),
        ({"threshold": math.nan}, "--threshold", "nan", "finite"),
        ({"threshold": math.inf}, "--threshold", "inf", "finite"),
        ({"threshold": -math.inf}, "--threshold", "-inf", "finite"),
        ({"schedule": "all"}, "--schedule", "'all'", "adaptive, one-by-one, together"),
        ({"draft": -1}, "--draft", "-1", "from 0 to"),
        ({"draft": DRAFT_ROWS + 1}, "--draft", str(DRAFT_ROWS + 1), f"from 0 to {DRAFT_ROWS}"),
        ({"draft": 10**30}, "--draft", "1" + "0" * 30, f"from 0 to {DRAFT_ROWS}"),
        ({"draft": 2.0}, "--draft", "2.0", "whole number"),
        ({"draft": True}, "--draft", "True", "whole number"),
        ({"draft": "4"}, "--draft", "'4'", "whole number"),
        ({"temperature": 0.0}, "--temperature", "0.0", "above 0"),
        ({"temperature": -1.0}, "--temperature", "-1.0", "above 0"),
        ({"temperature": math.inf}, "--temperature", "inf", "finite"),
        ({"temperature": math.nan}, "--temperature", "nan", "finite"),
        ({"seed": -1}, "--seed", "-1", "at least 0"),
        ({"seed": 0.5}, "--seed", "0.5", "whole number"),
        ({"sample": True}, "--sample", "--no-align", "plain decoding"),
        ({"stop": ("a", "")}, "--stop", "empty", "leave it out"),
    ],
    ids=str,
)
def test_a_refusal_names_flag_value_and_range(options: dict[str, Any], flag: str, value: str, allowed: str) -> None:
    with pytest.raises(OptionError) as caught:
        DecodeConfig(**options)
    message = str(caught.value)
    assert message.startswith(flag + " ")
    assert value in message
    assert allowed in message
    assert "\n" not in message


@pytest.mark.parametrize("stop", ["END", ("a", 1), 5, b"END"], ids=repr)
def test_stop_is_a_tuple_of_texts(stop: Any) -> None:
    # A lone text is a sequence of one-letter texts: "END" would end the answer at the first E.
    with pytest.raises(OptionError, match=r"^--stop "):
        DecodeConfig(stop=stop)


@pytest.mark.parametrize(
    ("options", "flag"), [({"top_p": "0.9"}, "--top-p"), ({"threshold": None}, "--threshold")], ids=["text", "None"]
)
def test_a_value_of_another_kind_is_refused_like_one_out_of_range(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(OptionError, match=f"^{flag} "):
        DecodeConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1, "top_p": 0.0, "max_new_tokens": 1, "seed": 0},
        {"top_p": 1, "threshold": -3},
        {"align": False, "sample": True, "temperature": 1e-9},
        *({"strategy": s} for s in STRATEGIES),
        *({"order": o} for o in ORDERS),
        *({"schedule": s} for s in SCHEDULES),
        *({"fallback": f} for f in FALLBACKS),
        *({"draft": d} for d in (None, 0, 1, DRAFT_ROWS)),
        {"align": False, "draft": 3, "schedule": "one-by-one"},
    ],
    ids=str,
)
def test_values_inside_their_range_are_kept(options: dict[str, Any]) -> None:
    config = DecodeConfig(**options)
    assert {name: getattr(config, name) for name in options} == options


def test_numbers_of_other_libraries_become_plain_ones() -> None:
    given = {"top_k": np.int64(9), "top_p": np.float32(0.5), "threshold": Fraction(1, 4), "draft": np.int32(3)}
    config = DecodeConfig(**given)  # type: ignore[arg-type]
    assert json.loads(json.dumps(config.to_json()))["threshold"] == 0.25
    assert [type(getattr(config, name)) for name in given] == [int, float, float, int]


@pytest.mark.parametrize("name", ["align", "sample"])
def test_a_switch_is_true_or_false(name: str) -> None:
    with pytest.raises(OptionError, match=f"^{name} is 'no'; it must be True or False$"):
        DecodeConfig(**{name: "no"})  # type: ignore[arg-type]


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DecodeConfig().top_k = 3  # type: ignore[misc]


def test_an_option_error_is_both_ours_and_a_value_error() -> None:
    assert issubclass(OptionError, MaraError)
    assert issubclass(OptionError, ValueError)


def test_to_json_has_every_field_and_makes_the_same_config() -> None:
    config = DecodeConfig(top_k=3, stop=("a", "b"), fallback="last", threshold=0.5, draft=4)
    values = json.loads(json.dumps(config.to_json()))
    assert list(values) == [f.name for f in dataclasses.fields(DecodeConfig)]
    assert DecodeConfig(**{**values, "stop": tuple(values["stop"])}) == config
