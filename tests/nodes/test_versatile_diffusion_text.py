"""The nodes of Versatile Diffusion's text outputs: schema, wiring, and a run from files to texts."""

import os

import folder_paths
import pytest
import torch
from safetensors.torch import save_file

from palimpsest.devtools.graphs import API_FOLDER, load_graph
from palimpsest.nodes import versatile_diffusion_text as nodes
from palimpsest.nodes.versatile_diffusion import FROM_MODEL
from palimpsest.tests.helpers import versatile_text as toy
from palimpsest.tests.helpers.models import tiny_cond
from palimpsest.tests.helpers.sampling import ksampler
from palimpsest.versatile_diffusion import files, loader, optimus_files
from palimpsest.versatile_diffusion.keys import IMAGE, OFFICIAL_2023
from palimpsest.versatile_diffusion.model import FLOW


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A models folder with a toy four-flow file, a toy Optimus of latents of 768 values, and its vocabularies."""
    own = toy.own_models_folder(monkeypatch, tmp_path)
    toy.write_vocabularies(own)
    torch.save(toy.published(toy.tiny_text(latent=768), OFFICIAL_2023), tmp_path / files.FOLDER / "vd.pth")
    torch.save(toy.optimus_state(latent=768), own / "optimus-vae.pth")
    return tmp_path


def test_ids_and_order_of_inputs_are_for_ever():
    assert {node.define_schema().node_id: [item.id for item in node.define_schema().inputs] for node in nodes.NODES} == {
        "PalimpsestVersatileTextLoader": ["model_name", "contexts", "precision", "attention_sets", "clip_name"],
        "PalimpsestVersatileEmptyTextLatent": ["batch_size"],
        "PalimpsestVersatileOptimusLoader": ["optimus_name", "precision"],
        "PalimpsestVersatileOptimusEncode": ["optimus", "text", "one_per_line"],
        "PalimpsestVersatileOptimusEdit": ["optimus", "latent", "negative", "positive"],
        "PalimpsestVersatileOptimusDecode": ["optimus", "latent", "seed", "temperature", "top_k", "top_p", "max_tokens", "repeats"],
    }


def defaults(node):
    return {item.id: item.default for item in node.define_schema().inputs if getattr(item, "default", None) is not None}


def shown(output):
    return output.ui["text"]


@torch.inference_mode()
def test_from_files_to_texts_through_the_stock_sampler(installed):
    assert defaults(nodes.VersatileTextLoader)["model_name"] == "vd.pth" and defaults(nodes.VersatileOptimusLoader)["optimus_name"] == "optimus-vae.pth"
    loaded = nodes.VersatileTextLoader.execute(**{**defaults(nodes.VersatileTextLoader), "precision": "fp32"})
    model, report, _ = loaded.args
    assert "vd.pth: official 2023 naming" in report and report in shown(loaded)[0]
    (latent,) = nodes.VersatileEmptyTextLatent.execute(batch_size=3).args
    assert latent["samples"].shape == (3, 768, 1, 1) and not latent["samples"].any()

    def picture(tokens, seed):
        ((values, options),) = tiny_cond(tokens, seed, toy.CONTEXT)
        return [[values / 7, {**options, FLOW: IMAGE}]]

    samples = ksampler(model, latent, picture(257, 0), picture(257, 1), steps=3, cfg=7.5, sampler="ddim", scheduler="ddim_uniform")
    optimus, report = nodes.VersatileOptimusLoader.execute(**defaults(nodes.VersatileOptimusLoader)).args
    assert "encoder and decoder, latents of 768 values" in report
    output = nodes.VersatileOptimusDecode.execute(optimus=optimus, latent={"samples": samples}, **defaults(nodes.VersatileOptimusDecode))
    text, texts = output.args
    assert len(texts) == 3 and text == "\n".join(texts) and shown(output) == (text,) and len(set(texts)) == 3
    assert nodes.VersatileOptimusDecode.define_schema().outputs[1].is_output_list


def test_the_text_loader_brings_the_clip(installed, monkeypatch):
    """Regression: text variation needed Versatile Diffusion Loader, and with it the whole image diffuser, only to get a CLIP."""
    folder = installed / "text_encoders"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, str(folder / "clip-l.safetensors"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(folder)], {".safetensors"}))
    # the tower itself is the business of the loader's own tests
    monkeypatch.setitem(loader.LOADERS, "clip", lambda file, prefix="": (os.path.basename(file.path), prefix))
    node = nodes.VersatileTextLoader
    assert node.define_schema().inputs[-1].options == [FROM_MODEL, "clip-l.safetensors"]
    assert [item.id for item in node.define_schema().outputs] == ["model", "report", "clip"]
    run = lambda **changed: node.execute(**{**defaults(node), **changed}).args[1:]
    report, clip = run(model_name="vd.pth")
    assert clip is None and "not chosen: clip" in report
    report, clip = run(model_name="vd.pth", clip_name="clip-l.safetensors")
    assert clip == ("clip-l.safetensors", "") and "not chosen" not in report
    whole = torch.load(installed / files.FOLDER / "vd.pth", weights_only=True)
    torch.save({**whole, "ctx.text.model.text_projection.weight": torch.ones(2, 2)}, installed / files.FOLDER / "whole.pth")
    assert run(model_name="whole.pth")[1] == ("whole.pth", "ctx.text.model.")
    with pytest.raises(ValueError, match="no file gone.safetensors in models/text_encoders"):
        run(model_name="vd.pth", clip_name="gone.safetensors")
    before = node.fingerprint_inputs("vd.pth", "clip-l.safetensors")
    assert before != node.fingerprint_inputs("vd.pth", FROM_MODEL) != ""
    os.utime(folder / "clip-l.safetensors", ns=(1, 1))
    assert node.fingerprint_inputs("vd.pth", "clip-l.safetensors") != before


def test_the_words_of_the_sample_graph_need_no_image_diffuser():
    """Regression: the graph of text variation took its CLIP from Versatile Diffusion Loader, which now serves the drawn pictures alone."""
    graph = load_graph(API_FOLDER / "versatile_text_variation-vd.json")
    needed = [node_id for node_id, node in graph.items() if node["class_type"] in ("PreviewAny", "PalimpsestVersatileOptimusDecode")]
    for node_id in needed:
        needed.extend({value[0] for value in graph[node_id]["inputs"].values() if isinstance(value, list)} - set(needed))
    kinds = {graph[node_id]["class_type"] for node_id in needed}
    assert "PalimpsestVersatileTextLoader" in kinds and not {"PalimpsestVersatileLoader", "VAEDecode"} & kinds


@torch.inference_mode()
def test_encode_edit_decode(installed):
    optimus = nodes.VersatileOptimusLoader.execute("optimus-vae.pth", "auto").args[0]
    encode = lambda text, lines=False: nodes.VersatileOptimusEncode.execute(optimus=optimus, text=text, one_per_line=lines).args[0]["samples"]
    assert encode("the man\n\nwalks").shape == (1, 768, 1, 1) and encode("").shape == (1, 768, 1, 1)
    lines = encode("the man\n\nred dogs\n", True)
    assert lines.shape == (2, 768, 1, 1) and encode("\n \n", True).shape[0] == 1
    torch.testing.assert_close(lines[1:], encode("red dogs"), rtol=1e-4, atol=1e-5)
    latent = {"samples": lines, "batch_index": [4, 5]}
    edit = lambda negative, positive: nodes.VersatileOptimusEdit.execute(optimus=optimus, latent=latent, negative=negative, positive=positive).args[0]
    assert torch.equal(edit("", "")["samples"], lines) and edit("", "")["batch_index"] == [4, 5]
    torch.testing.assert_close(edit("", "walk")["samples"], lines + encode("walk"))
    assert not torch.equal(edit("red", "")["samples"], lines) and torch.equal(latent["samples"], lines)


def test_missing_files_are_explained(tmp_path, monkeypatch):
    toy.own_models_folder(monkeypatch, tmp_path)
    assert nodes.VersatileOptimusLoader.define_schema().inputs[0].options == [optimus_files.NONE_FOUND]
    assert "put optimus-vae.pth" in nodes.VersatileOptimusLoader.validate_inputs(optimus_files.NONE_FOUND)
    assert "put vd-four-flow" in nodes.VersatileTextLoader.validate_inputs(files.NONE_FOUND)
    assert nodes.VersatileOptimusLoader.validate_inputs(None) is True
    with pytest.raises(ValueError, match="There is no Optimus file yet"):
        nodes.VersatileOptimusLoader.execute(optimus_files.NONE_FOUND, "auto")
    assert nodes.VersatileOptimusLoader.fingerprint_inputs("gone.pth") == nodes.VersatileTextLoader.fingerprint_inputs(None) == ""


def test_a_replaced_file_is_loaded_anew(installed):
    path = installed / "optimus" / "optimus-vae.pth"
    before = nodes.VersatileOptimusLoader.fingerprint_inputs("optimus-vae.pth")
    assert before and nodes.VersatileOptimusLoader.fingerprint_inputs("optimus-vae.pth") == before
    os.utime(path, ns=(1, 1))
    assert nodes.VersatileOptimusLoader.fingerprint_inputs("optimus-vae.pth") != before
    assert nodes.VersatileOptimusLoader.validate_inputs("optimus-vae.pth") is True and nodes.VersatileTextLoader.validate_inputs("vd.pth") is True
