"""Prompts that ask for a text in the picture: sentences with a quoted phrase, as Flow-GRPO's task "ocr" has them.

    A close-up photo of a wooden signpost in a forest that says "Follow the Lantern", at dawn

What a reward is to read stands between the quotation marks, and in the metadata as `text`. Templates and words are of
this package; Flow-GRPO's own 20 thousand sentences (yifan123/flow_grpo, dataset/ocr) were written by a language model,
and can be given as a text file instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np

from dgpo_fast import rng
from dgpo_fast.records import Prompt

TRAIN_PROMPTS = 20_000
TEST_PROMPTS = 1_000

STYLES = (
    "A photo", "A close-up photo", "A wide-angle photo", "A grainy photo", "A cinematic shot", "An oil painting",
    "A watercolour painting", "A detailed illustration", "A coloured-pencil drawing", "A 3D render",
)  # fmt: skip
SCENES = (
    "a wooden signpost in a forest", "a neon sign above a bar", "a chalkboard outside a bakery",
    "a billboard by a road", "the cover of an old book", "a poster on a brick wall", "a ticket on a desk",
    "a banner across a village street", "the window of a barber's shop", "a road sign in the desert",
    "a birthday cake with icing letters", "a T-shirt on a clothes line", "a mug next to a laptop",
    "a stone tablet in a museum", "a label on a glass bottle", "the side of a delivery van",
    "a brass plate on a door", "a postcard on a fridge", "a shop front in a side street",
    "a protest sign held by a robot", "a newspaper on a park bench", "the hull of a fishing boat",
    "a scoreboard in a stadium", "a mural on a warehouse", "a menu board in a cafe", "a phone screen",
    "a sticker on a suitcase", "a flag on a snowy summit", "graffiti on a railway bridge", "a cinema marquee",
    "a wax-sealed letter on a table", "a metal plaque on a statue", "a paper lantern over a river",
    "a name tag on a uniform", "a patch on a denim jacket", "a sandwich board on a pavement",
    "a hand-painted sign on a beach hut", "a spaceship control panel", "a garden gate",
    "a wall calendar in a kitchen",
)  # fmt: skip
SAYINGS = ("that says", "that reads", "with the words", "with the inscription", "bearing the text", "showing the words")
LIGHTS = (
    "at dawn", "at dusk", "in bright sunlight", "under soft studio light", "on a foggy morning", "lit by a single lamp",
    "with long shadows", "in warm colours", "in muted colours", "with a blurred background", "in sharp focus",
)  # fmt: skip

ADJECTIVES = (
    "Amber", "Ancient", "Blue", "Bold", "Brave", "Bright", "Broken", "Burning", "Calm", "Clever", "Copper", "Crystal",
    "Curious", "Daring", "Distant", "Double", "Early", "Electric", "Empty", "Endless", "Fading", "Fearless", "First",
    "Flying", "Frozen", "Gentle", "Golden", "Grand", "Happy", "Hidden", "Hollow", "Honest", "Humble", "Iron", "Lazy",
    "Little", "Lost", "Lucky", "Mighty", "Modern", "Morning", "Northern", "Old", "Painted", "Quiet", "Rapid", "Royal",
    "Rusty", "Secret", "Silent", "Silver", "Simple", "Sleepy", "Southern", "Spring", "Sweet", "Tiny", "Velvet", "Wild",
    "Winter",
)  # fmt: skip
NOUNS = (
    "Anchor", "Apple", "Arrow", "Badger", "Bell", "Bird", "Bridge", "Candle", "Castle", "Cloud", "Clover", "Coffee",
    "Comet", "Compass", "Crown", "Dragon", "Dream", "Eagle", "Ember", "Engine", "Falcon", "Feather", "Forest", "Fox",
    "Garden", "Ghost", "Harbour", "Hammer", "Heart", "Honey", "Horizon", "Island", "Journey", "Kettle", "Lantern",
    "Lemon", "Lighthouse", "Lion", "Maple", "Mirror", "Moon", "Mountain", "Ocean", "Orchard", "Owl", "Paper", "Pearl",
    "Piano", "Pilot", "Planet", "Rabbit", "River", "Robot", "Rocket", "Sparrow", "Star", "Stone", "Summer", "Tiger",
    "Valley", "Violin", "Willow", "Window", "Wolf",
)  # fmt: skip
PLACES = (
    "Academy", "Bakery", "Books", "Brewery", "Cafe", "Club", "Cinema", "Festival", "Gallery", "Garage", "Hotel", "Inn",
    "Lane", "Market", "Museum", "Park", "Records", "Road", "School", "Station", "Street", "Studio", "Theatre", "Tours",
)  # fmt: skip
VERBS = (
    "Build", "Catch", "Chase", "Choose", "Discover", "Draw", "Find", "Follow", "Free", "Guard", "Hear", "Imagine",
    "Keep", "Love", "Make", "Meet", "Paint", "Protect", "Remember", "Save", "See", "Share", "Trust", "Visit",
)  # fmt: skip
LABELS = (
    "Bay", "Bus", "Chapter", "Deck", "Dock", "Door", "Exit", "Floor", "Gate", "Hall", "Lane", "Level", "Line", "Mile",
    "No.", "Page", "Pier", "Platform", "Room", "Route", "Sector", "Table", "Track", "Unit",
)  # fmt: skip


def ocr_prompts(split: Literal["train", "test"]) -> list[str]:
    """The prompts of a split, 20,000 or 1,000, each a `Prompt` whose metadata has the `text` to be rendered.

    No two of them, of either split, ask for the same text.
    """
    total = TRAIN_PROMPTS + TEST_PROMPTS
    texts = [*itertools.islice(_texts(), total)]
    drawn = rng.random_words([_stream("sentences")], 4 * total).reshape(-1, 4).tolist()
    order = rng.permutation(_stream("order"), total)
    mine = order[:TEST_PROMPTS] if split == "test" else order[TEST_PROMPTS:]
    return [_sentence(texts[place], *drawn[place]) for place in mine]


def _sentence(text: str, style: int, scene: int, saying: int, light: int) -> Prompt:
    parts = (STYLES[style % len(STYLES)], SCENES[scene % len(SCENES)], SAYINGS[saying % len(SAYINGS)])
    return Prompt('{} of {} {} "{}", {}'.format(*parts, text, LIGHTS[light % len(LIGHTS)]), {"text": text})


def _texts() -> Iterator[str]:
    """Different phrases of one to four words; kinds of phrase take turns, and drop out where they are used up."""
    numbers = [str(number) for number in range(1, 100)]
    kinds = (
        (NOUNS,),
        (ADJECTIVES, NOUNS),
        (LABELS, numbers),
        (VERBS, ("the", "Your", "Every"), NOUNS),
        (NOUNS, ("and",), NOUNS),
        (NOUNS, PLACES),
        (ADJECTIVES, NOUNS, PLACES),
        (("The",), ADJECTIVES, NOUNS, PLACES),
    )
    turns = itertools.zip_longest(*(_phrases(words, str(kind)) for kind, words in enumerate(kinds)))
    seen: set[str] = set()
    for text in itertools.chain.from_iterable(turns):
        if text is not None and text not in seen:
            seen.add(text)
            yield text


def _phrases(words: tuple[tuple[str, ...] | list[str], ...], name: str) -> Iterator[str]:
    """Every phrase with a word of each place, in an order fixed by a named stream."""
    sizes = [len(choices) for choices in words]
    for number in rng.permutation(_stream(f"phrases {name}"), int(np.prod(sizes))):
        places = np.unravel_index(number, sizes)
        chosen = [choices[place] for choices, place in zip(words, places, strict=True)]
        if len(set(chosen)) == len(chosen):
            yield " ".join(chosen)


def _stream(name: str) -> rng.Stream:
    return rng.stream(0, stage=f"ocr prompts: {name}")
