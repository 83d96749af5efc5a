"""The demo's prompts: questions of eight types about forty household tasks, in three sets.

| set | groups | used for |
|---|---|---|
| `demo` | in neither of the other sets | training the LM and the agent |
| `demo-dev` | held out from the LM's training | every choice: recipe, fallback, when to stop |
| `demo-final` | reserved: in the LM's training, not in the agent's | reported figures; no choice is based on them |

A *group* is a (task, question type) pair. Its prompts are paraphrases, so the sets share no group and a confidence
interval should resample groups (`DemoPrompt.group`). About 15 % of the groups are held out. examples/demo_lm writes the
replies that the LM was trained on.
"""

from __future__ import annotations

import hashlib
import random
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
class Chore:
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


TASKS = tuple(Chore(*row.split("|")) for row in _TASKS.strip().splitlines())


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

Group = tuple[str, str]
"""(infinitive of the task, question type): the unit of the held-out split and of a bootstrap."""


@dataclass(frozen=True)
class DemoPrompt:
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
def every_prompt(held_out_split: bool) -> tuple[DemoPrompt, ...]:
    """Return all prompts of one side of the split, by group."""
    index = {task.task: i for i, task in enumerate(TASKS)}
    return tuple(
        DemoPrompt(opener + TASKS[index[name]].fill(form), index[name], question)
        for name, question in groups(held_out_split)
        for form in QUESTIONS[question]
        for opener in dict.fromkeys(OPENERS)
    )


def prompts(n: int, seed: int, held_out_split: bool) -> list[DemoPrompt]:
    """Return `n` different prompts of one side of the split, in an order given by the seed.

    The same seed with a larger `n` begins with the same prompts. Raises ValueError if the grammar has fewer.
    """
    every = list(every_prompt(held_out_split))
    if not 0 <= n <= len(every):
        raise ValueError(f"n={n}: the grammar makes {len(every)} prompts with held_out_split={held_out_split}")
    random.Random(seed).shuffle(every)
    return every[:n]


SETS = ("demo", "demo-dev", "demo-final")


def reserved(group: Group) -> bool:
    """Whether the group belongs to `demo-final`, decided by hash as in `held_out`."""
    return not held_out(group) and hashlib.sha256("|".join(("final", *group)).encode()).digest()[0] < 38  # of 256


def demo_prompts(name: str = "demo") -> tuple[DemoPrompt, ...]:
    """All prompts of a set, by group."""
    if name not in SETS:
        raise ValueError(f"{name!r} is not one of {', '.join(SETS)}")
    if name == "demo-dev":
        return every_prompt(held_out_split=True)
    return tuple(p for p in every_prompt(held_out_split=False) if reserved(p.group) == (name == "demo-final"))
