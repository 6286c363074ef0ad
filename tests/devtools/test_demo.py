"""The demo, on graphs of stock nodes."""
import json

import pytest
from PIL import Image

from palimpsest.devtools import demo
from palimpsest.devtools.sheet import write_sheet
from palimpsest.tests.helpers.stock import stock_graph

pytestmark = pytest.mark.server


@pytest.fixture
def graph_file(tmp_path):
    def write(name, graph):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(graph))
        return path

    return write


def with_text(graph):
    return {**graph, "3": {"class_type": "PreviewAny", "inputs": {"source": "PSNR 31 dB"}, "_meta": {"title": "score"}},
            "4": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}, "_meta": {"title": "input"}}}


def test_pictures_and_sheet_are_written(server, graph_file, tmp_path, capsys):
    files, rows, failures = demo.run_graphs(server, [graph_file("mini-stock", with_text(stock_graph()))], tmp_path)
    assert failures == [] and sorted(path.name for path in files) == ["mini-stock-edit-1.png", "mini-stock-input-1.png"]
    assert [label for label, _ in rows[0].pictures] == ["input", "edit"] and rows[0].lines == ["score: PSNR 31 dB"]
    write_sheet(rows, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width > 512
    assert "[1/1] mini-stock: " in capsys.readouterr().out


def test_a_graph_without_its_model_is_skipped_with_the_place_to_put_it(server, graph_file, tmp_path, capsys):
    graph = {**stock_graph(), "9": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "dreamy.safetensors"}}}
    assert demo.run_graphs(server, [graph_file("community", graph)], tmp_path) == ([], [], [])
    assert "skipped: needs dreamy.safetensors in models/checkpoints" in capsys.readouterr().out


def test_a_mini_graph_without_its_model_is_a_failure(server, graph_file, tmp_path):
    graph = {**stock_graph(), "9": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "dreamy.safetensors"}}}
    *_, failures = demo.run_graphs(server, [graph_file("mini-x", graph)], tmp_path)
    assert len(failures) == 1 and "dreamy.safetensors" in failures[0]


def test_a_failing_graph_is_named_and_the_next_one_runs(server, graph_file, tmp_path):
    broken = stock_graph()
    broken["1"]["inputs"]["width"] = -1
    paths = [graph_file("mini-a", broken), graph_file("mini-b", stock_graph())]
    files, rows, failures = demo.run_graphs(server, paths, tmp_path)
    assert len(failures) == 1 and "mini-a: node 1 (EmptyImage)" in failures[0] and "width" in failures[0]
    assert [path.name for path in files] == ["mini-b-edit-1.png"] and len(rows) == 1


def test_a_graph_that_makes_no_picture_is_a_failure(server, graph_file, tmp_path):
    graph = {"1": {"class_type": "PreviewAny", "inputs": {"source": "words"}}}
    *_, failures = demo.run_graphs(server, [graph_file("mini-text", graph)], tmp_path)
    assert len(failures) == 1 and "made no picture" in failures[0]


@pytest.mark.parametrize("words", [[], ["nothing-is-called-this"]])
def test_without_graphs_it_says_so_and_fails(monkeypatch, tmp_path, capsys, words):
    """Regression: a checkout without its graphs counted as a demo that had run."""
    monkeypatch.setattr(demo.graphs, "api_graphs", lambda: [])
    assert demo.main(words) == 1
    assert "no graphs in workflows/api" in capsys.readouterr().out
