"""Scene → its short caption in German, Spanish or French.

Adjectives agree with their nouns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from capstan.pipeline.world.scene import Scene, Thing

# Noun and gender of each shape; forms of each colour by gender, separated by "/" where they differ.
_GERMAN_NOUNS: Final = {
    "circle": ("Kreis", "m"),
    "square": ("Quadrat", "n"),
    "triangle": ("Dreieck", "n"),
    "star": ("Stern", "m"),
    "cross": ("Kreuz", "n"),
}
_GERMAN_COLOURS: Final = {
    "red": "roter/rotes",
    "green": "grüner/grünes",
    "blue": "blauer/blaues",
    "yellow": "gelber/gelbes",
    "orange": "orangefarbener/orangefarbenes",
    "purple": "violetter/violettes",
    "pink": "rosa",
    "cyan": "türkisfarbener/türkisfarbenes",
}
_SPANISH_NOUNS: Final = {
    "circle": ("círculo", "m"),
    "square": ("cuadrado", "m"),
    "triangle": ("triángulo", "m"),
    "star": ("estrella", "f"),
    "cross": ("cruz", "f"),
}
_SPANISH_COLOURS: Final = {
    "red": "rojo/roja",
    "green": "verde",
    "blue": "azul",
    "yellow": "amarillo/amarilla",
    "orange": "naranja",
    "purple": "morado/morada",
    "pink": "rosa",
    "cyan": "turquesa",
}
_FRENCH_NOUNS: Final = {
    "circle": ("cercle", "m"),
    "square": ("carré", "m"),
    "triangle": ("triangle", "m"),
    "star": ("étoile", "f"),
    "cross": ("croix", "f"),
}
_FRENCH_COLOURS: Final = {
    "red": "rouge",
    "green": "vert/verte",
    "blue": "bleu/bleue",
    "yellow": "jaune",
    "orange": "orange",
    "purple": "violet/violette",
    "pink": "rose",
    "cyan": "turquoise",
}
LANGUAGES: Final = ("German", "Spanish", "French")


def translate(scene: Scene, language: str) -> str:
    """Return the things' colours and shapes in one of `LANGUAGES`."""
    if language == "German":
        return " und ".join(f"ein {_agree(thing, _GERMAN_NOUNS, _GERMAN_COLOURS)[1]}" for thing in scene.things)
    if language == "Spanish":
        nouns = [_agree(thing, _SPANISH_NOUNS, _SPANISH_COLOURS) for thing in scene.things]
        return " y ".join(f"{'un' if gender == 'm' else 'una'} {text}" for gender, text in nouns)
    if language == "French":
        nouns = [_agree(thing, _FRENCH_NOUNS, _FRENCH_COLOURS) for thing in scene.things]
        return " et ".join(f"{'un' if gender == 'm' else 'une'} {text}" for gender, text in nouns)
    raise ValueError(f"unknown language {language!r}")


def _agree(thing: Thing, nouns: Mapping[str, tuple[str, str]], colours: Mapping[str, str]) -> tuple[str, str]:
    """Return (gender, noun with its colour); the colour precedes a German noun and follows the others."""
    noun, gender = nouns[thing.shape]
    forms = colours[thing.colour].split("/")
    colour = forms[0] if gender == "m" else forms[-1]
    return gender, f"{colour} {noun}" if nouns is _GERMAN_NOUNS else f"{noun} {colour}"
