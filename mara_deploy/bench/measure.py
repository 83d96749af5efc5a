"""The measurements: contestants take turns, in several sessions; medians, quartiles, ratios turn by turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from mara_deploy.bench.contestant import MARA, Contestant, Contestants

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
TOGETHER = ("plain", "aligned")
"""Ways to decode several conversations."""
SESSIONS = 4
"""How often contestants are restarted for plain steps and prefill, each time in another order: the speed of a process
varies by several percent with where its memory happens to be, and on some machines the first to start is slower."""
WARM_UP = 2
"""Rounds on a profile that do not count: the schedule learns the agent's habits from them."""
SERIAL_ROUNDS, SERIAL_TOKENS, SERIAL_STEPS = 3, 12, 4
"""Limits for serial contestants, which are slow: rounds and tokens on a profile, plain steps"""
PAUSE_S = 0.05
"""between two contestants: the threads of the previous one still spin"""


@dataclass
class Turns:
    """Results on a profile, turn by turn."""

    ours: dict[str, list[dict[str, Any]]]
    """{way: answers of the worker}"""
    peers: dict[str, list[float]]
    """{name: ms for as many plain tokens as an answer has after its first}"""
    serial_ms: dict[str, list[float]]
    """{name: ms per token with one forward pass per candidate}"""


@dataclass(frozen=True)
class Bench:
    """The measurements."""

    contestants: Contestants
    contexts: Sequence[int]
    """ascending"""
    tokens: int
    """decoded per turn"""
    rounds: int
    """turns of each contestant"""
    say: Callable[[str], None]
    """takes the lines of the tables"""

    def memory(self) -> dict[str, int]:
        """Peak resident bytes of a new process that decodes at the shortest context, by contestant."""
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
        figures: dict[str, dict[str, Any]] = {}
        for context in self.contexts:

            def step(contestant: Contestant, context: int = context) -> float:
                tokens = SERIAL_STEPS if contestant.serial else self.tokens
                return float(median(contestant.ask("decode", context=context, tokens=tokens)["ms"]))

            shortest = context == self.contexts[0]
            figures[str(context)] = self._in_turns(step, f"  {context:>5} tokens ", serial=shortest)
        return figures

    def prefill(self) -> dict[str, dict[str, Any]]:
        """Milliseconds to the first token of a prompt."""
        length = min(1024, self.contexts[-1])
        self.say(f"\nprefill of {length} tokens, ms")

        def first_token(contestant: Contestant) -> float:
            return float(contestant.ask("prefill", tokens=length)["ms"])

        return {str(length): self._in_turns(first_token, "  ", most=5, serial=False)}

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

    def together(self, counts: Sequence[int]) -> dict[str, dict[str, Any]]:
        """Tokens per second of several conversations at once, on the first profile, and × those of one alone."""
        context = self.contexts[0]
        self.say(f"\nconversations at once, {context} tokens each: tokens/s of all, × one alone")
        sides = [(MARA, way) for way in TOGETHER]
        sides += [(name, "plain") for name, peer in self.contestants.items() if name != MARA and peer.conversations]
        speeds: dict[tuple[str, str], dict[int, list[float]]] = {
            side: {count: [] for count in sorted({1, *counts}) if count <= self.contestants[side[0]].conversations}
            for side in sides
        }
        for turn in range(WARM_UP + self.rounds):
            for (name, way), by_count in speeds.items():
                ours: dict[str, Any] = {"profile": PROFILES[0] | {"seed": turn}, "way": way, "options": WAYS[way]}
                for count, values in by_count.items():
                    request = {"conversations": count, "context": context, "tokens": self.tokens}
                    answer = self.contestants[name].ask("together", **request, **(ours if name == MARA else {}))
                    if turn >= WARM_UP:
                        values.append(answer["tokens"] / answer["ms"] * 1e3)
                    time.sleep(PAUSE_S)
        figures: dict[str, dict[str, Any]] = {}
        for (name, way), by_count in speeds.items():
            figures.setdefault(name, {})[way] = {}
            for count, values in by_count.items():
                found = {"tokens_per_second": spread(values), "ratio": spread(ratios(values, by_count[1]))}
                figures[name][way][str(count)] = found
                speed = found["tokens_per_second"]["median"]
                self.say(f"  {name:<10}{way:<9}{count:>3}{speed:9.1f} tokens/s   × {bracketed(found['ratio'])}")
            if left := sorted({*counts} - {*by_count}):
                most = self.contestants[name].conversations
                self.say(f"  {name:<10}{way:<9}without {', '.join(map(str, left))}: it holds {most} at once")
        return figures

    def profile(self, number: int) -> dict[str, Any]:
        """Plain against aligned decoding on a profile, and against the peers' plain one; ratios are of tokens/s."""
        profile = PROFILES[number - 1]
        figures = {"profile": profile, **summary(self._collect(profile), self.tokens)}
        for line in table(number, figures):
            self.say(line)
        return figures

    def _collect(self, profile: dict[str, Any]) -> Turns:
        ways = {way: options for way, options in WAYS.items() if way != "drafting" or "repeated" in profile}
        serial = [name for name in self.contestants if self.contestants[name].serial and "repeated" not in profile]
        peers = [name for name in self.contestants if name != MARA and not self.contestants[name].serial]
        turns = Turns({way: [] for way in ways}, {name: [] for name in peers}, {name: [] for name in serial})
        session = -(-self.rounds // SESSIONS)
        for turn in range(WARM_UP + self.rounds):
            counted = turn - WARM_UP
            if peers and counted >= 0 and counted % session == 0:
                self.contestants.restart(peers, turn)  # only peers: ours would lose what it has learnt
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
            for name in serial if counted < SERIAL_ROUNDS else ():
                tokens = min(self.tokens, SERIAL_TOKENS)
                ms = self.contestants[name].ask("serial", **request, tokens=tokens)["ms"]
                turns.serial_ms[name].append(ms / tokens)
        return turns

    def _plain_ms(self, name: str) -> float:
        """Time a peer takes for as many plain tokens as an answer on a profile has after its first."""
        answer = self.contestants[name].ask("decode", context=self.contexts[0], tokens=self.tokens - 1)
        return float(sum(answer["ms"]))

    def _in_turns(
        self, measure: Callable[[Contestant], float], label: str, most: int | None = None, serial: bool = True
    ) -> dict[str, Any]:
        """Median and quartiles by contestant. serial: serial contestants, which are slow, take part."""
        rounds = min(self.rounds, most or self.rounds)
        values: dict[str, list[float]] = {
            name: [] for name in self.contestants if serial or not self.contestants[name].serial
        }
        sessions = min(SESSIONS, rounds)
        for session in range(sessions):
            if session:
                self.contestants.restart([n for n in values if not self.contestants[n].serial], session)
            for turn in range(rounds // sessions + (session < rounds % sessions) + 1):
                for name in values:
                    if self.contestants[name].serial and (session or turn > 2):
                        continue
                    value = measure(self.contestants[name])
                    if turn:  # the first fills caches and creates bindings
                        values[name].append(value)
                    time.sleep(PAUSE_S)
        figures: dict[str, Any] = {name: {"ms": spread(v)} for name, v in values.items()}
        for name in figures:
            figures[name]["mara_to_it"] = spread(ratios(values[MARA][: len(values[name])], values[name]))
            self.say(
                f"{label}{name:<14}{bracketed(figures[name]['ms'])}"
                + ("" if name == MARA else f"   mara is × {bracketed(figures[name]['mara_to_it'])} of it")
            )
        return figures


def summary(turns: Turns, tokens: int) -> dict[str, Any]:
    """Figures of a profile, `tokens` per turn."""
    ms = {way: [a["ms"] for a in answers] for way, answers in turns.ours.items()}
    plain = turns.ours["plain"]
    figures: dict[str, Any] = {"continued": sum(a["continued"] for a in plain) / len(plain), "ways": {}}
    for way, answers in turns.ours.items():
        total = {key: sum(a["stats"][key] for a in answers) for key in ("tokens", "forwards", "rows")}
        host_ms = sum(a["ms"] - a["engine_ms"] for a in answers)
        figures["ways"][way] = {
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
        figures.setdefault("peers", {})[name] = {
            "tokens_per_second": (tokens - 1) * len(theirs) / sum(theirs) * 1e3,
            "mara_to_its_plain": {way: spread(ratios(theirs, ours)) for way, ours in ms.items()},
        }
    for name, serial_ms in turns.serial_ms.items():
        figures.setdefault("serial", {})[name] = {
            "ms_per_token": median(serial_ms),
            "gain": median(serial_ms) / median(ms["aligned"]) * (tokens - 1),
        }
    return figures


def table(number: int, figures: dict[str, Any]) -> list[str]:
    """Lines of the table about a profile."""
    from mara_deploy.bench.synthetic import Profile  # imports NumPy, which --help does without

    lines = [
        f"\nsynthetic acceptance {number}: {Profile(**figures['profile'])}; "
        f"{figures['continued']:.0%} of tokens continue an earlier phrase"
    ]
    for way, values in figures["ways"].items():
        lines.append(
            f"  {way:<12}{values['tokens_per_second']:7.1f} tokens/s   × {bracketed(values['ratio'])} of plain"
            f"   (predicted × {values['expected_ratio']:.2f})   {values['passes_per_token']:.2f} passes, "
            f"{values['rows_per_token']:.2f} rows per token   host {values['host_share']:.1%}"
        )
    for name, values in figures.get("peers", {}).items():
        to_it = values["mara_to_its_plain"]
        ratios_of_ways = (
            f"{way} is × {bracketed(to_it[way])}" for way in ("plain", "aligned", "drafting") if way in to_it
        )
        lines.append(f"  {name}, plain: {values['tokens_per_second']:.1f} tokens/s; of it {', '.join(ratios_of_ways)}")
    for name, values in figures.get("serial", {}).items():
        lines.append(
            f"  {name}, one pass per candidate: {1e3 / values['ms_per_token']:.1f} tokens/s; "
            f"aligned is × {values['gain']:.1f}"
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
