"""SeeCoder over HTTP: wrong files in one sentence, a wrong model before sampling, cancel and queue again."""
import hashlib

import pytest
import torch
from safetensors.torch import save_file

from palimpsest.devtools.client import Interrupted
from palimpsest.devtools.graphs import API_FOLDER, load_graph
from palimpsest.tests.helpers.checkpoints import seecoder_shapes, write_random_checkpoint

pytestmark = pytest.mark.server
FILLER = {f"filler.{i}": torch.zeros(1024, 1024) for i in range(2)}  # below 4 MiB a file is taken for a negative embedding


@pytest.fixture(scope="module")
def folder(server):
    """models/seecoder with files that are none, and one whose tokens are as wide as SD1.5's."""
    folder = server.base / "models" / "seecoder"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"image_proj.proj.weight": torch.ones(2), "ip_adapter.1.to_k_ip.weight": torch.ones(2), **FILLER}, str(folder / "ip_adapter.safetensors"))
    save_file({"vision_model.embeddings.class_embedding": torch.ones(2), **FILLER}, str(folder / "clip_vision.safetensors"))
    write_random_checkpoint(folder / "seecoder-random.safetensors", seecoder_shapes())
    whole = (folder / "seecoder-random.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    yield folder
    server.request("/free", {"unload_models": True, "free_memory": True})
    for file in folder.iterdir():
        file.unlink()


def encoded(name: str, model: bool = False) -> dict:
    """A picture encoded with a file; with the mini checkpoint as the MODEL to check."""
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0x336699}},
        "2": {"class_type": "PalimpsestSeeCoderLoader", "inputs": {"seecoder_name": name, "precision": "auto"}},
        "3": {"class_type": "PalimpsestSeeCoderEncode", "inputs": {
            "seecoder": ["2", 0], "image": ["1", 0], "negative": "zeros", "strength": 1.0, "batch": "one each", "weights": "", "resize_longer_side": 0, "anime_file": "none"}},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 2]}},
    }
    if model:
        graph["5"] = {"class_type": "PalimpsestMiniCheckpoint", "inputs": {"name": "text_to_image"}}
        graph["3"]["inputs"]["model"] = ["5", 0]
    return graph


@pytest.mark.parametrize("name, node_id, words", [
    ("ip_adapter.safetensors", "2", "holds an IP-Adapter"),
    ("clip_vision.safetensors", "2", "holds a CLIP vision model"),
    ("truncated.safetensors", "2", "cannot be read"),
])
def test_wrong_files_are_named_in_one_sentence(server, keeps_serving, folder, name, node_id, words):
    with keeps_serving() as failed:
        server.run(encoded(name))
    error = failed.value
    assert error.node_id == node_id and words in error.message and name in error.message, str(error)
    assert "\n" not in error.message and error.message.endswith(".") and error.exception_type == "ValueError"


def test_a_model_of_another_width_is_refused_before_sampling(server, keeps_serving, folder):
    with keeps_serving() as failed:
        server.run(encoded("seecoder-random.safetensors", model=True))
    assert failed.value.node_id == "3" and "768" in failed.value.message and "\n" not in failed.value.message


def test_cancel_and_queue_again_gives_the_same_picture(server):
    def pictures(graph):
        result = server.run(graph)
        return [hashlib.sha256(server.view(found)).hexdigest() for found in result.images("9")]

    graph = load_graph(API_FOLDER / "mini-seecoder.json")
    first = pictures(graph)
    again = load_graph(API_FOLDER / "mini-seecoder.json")
    again["2"]["inputs"]["seed"] = 4  # nothing of the cancelled run comes from the cache
    with pytest.raises(Interrupted):
        server.run(again, lambda node_id, value, _: server.interrupt() if node_id == "6" and value else None)
    server.request("/free", {"unload_models": True, "free_memory": True})
    assert pictures(graph) == first
