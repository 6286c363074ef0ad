"""Reading API graphs (workflows/api/*.json): names, the models they need, and what their outputs are for.

An API graph is {node id: {"class_type", "inputs", "_meta"}}; the host ignores `_meta`. We read from it:

    title     as the host's own export writes it. On nodes that put out pictures or text it says what they are:
              "input", "edit", "input 2", "edit 2: a blue circle", "score" ... (see Role)
    models    [{"name", "directory", "url"}]: files this loader needs, same shape as properties.models of a canvas node
    smoke     true: this graph is its method's smoke test on the oldest supported host
    after     name of a graph whose file this node reads: that one runs first

devtools/canvas.py and devtools/settings.py name what they read.
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
API_FOLDER = ROOT / "workflows" / "api"
# inputs of loaders (the host's and ours) and the models/ folder they read
MODEL_INPUTS = {
    "ckpt_name": "checkpoints", "lora_name": "loras", "vae_name": "vae", "control_net_name": "controlnet", "unet_name": "diffusion_models",
    "clip_name": "text_encoders", "clip_name1": "text_encoders", "clip_name2": "text_encoders", "style_model_name": "style_models",
    "gligen_name": "gligen", "hypernetwork_name": "hypernetworks", "photomaker_model_name": "photomaker", "seecoder_name": "seecoder", "sam_name": "sams",
    "clip_vision_name": "clip_vision", "optimus_name": "optimus",
}
TITLE = re.compile(r"^(?P<name>[^:\d]+?)\s*(?P<row>\d+)?\s*(?::\s*(?P<caption>.+))?$", re.S)


@dataclass(frozen=True)
class Role:
    """What a titled output is on the contact sheet: `name` 1..n of the sheet's `row`, with a caption."""
    name: str
    row: int
    caption: str


@dataclass(frozen=True)
class Missing:
    """A model file that a graph needs and the host has not got."""
    name: str
    directory: str
    url: str = ""

    def __str__(self) -> str:
        return f"{self.name} in models/{self.directory}" + (f" (from {self.url})" if self.url else "")


def api_graphs(folder: Path = API_FOLDER) -> list[Path]:
    """Every API graph of the pack, by name."""
    return sorted(folder.glob("*.json"))


def load_graph(path: Path) -> dict:
    """The nodes of an API graph file. Raises ValueError."""
    try:
        graph = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON ({error})") from None
    return nodes_of(graph)


def nodes_of(graph: dict) -> dict:
    """`graph` if it is an API graph. Raises ValueError for a canvas workflow and anything else."""
    if not isinstance(graph, dict) or not graph or not all(isinstance(node, dict) and "class_type" in node for node in graph.values()):
        raise ValueError("this is no API graph (node id -> class_type and inputs): export it with Workflow > Export (API)")
    return graph


def text_of(graph: dict) -> str:
    """An API graph as its file holds it: one node a line, so that changes can be read."""
    return "{\n" + ",\n".join(f" {json.dumps(node_id)}: {json.dumps(node)}" for node_id, node in graph.items()) + "\n}\n"


def node_name(graph: dict, node_id: str | None) -> str:
    """A node as people know it: `node 5 (KSampler)` or `node 5 (KSampler "edit")`."""
    node = graph.get(str(node_id), {})
    title = title_of(node)
    kind = node.get("class_type", "unknown")
    return f"node {node_id} ({kind}" + (f' "{title}")' if title and title != kind else ")")


def title_of(node: dict) -> str:
    """The title that a node of an API graph carries, "" if none."""
    return node.get("_meta", {}).get("title", "")


def role(node: dict) -> Role:
    """What a node's output is for, from its title (its class if it has none)."""
    title = title_of(node) or node["class_type"]
    match = TITLE.match(title)
    if not match:
        return Role(title, 1, "")
    return Role(match["name"].strip().lower(), int(match["row"] or 1), (match["caption"] or "").strip())


def is_smoke(graph: dict) -> bool:
    """Whether the graph is its method's smoke test."""
    return any(node.get("_meta", {}).get("smoke") for node in graph.values())


def in_order(paths: list[Path]) -> list[Path]:
    """`paths` with the graphs that they need the files of, each of those before its readers. Raises ValueError for a graph that is not there."""
    ordered: list[Path] = []

    def add(path: Path, readers: tuple[Path, ...] = ()) -> None:
        if path in ordered or path in readers:
            return
        if not path.is_file():
            raise ValueError(f"{readers[-1].name} reads a file of {path.stem}, but there is no graph {path.name} beside it")
        try:
            nodes = load_graph(path).values()
        except ValueError:
            nodes = ()  # whoever runs it says what is wrong with it
        for first in filter(None, (node.get("_meta", {}).get("after") for node in nodes)):
            add(path.with_stem(first), (*readers, path))
        ordered.append(path)

    for path in paths:
        add(path)
    return ordered


def options_of(info: dict, name: str) -> list | None:
    """Choices of a combo input in a node's /object_info entry, None if it is no combo."""
    for group in info.get("input", {}).values():
        if name in group:
            kind, *rest = group[name]
            if isinstance(kind, list):
                return kind
            return rest[0].get("options") if kind == "COMBO" and rest else None
    return None


def declared_as(models: list[dict], name: str, directory: str) -> dict:
    """The declared entry of a file, that of `directory` where the file is needed in several; {} if there is none."""
    found = [entry for entry in models if entry["name"] == name]
    return next((entry for entry in found if entry["directory"] == directory), found[0] if found else {})


def missing_models(graph: dict, object_info: dict, models: list[Path] = ()) -> list[Missing]:
    """Files the graph names that are not among the host's choices, nor below one of the `models` folders."""
    missing = []
    for node in graph.values():
        declared = node.get("_meta", {}).get("models", [])
        names = {entry["name"] for entry in declared}
        offered = object_info.get(node["class_type"], {})
        seen = set()
        for name, value in node.get("inputs", {}).items():
            if not isinstance(value, str) or (value not in names and name not in MODEL_INPUTS):
                continue
            seen.add(value)
            options = options_of(offered, name)
            if options is not None and value not in options:
                entry = declared_as(declared, value, MODEL_INPUTS.get(name, ""))
                missing.append(Missing(value, entry.get("directory") or MODEL_INPUTS.get(name, ""), entry.get("url", "")))
        for entry in declared:
            if entry["name"] not in seen and not any((folder / entry["directory"] / entry["name"]).is_file() for folder in models):
                missing.append(Missing(entry["name"], entry["directory"], entry.get("url", "")))
    return list(dict.fromkeys(missing))
