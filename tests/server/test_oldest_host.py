"""Smoke leg: the oldest supported ComfyUI loads the pack, offers its nodes and runs one graph per method."""
import pytest

from palimpsest.devtools.graphs import api_graphs, in_order, is_smoke, load_graph
from palimpsest.nodes import all_nodes
from palimpsest.tests.helpers.log import our_warnings

pytestmark = pytest.mark.server
SMOKE = [path for path in api_graphs() if path.stem.startswith("mini-") and is_smoke(load_graph(path))]


def test_it_offers_every_node(oldest_server):
    offered = {name for name in oldest_server.object_info() if name.startswith("Palimpsest")}
    assert offered == {node.GET_SCHEMA().node_id for node in all_nodes()}


def test_no_warning_names_this_pack(oldest_server, root):
    assert our_warnings(oldest_server, root) == []


@pytest.mark.parametrize("method", ["ddim_invert", "pnp", "mrsa", "instruct_pix2pix", "versatile"])
def test_every_method_has_a_smoke_graph(method):
    """An empty list would be no test at all."""
    assert [path for path in SMOKE if path.stem.startswith(f"mini-{method}")]


@pytest.mark.slow
@pytest.mark.parametrize("path", SMOKE, ids=lambda path: path.stem)
def test_smoke_graph(oldest_server, path):
    *before, path = in_order([path])
    for first in before:
        oldest_server.run(load_graph(first))
    graph = load_graph(path)
    result = oldest_server.run(graph)
    assert any(entry.get("images") for entry in result.outputs.values()), "the graph made no picture"
