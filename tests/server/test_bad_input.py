"""What people connect by mistake, over HTTP: one sentence that names the node, nothing half-written, and the server keeps serving."""
import pickle

import pytest
import torch
from safetensors.torch import save, save_file

from palimpsest.inversion.storage import save_trajectory
from palimpsest.inversion.trajectory import Trajectory

pytestmark = pytest.mark.server


def inversion(**changes) -> dict:
    """Two steps of DDIM Invert on the mini checkpoint, saved; `changes` go to the node's inputs."""
    return {
        "1": {"class_type": "PalimpsestMiniCheckpoint", "inputs": {"name": "text_to_image"}},
        "2": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a red circle"}},
        "4": {"class_type": "PalimpsestDDIMInvert", "inputs": {
            "model": ["1", 0], "latent_image": ["2", 0], "positive": ["3", 0], "steps": 2, "scheduler": "normal", "guidance": 1.0, "iterations": 0,
            "convention": "destination", **changes}},
        "5": {"class_type": "PalimpsestSaveTrajectory", "inputs": {"trajectory": ["4", 1], "filename_prefix": "trajectories/bad_input"}},
    }


def wrong_channels() -> dict:
    return inversion(latent_image=["6", 0]) | {"6": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}}}


def nan_pixels() -> dict:
    """The decoder makes NaN pixels of NaN latents; no stock node loads such a picture."""
    return inversion(latent_image=["8", 0]) | {
        "6": {"class_type": "LoadLatent", "inputs": {"latent": "nan.latent"}},
        "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
        "8": {"class_type": "VAEEncode", "inputs": {"pixels": ["7", 0], "vae": ["1", 2]}},
    }


def loaded(file: str) -> dict:
    return {
        "1": {"class_type": "PalimpsestMiniCheckpoint", "inputs": {"name": "text_to_image"}},
        "2": {"class_type": "PalimpsestLoadTrajectory", "inputs": {"file": file}},
        "3": {"class_type": "PalimpsestReconstructCheck", "inputs": {"model": ["1", 0], "trajectory": ["2", 0]}},
    }


def injected(**changes) -> dict:
    graph = inversion()
    del graph["5"]
    return graph | {
        "6": {"class_type": "PalimpsestPnPInjector", "inputs": {
            "model": ["1", 0], "trajectory": ["4", 1], "feature_layers": "preset default", "attention_layers": "preset default", "tau_f": 0.8, "tau_A": 0.5,
            "negative_schedule": "off", "negative_alpha": 1.0, "bank_device": "auto", **changes}},
        "7": {"class_type": "PreviewAny", "inputs": {"source": ["6", 2]}},
    }


def half_denoised() -> dict:
    graph = injected()
    return graph | {
        "7": {"class_type": "KSampler", "inputs": {
            "model": ["6", 0], "seed": 0, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "positive": ["3", 0], "negative": ["3", 0],
            "latent_image": ["6", 1], "denoise": 0.4}},
        "8": {"class_type": "SaveLatent", "inputs": {"samples": ["7", 0], "filename_prefix": "bad_input"}},
    }


def scene(**changes) -> dict:
    inputs = {"seed": 1, "objects": "1", "caption": "", "edit": "none", "edit_value": "auto", "edit_object": 1, "name_all": True, **changes}
    return {"1": {"class_type": "PalimpsestMiniScene", "inputs": inputs}, "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 2]}}}


def concept(extra=None, **changes) -> dict:
    """One MRSA Concept of a scene; `changes` go to its inputs, `extra` nodes beside it."""
    return {
        "1": {"class_type": "PalimpsestMiniCheckpoint", "inputs": {"name": "text_to_image"}},
        "2": scene()["1"],
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ["2", 2]}},
        "4": {"class_type": "PalimpsestMRSAConcept", "inputs": {
            "mask": ["2", 1], "picture_prompt": ["3", 0], "weight": 3.0, "resize": "crop", "width": 128, "height": 128, "mask_policy": "area", "mask_threshold": 0.5,
            "image": ["2", 0], "vae": ["1", 2], **changes}},
        "5": {"class_type": "PreviewAny", "inputs": {"source": ["4", 2]}},
    } | (extra or {})


def without(graph: dict, node: str, name: str) -> dict:
    del graph[node]["inputs"][name]
    return graph


def composed(graph=None, **changes) -> dict:
    return (graph or concept()) | {
        "6": {"class_type": "PalimpsestMRSAConceptComposer", "inputs": {
            "model": ["1", 0], "concepts": ["4", 0], "layers": "preset default", "start": 0.0, "end": 1.0, "style_fidelity": 1.0, "rule": "code",
            "noise": "fresh every step (published)", "reference_seed": -1, "watch": False, "bank_device": "auto", **changes}},
        "7": {"class_type": "PreviewAny", "inputs": {"source": ["6", 2]}},
    }


def concept_of_another_family() -> dict:
    latent = {"8": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}}}
    return composed(without(without(concept(latent, latent=["8", 0]), "4", "image"), "4", "vae"))


def composed_twice() -> dict:
    graph = composed()
    return graph | {"7": {"class_type": "PalimpsestMRSAConceptComposer", "inputs": {**graph["6"]["inputs"], "model": ["6", 0]}},
                    "8": {"class_type": "PreviewAny", "inputs": {"source": ["7", 2]}}}


def unwatched() -> dict:
    return composed() | {"7": {"class_type": "PalimpsestConceptAttentionPreview", "inputs": {"shares": ["6", 1], "latent": ["8", 0], "image": ["2", 0]}},
                         "8": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}}}


def image_guided(**changes) -> dict:
    """InstructPix2Pix CFG; `changes` go to its inputs."""
    return {
        "1": {"class_type": "PalimpsestMiniCheckpoint", "inputs": {"name": "text_to_image"}},
        "6": {"class_type": "PalimpsestInstructPix2PixCFG", "inputs": {
            "model": ["1", 0], "image_scale": 1.5, "start": 0.0, "end": 1.0, "separate_call": "auto", **changes}},
        "7": {"class_type": "PreviewAny", "inputs": {"source": ["6", 0]}},
    }


def editing_nothing() -> dict:
    """An edit model whose prompts carry no picture."""
    graph = inversion()
    return {**image_guided(), "1": {"class_type": "PalimpsestMiniCheckpoint", "inputs": {"name": "instruct_pix2pix"}}, "2": graph["2"], "3": graph["3"]} | {
        "7": {"class_type": "KSampler", "inputs": {
            "model": ["6", 0], "seed": 0, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "positive": ["3", 0], "negative": ["3", 0],
            "latent_image": ["2", 0], "denoise": 1.0}},
        "8": {"class_type": "SaveLatent", "inputs": {"samples": ["7", 0], "filename_prefix": "bad_input"}},
    }


def edited_never() -> dict:
    return {**image_guided(start=0.8, end=0.2), "1": {"class_type": "PalimpsestMiniCheckpoint", "inputs": {"name": "instruct_pix2pix"}}}


def pictured(extra=None, **changes) -> dict:
    """InstructPix2Pix Conditioning of a scene; `changes` go to its inputs, `extra` nodes beside it."""
    return {
        "1": {"class_type": "PalimpsestMiniCheckpoint", "inputs": {"name": "text_to_image"}},
        "2": scene(objects="2")["1"],
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "make the circle blue"}},
        "4": {"class_type": "PalimpsestInstructPix2PixConditioning", "inputs": {
            "positive": ["3", 0], "negative": ["3", 0], "vae": ["1", 2], "image": ["2", 0], "longer_side": 128, **changes}},
        "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 4]}},
    } | (extra or {})


def narrow_picture() -> dict:
    return pictured({"6": {"class_type": "EmptyImage", "inputs": {"width": 2000, "height": 16, "batch_size": 1, "color": 0}}}, image=["6", 0])


def edit_checkpoint(name: str, weights: str = "ema") -> dict:
    return {
        "1": {"class_type": "PalimpsestInstructPix2PixLoader", "inputs": {"ckpt_name": name, "weights": weights}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }


@pytest.fixture(scope="module")
def bad_checkpoints(server):
    """Files in models/checkpoints that are no edit checkpoints, gone afterwards: other tests see what the host lists."""
    folder = server.base / "models" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    files = {"bad_one_set": {first: torch.zeros(320, 8, 3, 3)}, "bad_ordinary": {first: torch.zeros(320, 4, 3, 3)}, "bad_inpainting": {first: torch.zeros(320, 9, 3, 3)},
             "bad_weights": {"weight": torch.zeros(3)}}
    paths = [folder / f"{name}.safetensors" for name in files]
    for path, state in zip(paths, files.values()):
        save_file(state, str(path))
    paths.append(folder / "bad_code.ckpt")
    paths[-1].write_bytes(pickle.dumps(print))
    yield
    for path in paths:
        path.unlink()


@pytest.fixture(scope="module")
def bad_files(server, bad_checkpoints):
    """Files in the server's input folder that are not what their names say."""
    folder = server.base / "input"
    whole = folder / "other_model.safetensors"
    save_trajectory(Trajectory(sigmas=torch.tensor([0.0, 14.6]), latents=torch.zeros(2, 1, 4, 16, 16), conditioning=[], architecture="SD1.x", prediction="eps",
                               fingerprint="abc:AAA="), str(whole))
    (folder / "truncated.safetensors").write_bytes(whole.read_bytes()[:-100])
    (folder / "pickle.safetensors").write_bytes(pickle.dumps({"latents": [1, 2, 3]}))
    save_file({"weight": torch.zeros(3)}, str(folder / "weights.safetensors"))
    (folder / "nan.latent").write_bytes(save({"latent_tensor": torch.full((1, 4, 16, 16), float("nan")), "latent_format_version_0": torch.zeros(0)}))


# what is wrong: (graph, the node that says so, words of its sentence)
BAD = {
    "latent of 16 channels": (wrong_channels, "4", "16 channels, but the model works on 4"),
    "NaN pixels": (nan_pixels, "4", "NaN or infinite"),
    "trajectory of another model": (lambda: loaded("other_model.safetensors"), "3", "another SD1.x model"),
    "truncated trajectory": (lambda: loaded("truncated.safetensors"), "2", "truncated.safetensors is not a readable safetensors file"),
    "pickle": (lambda: loaded("pickle.safetensors"), "2", "pickle.safetensors is not a readable safetensors file"),
    "weights for a trajectory": (lambda: loaded("weights.safetensors"), "2", "not a trajectory"),
    "layer that is not there": (lambda: injected(feature_layers="u99"), "6", "u99"),
    "layers in no notation": (lambda: injected(attention_layers="the middle"), "6", 'Cannot read "the" in the attention layers'),
    "guidance without a negative": (lambda: inversion(guidance=7.5), "4", "needs a negative"),
    "denoise below 1": (half_denoised, "7", "set denoise to 1"),
    "concept without a source": (lambda: without(concept(), "4", "image"), "4", "neither is connected"),
    "concept without a VAE": (lambda: without(concept(), "4", "vae"), "4", "no VAE is connected"),
    "concept of another family": (concept_of_another_family, "6", "has 16 channels, but the connected model works on 4"),
    "composer behind a composer": (composed_twice, "7", "chain all concepts into one composer"),
    "composed layer that is not there": (lambda: composed(layers="u99"), "6", "u99"),
    "composer's window the wrong way": (lambda: composed(start=0.8, end=0.2), "6", "the start before the end"),
    "watched layer that is not composed": (lambda: composed(watch=True, watch_layers="d0"), "6", "None of the watch layers sees the concepts"),
    "shares without watch": (unwatched, "7", "switch its watch on"),
    "image scale on an ordinary model": (image_guided, "6", "takes 4, as an ordinary text-to-image model"),
    "image scale that never acts": (edited_never, "6", "set the start before the end"),
    "edit of no picture": (editing_nothing, "7", "put InstructPix2Pix Conditioning between the prompts and the sampler"),
    "two masks for one picture": (lambda: pictured(mask=["2", 1]), "4", "2 masks for 1 picture"),
    "picture that is too narrow": (narrow_picture, "4", "too narrow for the published size rule"),
    "longer side below a cell": (lambda: pictured(longer_side=32), "4", "set it to 64 or more"),
    "checkpoint without averages": (lambda: edit_checkpoint("bad_one_set.safetensors"), "1", "set weights to plain"),
    "ordinary checkpoint": (lambda: edit_checkpoint("bad_ordinary.safetensors", "plain"), "1", "takes 4, as an ordinary text-to-image model"),
    "inpainting checkpoint": (lambda: edit_checkpoint("bad_inpainting.safetensors", "plain"), "1", "takes 9, as an inpainting model"),
    "weights for a checkpoint": (lambda: edit_checkpoint("bad_weights.safetensors"), "1", "holds no UNet of the SD family"),
    "checkpoint of code": (lambda: edit_checkpoint("bad_code.ckpt"), "1", "get the .safetensors of it instead"),
    "edit of a second object": (lambda: scene(edit="color", edit_object=2), "1", "object 2 cannot be edited"),
    "edit to what is there": (lambda: scene(caption="a red circle", edit="color", edit_value="red"), "1", "is red already"),
    "edit to a word of another attribute": (lambda: scene(edit="shape", edit_value="red"), "1", "'red' is no shape"),
}
# widgets: some hosts refuse them before anything runs, in their own words, others leave it to us
REFUSED = {
    "zero steps": (lambda: inversion(steps=0), "4", "steps"),
    "scheduler that is not there": (lambda: inversion(scheduler="none"), "4", "none"),
    "member that is not shipped": (lambda: {**inversion(), "1": {"class_type": "PalimpsestMiniCheckpoint", "inputs": {"name": "none"}}}, "1", "none"),
    "missing trajectory file": (lambda: loaded("none.safetensors"), "2", "does not exist"),
    "missing edit checkpoint": (lambda: edit_checkpoint("none.safetensors"), "1", "There is no checkpoint none.safetensors"),
    "checkpoint outside the folders": (lambda: edit_checkpoint("../../secret.safetensors"), "1", "There is no checkpoint"),
    "file outside the folders": (lambda: loaded("../../secret.safetensors"), "2", "outside"),
}


def written(server) -> set[str]:
    """What lies in the output folder, apart from the pictures of the stock graph."""
    return {path.name for path in (server.base / "output").rglob("*") if path.is_file() and not path.name.startswith("stock")}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(server, keeps_serving, bad_files, name):
    make, node_id, words = BAD[name]
    before = written(server)
    with keeps_serving() as failed:
        server.run(make())
    error = failed.value
    assert error.node_id == node_id and words in error.message, str(error)
    assert "\n" not in error.message and error.message.endswith(".") and error.exception_type == "ValueError"
    assert written(server) == before, "something was left half-written"


@pytest.mark.parametrize("name", REFUSED)
def test_bad_widget_is_refused_by_name(server, keeps_serving, name):
    make, node_id, words = REFUSED[name]
    with keeps_serving() as failed:
        server.run(make())
    assert failed.value.node_id == node_id and words in failed.value.message, str(failed.value)


def test_an_empty_prompt_works(server):
    graph = inversion()
    graph["3"]["inputs"]["text"] = ""
    before = written(server)
    result = server.run(graph)
    (new,) = written(server) - before
    assert new in result.text("5") and "2 steps" in result.text("4")
