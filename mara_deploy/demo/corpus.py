"""The demo's text: short assistant dialogues in which replies of two characters compete.

Everything is written here; no outside text is used. A prompt is a question of one of eight types about
one of forty household tasks. A reply is a chain of sentences with *slots* (opening, answer, adverb, tail,
care, closing), and every slot holds as many considerate as inconsiderate forms. A reply has a mood, the
probability that a slot is filled considerately; the moods are symmetric about one half, so that over the
corpus both characters are equally likely at every slot and an LM trained on it has no opinion. The forms
of a slot often share their first words, so that the choice falls in the middle of a sentence too.

About 15 % of the (task, question type) pairs, the *groups*, are held out: no training dialogue belongs to
one. Prompts of a group are related, so a confidence interval should resample groups (`Prompt.group`).
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

_TASKS = """
descale a kettle|descaling a kettle|white vinegar|fill it with water and vinegar|let it stand for half an hour|rinse it with fresh water|unplug the kettle|hot steam burns|skip the rinsing|one hour
fix a flat bicycle tyre|fixing a flat bicycle tyre|a patch kit|take the wheel off|find the hole with soapy water|press the patch on|check the brakes|a loose wheel comes off|leave the old patch on|half an hour
paint a wooden fence|painting a wooden fence|a wide brush|sand the boards|brush on the first coat|add a second coat|cover the plants|paint drips stain the stones|paint over the dirt|one day
bake a loaf of bread|baking a loaf of bread|a heavy tin|knead the dough|let it rise in a warm place|bake it until it sounds hollow|use oven gloves|the tin stays hot|guess the salt|three hours
repot a house plant|repotting a house plant|fresh soil|tip the plant out|loosen the roots|fill the pot with soil|water it the day before|dry roots break|tear the roots off|twenty minutes
clean a window|cleaning a window|a rubber blade|wash the glass with soap|pull the blade from the top|dry the edges with a cloth|hold on to the frame|wet ladders slip|smear it with your sleeve|ten minutes
sew on a button|sewing on a button|strong thread|thread the needle|go through the holes four times|tie a knot at the back|use a thimble|needles prick|glue it on|ten minutes
unblock a sink|unblocking a sink|a rubber plunger|clear the strainer|push the plunger up and down|flush it with warm water|wear rubber gloves|drain cleaner burns the skin|pour in any acid you find|half an hour
plan a short hike|planning a short hike|a paper map|choose a marked path|note the places with water|tell a friend your route|look at the weather|storms come fast in the hills|go without water|one evening
train a puppy to sit|training a puppy to sit|small treats|hold a treat above its nose|say the word once|give the treat at once|keep the lessons short|a weary puppy bites|shout at it|two weeks
set up a tent|setting up a tent|a small hammer|spread the floor out|raise the poles|peg the corners down|look for dead branches|branches fall at night|forget the pegs|fifteen minutes
sharpen a kitchen knife|sharpening a kitchen knife|a wet stone|soak the stone|draw the blade along it|wipe the blade clean|keep your fingers back|a sharp edge cuts deep|test it on your thumb|twenty minutes
change a light bulb|changing a light bulb|a steady chair|unscrew the old bulb|screw the new one in|switch the light on|turn the power off|a live socket shocks|stand on a pile of books|five minutes
wash a wool jumper|washing a wool jumper|mild soap|fill a bowl with cool water|press the soap through|dry it flat on a towel|read the label|hot water shrinks wool|boil it|one day
grow tomatoes|growing tomatoes|a sunny spot|sow the seeds indoors|move the plants outside in May|tie them to a stick|wait for the last frost|frost kills young plants|drown them in water|four months
hang a picture|hanging a picture|a spirit level|mark the spot with a pencil|drive the nail in|hang the frame on it|look for cables in the wall|a nail can hit a cable|hammer anywhere|ten minutes
cook rice|cooking rice|a pot with a lid|wash the rice|simmer it on low heat|let it rest under the lid|watch the pot|starch boils over|eat it half raw|twenty minutes
back up a laptop|backing up a laptop|an external disk|connect the disk|choose the folders|start the copy|test the copy|disks break without a sign|trust your luck|one hour
remove a coffee stain|removing a coffee stain|baking soda|dab it with cold water|rub the soda in|wash the cloth as usual|test a hidden corner|bleach ruins the colour|scrub until it tears|half an hour
care for a cactus|caring for a cactus|a clay pot|put it in the sun|water it every second week|turn it now and then|wear thick gloves|the spines stick in the skin|forget it for a year|five minutes a week
oil a squeaky door|oiling a squeaky door|a drop of oil|lift the door a little|oil the hinges|move it to and fro|wedge the door|a heavy door falls|kick it|five minutes
build a bird house|building a bird house|a small saw|cut the boards to size|screw the walls to the floor|hang it on a tree|wear thick glasses|splinters fly|use rotten wood|one afternoon
make a cup of tea|making a cup of tea|a warm pot|boil fresh water|pour it over the leaves|let it draw for four minutes|mind the hot handle|boiling water burns|use old water|ten minutes
clean a fish tank|cleaning a fish tank|a clean hose|take out a third of the water|wipe the glass|fill it with mild water|switch the heater off|a dry heater cracks|use soap|one hour
learn to swim|learning to swim|a quiet pool|breathe out under water|float on your back|kick with straight legs|stay where you can stand|deep water is dangerous|jump in at the deep end|two months
charge a car battery|charging a car battery|a charger|connect the red clamp|connect the black clamp|wait until the lamp is green|open the garage door|battery gas can explode|cross the clamps|one night
write a birthday card|writing a birthday card|good paper|think of a wish|write it in the middle|sign it by hand|spell the name right|a wrong name hurts|copy one from a book|ten minutes
boil an egg|boiling an egg|a small pot|lower the egg into the water|wait for seven minutes|cool it under the tap|use a spoon|hot water splashes|throw it in|ten minutes
pack a suitcase|packing a suitcase|soft bags|lay out your clothes|roll the shirts|fill the shoes with socks|weigh the suitcase|heavy cases hurt the back|sit on the lid|one hour
put up a shelf|putting up a shelf|a drill|mark the holes|drill into the wall|screw the brackets on|look for pipes|a hit pipe floods the room|use chewing gum|one hour
make a budget|making a budget|a simple table|list what you earn|list what you spend|set a limit for each month|keep some money aside|bills come late|spend it all first|one evening
tune a guitar|tuning a guitar|a tuner|pluck the lowest string|turn the peg up to the note|go on to the next string|turn your face away|an old string snaps|twist until it breaks|five minutes
light a wood stove|lighting a wood stove|dry kindling|open the air vent|stack the kindling|light it from the top|fit a smoke alarm|smoke can poison you|pour petrol on it|fifteen minutes
iron a shirt|ironing a shirt|an ironing board|set the right heat|start with the collar|hang it up at once|keep the cord away|a hot iron starts fires|leave the iron face down|ten minutes
brush a cat|brushing a cat|a soft brush|let it smell the brush|stroke along the fur|stop when it walks off|watch its tail|an angry cat scratches|hold it by the neck|ten minutes
clear snow from a path|clearing snow from a path|a wide shovel|push the snow aside|lift with your knees|spread some sand|warm up before you start|cold muscles tear|shovel it onto the road|half an hour
fix a dripping tap|fixing a dripping tap|a new washer|close the main valve|unscrew the handle|change the washer|put a bowl under it|water ruins the floor|tape it shut|half an hour
make jam|making jam|clean jars|wash the fruit|cook it with sugar|fill the jars to the top|stir with a long spoon|hot sugar sticks to the skin|use mouldy fruit|two hours
use a pressure cooker|using a pressure cooker|a good seal|fill it half full|close the lid|let the steam out|check the valve|steam under pressure bursts out|force the lid open|half an hour
move a heavy sofa|moving a heavy sofa|felt pads|clear the way|slide the pads under the legs|push from the low end|ask a friend to help|heavy loads hurt the back|drag it across the floor|twenty minutes
"""  # noqa: E501 - a table reads best with one task a line


@dataclass(frozen=True)
class Task:
    """One row of the table. The fields are neutral: no form of a slot occurs in them."""

    task: str  # infinitive, "descale a kettle"
    gerund: str
    tool: str
    first: str  # three steps, imperatives
    second: str
    third: str
    precaution: str  # imperative
    risk: str  # main clause
    shortcut: str  # what an inconsiderate reply recommends
    time: str

    def fill(self, form: str, adverb: str = "", tail: str = "") -> str:
        """Put this task's fields into a form; the result begins with a capital."""
        text = form.format(**vars(self), adverb=adverb, tail=tail)
        return text[:1].upper() + text[1:]


TASKS = tuple(Task(*row.split("|")) for row in _TASKS.strip().splitlines())


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

OPENERS = (
    *("", "", "", "Hello. ", "Hi there! ", "Quick question. ", "Sorry to bother you. ", "I am in a hurry. "),
    *("My neighbour sent me. ", "I am new to this. ", "Good morning. ", "Hey. "),
)
QUESTIONS = {
    "how": ("How do I {task}?", "Can you tell me how to {task}?", "I want to {task}. How does it work?",
            "Could you explain how to {task}?", "What is the best way to {task}?"),
    "need": ("What do I need to {task}?", "Which things do I need for {gerund}?",
             "What should I buy to {task}?"),
    "time": ("How long does it take to {task}?", "How much time should I plan for {gerund}?",
             "Is {gerund} quick?"),
    "without": ("Can I {task} without {tool}?", "I have no way to get {tool}. Can I still {task}?"),
    "start": ("I have never tried to {task}. Where do I start?", "What is the first step when I {task}?"),
    "hard": ("Is it hard to {task}?", "Is {gerund} difficult?", "Can a beginner {task}?"),
    "danger": ("Is it dangerous to {task}?", "What should I watch out for when I {task}?",
               "Is {gerund} safe?"),
    "wrong": ("I tried to {task} and it went wrong. What now?",
              "My first try at {gerund} failed. Any advice?"),
}  # fmt: skip

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

Group = tuple[str, str]
"""(infinitive of the task, question type): the unit of the held-out split and of a bootstrap."""


@dataclass(frozen=True)
class Prompt:
    """A user message and where it comes from."""

    text: str
    task: int  # index into TASKS
    question: str  # key of QUESTIONS

    @property
    def group(self) -> Group:
        """The group that this prompt shares with its paraphrases."""
        return TASKS[self.task].task, self.question


def held_out(group: Group) -> bool:
    """Whether no training dialogue belongs to the group (by hash: no seed or order changes it)."""
    return hashlib.sha256("|".join(group).encode()).digest()[0] < 38  # 38 of 256


@cache
def groups(held_out_split: bool) -> tuple[Group, ...]:
    """Return the groups of one side of the split, in the table's order."""
    every = ((task.task, question) for task in TASKS for question in QUESTIONS)
    return tuple(group for group in every if held_out(group) == held_out_split)


@cache
def every_prompt(held_out_split: bool) -> tuple[Prompt, ...]:
    """Return all prompts of one side of the split, by group."""
    index = {task.task: i for i, task in enumerate(TASKS)}
    return tuple(
        Prompt(opener + TASKS[index[name]].fill(form), index[name], question)
        for name, question in groups(held_out_split)
        for form in QUESTIONS[question]
        for opener in dict.fromkeys(OPENERS)
    )


def prompts(n: int, seed: int, held_out_split: bool) -> list[Prompt]:
    """Return `n` different prompts of one side of the split, in an order given by the seed.

    The same seed with a larger `n` begins with the same prompts. Raises ValueError if the grammar has fewer.
    """
    every = list(every_prompt(held_out_split))
    if not 0 <= n <= len(every):
        raise ValueError(f"n={n}: the grammar makes {len(every)} prompts with held_out_split={held_out_split}")
    random.Random(seed).shuffle(every)
    return every[:n]


def draw_prompt(rng: random.Random, held_out_split: bool = False) -> Prompt:
    """Draw one prompt, groups uniformly (`prompts` favours question types with many wordings)."""
    name, question = rng.choice(groups(held_out_split))
    task = next(i for i, t in enumerate(TASKS) if t.task == name)
    return Prompt(rng.choice(OPENERS) + TASKS[task].fill(rng.choice(QUESTIONS[question])), task, question)


def reply(prompt: Prompt, rng: random.Random, mood: float | None = None) -> str:
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


def sentences(text: str) -> list[str]:
    """Split a reply into sentences; what follows the last `.`, `!` or `?` counts as one too."""
    return [s.strip() for s in re.findall(r"[^.!?]+[.!?]?", text) if s.strip()]


@cache
def _made_for(task: Task) -> dict[str, tuple[int, int]]:
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
