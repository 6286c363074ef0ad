"""Every sample workflow in the real front end: opens without missing nodes; those on mini models run from the Run button."""
import json

import pytest

from palimpsest.devtools.graphs import API_FOLDER, ROOT, in_order, load_graph
from palimpsest.devtools.layout import fitted
from palimpsest.devtools.server import PACK

pytestmark = pytest.mark.browser
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
MINI = [path for path in WORKFLOWS if path.stem.startswith("mini-")]


def models_of(path) -> list[dict]:
    """Files that a widget names: the page lists no others, such as a vocabulary beside a model."""
    return [model for node in json.loads(path.read_text(encoding="utf-8"))["nodes"] for model in node["properties"].get("models", []) if model["name"] in node["widgets_values"]]


def is_input(info: dict, name: str) -> bool:
    return any(name in group for group in info["input"].values())


def canvas(picture_class: str) -> dict:
    """A two-node canvas workflow: a grey picture into a node of that class."""
    return {
        "last_node_id": 2, "last_link_id": 1, "version": 0.4, "groups": [], "config": {}, "extra": {},
        "links": [[1, 1, 0, 2, 0, "IMAGE"]],
        "nodes": [
            {"id": 1, "type": "EmptyImage", "pos": [100, 100], "size": [300, 130], "flags": {}, "order": 0, "mode": 0, "inputs": [],
             "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}], "properties": {}, "widgets_values": [64, 64, 1, 8421504]},
            {"id": 2, "type": picture_class, "pos": [500, 100], "size": [300, 300], "flags": {}, "order": 1, "mode": 0,
             "inputs": [{"name": "images", "type": "IMAGE", "link": 1}], "outputs": [], "properties": {}, "widgets_values": []},
        ],
    }


def test_a_stock_workflow_opens_and_runs(front_end, tmp_path):
    path = tmp_path / "stock.json"
    path.write_text(json.dumps(canvas("PreviewImage")))
    front_end.open_workflow(path)
    assert front_end.missing_nodes() == []
    assert len(front_end.run()) == 1
    assert front_end.screenshot("stock").stat().st_size > 10_000


def test_a_missing_node_is_noticed(front_end, tmp_path):
    path = tmp_path / "missing.json"
    path.write_text(json.dumps(canvas("PalimpsestNoSuchNode")))
    front_end.open_workflow(path)
    assert "PalimpsestNoSuchNode" in front_end.missing_nodes()


def test_a_failing_graph_is_noticed(front_end, tmp_path):
    workflow = canvas("PreviewImage")
    workflow["nodes"][1]["inputs"][0]["link"] = None
    workflow["nodes"][0]["outputs"][0]["links"], workflow["links"] = [], []
    path = tmp_path / "unlinked.json"
    path.write_text(json.dumps(workflow))
    front_end.open_workflow(path)
    with pytest.raises(AssertionError, match="Required input is missing"):
        front_end.run(20)


@pytest.mark.parametrize("path", [path for path in WORKFLOWS if path not in MINI], ids=lambda path: path.stem)
def test_workflow_opens_without_missing_nodes(front_end, path):
    front_end.open_workflow(path)
    assert front_end.missing_nodes() == []
    offered = front_end.missing_models()
    # the page lists a file, with a button to get it, only if its address is one that it trusts
    assert all(f"{model['directory']} / {model['name']}" in offered for model in models_of(path)), offered
    front_end.screenshot(path.stem)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_page_reads_the_workflow_as_its_api_graph(front_end, path):
    front_end.open_workflow(path)
    offered = front_end.server.object_info()
    widths = {str(node["id"]): node["size"][0] for node in json.loads(path.read_text())["nodes"]}

    def plain(graph):
        # The canvas cuts titles wider than their nodes; PreviewAny's page part adds a widget that its node does not have
        return {node_id: (node["class_type"], fitted(node["_meta"]["title"], widths[node_id]),
                          {name: value for name, value in node["inputs"].items() if is_input(offered[node["class_type"]], name)})
                for node_id, node in graph.items()}

    assert plain(front_end.api_graph()) == plain(load_graph(API_FOLDER / path.name))


@pytest.mark.slow
@pytest.mark.parametrize("path", MINI, ids=lambda path: path.stem)
def test_mini_workflow_runs_from_the_run_button(front_end, path):
    for first in in_order([API_FOLDER / path.name])[:-1]:
        front_end.server.run(load_graph(first))
    front_end.open_workflow(path)
    assert front_end.missing_nodes() == []
    assert front_end.run()
    front_end.screenshot(path.stem)


@pytest.mark.slow
def test_the_p2p_controller_shows_its_alignment_on_the_canvas(front_end):
    front_end.open_workflow(ROOT / "workflows" / "mini-p2p-swap.json")
    front_end.run()
    sizes = front_end.page.evaluate(
        "app.graph._nodes.filter(node => node.type === 'PalimpsestP2PController').flatMap(node => (node.imgs || []).map(image => [image.naturalWidth, image.naturalHeight]))"
    )
    # two prompts of a dozen tokens side by side; a picture of the scene would be 128 x 128
    assert len(sizes) == 1 and sizes[0][0] > 300, sizes


def test_the_templates_browser_offers_every_workflow(server):
    assert sorted(server.get("/api/workflow_templates").get(PACK, [])) == sorted(path.stem for path in WORKFLOWS)
