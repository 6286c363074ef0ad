"""The graphs on community checkpoints, run once: random weights of the right shapes under the named files, small pictures, two steps."""
import io
import re

import numpy as np
import pytest
from PIL import Image

from palimpsest.devtools.graphs import api_graphs, load_graph, missing_models, role
from palimpsest.tests.helpers import checkpoints
from palimpsest.tests.helpers.versatile_text import write_vocabularies

pytestmark = [pytest.mark.server, pytest.mark.slow]
GRAPHS = [path for path in api_graphs() if not path.stem.startswith("mini-")]
# folder and file -> what is in it; one file may be needed in two folders
SHAPES = {
    "checkpoints/v1-5-pruned-emaonly-fp16.safetensors": checkpoints.sd15_shapes,
    "checkpoints/Realistic_Vision_V5.1_fp16-no-ema.safetensors": checkpoints.sd15_shapes,
    "checkpoints/instruct-pix2pix-00-22000.safetensors": checkpoints.instruct_pix2pix_shapes,
    "seecoder/seecoder-v1-0.safetensors": checkpoints.seecoder_shapes,
    "controlnet/control_v11p_sd15_canny_fp16.safetensors": checkpoints.controlnet_sd15_shapes,
    "sams/sam_vit_b_01ec64.pth": checkpoints.sam_shapes,
    "versatile_diffusion/vd-four-flow-v1-0-fp16.pth": checkpoints.versatile_shapes,
    "vae/kl-f8.pth": checkpoints.vae_sd15_shapes,
    "text_encoders/clip-vit-large-patch14.safetensors": checkpoints.clip_text_shapes,
    "clip_vision/clip-vit-large-patch14.safetensors": checkpoints.clip_vision_shapes,
    "optimus/optimus-vae.pth": checkpoints.optimus_shapes,
}
VOCABULARIES = ("optimus/gpt2-vocab.json", "optimus/bert-base-cased-vocab.txt")  # written together, for the small Optimus
PIXELS, STEPS, PAINTED = 64, 2, "painted.png"
SMALL = {"width": PIXELS, "height": PIXELS, "longer_side": PIXELS, "steps": STEPS, "end_at_step": STEPS}


@pytest.fixture(scope="module")
def stocked_server(server):
    """The server with a random checkpoint under every name that a community graph loads, and a picture with a painted mask."""
    models = [model for path in GRAPHS for node in load_graph(path).values() for model in node.get("_meta", {}).get("models", [])]
    files = []
    for name in sorted({f"{model['directory']}/{model['name']}" for model in models}):
        files.append(server.base / "models" / name)
        if name not in VOCABULARIES:
            assert name in SHAPES, f"tell SHAPES what {name} is made of"
            checkpoints.write_random_checkpoint(files[-1], SHAPES[name]())
    write_vocabularies(server.base / "models" / "optimus")
    files.append(server.base / "input" / PAINTED)
    painted = Image.effect_noise((96, 96), 60).convert("RGBA")
    painted.putalpha(Image.linear_gradient("L").resize((96, 96)))
    painted.save(files[-1])
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
    if any(node["class_type"] == "PalimpsestConceptMaskSAM" for node in graph.values()):
        pytest.importorskip("segment_anything", reason="the optional package segment-anything is not installed")
    assert missing_models(graph, stocked_server.object_info(), [stocked_server.base / "models"]) == []
    masks = {value[0] for node in graph.values() for value in node["inputs"].values() if isinstance(value, list) and value[1] == 1}
    painted = [graph[node_id] for node_id in masks if graph[node_id]["class_type"] == "LoadImage"]
    for loader in painted:
        loader["inputs"]["image"] = PAINTED
    for node in graph.values():
        node["inputs"].update({name: value for name, value in SMALL.items() if name in node["inputs"]})
    before = len(stocked_server.log().encode())
    result = stocked_server.run(graph)
    log = stocked_server.log(before)
    assert not re.findall(r".*(?:missing|unexpected).*", log, re.I), "the random checkpoint is not of the shapes that the host expects"
    assert not painted or "no effect" not in log, "a node of ours was idle"
    pictures = {node_id: result.images(node_id) for node_id, node in graph.items() if node["class_type"] == "SaveImage"}
    assert pictures and all(pictures.values())
    for node_id, found in ((node_id, picture) for node_id, several in pictures.items() for picture in several):
        pixels = np.asarray(Image.open(io.BytesIO(stocked_server.view(found))))
        # a reference is shown as it was loaded
        assert pixels.std() > 0 and (role(graph[node_id]).name.startswith(("input", "concept")) or pixels.shape == (PIXELS, PIXELS, 3))
    for node_id, node in graph.items():
        if node["class_type"] == "PreviewAny":
            assert result.text(node_id).strip(), f'nothing was written for "{role(node).name}"'
