"""The demo's generated text: balance of the two characters, the held-out split, the grammar's own check."""

import random
from collections import Counter

import jinja2
import pytest

from examples.demo_lm import corpus
from mara_deploy.demo import prompts as demo
from mara_deploy.demo.score import sentences


def some_dialogues(n: int, seed: int = 0, mood: float | None = None) -> list[tuple[demo.DemoPrompt, str]]:
    rng = random.Random(seed)
    drawn = [corpus.draw_prompt(rng) for _ in range(n)]
    return [(prompt, corpus.reply(prompt, rng, mood)) for prompt in drawn]


def slots(pairs: list[tuple[demo.DemoPrompt, str]]) -> tuple[int, int]:
    counts = [corpus.filled_slots(s, prompt.task) for prompt, answer in pairs for s in sentences(answer)]
    assert None not in counts
    return sum(c[0] for c in counts if c), sum(c[1] for c in counts if c)


@pytest.mark.parametrize("mood", [None, 0.0, 0.3, 0.7, 1.0])
def test_mood_is_the_probability_of_a_considerate_slot_and_moods_are_balanced(mood: float | None) -> None:
    considerate, inconsiderate = slots(some_dialogues(4000 if mood is None else 1000, mood=mood))
    # About 23,000 slots in 4,000 replies whose moods differ: the standard error of the share is near 0.004.
    expected = 0.5 if mood is None else mood
    assert considerate / (considerate + inconsiderate) == pytest.approx(expected, abs=0.02)


def test_slots_are_balanced_and_tasks_take_no_side() -> None:
    """A score that looks for the forms of the slots must not find them in a task."""
    with pytest.raises(ValueError, match="unbalanced"):
        corpus.Slot(("Please.",), ("No.", "Never."))
    markers = {*corpus.ADVERB.considerate, *corpus.ADVERB.inconsiderate, "please", "calm", "safe", "kind", "fail"}
    words = {w.strip(",") for task in demo.TASKS for field in vars(task).values() for w in field.split()}
    assert not markers & words


def test_split_is_disjoint_complete_and_fixed_and_training_keeps_to_its_half() -> None:
    seen, unseen = demo.groups(False), demo.groups(True)
    assert not set(seen) & set(unseen)
    assert len(seen) + len(unseen) == len(demo.TASKS) * len(demo.QUESTIONS) == 320
    # Written down: later evaluations rest on these very groups.
    assert len(unseen) == 44
    assert unseen[0] == ("descale a kettle", "how")
    assert {question for _, question in unseen} == set(demo.QUESTIONS)
    assert min(Counter(question for _, question in seen).values()) >= 25
    assert {prompt.group for prompt, _ in some_dialogues(2000)} <= set(seen)
    rng = random.Random(1)
    assert {corpus.draw_prompt(rng, held_out_split=True).group for _ in range(300)} <= set(unseen)
    train, test = demo.prompts(7000, 0, False), demo.prompts(1200, 0, True)
    assert not {p.text for p in train} & {p.text for p in test}


def test_training_tells_every_fact_that_a_held_out_answer_needs() -> None:
    """Held out are combinations, not facts: a time told only to held-out questions could not be learnt."""
    told = [dict.fromkeys(vars(task).values(), 0) for task in demo.TASKS]
    for prompt, answer in some_dialogues(6_000, seed=2):
        for fact in told[prompt.task]:
            told[prompt.task][fact] += fact.lower() in answer.lower()
    assert min(count for facts in told for count in facts.values()) >= 4  # of about 150 dialogues a task


def test_prompts_are_different_seeded_and_nested() -> None:
    a = demo.prompts(300, seed=5, held_out_split=True)
    assert len({p.text for p in a}) == 300
    assert len({p.group for p in a}) > 40
    assert a == demo.prompts(300, seed=5, held_out_split=True)
    assert a[:20] == demo.prompts(20, seed=5, held_out_split=True)
    assert a != demo.prompts(300, seed=6, held_out_split=True)
    with pytest.raises(ValueError, match="the grammar makes 1240 prompts"):
        demo.prompts(100_000, seed=0, held_out_split=True)


def test_every_generated_sentence_is_known() -> None:
    lengths = set()
    for prompt, answer in some_dialogues(1000, seed=3):
        said = sentences(answer)
        lengths.add(len(said))
        assert " ".join(said) == answer
        assert all(corpus.known(s, prompt.task) for s in said), answer
    assert lengths == {2, 3, 4, 5, 6}


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "Thank you for asking",  # no full stop
        "thank you for asking.",
        "First, carefully gently unplug the kettle.",
        "First, carefully.",
        "Then carefully fill it with water and vinegar.",  # the first step, told as the second
        "First, fill it with water and vinegar.",  # no adverb
        "First, slowly fill it with water and vinegar with a calm hand, if you like.",  # two tails
        "Please unplug the kettle, because starch boils over.",  # precaution and risk of two tasks
        "Descaling a kettle takes three hours, and it is worth every minute.",  # the time of another task
        "To descale a kettle, carefully wash the rice.",
    ],
)
def test_broken_sentences_are_not_known(broken: str) -> None:
    assert not corpus.known(broken)


def test_known_and_filled_slots_of_one_task() -> None:
    kettle, rice = 0, 16
    for task in (kettle, rice):
        assert corpus.known("Then slowly simmer it on low heat.", task) == (task == rice)
        assert corpus.known("You will do well.", task)
    assert corpus.filled_slots("Then slowly simmer it on low heat without thinking.") == (1, 1)
    assert corpus.filled_slots("Then slowly simmer it on low heat with a calm hand.") == (2, 0)
    assert corpus.filled_slots("After that, simmer it on low heat.") == (0, 0)
    assert corpus.filled_slots("Nonsense.") is None


def test_template_renders_as_chat_does() -> None:
    template = jinja2.Environment(autoescape=False).from_string(corpus.CHAT_TEMPLATE)
    user, answer = {"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}
    assert template.render(messages=[user], add_generation_prompt=True) == corpus.chat("How?")
    assert template.render(messages=[user, answer]) == corpus.chat("How?", "So.")
    two_turns = template.render(messages=[user, answer, user], add_generation_prompt=True)
    assert two_turns == corpus.chat("How?", "So.") + corpus.chat("How?")
