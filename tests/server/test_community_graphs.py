"""The graphs on community checkpoints, run once: random weights of the right shapes under the named files, small pictures, two steps."""
import io
import re

import numpy as np
import pytest
from PIL import Image

from palimpsest.devtools.graphs import api_graphs, load_graph, missing_models, role
from palimpsest.tests.helpers.checkpoints import controlnet_sd15_shapes, sd15_shapes, seecoder_shapes, write_random_checkpoint

pytestmark = [pytest.mark.server, pytest.mark.slow]
GRAPHS = [path for path in api_graphs() if not path.stem.startswith("mini-")]
SHAPES = {
    "v1-5-pruned-emaonly-fp16.safetensors": sd15_shapes,
    "Realistic_Vision_V5.1_fp16-no-ema.safetensors": sd15_shapes,
    "seecoder-v1-0.safetensors": seecoder_shapes,
    "control_v11p_sd15_canny_fp16.safetensors": controlnet_sd15_shapes,
}
PIXELS, STEPS = 64, 2
SMALL = {"width": PIXELS, "height": PIXELS, "steps": STEPS, "end_at_step": STEPS}


@pytest.fixture(scope="module")
def stocked_server(server):
    """The server with a random checkpoint under every name that a community graph loads."""
    models = [model for path in GRAPHS for node in load_graph(path).values() for model in node.get("_meta", {}).get("models", [])]
    files = []
    for model in {model["name"]: model for model in models}.values():
        assert model["name"] in SHAPES, f"tell SHAPES what {model['name']} is made of"
        files.append(server.base / "models" / model["directory"] / model["name"])
        write_random_checkpoint(files[-1], SHAPES[model["name"]]())
    yield server
    server.request("/free", {"unload_models": True, "free_memory": True})
    for file in files:
        try:
            file.unlink()
        except OSError:
            pass  # Windows keeps a mapped file; it goes with the server's folder


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_community_graph_runs_on_random_weights(stocked_server, path):
    graph = load_graph(path)
    assert missing_models(graph, stocked_server.object_info()) == []
    for node in graph.values():
        node["inputs"].update({name: value for name, value in SMALL.items() if name in node["inputs"]})
    before = len(stocked_server.log().encode())
    result = stocked_server.run(graph)
    assert not re.findall(r".*(?:missing|unexpected).*", stocked_server.log(before), re.I), "the random checkpoint is not of the shapes that the host expects"
    pictures = {node_id: result.images(node_id) for node_id, node in graph.items() if node["class_type"] == "SaveImage"}
    assert pictures and all(pictures.values())
    for node_id, found in ((node_id, picture) for node_id, several in pictures.items() for picture in several):
        pixels = np.asarray(Image.open(io.BytesIO(stocked_server.view(found))))
        # a reference is shown as it was loaded
        assert pixels.std() > 0 and (role(graph[node_id]).name == "input" or pixels.shape == (PIXELS, PIXELS, 3))
