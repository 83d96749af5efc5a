"""The oracle and the tiny checkpoints are checked here, so that a disagreement with the product means the product.

Three ways: cases worked out by hand on a stub model; a second decoder, written differently and without any cache;
and mutations of the oracle which the checkpoints must be able to tell from the original.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import checkpoints, oracle

EOS = 5
VOCAB = 6
# What float32 leaves uncertain in the logits of the tiny models (float32 against float64: up to 6e-5).
FRAGILE = 1e-4


# --- a stub model ----------------------------------------------------------------------------------------------------


class StubModel:
    """A language model as a table: history of ids -> {id: probability}, and history -> margin.

    Its cache is one list which every forward changes in place, so a cache shared by two candidates shows up as a
    history that is not in the table. Ids without a probability get minus infinity.
    """

    def __init__(self, rows: dict[tuple[int, ...], dict[int, float]], margins: dict[tuple[int, ...], float]) -> None:
        self.rows, self.margins = rows, margins
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, *, input_ids, past_key_values, use_cache, output_hidden_states):
        assert input_ids.shape[0] == 1
        assert use_cache
        assert output_hidden_states
        history = SimpleNamespace(ids=[]) if past_key_values is None else past_key_values
        if past_key_values is None:
            input_ids = input_ids[:, 1:]  # the prompt is one token; the tables start after it
        history.ids += input_ids[0].tolist()
        key = tuple(history.ids)
        self.calls.append(key)
        logits = torch.full((1, 1, VOCAB), -math.inf)
        for token, probability in self.rows[key].items():
            logits[0, 0, token] = math.log(probability)
        state = torch.tensor([[[self.margins.get(key, 99.0)]]])  # (1, 1, 1)
        wrong = torch.full_like(state, 77.0)
        return SimpleNamespace(logits=logits, hidden_states=(wrong, state), past_key_values=history)


def stub_agent(states: torch.Tensor) -> torch.Tensor:
    """The state is the margin: z = (1, 1 + state)."""
    return torch.cat([torch.ones_like(states), 1.0 + states], dim=1)


def run(model: StubModel, **options) -> oracle.OracleResult:
    return oracle.decode(model, stub_agent, [0], eos_ids=[EOS], **options)


def one_decision(margin_2: float, margin_0: float, margin_4: float) -> StubModel:
    """Candidates 2, 0, 4 in this rank (tails 1, .5, .2), then a lone EOS."""
    end = {EOS: 1.0}
    return StubModel(
        {(): {2: 0.5, 0: 0.3, 4: 0.2}, (2,): end, (0,): end, (4,): end},
        {(2,): margin_2, (0,): margin_0, (4,): margin_4},
    )


@pytest.mark.parametrize(
    ("strategy", "order", "picked", "rank", "examined", "smallest"),
    [
        ("top1", "ranked", 0, 2, [2, 0], 1.0),
        ("top1", "best_last", 0, 2, [0], 1.0),
        ("top1", "reversed", 4, 3, [4], 2.0),
        ("max_prob", "ranked", 4, 3, [2, 0, 4], 1.0),
        ("max_prob", "best_last", 4, 3, [0, 4, 2], 1.0),
        ("max_prob", "reversed", 4, 3, [4, 0, 2], 1.0),
        # default_rng(0).integers(2) is 1: the second accepted one in the order of examination
        ("random", "ranked", 4, 3, [2, 0, 4], 1.0),
        ("random", "best_last", 4, 3, [0, 4, 2], 1.0),
        ("random", "reversed", 0, 2, [4, 0, 2], 1.0),
    ],
)
@pytest.mark.parametrize("fallback", ["first", "last"])
def test_each_strategy_in_each_order(strategy, order, picked, rank, examined, smallest, fallback) -> None:
    result = run(one_decision(-1.0, 1.0, 2.0), strategy=strategy, order=order, fallback=fallback)
    assert result.token_ids == [picked, EOS]
    assert result.finish_reason == "stop"
    assert result.positions[0]["candidates"] == [2, 0, 4]
    assert result.positions[0]["examined"] == examined
    assert result.counters == {
        "tokens": 2,
        "decisions": 1,
        "examined": len(examined),
        "forced": 0,
        "accepted_rank": {rank: 1},
        "candidate_counts": {1: 1, 3: 1},
        "smallest_margin": smallest,
    }


@pytest.mark.parametrize(("fallback", "picked", "rank"), [("first", 2, 1), ("last", 4, 3)])
@pytest.mark.parametrize("order", oracle.ORDERS)
@pytest.mark.parametrize("strategy", oracle.STRATEGIES)
def test_all_rejected_takes_the_fallback_in_lm_rank_and_a_tie_rejects(strategy, order, fallback, picked, rank) -> None:
    result = run(one_decision(-3.0, 0.0, -0.5), strategy=strategy, order=order, fallback=fallback)
    assert result.token_ids == [picked, EOS]
    assert (result.positions[0]["forced"], result.positions[0]["rank"]) == (True, rank)
    assert result.counters == {
        "tokens": 2,
        "decisions": 1,
        "examined": 3,
        "forced": 1,
        "accepted_rank": {},
        "candidate_counts": {1: 1, 3: 1},
        "smallest_margin": 0.0,
    }


@pytest.mark.parametrize(
    ("threshold", "picked", "examined", "smallest"),
    [(0.0, 0, 2, 1.0), (1.0, 4, 3, 0.0), (-1.5, 2, 1, 0.5), (-1.0, 0, 2, 0.0), (1.75, 4, 3, 0.25)],
)
def test_a_margin_must_exceed_the_threshold_strictly(threshold, picked, examined, smallest) -> None:
    result = run(one_decision(-1.0, 1.0, 2.0), threshold=threshold)
    assert result.token_ids == [picked, EOS]
    assert result.counters["examined"] == examined
    assert result.counters["smallest_margin"] == smallest


@pytest.mark.parametrize(("order", "picked"), [("ranked", 0), ("best_last", 0), ("reversed", 4)])
def test_max_prob_takes_the_earliest_examined_on_an_exact_tie(order, picked) -> None:
    result = run(one_decision(-1.0, 1.5, 1.5), strategy="max_prob", order=order)
    assert result.token_ids == [picked, EOS]
    assert result.positions[0]["gap_parts"]["best_two"] == 0.0
    assert result.gaps[0] == 0.0


def test_max_prob_falls_back_when_the_best_margin_does_not_exceed_the_threshold() -> None:
    result = run(one_decision(-1.0, 1.0, 2.0), strategy="max_prob", threshold=2.0, fallback="first")
    assert result.token_ids == [2, EOS]
    assert result.counters["forced"] == 1


def test_random_draws_once_for_each_decision_with_an_accepted_candidate() -> None:
    # default_rng(0) gives integers(2), integers(3), integers(2), integers(2) = 1, 1, 1, 0.
    draws = np.random.default_rng(0)
    assert [int(draws.integers(n)) for n in (2, 3, 2, 2)] == [1, 1, 1, 0]
    two, three, one = {1: 0.6, 3: 0.4}, {0: 0.5, 2: 0.3, 4: 0.2}, {1: 1.0}
    path = [3, 1, 1, 2, 3, 1, 1]
    rows: dict[tuple[int, ...], dict[int, float]] = {}
    margins: dict[tuple[int, ...], float] = {}
    for i, (row, accepts) in enumerate(
        [
            (two, (1, 3)),  # draw 1 of {1, 3}: 3
            (one, ()),  # no decision, no draw
            (two, ()),  # forced: the first, no draw
            (three, (0, 2, 4)),  # draw 1 of {0, 2, 4}: 2
            (two, (1, 3)),  # draw 1 of {1, 3}: 3
            (two, (1, 3)),  # draw 0 of {1, 3}: 1
            (one, ()),
        ]
    ):
        prefix = tuple(path[:i])
        rows[prefix] = row
        for token in row:
            margins[(*prefix, token)] = 1.0 if token in accepts else -1.0
            rows.setdefault((*prefix, token), {EOS: 1.0})
    result = run(StubModel(rows, margins), strategy="random", seed=0)
    assert result.token_ids == [*path, EOS]
    assert result.counters["forced"] == 1
    assert result.counters["decisions"] == 5
    assert result.counters["examined"] == 11
    assert result.counters["accepted_rank"] == {1: 1, 2: 3}
    assert result.counters["candidate_counts"] == {1: 3, 2: 4, 3: 1}


def test_a_decision_follows_the_accepted_prefix_only() -> None:
    # Two decisions in a row, the best rejected in both: a shared cache would hold (2, 0) or (2, 0, 1).
    model = StubModel(
        {
            (): {2: 0.6, 0: 0.4},
            (2,): {EOS: 1.0},
            (0,): {1: 0.7, 2: 0.3},
            (0, 1): {EOS: 1.0},
            (0, 2): {3: 1.0},
            (0, 2, 3): {EOS: 1.0},
        },
        {(2,): -1.0, (0,): 1.0, (0, 1): -2.0, (0, 2): 0.5},
    )
    result = run(model)
    assert result.token_ids == [0, 2, 3, EOS]
    assert model.calls == [(), (2,), (0,), (0, 1), (0, 2), (0, 2, 3)]  # the agent's forwards also continue the text
    assert result.counters["accepted_rank"] == {2: 2}
    assert result.counters["smallest_margin"] == 0.5
    assert [p["position"] for p in result.positions] == [1, 2, 3, 4]


def test_eos_is_a_candidate_that_can_be_rejected_and_nothing_runs_after_it() -> None:
    rows = {(): {EOS: 0.6, 1: 0.4}, (EOS,): {}, (1,): {3: 0.5, EOS: 0.3, 2: 0.2}, (1, EOS): {}, (1, 3): {}}
    model = StubModel(rows, {(EOS,): -1.0, (1,): 1.0, (1, 3): -1.0, (1, EOS): 1.0})
    result = run(model)
    assert result.token_ids == [1, EOS]
    assert result.finish_reason == "stop"
    assert model.calls[-1] == (1, EOS)
    assert result.counters["accepted_rank"] == {2: 2}


def test_length_limit() -> None:
    rows = {tuple([1] * n): {1: 1.0} for n in range(6)}
    result = run(StubModel(rows, {}), max_new_tokens=5)
    assert (result.token_ids, result.finish_reason) == ([1] * 5, "length")
    assert result.counters["smallest_margin"] is None
    assert result.counters["candidate_counts"] == {1: 5}
    assert run(StubModel(rows, {}), max_new_tokens=0).token_ids == []
    last_is_eos = run(one_decision(1.0, 1.0, 1.0), max_new_tokens=2)
    assert (last_is_eos.token_ids, last_is_eos.finish_reason) == ([2, EOS], "stop")


def test_any_of_several_eos_ids_stops() -> None:
    rows = {(): {1: 1.0}, (1,): {3: 1.0}}
    result = oracle.decode(StubModel(rows, {}), stub_agent, [0], eos_ids=[EOS, 3])
    assert (result.token_ids, result.finish_reason) == ([1, 3], "stop")


def test_a_non_finite_state_is_an_error_naming_the_position() -> None:
    # The logits stay fine: only the state of rank 2 is broken, after rank 1 was rejected.
    with pytest.raises(ValueError, match="position 1: candidate 0 has a non-finite hidden state"):
        run(one_decision(-1.0, math.nan, 1.0))


@pytest.mark.parametrize(
    "options", [{"strategy": "top2"}, {"order": "best"}, {"fallback": "none"}, {"top_k": 0}, {"top_p": 1.5}]
)
def test_unknown_options_are_errors(options) -> None:
    with pytest.raises(ValueError, match="must"):
        run(one_decision(1.0, 1.0, 1.0), **options)


# --- the candidate list ----------------------------------------------------------------------------------------------


def ids_of(logits: list[float], *, top_k: int = 40, top_p: float = 0.95) -> list[int]:
    return oracle.candidates(torch.tensor(logits), top_k=top_k, top_p=top_p).ids


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def test_equal_logits_rank_by_lower_id() -> None:
    assert ids_of([1.0, 3.0, 2.0, 3.0, 2.0], top_p=1.0) == [1, 3, 2, 4, 0]
    assert ids_of([0.0, -0.0, 0.0], top_p=1.0) == [0, 1, 2]
    assert ids_of([0.0] * 5000, top_p=1.0) == list(range(40))


def test_exactly_top_k_survive_a_tie_at_the_boundary() -> None:
    found = oracle.candidates(torch.tensor([1.0, 2.0, 1.0, 1.0]), top_k=2, top_p=1.0)
    assert found.ids == [1, 0]
    assert found.logit_gap == 0.0


def test_rank_by_the_logits_not_by_log_softmax() -> None:
    logits = torch.tensor([0.0, 1e-8, -1.0])
    scores = logits.log_softmax(dim=0)
    assert scores[0] == scores[1]  # the normaliser makes a tie
    assert oracle.candidates(logits, top_k=3, top_p=1.0).ids == [1, 0, 2]


def test_top_p_drops_at_or_below_its_complement() -> None:
    equal = [0.0] * 4  # tails 1, .75, .5, .25
    assert ids_of(equal, top_p=0.5) == [0, 1]
    assert ids_of(equal, top_p=0.75) == [0, 1, 2]
    assert ids_of(equal, top_p=0.76) == [0, 1, 2, 3]
    assert ids_of(logs(0.96, 0.03, 0.01)) == [0]
    assert ids_of(logs(0.94, 0.05, 0.01)) == [0, 1]
    assert ids_of(logs(0.01, 0.94, 0.05)) == [1, 2]


def test_top_p_is_taken_over_the_top_k_renormalised() -> None:
    # .4 and .3 renormalise to .571 and .429; 1 - top_p lies between .3 and .429.
    assert ids_of(logs(0.4, 0.3, 0.2, 0.1), top_k=2, top_p=0.6) == [0, 1]
    assert ids_of(logs(0.4, 0.3, 0.2, 0.1), top_k=2, top_p=0.56) == [0]


def test_ends_of_the_ranges() -> None:
    logits = [0.0, 5.0, 1.0, 4.9]
    assert ids_of(logits, top_p=0.0) == [1]
    assert ids_of([0.0] * 4, top_p=0.0) == [0]  # the best stays even where it is not ahead
    assert ids_of(logits, top_p=1.0) == [1, 3, 2, 0]
    assert ids_of(logits, top_p=1.0, top_k=1) == [1]
    assert ids_of(logits, top_p=1.0, top_k=99) == [1, 3, 2, 0]
    assert ids_of([0.0, -math.inf], top_p=1.0) == [0]
    for bad in ([math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]):
        with pytest.raises(ValueError, match="non-finite"):
            ids_of(bad)


def test_candidate_gaps() -> None:
    found = oracle.candidates(torch.tensor(logs(0.5, 0.3, 0.16, 0.04)), top_k=4, top_p=0.95)
    assert found.ids == [0, 1, 2]
    assert found.logit_gap == pytest.approx(math.log(0.5 / 0.3), abs=1e-6)
    assert found.nucleus_gap == pytest.approx(0.01, abs=1e-6)  # .04 against .05; .2 is farther
    # The swap of ranks 3 and 4 matters at top_k = 3 with top_p = 1, not where top_p drops both.
    close = torch.tensor(logs(0.6, 0.3799, 0.0101, 0.01))
    assert oracle.candidates(close, top_k=3, top_p=1.0).logit_gap == pytest.approx(math.log(1.01), abs=1e-6)
    dropped = oracle.candidates(close, top_k=3, top_p=0.95)
    assert dropped.ids == [0, 1]
    assert dropped.logit_gap == pytest.approx(math.log(0.6 / 0.3799), abs=1e-6)
    # A single candidate: only the distance to the runner-up. The whole vocabulary: no end to cross.
    assert oracle.candidates(torch.tensor([0.0, 2.0]), top_k=1, top_p=0.5).logit_gap == 2.0
    assert oracle.candidates(torch.tensor([0.0, 2.0]), top_k=9, top_p=1.0).logit_gap == 2.0
    assert oracle.candidates(torch.tensor([0.0]), top_k=9, top_p=1.0).logit_gap == math.inf


def test_gaps_of_a_position_include_the_margins() -> None:
    ranks = math.log(0.3 / 0.2)  # the smaller of the two differences of neighbours
    assert run(one_decision(-1.0, 1.0, 2.0), top_p=1.0).gaps[0] == pytest.approx(ranks, abs=1e-6)
    assert run(one_decision(-0.25, 1.0, 2.0), top_p=1.0).gaps[0] == 0.25
    assert run(one_decision(1.0, 0.125, 2.0), top_p=1.0).gaps[0] == pytest.approx(ranks, abs=1e-6)  # not examined
    near = run(one_decision(-1.0, 1.75, 2.0), top_p=1.0, strategy="max_prob")
    assert near.gaps[0] == 0.25
    assert len(near.gaps) == len(near.positions) == len(near.token_ids) == 2


# --- tiny models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=checkpoints.ARCHITECTURES)
def tiny(request, tmp_path_factory):
    """Architecture, folder, model, agent and `decoded` text of one tiny checkpoint."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster at this size
    folder = checkpoints.make(request.param, tmp_path_factory.mktemp("tiny") / request.param)
    model = checkpoints.load(folder)
    states = checkpoints.sample_states(model)
    agent = checkpoints.make_agent(model.config.hidden_size, seed=7, sample_states=states)
    case = SimpleNamespace(architecture=request.param, folder=folder, model=model, agent=agent)
    case.right = decoded(case)
    yield case
    torch.set_num_threads(threads)


def brute_force(model, agent, prompt, *, top_k, top_p, n, strategy, order, fallback, threshold, seed) -> list[int]:
    """The same algorithm again, without a cache: the whole prefix is recomputed for every candidate."""

    def read(ids: list[int]) -> tuple[list[float], torch.Tensor]:
        with torch.no_grad():
            out = model.model(input_ids=torch.tensor([ids]), use_cache=False)
            return model.lm_head(out.last_hidden_state[0, -1]).tolist(), out.last_hidden_state[0, -1]

    rng = np.random.default_rng(seed)
    text = list(prompt)
    while len(text) < len(prompt) + n:
        logits, _ = read(text)
        survivors = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
        weights = {i: math.exp(logits[i] - logits[survivors[0]]) for i in survivors}
        total = math.fsum(weights.values())
        while len(survivors) > 1:  # strip from the low end what fits into 1 - top_p
            dropped = [i for i in weights if i not in survivors]
            if math.fsum(weights[i] for i in [survivors[-1], *dropped]) / total > 1 - top_p:
                break
            survivors.pop()
        pick = survivors[0]
        if len(survivors) > 1:
            queue = {"ranked": survivors, "best_last": [*survivors[1:], pick], "reversed": survivors[::-1]}[order]
            yes = {}
            for candidate in queue:
                with torch.no_grad():
                    z0, z1 = agent(read([*text, candidate])[1].unsqueeze(0))[0].tolist()
                if z1 - z0 > threshold:
                    yes[candidate] = z1 - z0
                    if strategy == "top1":
                        break
            if not yes:
                pick = survivors[0] if fallback == "first" else survivors[-1]
            elif strategy == "random":
                pick = list(yes)[rng.integers(len(yes))]
            else:
                pick = max(yes, key=yes.get)
        text.append(pick)
        if pick in checkpoints.EOS_IDS:
            break
    return text[len(prompt) :]


VARIANTS = [
    {"strategy": s, "order": o, "fallback": f}
    for s, o, f in itertools.product(oracle.STRATEGIES, oracle.ORDERS, oracle.FALLBACKS)
]


def test_a_cache_free_second_decoder_gives_the_same_ids(tiny) -> None:
    fixed = {"top_k": 40, "top_p": 0.95, "threshold": 0.1, "seed": 3}
    compared = emitted = 0
    for variant, prompt in zip(VARIANTS, checkpoints.random_prompts(len(VARIANTS), seed=11), strict=True):
        result = oracle.decode(
            tiny.model, tiny.agent, prompt, eos_ids=checkpoints.EOS_IDS, max_new_tokens=12, **fixed, **variant
        )
        again = brute_force(tiny.model, tiny.agent, prompt, n=12, **fixed, **variant)
        sure = next((i for i, gap in enumerate(result.gaps) if gap < FRAGILE), len(result.gaps))
        assert again[:sure] == result.token_ids[:sure], variant
        if sure == len(result.gaps):
            assert again == result.token_ids, variant
        compared, emitted = compared + sure, emitted + len(result.token_ids)
    assert compared > 0.8 * emitted  # the comparison is about something


def test_agreement_does_not_depend_on_the_defaults(tiny) -> None:
    for top_k, top_p in ((1, 0.95), (3, 1.0), (40, 0.0), (10_000, 0.5)):
        options = {"top_k": top_k, "top_p": top_p, "strategy": "top1", "order": "ranked", "fallback": "first"}
        options |= {"threshold": 0.0, "seed": 0}
        for prompt in checkpoints.random_prompts(1, seed=top_k):
            result = oracle.decode(
                tiny.model, tiny.agent, prompt, eos_ids=checkpoints.EOS_IDS, max_new_tokens=12, **options
            )
            again = brute_force(tiny.model, tiny.agent, prompt, n=12, **options)
            sure = next((i for i, gap in enumerate(result.gaps) if gap < FRAGILE), len(result.gaps))
            assert again[:sure] == result.token_ids[:sure], (top_k, top_p)
            if 1 in (top_k, 1 + top_p):
                assert result.counters["decisions"] == 0


def test_accept_all_is_greedy_and_so_is_reject_all_with_fallback_first(tiny) -> None:
    prompt = checkpoints.random_prompts(1, seed=5)[0]
    greedy = tiny.model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=48, do_sample=False
    )[0, len(prompt) :].tolist()
    for threshold, fallback in ((-1e9, "last"), (1e9, "first")):
        result = oracle.decode(
            tiny.model,
            tiny.agent,
            prompt,
            eos_ids=checkpoints.EOS_IDS,
            max_new_tokens=48,
            threshold=threshold,
            fallback=fallback,
        )
        assert result.token_ids == greedy


def test_hidden_states_are_those_the_head_reads(tiny) -> None:
    ids = torch.tensor(checkpoints.random_prompts(2))
    with torch.no_grad():
        out = tiny.model(input_ids=ids, output_hidden_states=True)
        torch.testing.assert_close(tiny.model.lm_head(out.hidden_states[-1]), out.logits)


def decoded(tiny, model=None, agent=None) -> list[list[int]]:
    return [
        oracle.decode(
            model or tiny.model, agent or tiny.agent, prompt, eos_ids=checkpoints.EOS_IDS, max_new_tokens=32
        ).token_ids
        for prompt in checkpoints.random_prompts(6, seed=21)
    ]


def test_the_checkpoints_show_a_cache_shared_by_siblings(tiny, monkeypatch) -> None:
    monkeypatch.setattr(oracle, "copy", SimpleNamespace(deepcopy=lambda cache: cache))
    assert sum(a != b for a, b in zip(tiny.right, decoded(tiny), strict=True)) >= 4


def test_the_checkpoints_show_a_wrong_position(tiny) -> None:
    def one_too_far(*, input_ids, past_key_values, **options):
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        places = past + torch.arange(input_ids.shape[1])[None] + (past > 0)
        return tiny.model(input_ids=input_ids, past_key_values=past_key_values, position_ids=places, **options)

    wrong = decoded(tiny, model=one_too_far)
    assert sum(a != b for a, b in zip(tiny.right, wrong, strict=True)) >= 4


def test_the_checkpoints_show_a_state_from_before_the_final_norm(tiny) -> None:
    def before_the_norm(**options):
        seen = []
        hook = tiny.model.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        out = tiny.model(**options)
        hook.remove()
        return SimpleNamespace(logits=out.logits, hidden_states=seen, past_key_values=out.past_key_values)

    wrong = decoded(tiny, model=before_the_norm)
    assert sum(a != b for a, b in zip(tiny.right, wrong, strict=True)) >= 4


def test_the_text_is_fit_for_tests(tiny) -> None:
    results = [
        oracle.decode(tiny.model, tiny.agent, prompt, eos_ids=checkpoints.EOS_IDS)
        for prompt in checkpoints.random_prompts(10, seed=3)
    ]
    positions = [p for r in results for p in r.positions]
    sizes = np.array([len(p["candidates"]) for p in positions])
    margins = np.array([m for p in positions for m in p["margins"].values()])
    assert 0.4 < np.mean(sizes == 1) < 0.6
    assert np.mean(sizes[sizes > 1] <= 8) > 0.95
    assert 0.45 < np.mean(margins > 0) < 0.75
    assert np.mean(np.abs(margins) < 1e-3) < 0.01
    assert np.mean(np.array([g for r in results for g in r.gaps]) < FRAGILE) < 0.01
    assert len({t for r in results for t in r.token_ids}) > 100
    assert {1, 2, 3} <= {rank for r in results for rank in r.counters["accepted_rank"]}
    assert sum(r.counters["forced"] for r in results) > 0
    assert 1 <= sum(r.finish_reason == "stop" for r in results) <= 8
    assert all(len(set(r.token_ids[-16:])) > 4 for r in results if r.finish_reason == "length")  # no short loop


# --- the files -------------------------------------------------------------------------------------------------------


def test_files_are_deterministic_and_differ_by_seed(tiny, tmp_path: Path) -> None:
    again = checkpoints.make(tiny.architecture, tmp_path / "again")
    other = checkpoints.make(tiny.architecture, tmp_path / "other", seed=1)
    weights = [(f / "model.safetensors").read_bytes() for f in (tiny.folder, again, other)]
    assert weights[0] == weights[1] != weights[2]


def test_the_shapes_that_matter(tiny) -> None:
    config = json.loads((tiny.folder / "config.json").read_text())
    generation = json.loads((tiny.folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [257, 258]
    assert config["eos_token_id"] == 257  # the trap: only the generation config holds the list
    assert config["num_attention_heads"] == 2 * config["num_key_value_heads"]
    assert tiny.model.config.tie_word_embeddings == (tiny.architecture in ("qwen2", "qwen3"))
    if tiny.architecture == "qwen3":
        assert config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]
    if tiny.architecture == "llama":
        assert config["rope_scaling"]["rope_type"] == "llama3"
    if tiny.architecture == "mistral":
        assert config["sliding_window"] is None


def test_tie_can_be_overridden(tmp_path: Path) -> None:
    for architecture, tie in (("qwen2", False), ("llama", True)):
        model = checkpoints.load(checkpoints.make(architecture, tmp_path / architecture, tie=tie))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    with pytest.raises(ValueError, match="must be one of"):
        checkpoints.make("gpt2", tmp_path)


@pytest.mark.parametrize("accept_rate", [0.0, 0.3, 0.6, 1.0])
def test_the_agent_has_the_released_names_and_the_wanted_rate(accept_rate: float) -> None:
    states = torch.randn((200, 64), generator=torch.Generator().manual_seed(4)) * 3.0
    agent = checkpoints.make_agent(64, seed=1, accept_rate=accept_rate, sample_states=states)
    assert set(agent.state_dict()) == {
        f"{layer}.{kind}" for layer in ("ln", "linear1", "linear2", "output_linear") for kind in ("weight", "bias")
    }
    with torch.no_grad():
        z = agent(states)
    assert z.shape == (200, 2)
    margins = z[:, 1] - z[:, 0]
    assert (margins > 0).float().mean().item() == pytest.approx(accept_rate)
    assert margins.std().item() == pytest.approx(1.0, abs=1e-3)
    same = checkpoints.make_agent(64, seed=1, accept_rate=accept_rate, sample_states=states)
    assert all(torch.equal(a, b) for a, b in zip(agent.state_dict().values(), same.state_dict().values(), strict=True))
    assert checkpoints.make_agent(48, seed=1, widths=(8, 4))(torch.zeros(3, 48)).shape == (3, 2)


@pytest.mark.parametrize("vocab_size", [260, 272, 384])
def test_the_tokenizer_adds_bos_and_so_does_its_template(tmp_path: Path, vocab_size: int) -> None:
    from transformers import AutoTokenizer

    checkpoints.add_tokenizer(tmp_path, vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == vocab_size
    text = "the salt 2 é\n"
    assert tokenizer(text).input_ids[0] == checkpoints.BOS_ID
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<|end|>", "<pad>"]) == [256, 257, 258, 259]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<s>[user] hi\n[assistant] "
    assert tokenizer(prompt).input_ids.count(checkpoints.BOS_ID) == 2  # the trap
    assert tokenizer(prompt, add_special_tokens=False).input_ids.count(checkpoints.BOS_ID) == 1


def test_the_cache_of_transformers_is_copied_deeply(tiny) -> None:
    with torch.no_grad():
        cache = tiny.model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        tiny.model(input_ids=torch.tensor([[4]]), past_key_values=other, use_cache=True)
    assert (cache.get_seq_length(), other.get_seq_length()) == (3, 4)
