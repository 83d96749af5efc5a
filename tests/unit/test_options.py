"""Options from dataclass fields: check, JSON, flag and help all follow the field. Defaults of decoding."""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mara_deploy.commands.options import add_options, flags_given, from_args, given, reject, values_of
from mara_deploy.train.config import RECIPES, TrainConfig
from mara_export.options import BuildOptions, ExportOptions
from mara_runtime.config import DecodeConfig
from mara_runtime.errors import MaraError, OptionError
from mara_runtime.options import Options, option, required


@dataclass(frozen=True)
class Sample(Options):
    model: str = required("what to load", metavar="MODEL")
    top_k: int = option(40, "most candidates", least=1)
    top_p: float = option(0.95, "the nucleus, 95 % of it", least=0, most=1)
    rate: float | None = option(None, "speed", above=0, unset="what fits")
    level: int = option(3, "effort", least=0, most=5)
    kind: str = option("a", "which", choices=("a", "b"))
    stop: tuple[str, ...] = option((), "ends it")
    sizes: tuple[int, ...] = option((), "sizes", flag="--size", separator=",", least=1)
    widths: tuple[int, int] = option((8, 4), "layers", least=1)
    note: str | None = option(None, "any text", allow_empty=True)
    verify: bool = option(True, "skip checks")
    raw: bool = option(False, "as it is")
    out: Path | None = option(None, "where", metavar="DIR")
    parts: Mapping[str, float] | None = option(None, "of each", flag="--part", unset="all alike")


def parse(*argv: str, **how: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser, Sample, **how)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"top_k": 0}, ("--top-k is 0", "a whole number of at least 1")),
        ({"top_k": True}, ("--top-k is True", "a whole number")),
        ({"top_k": None}, ("--top-k is None", "a whole number")),
        ({"top_p": 1.01}, ("--top-p is 1.01", "from 0 to 1")),
        ({"top_p": math.nan}, ("--top-p is nan", "from 0 to 1")),
        ({"top_p": "0.9"}, ("--top-p is '0.9'", "from 0 to 1")),
        ({"rate": 0.0}, ("--rate is 0.0", "a finite number above 0")),
        ({"rate": 10**400}, ("--rate is 1000", "a finite number above 0")),
        ({"level": 6}, ("--level is 6", "a whole number from 0 to 5")),
        ({"kind": "A"}, ("--kind is 'A'", "one of a, b")),
        ({"stop": "END"}, ("--stop is 'END'", "a tuple")),
        ({"stop": ("a", 1)}, ("--stop is 1", "text")),
        ({"stop": ("a", "")}, ("--stop is empty",)),
        ({"sizes": (8, 0)}, ("--size is 0", "at least 1")),
        ({"widths": (8,)}, ("--widths is (8,)", "2 values")),
        ({"model": ""}, ("--model is empty",)),
        ({"raw": "no"}, ("raw is 'no'", "True or False")),
        ({"out": "x"}, ("--out is 'x'",)),
        *(
            ({"parts": parts}, (f"--part is {parts!r}", "one or more names, each with a finite number"))
            for parts in ({}, "a", ["a"], {1: 1.0}, *({"a": x} for x in ("x", None, True, math.nan, math.inf, 10**400)))
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_rejected_value_is_named_with_flag_and_range(values, named):
    with pytest.raises(OptionError) as caught:
        Sample(**{"model": "m", **values})
    assert all(text in str(caught.value) for text in named), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"top_k": 1, "top_p": 0.0, "rate": 1e-9, "level": 0},
        {"top_p": 1.0, "level": 5, "kind": "b", "stop": ("a", "b"), "sizes": (1, 2), "widths": (1, 2)},
        {"note": "", "verify": False, "raw": True, "out": Path("x"), "rate": None},
        {"parts": {"a": -1.5, "b": 0.0}},
    ],
)
def test_values_at_the_ends_of_their_range_are_kept(values):
    sample = Sample("m", **values)
    assert {name: getattr(sample, name) for name in values} == values
    assert Sample.from_json(json.loads(json.dumps({**sample.to_json(), "out": None}))) == Sample(
        "m", **{**values, "out": None}
    )


def test_numbers_of_other_libraries_become_plain_ones():
    numbers: Any = {"top_k": np.int64(9), "top_p": np.float32(0.5), "rate": Fraction(1, 4), "parts": {"a": np.int64(2)}}
    sample = Sample("m", **numbers)
    assert json.loads(json.dumps(sample.to_json()))["rate"] == 0.25
    assert sample.parts == {"a": 2.0}
    values = (sample.top_k, sample.top_p, sample.rate, sample.parts["a"])
    assert [type(value) for value in values] == [int, float, float, float]


def test_numbers_by_name_are_a_copy():
    given_parts = {"b": 1.0, "a": 2.0}
    sample = Sample("m", parts=given_parts)
    given_parts.clear()
    assert sample.parts is not None
    assert [*sample.parts] == ["b", "a"]  # in their order


def test_options_are_frozen_and_their_error_is_a_value_error_too():
    with pytest.raises(FrozenInstanceError):
        Sample("m").top_k = 3  # type: ignore[misc]
    assert issubclass(OptionError, MaraError)
    assert issubclass(OptionError, ValueError)


# ── flags ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_flags_set_the_fields():
    argv = (
        *("--model", "m", "--top-k", "3", "--rate", "2", "--kind", "b", "--stop", "x", "--stop", "y"),
        *("--size", "1,2", "--size", "3", "--widths", "5", "6", "--note", "", "--no-verify", "--raw", "--out", "d"),
    )
    assert from_args(Sample, parse(*argv)) == Sample(
        *("m", 3, 0.95, 2.0, 3, "b", ("x", "y"), (1, 2, 3), (5, 6), "", False, True, Path("d"))
    )
    assert from_args(Sample, parse("--model", "m")) == Sample("m")
    assert from_args(Sample, parse("--model", "m"), top_k=7).top_k == 7


def test_numbers_by_name_as_flags():
    args = parse("--model", "m", "--part", "b=0.5", "--part", "a", "--part", "c=-2e-1")
    parts = from_args(Sample, args).parts
    assert parts is not None
    assert [*parts.items()] == [("b", 0.5), ("a", 1.0), ("c", -0.2)]
    with pytest.raises(OptionError, match=r"--part is b=0.5 a=1 c=-0.2, but nobody asks; leave it out"):
        reject(args, Sample, ("parts",), "nobody asks")
    for argv, named in (
        (("b=1", "a", "b=2"), r"--part gives a name twice: b a b"),
        (("b=",), r"--part is \{'b': ''\}; it must be one or more names, each with a finite number"),
        (("b=x", "a"), r"--part is .*'x'"),
        (("b=nan",), r"--part is .*nan"),
        (("a=b=1",), r"--part is .*'b=1'"),
    ):
        with pytest.raises(OptionError, match=named):
            from_args(Sample, parse("--model", "m", *(text for part in argv for text in ("--part", part))))


def test_what_was_given_is_known():
    args = parse("--model", "m", "--top-k", "40", "--no-verify")
    assert given(Sample, args) == {"model": "m", "top_k": 40, "verify": False}
    assert flags_given(Sample, args, exclude=("model",)) == ["--top-k", "--no-verify"]
    reject(args, Sample, ("top_p", "rate"), "never raised")
    with pytest.raises(OptionError, match=r"--top-k is 40, but nobody asks; leave it out"):
        reject(args, Sample, ("rate", "top_k"), "nobody asks")


def test_a_flag_of_several_values():
    args = parse("--model", "m", "--level", "1", "--level", "2", "--level", "1", several=("level", "top_k"))
    assert values_of(Sample, "level", args) == (1, 2)
    assert values_of(Sample, "top_k", args) == (40,)


@dataclass(frozen=True)
class Other(Options):
    top_k: int = option(5, "of something else", flag="--other-top-k")


def test_fields_of_the_same_name_stay_apart():
    parser = argparse.ArgumentParser()
    add_options(parser, Sample)
    add_options(parser, Other)
    args = parser.parse_args(["--model", "m", "--top-k", "3"])
    assert (from_args(Sample, args).top_k, from_args(Other, args).top_k) == (3, 5)


def test_help_shows_metavar_default_and_repetition():
    parser = argparse.ArgumentParser()
    add_options(parser, Sample, several=("level",))
    text = " ".join(parser.format_help().split())
    for words in (
        "--model MODEL what to load",
        "--top-k N most candidates (default: 40)",
        "the nucleus, 95 % of it (default: 0.95)",
        "--rate X speed (default: what fits)",
        "effort (default: 3; can be repeated)",
        "--kind {a,b} which (default: a)",
        "--widths N N layers (default: 8 4)",
        "--no-verify skip checks",
        "--raw as it is",
        "--out DIR where",
        "--part NAME[=X] of each (default: all alike; can be repeated)",
    ):
        assert words in text
    assert "[--top-k N]" in text
    assert "--model MODEL [" in text  # required


def test_help_shows_the_defaults_of_given_instances():
    parser = argparse.ArgumentParser()
    add_options(parser, TrainConfig, defaults=tuple(RECIPES.values()))
    text = " ".join(parser.format_help().split())
    paper, demo = RECIPES["paper"], RECIPES["demo"]
    assert f"(default: {paper.episodes}, {demo.episodes})" in text
    assert f"(default: {paper.top_k})" in text  # where all agree


@pytest.mark.parametrize(
    "config",
    [DecodeConfig(), DecodeConfig(agents={"a": 0.5, "b": -1.0}), ExportOptions(), BuildOptions(), RECIPES["demo"]],
    ids=lambda c: type(c).__name__,
)
def test_every_option_has_a_flag_and_survives_json(config):
    parser = argparse.ArgumentParser()
    add_options(parser, type(config))
    assert parser.format_help().count("\n  --") == len(config.to_json())
    assert type(config).from_json(json.loads(json.dumps(config.to_json(), default=str))) == config


def test_decoding_has_the_defaults_of_the_paper_s_evaluation():
    config = DecodeConfig()
    assert (config.align, config.candidates, config.strategy) == (True, (40, 0.95), "top1")
    assert (config.order, config.threshold, config.fallback) == ("ranked", 0.0, None)
    assert (config.schedule, config.draft) == ("adaptive", None)
