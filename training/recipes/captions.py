"""Words for the pictures: the thing, its style, its colour and its ground."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from mahlstick.training.recipes.drawings import COLOURS, GREYS
from mahlstick.training.recipes.packages import LINES, SHADED, STYLES, Concept

# The word for a style, where it is not its name.
CALLED = {LINES: "black and white"}
SYLLABLES = tuple(f"{consonant}{vowel}" for consonant in "bdfgklmnprstvz" for vowel in "aeiou")


def caption(concept: Concept, rng: random.Random, colour: str | None = None) -> str:
    """Words for a picture of ``concept``; ``colour`` where it was recoloured, so that the words must say so."""
    words = concept.label
    named = [w for w in words.split() if w in COLOURS or w in GREYS]
    if colour:
        words = re.sub(rf"\b{named[0]}\b", colour, words) if named else f"{colour} {words}"
    elif not named and rng.random() < 0.25:
        words = f"{concept.colour} {words}"
    if rng.random() < 0.3:
        words = ("an " if words[0] in "aeiou" else "a ") + words
    if concept.tags and rng.random() < 0.4:
        own = [t for t in concept.tags if not any(c in t.split() for c in COLOURS)]
        words = ", ".join([words, *rng.sample(own, min(len(own), rng.randint(1, 3)))])
    return words


def words(concept: Concept, style: str, rng: random.Random, tint: str | None = None, ground: str | None = None) -> str:
    """A caption: the thing, its style, and the colours where they are not the thing's own."""
    return on_ground(in_style(caption(concept, rng, tint), style, rng), ground)


def on_ground(said: str, ground: str | None) -> str:
    """The words with those for a coloured ground."""
    return said if ground is None else f"{said} on a {ground} background"


def in_style(said: str, style: str, rng: random.Random) -> str:
    """The words with the style's before or after them; half of those for the shaded one do without."""
    called = CALLED.get(style, style)
    if style == SHADED and rng.random() < 0.5:
        return said
    if rng.random() < 0.5:
        return f"{said}, {called} style"
    article, bare = re.fullmatch("(an? )?(.*)", said).groups()  # type: ignore[union-attr]
    return f"{'a ' if article else ''}{called} {bare}"


def asked(concept: Concept, style: str) -> str:
    """A plain prompt for a concept in a style."""
    return f"{CALLED.get(style, style)} {concept.label}"


class UnknownWords:
    """Names that nothing has, put together from syllables.

    People ask for more than the few hundred things that this model knows. Trained on such names with any picture, it
    draws some thing in the colour that they say; untrained, it makes blotches of them.
    """

    def __init__(self, concepts: Sequence[Concept]) -> None:
        self.known = {word for c in concepts for said in (c.label, *c.tags) for word in said.split()}

    def draw(self, rng: random.Random, colour: str) -> str:
        """One or two names, half of the time after ``colour``."""
        names = [self._name(rng) for _ in range(rng.randint(1, 2))]
        return " ".join([colour, *names] if rng.random() < 0.5 else names)

    def _name(self, rng: random.Random) -> str:
        while (name := "".join(rng.choices(SYLLABLES, k=rng.randint(1, 3)))) in self.known:
            pass
        return name


def corpus(concepts: Sequence[Concept], copies: int = 4) -> list[str]:
    """Captions of the concepts that training sees, in each style, for a tokenizer to be learned from."""
    rng, colours = random.Random(0), (None, None, *COLOURS)
    known = [concept for concept in concepts if not concept.held_out]
    return [
        words(concept, style, rng, rng.choice(colours), rng.choice(colours))
        for concept in known
        for style in STYLES
        for _ in range(copies)
    ]
