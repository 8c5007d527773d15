"""Recipes, repairs, set-ups and plantings: titles and numbered steps, made from templates."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from random import Random
from typing import NamedTuple

import kvpress_moe.benchmark.tasks.vocabulary as words
from kvpress_moe.benchmark.tasks.wording import capitalised

_PARTS = "bracket clasp cover dial filter frame gasket grip handle hinge knob lever lid panel rail spring strap switch"
_MACHINES = """
barometer bicycle calculator camera drone lamp microscope motorbike printer projector radio scooter stopwatch tablet
telescope tricycle typewriter wheelbarrow wristwatch
"""
_TOOLS = "brush,chisel,clamp,file,hexagon key,mallet,pair of pliers,pair of tweezers,screwdriver,soft cloth,spanner"
_FLUIDS = "acetone,alcohol,lemon juice,soapy water,turpentine,vinegar,warm water,white spirit"
_BUTTONS = "back function home menu mode pairing power reset sync volume"
_CABLES = "blue cable,flat cable,grey cable,long cable,power cord,red cable,short cable,white cable"
_MENUS = "Advanced Connections Devices Expert General Network Options Privacy Security System Tools"
_PANS = "casserole,clay pot,copper pot,deep pan,frying pan,large pot,saucepan,wok"


class Step(NamedTuple):
    """A template; steps that take time also have a question how long and the beginning of its answer."""

    text: str
    question: str = ""
    prefix: str = ""


class Made(NamedTuple):
    """A step of a procedure. ``duration`` is empty if it takes no stated time."""

    title: str
    number: int
    text: str
    duration: str
    question: str
    prefix: str


_TIMES = {"m": (3, 45, "minutes"), "s": (5, 60, "seconds"), "h": (2, 30, "hours"), "d": (2, 28, "days")}
_RECIPE = (
    Step("chop {k} {vegetable}"),
    Step("peel {k} {vegetable}"),
    Step("heat {k} spoons of oil in a {pan}"),
    Step("season with {spice}"),
    Step("pour in {k}00 ml of stock"),
    Step("fry on high heat for {m}", "For how long must one fry when cooking {t}?", "One must fry for"),
    Step("simmer with the lid on for {m}", "How long does {t} simmer with the lid on?", "It simmers for"),
    Step("let it rest for {m}", "How long must {t} rest?", "It must rest for"),
    Step("bake for {m}", "For how long is {t} baked?", "It is baked for"),
    Step("sprinkle with {spice}"),
    Step("serve on {colour} plates"),
)
_REPAIR = (
    Step("take off the {part}"),
    Step("loosen {k} screws with a {tool}"),
    Step("clean the {part} with {fluid}"),
    Step("soak the {part} for {m}", "How long does the part have to soak when {t}?", "The part has to soak for"),
    Step("replace the {part}"),
    Step("put a drop of glue on the {part}"),
    Step("let the glue dry for {h}", "For how long must the glue dry when {t}?", "The glue must dry for"),
    Step("straighten the {part} with a {tool}"),
    Step("tighten the {part}"),
    Step("paint the {part} {colour}"),
    Step(
        "leave the paint alone for {h}",
        "For how long should one leave the paint alone when {t}?",
        "One should wait for",
    ),
)
_SET_UP = (
    Step("plug in the {cable}"),
    Step("hold the {button} button for {s}", "For how long is the button held when {t}?", "The button is held for"),
    Step("press the {button} button {k} times"),
    Step("wait {m} until the {colour} light comes on", "How long does the light take to come on when {t}?", "It takes"),
    Step("open the menu {menu}"),
    Step("enter the code {code}"),
    Step("disconnect the {cable}"),
    Step("charge the battery for {h}", "For how long is the battery charged when {t}?", "The battery is charged for"),
    Step("choose channel {k}"),
    Step("write the number {code} on the label"),
)
_PLANTING = (
    Step("fill {k} pots with soil"),
    Step("soak the seeds for {h}", "For how long are the seeds soaked when {t}?", "The seeds are soaked for"),
    Step("dig holes {k} cm deep"),
    Step("mix in some ash with a {tool}"),
    Step("cover the pots with {colour} cloth"),
    Step("keep the pots in the dark for {d}", "How long do the pots stay in the dark when {t}?", "They stay there for"),
    Step("water every {k} days"),
    Step("move the pots next to the {vegetable}"),
    Step("plant {spice} between the rows"),
    Step("harvest after {d}", "After how much time does one harvest when {t}?", "One harvests after"),
)


@cache
def machines(split: str) -> tuple[str, ...]:
    """Belongings that have parts and screws."""
    return tuple(thing for thing in words.belongings(split) if thing.split()[-1] in listed(_MACHINES))


def listed(text: str) -> list[str]:
    return text.split("," if "," in text else None)


def titles(random: Random, split: str) -> Iterator[tuple[str, tuple[Step, ...]]]:
    """Endless different titles, each with the steps it may have."""
    seen = set()
    while True:
        person, firm = random.choice(words.people(split)), random.choice(words.firms(split))
        title, steps = random.choice(
            (
                (f"{person}'s {random.choice(words.dishes(split))}", _RECIPE),
                (f"{random.choice(words.cities(split))}-style {random.choice(words.dishes(split))}", _RECIPE),
                (f"repairing the {random.choice(machines(split))}", _REPAIR),
                (f"setting up the {firm} {random.choice(('alarm', 'receiver', 'router', 'scanner'))}", _SET_UP),
                (
                    f"growing {random.choice(words.vegetables(split))} in {random.choice(words.cities(split))}",
                    _PLANTING,
                ),
            )
        )
        if title not in seen:
            seen.add(title)
            yield title, steps


def procedure(random: Random, split: str, title: str, steps: tuple[Step, ...]) -> list[Made]:
    """Five to eight different steps of a procedure, in the order of the templates."""
    chosen = sorted(random.sample(range(len(steps)), random.randint(5, 8)))
    made = []
    for number, place in enumerate(chosen, 1):
        step = steps[place]
        times = {letter: f"{random.randrange(a, b)} {unit}" for letter, (a, b, unit) in _TIMES.items()}
        text = step.text.format(
            k=random.randrange(2, 10),
            code=random.randrange(1000, 10000),
            vegetable=random.choice(words.vegetables(split)),
            spice=random.choice(words.spices(split)),
            colour=random.choice(words.colours(split)),
            part=random.choice(listed(_PARTS)),
            tool=random.choice(listed(_TOOLS)),
            fluid=random.choice(listed(_FLUIDS)),
            button=random.choice(listed(_BUTTONS)),
            cable=random.choice(listed(_CABLES)),
            menu=random.choice(listed(_MENUS)),
            pan=random.choice(listed(_PANS)),
            **times,
        )
        taken = next((times[letter] for letter in times if f"{{{letter}}}" in step.text), "")
        made.append(Made(title, number, capitalised(text), taken, step.question.format(t=title), step.prefix))
    return made
