"""Written documents: short texts about many subjects that the frozen model writes itself (Cartridges' self-study)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from random import Random
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.benchmark.tasks.vocabulary import cities, people
from kvpress_moe.training.sampling import request_ids, sample_texts

# One field a line, fourteen subjects each.
_FIELDS = """
Marie Curie, Genghis Khan, Ada Lovelace, Simón Bolívar, Florence Nightingale, Saladin, Catherine the Great, Ibn Battuta, Nelson Mandela, Johannes Kepler, Harriet Tubman, Marco Polo, Rosa Luxemburg, Ashoka
Lisbon, Kyoto, Timbuktu, Bergen, Cusco, Samarkand, Edinburgh, Valparaíso, Dubrovnik, Nairobi, Quebec City, Hanoi, Ghent, Savannah
the tomato, sourdough bread, sushi, cheddar cheese, the pretzel, olive oil, ramen, maple syrup, paella, black pepper, kimchi, marzipan, the taco, couscous
the honey bee, the snow leopard, the emperor penguin, the octopus, the red fox, the giant tortoise, the barn owl, the blue whale, the hedgehog, the monarch butterfly, the camel, the Komodo dragon, the salmon, the fruit bat
the steam engine, the telephone, the printing press, the microscope, the bicycle, the zipper, the barometer, the sewing machine, the ballpoint pen, the elevator, the camera, the compass, the refrigerator, the typewriter
the Nile, the Danube, the Mississippi, Lake Baikal, the Mekong, the Rhine, Lake Titicaca, the Amazon, the Yukon, the Ganges, the Volga, Loch Ness, the Murray River, the Congo
the Treaty of Westphalia, the Hundred Years' War, the Congress of Vienna, the Battle of Hastings, the Peloponnesian War, the Crimean War, the Treaty of Tordesillas, the Siege of Vienna, the Battle of Trafalgar, the Boxer Rebellion, the Peace of Augsburg, the Winter War, the Treaty of Versailles, the Battle of Marathon
the violin, jazz, the opera, flamenco, the church organ, the string quartet, reggae, the accordion, Gregorian chant, the electric guitar, the choir, the harpsichord, folk songs of Ireland, the symphony orchestra
vaccination, insulin, penicillin, X-rays, malaria, the heart transplant, anaesthesia, scurvy, the stethoscope, asthma, smallpox, physiotherapy, the appendix, blood groups
volcanoes, photosynthesis, plate tectonics, genetics, black holes, the periodic table, glaciers, probability theory, magnetism, crystallography, tides, optics, fermentation, the ozone layer
cricket, the Tour de France, chess, the marathon, sumo wrestling, ice hockey, badminton, the Olympic Games, fencing, rock climbing, rugby, table tennis, archery, the regatta
the Eiffel Tower, Machu Picchu, the Taj Mahal, Hagia Sophia, the Sydney Opera House, the Alhambra, Stonehenge, the Brooklyn Bridge, Neuschwanstein Castle, the Colosseum, Angkor Wat, the Pantheon, the Forbidden City, Borobudur
the oak, the sunflower, bamboo, the tulip, coffee plants, the giant sequoia, lavender, the potato, moss, the baobab, rice, the orchid, seaweed, the olive tree
Iceland, Peru, Mongolia, Ethiopia, New Zealand, Portugal, Vietnam, Bolivia, Estonia, Morocco, Nepal, Cuba, Ghana, Finland
detective novels, silent films, science fiction, fairy tales, the western, sonnets, comic books, documentary films, historical novels, puppet theatre, the diary, animated films, epic poems, travel books
a shipping company, a toy factory, a family bakery, an airline, a watchmaker, a brewery, a publishing house, a bank, a shoe shop, a mining company, a software company, a seed merchant, a piano maker, a hotel
Carnival in Venice, Diwali, the Day of the Dead, Midsummer, the Edinburgh Fringe, Oktoberfest, the Lantern Festival, Mardi Gras, Nowruz, a village flower show, Hanami, a book fair, Holi, a jazz festival
copyright law, the Magna Carta, traffic rules, the right to vote, labour law, the Geneva Conventions, patents, food safety rules, the constitution of a small republic, building regulations, a law against noise, the census, customs duties, the law of the sea
the locomotive, the crane, the windmill, the submarine, the wind turbine, the tractor, the loom, the hot-air balloon, the diesel engine, the lighthouse, the water pump, the tram, the vending machine, the industrial robot
Mount Everest, the Sahara, the Great Barrier Reef, the Alps, the Galápagos Islands, the Dead Sea, Mount Fuji, Patagonia, the Grand Canyon, Lapland, Madagascar, the Black Forest, the Gobi Desert, Yellowstone
Vincent van Gogh, Frida Kahlo, mosaics, watercolour painting, Albrecht Dürer, pottery, stained glass, street photography, Hokusai, wood carving, Michelangelo, calligraphy, tapestry, land art
the Roman Empire, the Aztecs, the Vikings, the Ottoman Empire, the Hanseatic League, the Mali Empire, the Silk Road, the Inca road system, the Black Death, the gold rush in California, the Ming dynasty, the Industrial Revolution, ancient Egypt, the Renaissance
Mars, the Moon landing, comets, the Hubble telescope, Jupiter, solar eclipses, a weather satellite, Saturn's rings, meteorites, the space shuttle, Venus, an observatory, the first woman in space, the Milky Way
a secondary school, a public library, a fire brigade, a university, a museum of natural history, a night train, an orchestra for children, a city council, a railway station, a botanical garden, a youth hostel, a village hospital, a swimming pool, a farmers' market
""".strip().splitlines()  # noqa: E501

#: Subjects of the documents. Any twelve consecutive ones are of different fields.
SUBJECTS: tuple[str, ...] = tuple(chain(*zip(*(line.split(", ") for line in _FIELDS), strict=True)))

_MONTHS = "January February March April May June July August September October November December"
TEMPERATURE = 0.8
TOP_P = 0.95
SHORTEST = 100  # characters of a document

#: How documents are asked for, and how they begin, in turn: seven, so that every field gets each of them. A small model
#: keeps to a form that has begun.
_FORMS = (
    ("Write an encyclopedia article about {subject}. Give names, dates, places and numbers.", "{title}"),
    ("Tell the history of {subject}. Say who did what, in which year and where.", "In {year},"),
    (
        "Write a news report about {subject} with names of people, dates and numbers.",
        "{city}. On {day} {month} {year},",
    ),
    (
        "Write the chapter of a guide book on {subject}. Name places, prices, distances and times.",
        "Visitors of {city} come for {subject}. A ticket costs",
    ),
    (
        "Write a short biography of {person}, whose life had to do with {subject}. Give dates, places and names.",
        "{person} was born in {year} in",
    ),
    (
        "Write a conversation of two friends about {subject}. They tell each other facts, numbers and names.",
        "{first}: Did you know that {subject}",
    ),
    ("Write a short story about {subject} with names of people and places.", "{person} lived in {city}"),
)


@dataclass(frozen=True)
class WrittenDocument:
    """
    A document.

    Attributes
    ----------
    title, text : str
    """

    title: str
    text: str


def write_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    subjects: Sequence[str],
    seed: int,
    n_tokens: int = 220,
    batch: int = 16,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> list[WrittenDocument]:
    """
    Let the model write one document about each subject. Documents that are nearly empty are left out.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
        Without a chat template, the model continues the beginning of a document.
    subjects : sequence of str
    seed : int
    n_tokens : int
        Largest number of tokens of a document. What comes after its last complete sentence is cut off.
    batch : int
        Number of documents that are written at once.
    progress : callable
        ``progress(done, total)``.
    """
    generator, random = torch.Generator().manual_seed(seed), Random(seed)
    written = []
    for start in range(0, len(subjects), batch):
        progress(start, len(subjects))
        part = subjects[start : start + batch]
        forms = [_form(random, tokenizer, subject, start + row) for row, subject in enumerate(part)]
        longest = max(len(request_ids(tokenizer, form.request, form.beginning)) for form in forms)
        requests = [request_ids(tokenizer, form.request, form.beginning, longest) for form in forms]
        texts = sample_texts(model, tokenizer, requests, generator, n_tokens, TEMPERATURE, TOP_P)
        written += [
            WrittenDocument(form.title, clean(form.beginning + text)) for form, text in zip(forms, texts, strict=True)
        ]
    progress(len(subjects), len(subjects))
    return [document for document in written if len(document.text) >= SHORTEST]


class _Form(NamedTuple):
    """The request for a document (a bare title if there is no chat template), its beginning and its title."""

    request: str
    beginning: str
    title: str


def _form(random: Random, tokenizer: PreTrainedTokenizerBase, subject: str, number: int) -> _Form:
    request, beginning = _FORMS[number % len(_FORMS)]
    person = random.choice(people("train"))
    details = {
        "subject": subject,
        "title": as_title(subject),
        "person": person,
        "first": person.split()[0],
        "city": random.choice(cities("train")),
        "day": random.randint(1, 28),
        "month": random.choice(_MONTHS.split()),
        "year": random.randint(1850, 2020),
    }
    title = person if "{person}" in beginning else as_title(subject)
    request = request.format(**details) if tokenizer.chat_template else f"Title: {title}\n\n"
    return _Form(request, beginning.format(**details), title)


def as_title(subject: str) -> str:
    """A subject without its article, with a capital."""
    bare = re.sub(r"^(the|an?) ", "", subject)
    return bare[:1].upper() + bare[1:]


def clean(text: str) -> str:
    """A model's text without Markdown's marks and headings, up to its last complete sentence."""
    lines = [re.sub(r"^[#>\s]+|\*\*|__", "", line).strip() for line in text.strip().splitlines()]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    ends = [match.end() for match in re.finditer(r"[.!?][\"”’')]?(?=\s|$)", text)]
    return text[: ends[-1]] if ends else text


def density(text: str) -> float:
    """How much can be asked about a text: its different names and numbers, fewer if its words repeat."""
    details = set(re.findall(r"\b(?:[A-Z]\w{2,}|\d[\d,.]*)", text))
    words = re.findall(r"\w+", text.lower())
    return min(len(details), 20) * len(set(words)) / max(1, len(words))
