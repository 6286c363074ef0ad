"""Reading API graphs."""
import json

import pytest

from palimpsest.devtools.graphs import Missing, Role, api_graphs, in_order, is_smoke, load_graph, missing_models, node_name, role

INFO = {
    "CheckpointLoaderSimple": {"input": {"required": {"ckpt_name": [["a.safetensors"], {}]}}},
    "LoraLoader": {"input": {"required": {"lora_name": ["COMBO", {"options": ["l.safetensors"]}]}}},
    "Ours": {"input": {"required": {"weights": ["COMBO", {"options": []}]}}},
}


def test_the_shipped_graphs_make_six_pnp_edits_and_a_round_trip():
    """The contact sheet's promise; and an empty folder would leave every test over the graphs without cases."""
    graphs = {path.stem: load_graph(path).values() for path in api_graphs() if path.stem.startswith("mini-")}
    edits = [stem for stem, nodes in graphs.items() if any(node["class_type"] == "PalimpsestPnPInjector" for node in nodes)
             for node in nodes if node["class_type"] == "SaveImage" and role(node).name == "edit"]
    assert len(edits) >= 6, edits
    assert any(node["class_type"] == "PalimpsestReconstructCheck" for nodes in graphs.values() for node in nodes)
    assert any(not path.stem.startswith("mini-") for path in api_graphs()), "one for community checkpoints"


@pytest.mark.parametrize(("title", "expected"), [
    ("input", Role("input", 1, "")),
    ("edit 2", Role("edit", 2, "")),
    ("Edit 12: a blue circle: plain", Role("edit", 12, "a blue circle: plain")),
    ("film strip", Role("film strip", 1, "")),
    ("score: PSNR", Role("score", 1, "PSNR")),
])
def test_titles_say_what_an_output_is(title, expected):
    assert role({"class_type": "SaveImage", "_meta": {"title": title}}) == expected


def test_an_untitled_output_goes_by_its_class():
    assert role({"class_type": "SaveImage"}) == Role("saveimage", 1, "")


def loader(kind, name, value, **meta):
    return {"1": {"class_type": kind, "inputs": {name: value}, "_meta": meta}}


def test_a_file_that_the_host_offers_is_not_missing():
    assert missing_models(loader("CheckpointLoaderSimple", "ckpt_name", "a.safetensors"), INFO) == []
    assert missing_models(loader("LoraLoader", "lora_name", "l.safetensors"), INFO) == []


def test_a_missing_file_is_told_with_its_folder():
    assert missing_models(loader("CheckpointLoaderSimple", "ckpt_name", "b.safetensors"), INFO) == [Missing("b.safetensors", "checkpoints")]
    assert str(Missing("b.safetensors", "checkpoints")) == "b.safetensors in models/checkpoints"


def test_a_declared_file_is_told_with_its_address():
    entry = {"name": "s.safetensors", "directory": "seecoders", "url": "https://example.org/s.safetensors"}
    assert missing_models(loader("Ours", "weights", "s.safetensors", models=[entry]), INFO) == [Missing(**entry)]


def test_one_file_for_two_folders_is_told_for_each_that_lacks_it():
    entries = [{"name": "clip.safetensors", "directory": directory, "url": f"https://example.org/{directory}"} for directory in ("text_encoders", "clip_vision")]
    graph = {"1": {"class_type": "Two", "inputs": {"clip_name": "clip.safetensors", "clip_vision_name": "clip.safetensors"}, "_meta": {"models": entries}}}
    info = {"Two": {"input": {"required": {"clip_name": ["COMBO", {"options": []}], "clip_vision_name": ["COMBO", {"options": []}]}}}}
    assert missing_models(graph, info) == [Missing(**entry) for entry in entries]
    info["Two"]["input"]["required"]["clip_name"][1]["options"] = ["clip.safetensors"]
    assert missing_models(graph, info) == [Missing(**entries[1])]


def test_the_published_tasks_of_versatile_diffusion_have_a_graph_each():
    stems = {path.stem for path in api_graphs()}
    tasks = ("text_to_image", "variation", "dual", "multi", "focus", "image_to_text", "text_edit", "text_variation")
    assert {f"versatile_{task}-vd" for task in tasks} <= stems
    nodes = load_graph(next(path for path in api_graphs() if path.stem == "mini-versatile-dual"))
    ratios = [node["inputs"]["ratio"] for node in nodes.values() if node["class_type"] == "PalimpsestVersatileDualContext"]
    assert len(set(ratios)) >= 3 and all(0 < ratio < 1 for ratio in ratios)
    samplers = [node for node in nodes.values() if node["class_type"] == "KSampler"]
    assert all(nodes[node["inputs"]["positive"][0]]["class_type"] == "PalimpsestVersatileDualContext" for node in samplers) and len(samplers) == len(ratios)


def test_a_declared_file_that_no_input_names_is_looked_for_on_disk(tmp_path):
    graph = loader("Ours", "weights", 3, models=[{"name": "s.bin", "directory": "seecoders"}])
    assert missing_models(graph, INFO, [tmp_path]) == [Missing("s.bin", "seecoders")]
    (tmp_path / "seecoders").mkdir()
    (tmp_path / "seecoders" / "s.bin").touch()
    assert missing_models(graph, INFO, [tmp_path]) == []


def test_a_canvas_workflow_is_told_apart_from_an_api_graph(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"nodes": [], "links": [], "version": 0.4}))
    with pytest.raises(ValueError, match=r"Export \(API\)"):
        load_graph(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is no JSON"):
        load_graph(path)


def test_names_and_marks():
    graph = {"5": {"class_type": "KSampler", "inputs": {}, "_meta": {"title": "edit", "smoke": True}}, "6": {"class_type": "VAEDecode", "inputs": {}}}
    assert node_name(graph, "5") == 'node 5 (KSampler "edit")'
    assert node_name(graph, "6") == "node 6 (VAEDecode)"
    assert is_smoke(graph) and not is_smoke({"6": graph["6"]})


def write(folder, **after):
    for name, first in after.items():
        meta = {"after": first} if first else {}
        (folder / f"{name}.json").write_text(json.dumps({"1": {"class_type": "A", "inputs": {}, "_meta": meta}}))
    return folder


def test_a_graph_runs_after_the_one_whose_file_it_reads(tmp_path):
    write(tmp_path, a_load="b_save", b_save=None, c=None)
    assert [path.stem for path in in_order(api_graphs(tmp_path))] == ["b_save", "a_load", "c"]
    assert [path.stem for path in in_order([tmp_path / "a_load.json"])] == ["b_save", "a_load"]


def test_a_graph_that_reads_the_file_of_a_missing_one_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"a\.json reads a file of b"):
        in_order(api_graphs(write(tmp_path, a="b")))


def test_graphs_in_a_circle_do_not_hang(tmp_path):
    assert len(in_order(api_graphs(write(tmp_path, a="b", b="a")))) == 2


def test_a_broken_graph_keeps_its_turn(tmp_path):
    (tmp_path / "a.json").write_text("{")
    assert [path.stem for path in in_order(api_graphs(tmp_path))] == ["a"]
