"""Canvas workflows (workflows/*.json) from API graphs (workflows/api/*.json), so that the two cannot drift.

What a canvas holds beyond the graph comes from the host's /object_info (slots, the order of the widgets) and from the
graph's `_meta` (see graphs.py), which the host ignores:

    group     title of the group (column) that the node stands in
    control   what a seed does after each run: fixed (the default here), increment, decrement or randomize
    width     of the node in canvas pixels, for wide pictures

A Markdown file beside the API graph, of the same name, becomes the note on the canvas.
"""
import json
import re
import uuid
from pathlib import Path

from . import graphs, hosts, layout
from .graphs import ROOT, options_of, title_of

FOLDER = ROOT / "workflows"
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SEEDS = {"seed", "noise_seed"}
UPLOADS = ("image_upload", "video_upload", "audio_upload")
POSITIVE, NEGATIVE = {"color": "#232", "bgcolor": "#353"}, {"color": "#322", "bgcolor": "#533"}
NOTE = {"color": "#432", "bgcolor": "#653"}
OPTIONAL_SHAPE = 7  # LiteGraph's mark of a socket that may stay open


def pack_version() -> str:
    """The version in pyproject.toml."""
    return re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]


def inputs_of(info: dict) -> list[tuple[str, str, dict, bool]]:
    """(name, type, options, optional) of a node's inputs from its /object_info entry, in order."""
    found = []
    for group in ("required", "optional"):
        for name in info.get("input_order", {}).get(group, []):
            kind, *rest = info["input"][group][name]
            found.append((name, "COMBO" if isinstance(kind, list) else kind, rest[0] if rest else {}, group == "optional"))
    return found


def is_widget(kind: str, options: dict) -> bool:
    return kind in WIDGETS and not options.get("forceInput")


def widget_values(node: dict, info: dict) -> list:
    """widgets_values as the page stores them: one per widget input in order, and those of the widgets that the page adds."""
    values = []
    for name, kind, options, _ in inputs_of(info):
        if not is_widget(kind, options):
            continue
        value = node["inputs"].get(name)
        if isinstance(value, list) or name not in node["inputs"]:  # linked, or an optional one left alone
            value = options.get("default", (options_of(info, name) or [""])[0] if kind == "COMBO" else "")
        values.append(value)
        if kind == "INT" and options.get("control_after_generate", name in SEEDS):
            values.append(node.get("_meta", {}).get("control", "fixed"))
        if any(options.get(key) for key in UPLOADS):
            values.append("image")
    return values


def slots_of(info: dict) -> list[dict]:
    """The inputs of a canvas node: sockets first, then one per widget, as the page itself writes them."""
    sockets, widgets = [], []
    for name, kind, options, optional in inputs_of(info):
        slot = {"name": name, "type": kind, "link": None}
        if is_widget(kind, options):
            widgets.append({**slot, "widget": {"name": name}})
        else:
            sockets.append({**slot, "shape": OPTIONAL_SHAPE} if optional else slot)
    return sockets + widgets


def source_of(info: dict, models: list[dict]) -> dict:
    """A node's properties: which pack and version it is from, and the model files it needs."""
    ours = info["python_module"].startswith("custom_nodes.")
    properties = {"cnr_id": "palimpsest" if ours else "comfy-core", "ver": pack_version() if ours else hosts.CURRENT, "Node name for S&R": info["name"]}
    return {**properties, "models": models} if models else properties


def colors_of(node: dict) -> dict:
    if node["class_type"] != "CLIPTextEncode":
        return {}
    return NEGATIVE if "negative" in title_of(node).lower() else POSITIVE


def height_of(node: dict, info: dict, slots: list[dict]) -> int:
    """Height of a node; a text box whose text comes over a link stays small."""
    widgets = [slot for slot in slots if "widget" in slot]
    lines = sum(bool(options.get("multiline")) and not isinstance(node["inputs"].get(name), list) for name, _, options, _ in inputs_of(info))
    uploads = sum(any(options.get(key) for key in UPLOADS) for _, _, options, _ in inputs_of(info))
    controls = sum(kind == "INT" and options.get("control_after_generate", name in SEEDS) for name, kind, options, _ in inputs_of(info))
    return layout.node_height(node["class_type"], len(slots) - len(widgets), len(info["output"]), len(widgets) + uploads + controls, lines)


def order_of(graph: dict) -> list[str]:
    """Node ids, every node after those it takes from."""
    order: list[str] = []

    def visit(node_id: str) -> None:
        if node_id in order:
            return
        for value in graph[node_id]["inputs"].values():
            if isinstance(value, list):
                visit(str(value[0]))
        order.append(node_id)

    for node_id in graph:
        visit(node_id)
    return order


def canvas(stem: str, graph: dict, object_info: dict, note: str = "") -> dict:
    """The canvas workflow of an API graph. Raises KeyError for a node class that the host does not offer."""
    order = order_of(graph)
    nodes, links = {}, []
    for node_id, node in graph.items():
        info, meta = object_info[node["class_type"]], node.get("_meta", {})
        slots = slots_of(info)
        nodes[node_id] = {
            "id": int(node_id), "type": node["class_type"], "pos": [0, 0], "size": [0, height_of(node, info, slots)], "flags": {},
            "order": order.index(node_id), "mode": 0, "inputs": slots,
            "outputs": [{"name": name, "type": kind, "links": None} for name, kind in zip(info["output_name"], info["output"])],
            "title": title_of(node) or info["display_name"], "properties": source_of(info, meta.get("models", [])),
            "widgets_values": widget_values(node, info), **colors_of(node),
        }
    for node_id, node in graph.items():
        for index, slot in enumerate(nodes[node_id]["inputs"]):
            value = node["inputs"].get(slot["name"])
            if not isinstance(value, list):
                continue
            source, output = nodes[str(value[0])], value[1]
            link = len(links) + 1
            slot["link"] = link
            source["outputs"][output]["links"] = [*(source["outputs"][output]["links"] or []), link]
            links.append([link, source["id"], output, int(node_id), index, source["outputs"][output]["type"]])
    metas = [node.get("_meta", {}) for node in graph.values()]
    groups = layout.place(list(nodes.values()), [meta.get("group") for meta in metas], [meta.get("width", 0) for meta in metas])
    last = max(node["id"] for node in nodes.values())
    if note:
        last += 1
        nodes[str(last)] = {"id": last, "type": "MarkdownNote", "pos": [0, layout.TITLE], "size": [layout.NOTE_WIDTH, layout.note_height(note)], "flags": {}, "order": len(order),
                            "mode": 0, "inputs": [], "outputs": [], "title": "What to try", "properties": {}, "widgets_values": [note.strip()], **NOTE}
    placed = list(nodes.values())
    return {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"palimpsest/workflows/{stem}")), "revision": 0, "last_node_id": last, "last_link_id": len(links),
            "nodes": placed, "links": links, "groups": groups, "config": {}, "extra": {"ds": layout.view(placed)}, "version": 0.4}


def text_of(workflow: dict) -> str:
    """A canvas workflow as its file holds it: one node, link or group a line, so that changes can be read."""
    lists = {key: workflow[key] for key in ("nodes", "links", "groups")}
    rest = {key: value for key, value in workflow.items() if key not in lists}
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in rest.items()]
    parts += [f"{json.dumps(key)}: [\n" + ",\n".join(f" {json.dumps(entry)}" for entry in entries) + "\n]" for key, entries in lists.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def canvas_text(path: Path, object_info: dict) -> str:
    """What workflows/NAME.json must hold for the API graph at `path`."""
    note = path.with_suffix(".md")
    text = note.read_text(encoding="utf-8") if note.is_file() else ""
    return text_of(canvas(path.stem, graphs.load_graph(path), object_info, text))


def write_all(object_info: dict) -> list[Path]:
    """Rewrite every canvas workflow; returns those that changed."""
    changed = []
    for path in graphs.api_graphs():
        target, text = FOLDER / path.name, canvas_text(path, object_info)
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8", newline="\n")
            changed.append(target)
    return changed
