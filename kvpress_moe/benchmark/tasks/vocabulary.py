"""Words for the prompts. Each split has its own part of them."""

from __future__ import annotations

import hashlib
from functools import cache

SPLITS = ("train", "tune", "test")

_ADJECTIVES = """
able amber ancient arctic ashen autumn bashful blazing bold brave breezy bright brisk broken bronze calm careful
cheerful chilly clever cobalt copper coral cosmic crimson crisp curious dapper daring dusty eager early earnest
elegant emerald faded fancy fearless fierce flying foggy forest frosty gentle giant gifted gleaming golden graceful
grand granite gusty hasty hidden hollow honest humble icy idle indigo ivory jade jolly keen lively lonely loud lucky
lunar marble mellow merry mighty misty modest molten narrow nimble noble northern olive orange pale patient pearl
placid polished proud purple quaint quiet rapid restless royal rugged rusty sandy scarlet secret serene shady shiny
silent silver simple sleepy slender smoky solar solid spare speedy spotted steady stormy striped sturdy sunny swift
tame tender thirsty tidy timid tiny tranquil upbeat useful velvet violet vivid wandering warm wild windy wise witty
wooden young zealous
"""
_NOUNS = """
acorn anchor ant apple arrow badger barrel basin beacon beaver bell birch bison blossom boat bottle boulder branch
bridge brook bucket cabin camel candle canoe canyon castle cedar cellar chapel cherry cliff cloud clover comet
compass coyote crane creek cricket crow daisy deer desert dolphin dove dragon eagle elk ember falcon feather fern
ferret field finch forge fountain fox galaxy garden gate glacier goose grove gull hammer harbor hawk hazel hedge heron
hill horizon island ivy jackal jaguar kettle kite ladder lagoon lake lantern lark leaf lemon leopard lily lizard
lynx magpie maple marsh meadow melon mirror moon moss mountain needle nest oak oasis ocean orchard osprey otter owl
panther parrot path peach pebble pelican pepper pine planet plum pond poplar prairie puffin quarry rabbit raven reef
ridge river robin rocket rose saddle sail salmon shadow shell shore sparrow spruce star stone stork stream summit
swallow swan temple thistle thunder tiger timber torch tower trail trout tulip turtle valley violin walnut walrus
water weasel whale willow window wolf wren yarrow zebra
"""
_FIRST_NAMES = """
Ada Alma Anton Arlo Astrid Beatrix Bela Boris Bruno Camila Cecil Clara Conrad Cyrus Dahlia Darius Delia Dmitri
Edith Edgar Elena Elias Elsa Emil Enzo Esther Farah Felix Fiona Flora Freya Gideon Greta Gustav Hana Hector Hugo Ida
Igor Ingrid Irene Isaac Ivan Jonas Judith Julian Kira Klaus Lara Leander Leona Linus Lydia Magnus Malik Marta Matilda
Milan Miriam Nadia Nestor Nora Odette Olga Omar Oscar Otto Paloma Pedro Petra Quentin Rafael Ramona Regina Rosa Ruben
Sabine Selma Silas Simone Sonia Stefan Tamar Tessa Theo Tobias Ursula Valentin Vera Viktor Wanda Wilma Xenia Yara
Yusuf Zelda Zora
"""
_LAST_NAMES = """
Abbott Adler Albrecht Amado Arden Bagley Barlow Becker Bellamy Bergman Blake Borden Brandt Brennan Calloway Carver
Castell Chandler Cole Corbin Crane Dalton Danner Delgado Dempsey Drake Duvall Egan Eklund Ellery Fairfax Farrow
Fischer Fleming Forster Gable Galloway Garner Gilroy Grant Hadley Halloran Harding Hobbs Holt Huxley Ibsen Ingram
Jansen Jarvis Keller Kendall Kirby Lambert Landry Larkin Lennox Lindgren Lowell Maddox Marlow Mercer Morrow Nash
Navarro Norwood Novak Oakley Osborn Palmer Paxton Pierce Prescott Quill Ramsey Reeves Rhodes Rivers Sawyer Sinclair
Sterling Sutton Talbot Thorne Tilden Underhill Vance Vaughn Wallis Warner Webster Whitlock Winslow Wyatt Yates York
"""
_CITY_PARTS = """
Alder Ash Bright Brook Clear Cold Deep East Elm Fair Fern Glen Gold Green Hart High King Lake Lang Maple Mill New
North Oak Old Pine Red Rock Rose Salt Sand Silver South Spring Stone Sun Thorn West White Wind Winter Wood
"""
_CITY_ENDS = (
    "borough bridge bury dale field ford gate haven hill hurst mere mouth port ridge side stead ton view ville wick"
)
_FIRM_ENDS = """
Analytics Bakeries Brewing Ceramics Chemicals Dynamics Electronics Energy Foods Forestry Freight Furniture Glassworks
Instruments Insurance Logistics Marine Mining Motors Optics Paper Pharmaceuticals Plastics Press Railways Robotics
Shipping Software Steel Textiles Timber Tools Toys Watches
"""
_PROFESSIONS = """
accountant architect baker biologist carpenter chemist curator dentist diver economist editor electrician engineer
florist geologist glazier historian illustrator interpreter jeweller journalist lawyer librarian locksmith mechanic
musician nurse optician painter pharmacist photographer pilot plumber potter sculptor surgeon surveyor tailor
translator veterinarian watchmaker weaver welder
"""


def bucket(name: str) -> str:
    """The split of a name, by its hash: three fifths are train, one fifth is tune, one fifth is test."""
    number = hashlib.sha256(name.encode()).digest()[0] % 5
    return "train" if number < 3 else SPLITS[number - 2]


@cache
def _share(words: str, split: str) -> tuple[str, ...]:
    return tuple(word for word in words.split() if bucket(word) == split)


def adjectives(split: str) -> tuple[str, ...]:
    return _share(_ADJECTIVES, split)


def nouns(split: str) -> tuple[str, ...]:
    return _share(_NOUNS, split)


@cache
def keys(split: str) -> tuple[str, ...]:
    """Names of needles: adjective-noun."""
    return tuple(f"{adjective}-{noun}" for adjective in adjectives(split) for noun in nouns(split))


@cache
def people(split: str) -> tuple[str, ...]:
    return tuple(f"{first} {last}" for first in _share(_FIRST_NAMES, split) for last in _share(_LAST_NAMES, split))


@cache
def cities(split: str) -> tuple[str, ...]:
    names = (f"{part}{end}" for part in _CITY_PARTS.split() for end in _CITY_ENDS.split())
    return tuple(name for name in names if bucket(name) == split)


@cache
def firms(split: str) -> tuple[str, ...]:
    return tuple(f"{last} {end}" for last in _share(_LAST_NAMES, split) for end in _FIRM_ENDS.split())


def professions() -> tuple[str, ...]:
    """The same for all splits: there are too few to divide, and no question asks for them."""
    return tuple(_PROFESSIONS.split())
