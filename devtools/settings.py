"""The sample graphs edit with the settings that the scores were tuned to.

A node of an API graph whose `_meta` says `settings: KIND` (color, pattern, style, background) takes its inputs from
devtools/scores/pnp.py: layers, taus, cfg, steps, scheduler and negative prompt. `dev.py workflows` writes them there.
"""
from pathlib import Path

from . import graphs

LAYERS = {"feature_layers": "feature_layers", "attention_layers": "attention_layers", "tau_f": "tau_f", "tau_A": "tau_a", "cfg": "cfg"}


def tuned_inputs(node: dict, setting: dict, run: dict, caption: list | None) -> dict:
    """Inputs of one node with its settings in place; `run` holds steps, scheduler and iterations, `caption` is the link to the source's words."""
    known = {name: setting[key] for name, key in LAYERS.items()} | run
    inputs = {name: known.get(name, value) for name, value in node["inputs"].items()}
    if "text" in inputs:  # the negative prompt
        if setting["negative"] == "source" and caption is None:
            raise ValueError("a graph whose negative prompt is the source's words needs a Mini Scene node")
        inputs["text"] = caption if setting["negative"] == "source" else ""
    return inputs


def tuned(graph: dict, settings: dict[str, dict], run: dict) -> dict:
    """`graph` with the settings of every node that asks for them."""
    scene = next((node_id for node_id, node in graph.items() if node["class_type"] == "PalimpsestMiniScene"), None)
    caption = [scene, 2] if scene else None
    return {node_id: {**node, "inputs": tuned_inputs(node, settings[kind], run, caption)} if (kind := node.get("_meta", {}).get("settings")) else node
            for node_id, node in graph.items()}


def from_scores() -> tuple[dict, dict]:
    """(settings per kind of edit, what all runs share). Needs the host on sys.path."""
    from .scores import pnp

    return pnp.SETTINGS, {"steps": pnp.STEPS, "scheduler": pnp.SCHEDULER, "iterations": pnp.ITERATIONS}


def write_all(settings: dict[str, dict], run: dict) -> list[Path]:
    """Rewrite the API graphs whose settings changed; returns them."""
    changed = []
    for path in graphs.api_graphs():
        graph = graphs.load_graph(path)
        new = tuned(graph, settings, run)
        if new != graph:
            path.write_text(graphs.text_of(new), encoding="utf-8", newline="\n")
            changed.append(path)
    return changed
