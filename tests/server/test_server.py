"""The server helper itself, on stock nodes."""
import pytest

from palimpsest.devtools.client import GraphError, Interrupted
from palimpsest.devtools.server import Server, ServerError
from palimpsest.tests.helpers.stock import stock_graph

pytestmark = pytest.mark.server


def test_a_graph_runs_to_its_picture(server):
    seen = []
    result = server.run(stock_graph(), lambda *step: seen.append(step))
    assert result.executed == ["1", "2"]
    assert [step[0] for step in seen] == ["1", "2"]
    assert server.view(result.images("2")[0]).startswith(b"\x89PNG")


def test_a_refused_graph_names_node_input_and_reason(server, keeps_serving):
    graph = stock_graph()
    graph["1"]["inputs"]["width"] = -5
    with keeps_serving() as failed:
        server.run(graph)
    assert "node 1 (EmptyImage)" in str(failed.value) and "width" in failed.value.message


def test_a_graph_that_fails_while_it_runs_names_node_and_message(server, keeps_serving):
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
        "2": {"class_type": "ImageFromBatch", "inputs": {"image": ["1", 0], "batch_index": 0, "length": 1}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "4": {"class_type": "LatentComposite", "inputs": {"samples_to": ["3", 0], "samples_from": ["3", 0], "x": 0, "y": 0, "feather": 0}},
        "5": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "x"}},
        "6": {"class_type": "ImageScaleToTotalPixels", "inputs": {"image": ["2", 0], "upscale_method": "lanczos", "megapixels": 0.01}},
        "7": {"class_type": "SaveLatent", "inputs": {"samples": ["4", 0], "filename_prefix": "../../outside"}},
    }
    with keeps_serving() as failed:
        server.run(graph)
    assert failed.value.node_id == "7" and failed.value.message


def slow_graph(blurs: int, size: int) -> dict:
    """Nodes 10, 11, ... blur a picture one after the other."""
    graph = stock_graph()
    graph["1"]["inputs"].update(width=size, height=size)
    for number in range(10, 10 + blurs):
        source = "1" if number == 10 else str(number - 1)
        graph[str(number)] = {"class_type": "ImageBlur", "inputs": {"image": [source, 0], "blur_radius": 15, "sigma": 3.0}}
    graph["2"]["inputs"]["images"] = [str(9 + blurs), 0]
    return graph


def test_a_time_out_names_the_node_and_the_next_graph_runs(server):
    """Regression: a traceback, and the next graph waited until the slow one was through."""
    graph = slow_graph(40, 1024)
    with pytest.raises(ServerError, match=r"did not finish a graph within 1 seconds, it was at node \d+ \((ImageBlur|EmptyImage)\)"):
        server.run(graph, timeout=1)
    assert server.run(stock_graph()).images("2")


def test_cancel_is_told_apart_from_failure_and_the_next_graph_runs(server):
    graph = slow_graph(3, 1024)
    with pytest.raises(Interrupted):
        server.run(graph, lambda node_id, *_: server.interrupt() if node_id == "10" else None)
    assert server.run(stock_graph()).images("2")


def test_a_server_that_cannot_start_says_why(host):
    with pytest.raises(ServerError, match="unrecognized arguments: --no-such-option"):
        Server(host, ["--no-such-option"]).start()


def test_an_unknown_node_is_named(server):
    with pytest.raises(GraphError, match="NoSuchNode"):
        server.run({"1": {"class_type": "NoSuchNode", "inputs": {}}})
