"""What is measured: contestants take turns, in several sittings; medians, quartiles, ratios turn by turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

from mara_deploy.bench.contestant import HUGGING_FACE, MARA, OTHERS, Contestant, Contestants

PROFILES: tuple[dict[str, Any], ...] = (
    {"accept": 0.9},
    {"accept": 0.6},
    {"accept": 0.6, "foreseen": True},
    {"accept": 0.9, "repeated": 0.5},
    {"accept": 0.9, "repeated": 0.8},
)
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"align": False, "draft": 0},
    "aligned": {"draft": 0},
    "drafting": {},
    "one-by-one": {"schedule": "one-by-one", "draft": 0},
    "together": {"schedule": "together", "draft": 0},
}
SITTINGS = 4
"""How often contestants of plain steps and of prefill are started anew, each time another one first: the speed of a
process moves by several percent with where its memory happens to lie, and on some machines it is who starts first that
gets the slower place."""
WARM_UP = 2
"""Rounds on a profile that are not counted: the schedule learns the agent's habits from its decisions."""
SERIAL_ROUNDS, SERIAL_TOKENS = 3, 12
"""of Hugging Face on a profile, at most, as it takes long"""
PAUSE_S = 0.05
"""between two contestants: threads of the one before still spin"""


@dataclass
class Turns:
    """What was measured on an instrument, turn by turn."""

    ours: dict[str, list[dict[str, Any]]]
    """{way: answers of the worker}"""
    peers: dict[str, list[float]]
    """{name: ms of as many plain tokens as an answer has after its first}"""
    serial_ms: list[float] = field(default_factory=list)
    """of a token of Hugging Face, one candidate a pass"""


@dataclass(frozen=True)
class Bench:
    """The measurements, each told as it is done."""

    contestants: Contestants
    contexts: Sequence[int]
    """ascending"""
    tokens: int
    """decoded at a time"""
    rounds: int
    """turns of each contestant"""
    say: Callable[[str], None]
    """takes the lines of the table"""

    def memory(self) -> dict[str, int]:
        """Peak of a fresh process that takes the shortest context and decodes, by contestant."""
        peaks = {}
        for name in self.contestants:
            with closing(self.contestants.fresh(name)) as fresh:
                fresh.ask("decode", context=self.contexts[0], tokens=self.tokens)
                peaks[name] = int(fresh.ask("memory")["peak_bytes"])
        self.say(f"\npeak memory, {self.contexts[0]} tokens of prompt and {self.tokens} decoded")
        for name, peak in peaks.items():
            ratio = "" if name == MARA else f"mara is × {peaks[MARA] / peak:.2f} of it"
            self.say(f"  {name:<14}{peak / 1e6:9.0f} MB   {ratio}")
        return peaks

    def steps(self) -> dict[str, dict[str, Any]]:
        """Milliseconds of a plain greedy step at every context."""
        self.say("\nplain greedy step, ms")
        found: dict[str, dict[str, Any]] = {}
        for context in self.contexts:

            def step(contestant: Contestant, context: int = context) -> float:
                tokens = self.tokens if contestant.name != HUGGING_FACE else 4
                return float(median(contestant.ask("decode", context=context, tokens=tokens)["ms"]))

            eager = context == self.contexts[0]
            found[str(context)] = self._in_turns(step, f"  {context:>5} tokens ", eager=eager)
        return found

    def prefill(self) -> dict[str, dict[str, Any]]:
        """Milliseconds to the first token of a prompt."""
        length = min(1024, self.contexts[-1])
        self.say(f"\nprefill of {length} tokens, ms")

        def first_token(contestant: Contestant) -> float:
            return float(contestant.ask("prefill", tokens=length)["ms"])

        return {str(length): self._in_turns(first_token, "  ", most=5, eager=False)}

    def width(self) -> dict[str, Any]:
        """The cost of rows."""
        curve = self.contestants[MARA].ask("width")
        self.say("\na pass by its rows, ms (without the LM head)")
        self.say("  context " + "".join(f"{width:>8}" for width in curve["widths"]))
        for context, row in zip(curve["contexts"], curve["body_ms"], strict=True):
            self.say(f"  {context:>7} " + "".join(f"{ms:8.1f}" for ms in row))
        heads = ", ".join(f"{n}: {ms:.1f}" for n, ms in zip(curve["heads"], curve["head_ms"], strict=True))
        self.say(f"  LM head by rows: {heads}")
        return curve

    def profile(self, number: int) -> dict[str, Any]:
        """Plain against aligned on an instrument, and against the peers' plain, in turns; ratios are of tokens/s."""
        profile = PROFILES[number - 1]
        found = {"profile": profile, **summary(self._collect(profile), self.tokens)}
        for line in table(number, found):
            self.say(line)
        return found

    def _collect(self, profile: dict[str, Any]) -> Turns:
        ways = {way: options for way, options in WAYS.items() if way != "drafting" or "repeated" in profile}
        peers = [name for name in self.contestants if name in OTHERS]
        turns = Turns({way: [] for way in ways}, {name: [] for name in peers})
        serial_rounds = SERIAL_ROUNDS if HUGGING_FACE in self.contestants and "repeated" not in profile else 0
        sitting = -(-self.rounds // SITTINGS)
        for turn in range(WARM_UP + self.rounds):
            counted = turn - WARM_UP
            if peers and counted >= 0 and counted % sitting == 0:
                self.contestants.start_anew(peers, turn)  # of peers alone: ours would have to learn anew
                for name in peers:
                    self._plain_ms(name)
            request = {"profile": {**profile, "seed": turn}, "context": self.contexts[0]}
            answers = self.contestants[MARA].ask("profile", **request, tokens=self.tokens, ways=ways)
            if counted < 0:
                continue
            for way in ways:
                turns.ours[way].append(answers[way])
            for name in peers:
                time.sleep(PAUSE_S)
                turns.peers[name].append(self._plain_ms(name))
            if counted < serial_rounds:
                tokens = min(self.tokens, SERIAL_TOKENS)
                ms = self.contestants[HUGGING_FACE].ask("serial", **request, tokens=tokens)["ms"]
                turns.serial_ms.append(ms / tokens)
        return turns

    def _plain_ms(self, name: str) -> float:
        """Time that a peer takes to as many plain tokens as an answer on an instrument has after its first."""
        answer = self.contestants[name].ask("decode", context=self.contexts[0], tokens=self.tokens - 1)
        return float(sum(answer["ms"]))

    def _in_turns(
        self, measure: Callable[[Contestant], float], label: str, most: int | None = None, eager: bool = True
    ) -> dict[str, Any]:
        """Median and quartiles by contestant; eager: Hugging Face takes part, which takes minutes for long contexts."""
        rounds = min(self.rounds, most or self.rounds)
        values: dict[str, list[float]] = {name: [] for name in self.contestants if eager or name != HUGGING_FACE}
        sittings = min(SITTINGS, rounds)
        for sitting in range(sittings):
            if sitting:
                self.contestants.start_anew([name for name in values if name != HUGGING_FACE], sitting)
            for turn in range(rounds // sittings + (sitting < rounds % sittings) + 1):
                for name in values:
                    if name == HUGGING_FACE and (sitting or turn > 2):
                        continue
                    value = measure(self.contestants[name])
                    if turn:  # the first fills caches and makes bindings
                        values[name].append(value)
                    time.sleep(PAUSE_S)
        found: dict[str, Any] = {name: {"ms": spread(v)} for name, v in values.items()}
        for name in found:
            found[name]["mara_to_it"] = spread(ratios(values[MARA][: len(values[name])], values[name]))
            self.say(
                f"{label}{name:<14}{bracketed(found[name]['ms'])}"
                + ("" if name == MARA else f"   mara is × {bracketed(found[name]['mara_to_it'])} of it")
            )
        return found


def summary(turns: Turns, tokens: int) -> dict[str, Any]:
    """Figures of an instrument, `tokens` a turn."""
    ms = {way: [a["ms"] for a in answers] for way, answers in turns.ours.items()}
    plain = turns.ours["plain"]
    found: dict[str, Any] = {"continued": sum(a["continued"] for a in plain) / len(plain), "ways": {}}
    for way, answers in turns.ours.items():
        total = {key: sum(a["stats"][key] for a in answers) for key in ("tokens", "forwards", "rows")}
        host_ms = sum(a["ms"] - a["engine_ms"] for a in answers)
        found["ways"][way] = {
            # the first token of an answer comes with its prompt
            "tokens_per_second": (total["tokens"] - len(answers)) / sum(ms[way]) * 1e3,
            "ratio": spread(ratios(ms["plain"], ms[way])),
            "expected_ratio": sum(a["expected_ms"] for a in plain) / sum(a["expected_ms"] for a in answers),
            "passes_per_token": total["forwards"] / total["tokens"],
            "rows_per_token": total["rows"] / total["tokens"],
            "drafted": sum(a["stats"]["drafted"] for a in answers),
            "confirmed": sum(a["stats"]["confirmed"] for a in answers),
            "host_share": host_ms / sum(ms[way]),
            "host_ms_per_pass": host_ms / total["forwards"],
        }
    for name, theirs in turns.peers.items():
        found.setdefault("peers", {})[name] = {
            "tokens_per_second": (tokens - 1) * len(theirs) / sum(theirs) * 1e3,
            "mara_to_its_plain": {way: spread(ratios(theirs, ours)) for way, ours in ms.items()},
        }
    if turns.serial_ms:
        found["hugging_face_serial_ms"] = median(turns.serial_ms)
        found["gain_over_hugging_face_serial"] = median(turns.serial_ms) / median(ms["aligned"]) * (tokens - 1)
    return found


def table(number: int, found: dict[str, Any]) -> list[str]:
    """Lines of the table about an instrument."""
    from mara_deploy.bench.workload import Profile  # brings NumPy, which the command's --help does without

    lines = [
        f"\ninstrument {number}: {Profile(**found['profile'])}; "
        f"{found['continued']:.0%} of its tokens continue what was there"
    ]
    for way, values in found["ways"].items():
        lines.append(
            f"  {way:<12}{values['tokens_per_second']:7.1f} tokens/s   × {bracketed(values['ratio'])} of plain"
            f"   (by the curve × {values['expected_ratio']:.2f})   {values['passes_per_token']:.2f} passes, "
            f"{values['rows_per_token']:.2f} rows a token   host {values['host_share']:.1%}"
        )
    for name, values in found.get("peers", {}).items():
        to_it = values["mara_to_its_plain"]
        told = (f"{way} is × {bracketed(to_it[way])}" for way in ("plain", "aligned", "drafting") if way in to_it)
        lines.append(f"  {name}, plain: {values['tokens_per_second']:.1f} tokens/s; of it {', '.join(told)}")
    if "hugging_face_serial_ms" in found:
        lines.append(
            f"  Hugging Face, one candidate a pass: {1e3 / found['hugging_face_serial_ms']:.1f} tokens/s; "
            f"aligned is × {found['gain_over_hugging_face_serial']:.1f}"
        )
    return lines


def ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """first ÷ second, turn by turn."""
    return [a / b for a, b in zip(first, second, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "low": low, "high": high, "count": len(values)}


def bracketed(value: dict[str, float]) -> str:
    """A spread in words: median, and the quartiles in brackets."""
    return f"{value['median']:.3g} [{value['low']:.3g}–{value['high']:.3g}]"
