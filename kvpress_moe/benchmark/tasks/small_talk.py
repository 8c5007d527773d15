"""Small talk: turns of a conversation that say nothing about the speakers' plans."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from kvpress_moe.benchmark.tasks.texts import sentences
from kvpress_moe.benchmark.tasks.vocabulary import nouns

_TURNS = """
How was your morning, {o}?
Not bad at all, thanks for asking.
The queue at the post office was endless today.
Did anybody see the photo with the {x} that I sent around?
Yes, it was lovely, especially the {x} in the background.
It looks like rain again, doesn't it?
The forecast says it will clear up later.
I hope so, I forgot to bring anything for the rain.
Has anyone tried the new coffee machine?
I have, and it makes a noise like a {x}.
Ha, that sounds about right.
{o}, did you ever finish that puzzle with the {x}?
Almost! Only the {x} in the corner is missing.
That is what you said last time, {o}.
True, but this time I mean it.
Speaking of which, who has my charger?
It was on the shelf next to the {x} the last time I looked.
Thanks, I'll have a look.
I watched a documentary about a {x} and a {y} yesterday.
Was it any good?
Quite slow, but the pictures were beautiful.
My neighbour has put a huge {x} made of plaster in front of the house.
No way! I need to see that.
It even has a little {x} on top.
Some people have too much time, {o}.
Could somebody open a window, please?
Sure, one moment.
Much better, thank you.
I keep hearing that song about the {x} everywhere.
Me too, it's stuck in my head.
Please don't start singing it, {o}.
Too late!
Parking around here gets worse every week.
That's why I always walk.
Good for you, {o}. I should do that more often.
Is there any cake left?
I think {o} had the last piece.
That was not me, I swear.
We should really do this more often.
Agreed, it has been far too long.
Somebody painted a {x} on the wall of the car park.
I noticed that, and it isn't even badly done.
I still say it looks more like a {y} than a {x}.
Let's agree to disagree.
What was the name of that game with the {x} and the {y}?
I can never remember it either.
It will come to me as soon as I stop thinking about it.
That's how it always goes.
The lift is out of order again, by the way.
Again? It was repaired only the other day.
I took the stairs and counted a hundred steps.
So that's why you were out of breath, {o}.
Very funny.
I dreamt of a {x} last night, how odd is that?
Better than my dream about the {x}.
Don't ask me what that means, {o}.
Wait, my phone is ringing.
Sorry, wrong number.
Where were we?
{o} was telling us about the {x}.
""".strip().split("\n")
_QUOTES = (
    'Listen to this sentence from the manual: "{q}"',
    'I had to read this twice: "{q}"',
    'Does this make sense to anybody? "{q}"',
    'On page {n} it says: "{q}"',
)


def small_talk(random: Random, split: str, speakers: list[str]) -> Iterator[tuple[str, str]]:
    """Endless turns as (speaker, text), in an order that makes some sense. Now and then somebody quotes prose."""
    prose = [sentence for sentence in sentences(split) if '"' not in sentence and len(sentence) < 160]
    speaker = random.choice(speakers)
    place = random.randrange(len(_TURNS))
    while True:
        place = (place + random.choice((1, 1, 1, 1, 1, 3))) % len(_TURNS)
        speaker = random.choice([name for name in speakers if name != speaker])
        other = random.choice([name for name in speakers if name != speaker])
        first, second = random.sample(nouns(split), 2)
        template = random.choice(_QUOTES) if random.random() < 0.1 else _TURNS[place]
        quoted, page = random.choice(prose), random.randrange(2, 400)
        yield speaker, template.format(o=other, x=first, y=second, q=quoted, n=page)
