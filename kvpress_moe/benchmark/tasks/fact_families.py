"""Families of one-sentence facts: who owns what, where somebody works, what something costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import kvpress_moe.benchmark.tasks.vocabulary as words

_SHOPS = [
    "bakery",
    "barbershop",
    "bookshop",
    "brewery",
    "cinema",
    "clinic",
    "dairy",
    "florist",
    "garage",
    "library",
    "museum",
    "observatory",
    "pharmacy",
    "planetarium",
    "sauna",
    "stationer",
    "tannery",
    "theatre",
    "vineyard",
    "zoo",
]
_THINGS = ("front door", "car", "raincoat", "bicycle", "kitchen", "rowing boat", "suitcase", "scarf", "caravan")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def clock(random: Random) -> str:
    return f"{random.randrange(6, 22)}:{random.randrange(0, 60, 5):02}"


#: Kind -> something of this kind.
KINDS: dict[str, Callable[[Random, str], str]] = {
    "person": lambda random, split: random.choice(words.people(split)),
    "firm": lambda random, split: random.choice(words.firms(split)),
    "city": lambda random, split: random.choice(words.cities(split)),
    "street": lambda random, split: random.choice(words.streets(split)),
    "thing": lambda random, split: f"the {random.choice(words.belongings(split))}",
    "belonging": lambda random, split: random.choice(words.belongings(split)),
    "possession": lambda random, split: f"{random.choice(words.people(split))}'s {random.choice(_THINGS)}",
    "shop": lambda random, split: f"the {random.choice(_SHOPS)} in {random.choice(words.cities(split))}",
    "train": lambda random, split: f"the train to {random.choice(words.cities(split))}",
    "novel": lambda random, split: f'the novel "{random.choice(words.novels(split))}"',
    "colour": lambda random, split: random.choice(words.colours(split)),
    "food": lambda random, split: random.choice(words.foods(split)),
    "dish": lambda random, split: random.choice(words.dishes(split)),
    "instrument": lambda random, split: random.choice(words.instruments(split)),
    "language": lambda random, split: random.choice(words.languages(split)),
    "pet": lambda random, split: random.choice(words.pets(split)),
    "age": lambda random, split: str(random.randrange(19, 92)),
    "clock": lambda random, split: clock(random),
    "dollars": lambda random, split: f"{random.randrange(6, 980)} dollars",
    "year": lambda random, split: str(random.randrange(1820, 2015)),
    "recent": lambda random, split: str(random.randrange(1955, 2015)),
    "extension": lambda random, split: str(random.randrange(1000, 10000)),
    "platform": lambda random, split: str(random.randrange(2, 30)),
    "day": lambda random, split: random.choice(_DAYS),
}


@dataclass(frozen=True)
class Family:
    """
    A relation between a subject and a value, in several wordings.

    Attributes
    ----------
    subject, value : str
        Their kinds.
    statements, questions, prefixes : tuple of str
        Templates with ``{s}`` for the subject; statements also have ``{v}`` for the value, which completes a prefix.
    """

    subject: str
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    prefixes: tuple[str, ...]


FAMILIES = (
    Family(
        "thing",
        "person",
        ("{s} belongs to {v}.", "{v} is the owner of {s}.", "As everyone knows, {s} is the property of {v}."),
        ("Who owns {s}?", "To whom does {s} belong?", "Who is the owner of {s}?"),
        ("{s} belongs to", "the owner of {s} is"),
    ),
    Family(
        "person",
        "firm",
        ("{s} works for {v}.", "{s} has been employed at {v} for years.", "After university, {s} found a job at {v}."),
        ("Where does {s} work?", "Which company does {s} work for?", "Who is the employer of {s}?"),
        ("{s} works for", "the employer of {s} is"),
    ),
    Family(
        "person",
        "city",
        ("{s} lives in {v}.", "The home of {s} is in {v}.", "{s} has a small flat in {v} and lives there alone."),
        ("Where does {s} live?", "In which town does {s} live?", "Which town is the home of {s}?"),
        ("{s} lives in", "the home of {s} is in"),
    ),
    Family(
        "person",
        "city",
        ("{s} was born in {v}.", "{v} is the birthplace of {s}.", "It was in {v} that {s} was born."),
        ("Where was {s} born?", "In which town was {s} born?", "What is the birthplace of {s}?"),
        ("{s} was born in", "the birthplace of {s} is"),
    ),
    Family(
        "possession",
        "colour",
        ("{s} is {v}.", "The colour of {s} is {v}.", "In the photograph, {s} is {v}."),
        ("What colour is {s}?", "Which colour does {s} have?", "What is the colour of {s}?"),
        ("{s} is", "the colour of {s} is"),
    ),
    Family(
        "person",
        "age",
        (
            "{s} is {v} years old.",
            "{s} turned {v} last week.",
            "At the age of {v}, {s} still goes for a run every day.",
        ),
        ("How old is {s}?", "What is the age of {s}?"),
        ("the age of {s} is", "in years, the age of {s} is"),
    ),
    Family(
        "person",
        "food",
        ("{s} is allergic to {v}.", "{s} has an allergy to {v}.", "The doctor found that {s} is allergic to {v}."),
        ("What is {s} allergic to?", "To which food is {s} allergic?", "Which food should {s} avoid?"),
        ("{s} is allergic to", "{s} has an allergy to"),
    ),
    Family(
        "person",
        "person",
        ("{s} learned to draw from {v}.", "{v} taught {s} to draw.", "It was {v} who gave {s} drawing lessons."),
        ("Who taught {s} to draw?", "From whom did {s} learn to draw?", "Who gave {s} drawing lessons?"),
        ("{s} learned to draw from", "the person who taught {s} to draw is"),
    ),
    Family(
        "shop",
        "clock",
        ("{s} opens at {v}.", "The doors of {s} open at {v} every day.", "From {v} on, {s} is open."),
        ("When does {s} open?", "At what time does {s} open?"),
        ("{s} opens at", "the opening time of {s} is"),
    ),
    Family(
        "thing",
        "dollars",
        ("{s} costs {v}.", "The price of {s} is {v}.", "At the flea market, {s} was on sale for {v}."),
        ("How much does {s} cost?", "What is the price of {s}?"),
        ("{s} costs", "the price of {s} is"),
    ),
    Family(
        "person",
        "pet",
        ("{s} has a dog called {v}.", "The dog of {s} is called {v}.", "{v} is the name of the dog that {s} adopted."),
        ("What is the name of the dog of {s}?", "What is the dog of {s} called?"),
        ("the dog of {s} is called", "the name of the dog is"),
    ),
    Family(
        "person",
        "instrument",
        (
            "{s} plays the {v}.",
            "{s} practises the {v} for an hour a day.",
            "In the town's orchestra, {s} plays the {v}.",
        ),
        ("Which instrument does {s} play?", "What does {s} play in the orchestra?"),
        ("{s} plays the", "the instrument that {s} plays is the"),
    ),
    Family(
        "person",
        "extension",
        (
            "The phone extension of {s} is {v}.",
            "To reach {s}, dial extension {v}.",
            "{s} answers calls to extension {v}.",
        ),
        ("What is the phone extension of {s}?", "Which extension has to be dialled to reach {s}?"),
        ("the phone extension of {s} is", "to reach {s}, one has to dial"),
    ),
    Family(
        "person",
        "person",
        ("{s} is married to {v}.", "{s} and {v} have been married for years.", "{s} married {v} in a small chapel."),
        ("Who is {s} married to?", "Whom did {s} marry?", "Who is the spouse of {s}?"),
        ("{s} is married to", "the spouse of {s} is"),
    ),
    Family(
        "person",
        "dish",
        ("The favourite dish of {s} is {v}.", "There is nothing that {s} likes to eat more than {v}."),
        ("What is the favourite dish of {s}?", "What does {s} like to eat most?"),
        ("the favourite dish of {s} is", "most of all, {s} likes to eat"),
    ),
    Family(
        "firm",
        "year",
        ("{s} was founded in {v}.", "The history of {s} began in {v}.", "In {v}, two sisters founded {s}."),
        ("When was {s} founded?", "In which year was {s} founded?"),
        ("{s} was founded in", "the year in which {s} was founded is"),
    ),
    Family(
        "person",
        "language",
        ("{s} speaks fluent {v}.", "{s} teaches {v} at an evening school.", "{s} grew up speaking {v}."),
        ("Which language is {s} known to speak?", "What language can {s} speak?"),
        ("{s} speaks", "the language that {s} speaks is"),
    ),
    Family(
        "novel",
        "person",
        ("{s} was written by {v}.", "{v} is the author of {s}.", "{v} became famous for writing {s}."),
        ("Who wrote {s}?", "Who is the author of {s}?"),
        ("{s} was written by", "the author of {s} is"),
    ),
    Family(
        "train",
        "platform",
        ("{s} leaves from platform {v}.", "Passengers on {s} should go to platform {v}."),
        ("From which platform does {s} leave?", "What is the platform number of {s}?"),
        ("{s} leaves from platform", "the number of the platform is"),
    ),
    Family(
        "person",
        "street",
        ("{s} runs a small café in {v}.", "The café that {s} runs is in {v}."),
        ("Where is the café that {s} runs?", "In which street does {s} run a café?"),
        ("the café that {s} runs is in", "{s} runs a café in"),
    ),
    Family(
        "person",
        "day",
        ("{s} has an appointment with the dentist on {v}.", "On {v}, {s} has to go to the dentist."),
        ("When does {s} have an appointment with the dentist?", "On which day does {s} have to go to the dentist?"),
        ("{s} has to go to the dentist on", "the appointment is on"),
    ),
)
