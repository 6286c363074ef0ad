"""From prompts and layer names to a MODEL that notes attention maps or features during its next run."""

from __future__ import annotations

import torch

from ..p2p.tokens import read_tokens
from . import host
from .blocks import ATTENTION_PRESETS, SD1, SD2, SDXL, attention_points, check_reads_words, feature_points, unet_layers
from .collectors import Collector
from .maps import CollectFeatures, CollectMaps
from .reference_pass import add_edits

# word maps say most at a quarter and half of the latent's sides
MAP_PRESETS = {
    "default": {SD1: "d2-5,u0-5", SD2: "d2-5,u0-5", SDXL: "d0-3,m0,u0-5"},
    "all": {SD1: "d0-5,m0,u0-8", SD2: "d0-5,m0,u0-8", SDXL: "d0-3,m0,u0-5"},
    "decoder": ATTENTION_PRESETS["decoder"],
}


def _window(model, start: float, end: float) -> tuple[float, float]:
    """Noise levels (ceiling, floor) of a window of fractions of the schedule, as the host's own start and end percent count."""
    if not 0.0 <= start < end <= 1.0:
        raise ValueError(f"The window goes from {start:g} to {end:g}, but it needs two fractions between 0 and 1, the smaller first.")
    return host.window(model, start, end)


def collect_maps(model, clip, prompt: str, words: list[str], layers: str, start: float, end: float):
    """A clone of `model` that notes word maps, the collector, and the names of the maps.

    words: of the prompt; empty for every word of it. Raises ValueError, one sentence, for words the prompt does not have and for a model that reads no words.
    """
    known_layers = unet_layers(model)
    check_reads_words(model)
    tokens = read_tokens(clip, prompt)
    names = words or list(dict.fromkeys(tokens.words))
    missing = [name for name in names if not tokens.positions(name)]
    if missing or not names:
        known = f"which has {', '.join(tokens.words)}" if tokens.words else "which is empty"
        raise ValueError(f"There is no word {', '.join(missing) or 'at all'} in the prompt, {known}: write words as they stand in it.")
    places = attention_points(layers, known_layers, "map layers", "attn2", MAP_PRESETS)
    columns = torch.zeros(tokens.length, len(names))
    for number, name in enumerate(names):
        columns[list(tokens.positions(name)), number] = 1.0
    results = Collector("attention maps")
    ceiling, floor = _window(model, start, end)
    return add_edits(model, CollectMaps(places=places, words=columns, ceiling=ceiling, floor=floor, results=results)), results, names


def collect_features(model, layers: str, what: str, start: float, end: float):
    """A clone of `model` that notes features of the last step of a window, and the collector. what: "resblock" or "self-attention"."""
    known = unet_layers(model)
    places = feature_points(layers, known) if what == "resblock" else attention_points(layers, known)
    if not places:
        raise ValueError("No layer is chosen to look at: write layers like u1 or d2, or a preset.")
    results = Collector("features")
    ceiling, floor = _window(model, start, end)
    return add_edits(model, CollectFeatures(places=places, ceiling=ceiling, floor=floor, results=results)), results
