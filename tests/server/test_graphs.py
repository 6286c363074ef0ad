"""Every API graph of the pack, through the real server."""
import pytest

from palimpsest.devtools.graphs import api_graphs, in_order, load_graph, missing_models

pytestmark = pytest.mark.server
GRAPHS = api_graphs()


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_every_node_of_the_graph_is_known_and_its_inputs_exist(server, path):
    offered = server.object_info()
    for node_id, node in load_graph(path).items():
        assert node["class_type"] in offered, f"node {node_id} of {path.name}"
        groups = offered[node["class_type"]]["input"]
        known = {name for group in ("required", "optional") for name in groups.get(group, {})}
        assert set(node["inputs"]) <= known, f"node {node_id} ({node['class_type']}) of {path.name}"
        assert set(groups.get("required", {})) <= set(node["inputs"]), f"node {node_id} ({node['class_type']}) of {path.name}"


@pytest.mark.parametrize("path", [path for path in GRAPHS if path.stem.startswith("mini-")], ids=lambda path: path.stem)
def test_mini_graph_needs_no_file_that_is_not_shipped(server, path):
    assert missing_models(load_graph(path), server.object_info()) == []


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in GRAPHS if path.stem.startswith("mini-")], ids=lambda path: path.stem)
def test_mini_graph_runs_to_its_pictures(server, path):
    *before, path = in_order([path])
    for first in before:
        server.run(load_graph(first))
    graph = load_graph(path)
    result = server.run(graph)
    pictures = [picture for node_id in graph for picture in result.images(node_id)]
    assert pictures, "the graph made no picture"
    assert all(server.view(picture) for picture in pictures)


def test_every_canvas_workflow_has_its_api_graph_and_the_other_way_round(root):
    canvas = {path.stem for path in (root / "workflows").glob("*.json")}
    assert canvas == {path.stem for path in GRAPHS}
