"""Sample graphs and scores edit with the same settings."""
import pytest

from palimpsest.devtools import settings
from palimpsest.devtools.graphs import api_graphs, load_graph, text_of

RUN = {"steps": 25, "scheduler": "ddim_uniform", "iterations": 2}
BLUE = {"feature_layers": "u4", "attention_layers": "u1-8", "tau_f": 0.1, "tau_a": 0.2, "cfg": 7.0, "negative": "source"}


def node(kind, inputs, **meta):
    return {"class_type": kind, "inputs": inputs, "_meta": meta}


GRAPH = {
    "1": node("PalimpsestMiniScene", {"seed": 1}),
    "2": node("PalimpsestPnPInjector", {"model": ["9", 0], "feature_layers": "x", "attention_layers": "x", "tau_f": 0.5, "tau_A": 0.5, "bank_device": "cpu"}, settings="color"),
    "3": node("KSampler", {"model": ["2", 0], "steps": 1, "cfg": 1.0, "scheduler": "simple", "seed": 4}, settings="color"),
    "4": node("CLIPTextEncode", {"clip": ["9", 1], "text": "bad"}, settings="color"),
    "5": node("CLIPTextEncode", {"clip": ["9", 1], "text": "good"}),
}


def test_only_marked_nodes_and_only_their_settings_change():
    new = settings.tuned(GRAPH, {"color": BLUE}, RUN)
    assert new["2"]["inputs"] == {"model": ["9", 0], "feature_layers": "u4", "attention_layers": "u1-8", "tau_f": 0.1, "tau_A": 0.2, "bank_device": "cpu"}
    assert new["3"]["inputs"] == {"model": ["2", 0], "steps": 25, "cfg": 7.0, "scheduler": "ddim_uniform", "seed": 4}
    assert new["4"]["inputs"] == {"clip": ["9", 1], "text": ["1", 2]}
    assert (new["1"], new["5"]) == (GRAPH["1"], GRAPH["5"])
    assert settings.tuned(GRAPH, {"color": {**BLUE, "negative": "empty"}}, RUN)["4"]["inputs"]["text"] == ""


def test_the_sources_words_need_a_source():
    with pytest.raises(ValueError, match="Mini Scene"):
        settings.tuned({"4": GRAPH["4"]}, {"color": BLUE}, RUN)


@pytest.mark.parametrize("path", api_graphs(), ids=lambda path: path.stem)
def test_shipped_graph_has_the_settings_of_the_scores(path):
    """After devtools/scores/pnp.py changed: `python dev.py workflows`."""
    graph = load_graph(path)
    assert settings.tuned(graph, *settings.from_scores()) == graph
    assert path.read_text(encoding="utf-8") == text_of(graph)


def test_every_mini_edit_is_marked():
    """Plug-and-Play's edits only: the settings are those of its score."""
    graphs = {path.stem: list(load_graph(path).values()) for path in api_graphs() if path.stem.startswith("mini-")}
    edits = {name: nodes for name, nodes in graphs.items() if any(node["class_type"] == "PalimpsestPnPInjector" for node in nodes)}
    assert edits
    for name, nodes in edits.items():
        assert all(node["_meta"].get("settings") for node in nodes if node["class_type"] in ("PalimpsestPnPInjector", "KSamplerAdvanced", "CFGGuider")), name
