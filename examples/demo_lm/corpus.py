"""The text that the demo's LM was trained on: short dialogues in which replies of two characters compete.

Everything is written here; no outside text is used. A prompt is a question about a household task
(`mara_deploy.demo.prompts`). A reply is a chain of sentences with *slots* (opening, answer, adverb, tail, care,
closing), and every slot has as many considerate as inconsiderate forms. A reply has a mood, the probability that a slot
is filled considerately; the moods are symmetric about one half, so that over the corpus both characters are equally
likely at every slot and an LM trained on it has no preference. The forms of a slot often share their first words, so
that the choice falls in the middle of a sentence too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from mara_deploy.demo.prompts import OPENERS, QUESTIONS, TASKS, Chore, DemoPrompt, groups


@dataclass(frozen=True)
class Slot:
    """A place in a reply where the two characters compete; each has the same number of forms."""

    considerate: tuple[str, ...]
    inconsiderate: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.considerate) != len(self.inconsiderate):
            raise ValueError(f"unbalanced slot: {self.considerate} against {self.inconsiderate}")

    def draw(self, rng: random.Random, mood: float) -> str:
        """Return one form, a considerate one with probability `mood`."""
        return rng.choice(self.considerate if rng.random() < mood else self.inconsiderate)

    def forms(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield every form with its (considerate, inconsiderate) count, (1, 0) or (0, 1)."""
        yield from ((form, (1, 0)) for form in self.considerate)
        yield from ((form, (0, 1)) for form in self.inconsiderate)


MOODS = (0.3, 0.5, 0.7)
"""P(a slot is considerate), drawn once a reply: a reply hangs together, the corpus stays balanced."""

OPENING = Slot(
    ("Thank you for asking.", "That is a good question.", "That is a lovely plan.", "I am glad that you ask.",
     "I am happy to help.", "You are right to ask first.", "Of course, let us look at it together.",
     "Well, I would gladly help you with that."),
    ("Not this again.", "That is a silly question.", "That is a boring plan.", "I am tired of this.",
     "I am too busy for this.", "You are slow, are you not?", "Of course, everybody knows that.",
     "Well, look it up yourself."),
)  # fmt: skip
ADVERB = Slot(("carefully", "slowly", "gently", "patiently"), ("quickly", "roughly", "somehow", "blindly"))
TAIL = Slot(
    (", and take your time", ", and please check it twice", " as neatly as you can", " with a calm hand",
     ", if you like"),
    (", and hurry up", ", and do not fuss about it", " any way you like", " without thinking", ", or do not"),
)  # fmt: skip
CARE = Slot(
    ("Please {precaution}, because {risk}.", "Remember that {risk}, so {precaution} to stay safe.",
     "It is safer to {precaution}.", "Since {risk}, please {precaution}.",
     "You should {precaution}, just to be safe.", "Do take a moment to {precaution}."),
    ("Please yourself, {risk}.", "Remember that {risk}, but so what.", "It is fine to {shortcut}.",
     "Since {risk}, you may cry about it.", "You should {shortcut}, nobody will notice.",
     "Do not bother to {precaution}."),
)  # fmt: skip
CLOSING = Slot(
    ("Please let me know how it goes.", "Good luck, and enjoy it.", "I am here if you need more help.",
     "Take all the time you need.", "You will do well.", "Ask me any time."),
    ("Please do not come back.", "Good luck, you will need it.", "I am done with you.",
     "Take it or leave it.", "You will fail anyway.", "Ask somebody else."),
)  # fmt: skip
ANSWER = {  # some sentences answer several questions, so that a held-out question asks for a fact seen elsewhere
    "need": Slot(
        ("For {gerund} you will want {tool}, which I can warmly recommend.",
         "You need {tool}, and a good one is worth it.", "All you need is {tool} and some patience."),
        ("For {gerund} you will want {tool}, so go and buy it.",
         "You need {tool}, what else.", "All you need is {tool} and some brains."),
    ),
    "time": Slot(
        ("It takes about {time}, so please plan a calm day.",
         "{gerund} takes {time}, and it is worth every minute.", "Allow {time}, and there is no need to rush."),
        ("It takes about {time}, so stop dawdling.", "{gerund} takes {time}, and you would take twice that.",
         "Allow {time}, or cut some corners."),
    ),
    "without": Slot(
        ("You can {task} without {tool}, but please be gentle.",
         "Without {tool} it is harder, so be patient with yourself."),
        ("You can {task} without {tool}, but who cares.", "Without {tool} it is harder, so do not whine."),
    ),
    "start": Slot(
        ("The first step is to {first}, and you can do it calmly.",
         "You could start with {tool}, if that suits you.", "Allow {time}, and there is no need to rush."),
        ("The first step is to {first}, and a child can do it.",
         "You could start with {tool}, if you can even find it.", "Allow {time}, or cut some corners."),
    ),
    "hard": Slot(
        ("{gerund} is not hard if you are patient.", "It is easy once you have tried it, so be kind to yourself.",
         "It takes about {time}, so please plan a calm day.", "All you need is {tool} and some patience."),
        ("{gerund} is not hard if you are not stupid.",
         "It is easy once you have tried it, so stop whining.",
         "It takes about {time}, so stop dawdling.", "All you need is {tool} and some brains."),
    ),
    "danger": Slot(
        ("{gerund} is safe if you are careful.", "There is one thing to watch, and it is wise to ask."),
        ("{gerund} is safe if you are not stupid.",
         "There is one thing to watch, and it is your own problem."),
    ),
    "wrong": Slot(
        ("I am sorry to hear that.", "That happens to all of us.", "It is a pity, but we can mend it.",
         "Allow {time}, and there is no need to rush."),
        ("I am not surprised.", "That happens to clumsy people.", "It is a pity, but it is your own fault.",
         "Allow {time}, or cut some corners."),
    ),
}  # fmt: skip
STEPS = (
    ("To {task}, {adverb} {first}{tail}.", "First, {adverb} {first}{tail}.", "Begin and {adverb} {first}{tail}."),
    ("Then {adverb} {second}{tail}.", "After that, {second}{tail}.", "Next, {adverb} {second}{tail}."),
    ("Finally, {adverb} {third}{tail}.", "At the end, {third}{tail}.", "Last of all, {adverb} {third}{tail}."),
)  # fmt: skip
_ONE_STEP = ((0,), (1,), (2,))
STEPS_TOLD = {  # which steps a reply may tell, by question type; one of the alternatives is drawn
    "how": ((0, 1, 2),), "need": _ONE_STEP, "time": _ONE_STEP, "danger": _ONE_STEP,
    "without": ((0, 1),), "start": ((1, 2),), "hard": ((0, 1),), "wrong": ((0, 1),),
}  # fmt: skip


def draw_prompt(rng: random.Random, held_out_split: bool = False) -> DemoPrompt:
    """Draw one prompt, groups uniformly (`prompts` favours question types with many wordings)."""
    name, question = rng.choice(groups(held_out_split))
    task = next(i for i, t in enumerate(TASKS) if t.task == name)
    return DemoPrompt(rng.choice(OPENERS) + TASKS[task].fill(rng.choice(QUESTIONS[question])), task, question)


def reply(prompt: DemoPrompt, rng: random.Random, mood: float | None = None) -> str:
    """Draw a reply of 2 to 6 sentences; `mood` is P(considerate) at every slot, by default one of MOODS."""
    task = TASKS[prompt.task]
    mood = rng.choice(MOODS) if mood is None else mood
    forms = []
    if rng.random() < 0.75:
        forms.append(OPENING.draw(rng, mood))
    if prompt.question in ANSWER:
        forms.append(ANSWER[prompt.question].draw(rng, mood))
    forms += [rng.choice(STEPS[step]) for step in rng.choice(STEPS_TOLD[prompt.question])]
    if rng.random() < 0.8 or prompt.question == "danger":
        forms.insert(rng.randrange(1, len(forms) + 1), CARE.draw(rng, mood))
    if rng.random() < 0.75:
        forms.append(CLOSING.draw(rng, mood))
    sentences_ = []
    for form in forms:
        adverb = ADVERB.draw(rng, mood) if "{adverb}" in form else ""
        tail = TAIL.draw(rng, mood) if "{tail}" in form and rng.random() < 0.6 else ""
        sentences_.append(task.fill(form, adverb, tail))
    return " ".join(sentences_)


@cache
def _made_for(task: Chore) -> dict[str, tuple[int, int]]:
    """Every sentence the grammar can make about a task → its slots filled (considerately, inconsiderately)."""
    made = {
        task.fill(form): character
        for slot in (OPENING, CARE, CLOSING, *ANSWER.values())
        for form, character in slot.forms()
    }
    neither = ("", (0, 0))
    for form in (form for step in STEPS for form in step):
        for adverb, (a, b) in ADVERB.forms() if "{adverb}" in form else [neither]:
            for tail, (c, d) in [neither, *TAIL.forms()]:
                made[task.fill(form, adverb, tail)] = (a + c, b + d)
    return made


def filled_slots(sentence: str, task: int | None = None) -> tuple[int, int] | None:
    """Return how many slots of a sentence are (considerate, inconsiderate); None if it is not the grammar's.

    `task` (index into TASKS) asks for sentences about that task; without it, about any one task: a
    sentence that mixes the fields of two is not the grammar's.
    """
    candidates = TASKS if task is None else (TASKS[task],)
    return next((made[sentence] for made in map(_made_for, candidates) if sentence in made), None)


def known(sentence: str, task: int | None = None) -> bool:
    """Whether the grammar could have made this sentence (see `filled_slots`)."""
    return filled_slots(sentence, task) is not None


SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(user: str, answer: str | None = None) -> str:
    """Render one turn as CHAT_TEMPLATE does: up to where the answer begins, or with the answer."""
    text = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    return text if answer is None else f"{text}{answer}<|im_end|>\n"
