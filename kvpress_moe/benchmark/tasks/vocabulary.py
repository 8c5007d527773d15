"""Words for the prompts. Each split has its own part of them."""

from __future__ import annotations

import hashlib
from functools import cache
from random import Random

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
_COLOURS = """
amber apricot aqua beige black blue bronze brown burgundy charcoal copper coral cream crimson cyan emerald gold green
grey indigo ivory khaki lavender lilac lime magenta maroon mauve mint navy ochre olive orange peach pink plum purple
red rust salmon sand scarlet silver tan teal turquoise violet white yellow
"""
_FOODS = """
almonds apricots asparagus aubergines avocados bananas barley basil beetroot blueberries broccoli cabbage cashews celery
cherries chestnuts chickpeas cinnamon coconut coriander crab cucumbers dates eggs fennel figs garlic ginger grapes
hazelnuts honey kale kiwis leeks lentils lobster mangoes milk mushrooms mussels mustard oats onions oysters papaya
parsley peaches peanuts pears peas pecans pineapple pistachios plums prawns pumpkin radishes raspberries rhubarb rye
sesame shrimp soy spinach squid strawberries tomatoes trout tuna turnips walnuts wheat
"""
_VEGETABLES = """
artichokes aubergines beans beetroots carrots chillies courgettes cucumbers leeks mushrooms olives onions parsnips
peppers potatoes pumpkins radishes shallots tomatoes turnips yams apples pears plums apricots figs quinces
"""
_SPICES = """
aniseed basil cardamom chives cinnamon cloves coriander cumin dill fennel ginger juniper lavender marjoram mint mustard
nutmeg oregano paprika parsley pepper rosemary saffron sage salt sumac tarragon thyme turmeric vanilla
"""
_DISHES = """
apple crumble, bean stew, beef curry, beetroot salad, blueberry pancakes, carrot cake, cheese fondue, cherry pie,
chicken casserole, chilli, cinnamon buns, clam chowder, couscous, dumplings, fish pie, fried rice, gnocchi, goulash,
lamb kebab, lasagne, leek quiche, lemon tart, lentil soup, meatballs, mushroom risotto, nettle soup, noodle salad,
onion tart, paella, pea soup, pear strudel, pizza, plum cake, poached salmon, potato gratin, pumpkin soup, ramen,
ratatouille, rice pudding, roast duck, shepherd's pie, spinach pie, stuffed peppers, sushi, tomato soup, tortilla,
trout with almonds, vegetable curry, waffles, walnut bread
"""
_INSTRUMENTS = """
accordion bagpipes banjo bassoon bugle cello clarinet clavichord concertina cornet drums dulcimer euphonium fiddle flute
glockenspiel guitar harmonica harp harpsichord horn lute lyre mandolin marimba oboe ocarina organ piano piccolo recorder
saxophone sitar tambourine triangle trombone trumpet tuba ukulele vibraphone viola violin xylophone zither
"""
_LANGUAGES = """
Albanian Arabic Armenian Basque Bengali Breton Bulgarian Catalan Croatian Czech Danish Dutch Estonian Finnish French
Gaelic Georgian German Greek Hebrew Hindi Hungarian Icelandic Indonesian Italian Japanese Korean Latvian Lithuanian
Maltese Mandarin Mongolian Nepali Norwegian Persian Polish Portuguese Romanian Russian Serbian Slovak Slovene Spanish
Swahili Swedish Tamil Thai Turkish Ukrainian Urdu Vietnamese Welsh Zulu
"""
_BELONGINGS = """
armchair atlas backpack barometer bicycle bookcase bracelet briefcase calculator camera canoe cradle cupboard desk
dictionary drone easel globe hammock helmet jacket kayak lamp locket microscope mirror motorbike necklace notebook
painting parasol printer projector racket radio rucksack scarf scooter sledge sofa stopwatch suitcase surfboard tablet
teapot telescope tent thermos toolbox tricycle typewriter umbrella vase wardrobe wheelbarrow wristwatch
"""
_PETS = """
Bandit Barney Biscuit Bonnie Boomer Bubbles Buster Caramel Casper Chip Cinders Coco Cookie Cosmo Daisy Domino Dusty
Fudge Ginger Gizmo Gromit Hazel Honey Jasper Jet Kiwi Lucky Mango Marbles Max Minnie Misty Mocha Muffin Nugget Nutmeg
Olive Oreo Pebbles Pepper Pickles Pip Pixie Poppy Pretzel Pumpkin Rascal Rolo Rusty Scout Smudge Snowy Socks Sparky
Spud Sunny Tango Teddy Toffee Truffle Twix Waffles Whiskers Ziggy
"""
_COURSES = """
acrobatics aikido archery astronomy baking ballet beekeeping birdwatching bookbinding bouldering calligraphy carpentry
ceramics chess climbing cookery crochet diving drawing embroidery fencing gardening glassblowing gymnastics judo
juggling karate knitting mosaics origami painting patchwork photography pilates pottery printmaking rowing sailing
sculpture singing skating sewing swimming tango tapestry tennis theatre upholstery weaving welding woodcarving yoga
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


def many_people(random: Random, split: str, n: int) -> list[str]:
    """``n`` different names of people, with an initial if there are too few without."""
    plain = people(split)
    if 2 * n <= len(plain):
        return random.sample(plain, n)
    initials = [f"{first} {letter}. {last}" for first, last in map(str.split, plain) for letter in "ABDEGHJKLMNPRSTVW"]
    return random.sample(initials, min(n, len(initials)))


def first_names(split: str) -> tuple[str, ...]:
    return _share(_FIRST_NAMES, split)


def colours(split: str) -> tuple[str, ...]:
    return _share(_COLOURS, split)


def foods(split: str) -> tuple[str, ...]:
    """What somebody may be allergic to."""
    return _share(_FOODS, split)


def vegetables(split: str) -> tuple[str, ...]:
    """Vegetables and fruit that can be chopped, in the plural."""
    return _share(_VEGETABLES, split)


def spices(split: str) -> tuple[str, ...]:
    return _share(_SPICES, split)


def dishes(split: str) -> tuple[str, ...]:
    return tuple(dish for dish in " ".join(_DISHES.split()).split(", ") if bucket(dish) == split)


def instruments(split: str) -> tuple[str, ...]:
    return _share(_INSTRUMENTS, split)


def languages(split: str) -> tuple[str, ...]:
    return _share(_LANGUAGES, split)


@cache
def belongings(split: str) -> tuple[str, ...]:
    """Things in a colour."""
    names = (f"{colour} {thing}" for colour in _COLOURS.split() for thing in _BELONGINGS.split())
    return tuple(name for name in names if bucket(name) == split)


def pets(split: str) -> tuple[str, ...]:
    """Names of pets."""
    return _share(_PETS, split)


def courses(split: str) -> tuple[str, ...]:
    return _share(_COURSES, split)


@cache
def streets(split: str) -> tuple[str, ...]:
    return tuple(f"{noun.title()} {end}" for noun in nouns(split) for end in ("Street", "Lane", "Road"))


@cache
def novels(split: str) -> tuple[str, ...]:
    """Titles of novels, exhibitions, songs."""
    return tuple(f"The {adjective.title()} {noun.title()}" for adjective in adjectives(split) for noun in nouns(split))
