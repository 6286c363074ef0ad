"""From words to a scene: reads the grammar of `captions` and fills in what a caption leaves open.

A little more tolerant than the grammar is: upper case, a final stop, any order within an object, attributes left out.
"""

from __future__ import annotations

import random
import re

from .captions import BACKGROUND_WORDS, NO_SHAPE, OPENINGS, PATTERN_WORDS, PLACE_WORDS, SHAPE_WORDS, SIZE_WORDS, STYLE_WORDS, describe
from .scenes import BACKGROUNDS, COLORS, STYLES, Scene, apart, sample_background, sample_object

ATTEMPTS = 500  # draws before two objects are said not to fit beside each other
EXAMPLE = "'a small red circle with blue dots on the left and a large star, on a beige background, outline sketch'"


def _phrases() -> list[tuple[str, dict[str, str]]]:
    """(phrase, attributes it names) of one object, longest first so that "top left" is not read as "top"."""
    found = [("plain", {"pattern": "plain"})] + [(word, {}) for word in ("a", "an", "the", *NO_SHAPE)]
    for attribute, table in (("size", SIZE_WORDS), ("shape", SHAPE_WORDS), ("place", PLACE_WORDS)):
        found += [(phrase, {attribute: word}) for word, phrases in table.items() for phrase in phrases]
    for pattern, phrases in PATTERN_WORDS.items():
        found += [(phrase.format(c=color), {"pattern": pattern, "color2": color}) for phrase in phrases for color in COLORS]
        found.append((pattern, {"pattern": pattern}))
    found += [(color, {"color": color}) for color in COLORS]
    return sorted(found, key=lambda pair: -len(pair[0].split()))


def _take(text: str, phrase: str) -> str | None:
    """`text` without the first occurrence of `phrase` as whole words (a bar marks the gap), None where it does not occur."""
    rest, count = re.subn(rf"(?<!\S){re.escape(phrase)}(?!\S)", "|", text, count=1)
    return rest if count else None


def _say(words: str) -> ValueError:
    return ValueError(f"The mini grammar does not understand '{words}' in the caption: write it like {EXAMPLE}.")


def parse_object(text: str) -> dict[str, str]:
    """Attributes that an object's words name."""
    named: dict[str, str] = {}
    for phrase, attributes in _phrases():
        while (rest := _take(text, phrase)) is not None:
            for attribute, value in attributes.items():
                if named.setdefault(attribute, value) != value:
                    raise ValueError(f"The caption gives one object two values for {attribute}, '{named[attribute]}' and '{value}': "
                                     "name one, or put 'and a' between two objects.")
            text = rest
    left = " ".join(text.replace("|", " ").split())
    if left:
        raise _say(left)
    if named.get("color2") and named.get("color2") == named.get("color"):
        raise ValueError(f"A {named['color']} pattern does not show on a {named['color']} object: give the two different colors.")
    return named


def parse(text: str) -> tuple[list[dict[str, str]], dict[str, str]]:
    """(attributes named per object, attributes named of the whole scene), as `captions.caption` returns them.

    Raises ValueError, one sentence, for words outside the grammar, contradictions and more than two objects.
    """
    body = " ".join(text.lower().strip().rstrip(".").split())
    for opening in sorted((o.strip() for o in OPENINGS if o), key=len, reverse=True):
        body = body.removeprefix(opening).strip()
    body = " ".join(body.replace(",", " | ").split())
    whole: dict[str, str] = {}
    scene_phrases = [(words, "style", style) for style in STYLES for words in STYLE_WORDS[style]]
    scene_phrases += [(words.format(b=b).replace("on a", article, 1), "background", b) for words in BACKGROUND_WORDS for b in BACKGROUNDS
                      for article in ("on a", "on an", "a")]
    for phrase, attribute, value in sorted(scene_phrases, key=lambda p: -len(p[0])):
        if (rest := _take(body, phrase)) is not None:
            if whole.setdefault(attribute, value) != value:
                raise ValueError(f"The caption names two values for {attribute}, '{whole[attribute]}' and '{value}': name one.")
            body = rest
    parts = [part.strip(" |") for part in re.split(r"(?<!\S)and(?!\S)", body)]
    if len(parts) > 2:
        raise ValueError(f"The caption names {len(parts)} objects, but a mini scene holds one or two: leave out the others.")
    if not all(parts):
        raise ValueError(f"The caption names no object: write it like {EXAMPLE}.")
    return [parse_object(part.replace("|", " ")) for part in parts], whole


def scene_for(named: list[dict[str, str]], whole: dict[str, str], seed: int) -> Scene:
    """A scene with the named attributes; `seed` draws the rest. Raises ValueError when the objects cannot stand side by side."""
    rng = random.Random(seed)
    for _ in range(ATTEMPTS):
        objects = tuple(sample_object(rng, wanted) for wanted in named)
        clash = any(o.pattern != "plain" and o.color == o.color2 for o in objects)
        if not clash and (len(objects) < 2 or apart(*objects)):
            break
    else:
        raise ValueError("The two objects of the caption do not fit beside each other: choose places farther apart, or smaller sizes.")
    background = rng.choice(list(BACKGROUNDS))
    background = whole.get("background", background)
    style = rng.choice(STYLES)
    return Scene(objects, background, sample_background(rng, background), whole.get("style", style))


def restate(scene: Scene, named: list[dict[str, str]], whole: dict[str, str], seed: int) -> str:
    """A caption of `scene` in the grammar's words that names the attributes `named` and `whole` name, and no others.

    Same seed, same words: an edited twin's caption differs in the edited words only.
    """
    parts = [describe(obj, random.Random(seed + i), set(wanted).__contains__)[0] for i, (obj, wanted) in enumerate(zip(scene.objects, named))]
    text = " and ".join(parts)
    if "background" in whole:
        text += f" on a {scene.background} background"
    if "style" in whole:
        text += f", {STYLE_WORDS[scene.style][0]}"
    return text
