"""The nodes of Versatile Diffusion: schema, wiring, and a run of the stock sampler through all of them."""

import pytest
import torch

from palimpsest.nodes.versatile_context import (
    VersatileCombineImages, VersatileFocus, VersatileImageContext, VersatileLoadContext, VersatileSaveContext,
)
from palimpsest.nodes.versatile_diffusion import FROM_MODEL, ColorMatch, VersatileDualContext, VersatileEmptyImage, VersatileLoader, picked
from palimpsest.tests.helpers.models import tiny_sd15
from palimpsest.tests.helpers.sampling import ksampler
from palimpsest.tests.helpers.versatile import clip_vision, common_names, context, picture, relative, text_clip, tiny, write_files
from palimpsest.versatile_diffusion import files, loader
from palimpsest.versatile_diffusion.contexts import encode_pictures, image_conditioning
from palimpsest.versatile_diffusion.dual import BRANCH
from palimpsest.versatile_diffusion.focus import focus
from palimpsest.versatile_diffusion.keys import OFFICIAL_2023

NODES = (
    VersatileLoader, VersatileDualContext, VersatileEmptyImage, ColorMatch, VersatileImageContext, VersatileFocus, VersatileCombineImages, VersatileSaveContext,
    VersatileLoadContext,
)
EMPTY = torch.zeros(1, 4, 16, 16)


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    return clip_vision(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def clip():
    return text_clip()


@torch.inference_mode()
def run(node, **changed):
    """A node's outputs with its widgets at their defaults."""
    defaults = {item.id: item.default for item in node.define_schema().inputs if getattr(item, "default", None) is not None}
    return node.execute(**{**defaults, **changed}).args


def words(clip, text):
    import nodes

    with torch.inference_mode():
        return nodes.CLIPTextEncode().encode(clip, text)[0]


def test_ids_and_order_of_inputs_are_for_ever():
    assert [node.define_schema().node_id for node in NODES] == [
        "PalimpsestVersatileLoader", "PalimpsestVersatileDualContext", "PalimpsestVersatileEmptyImage", "PalimpsestColorMatch", "PalimpsestVersatileImageContext",
        "PalimpsestVersatileFocus", "PalimpsestVersatileCombineImages", "PalimpsestVersatileSaveContext", "PalimpsestVersatileLoadContext",
    ]
    assert [item.id for item in VersatileLoader.define_schema().inputs] == ["model_name", "flows", "precision", "attention_sets", "clip_name", "clip_vision_name", "vae_name"]
    assert [item.id for item in VersatileImageContext.define_schema().inputs] == ["clip_vision", "image", "crop", "weight", "focus", "batch", "mask", "model"]
    assert [item.id for item in VersatileDualContext.define_schema().inputs] == ["text", "image", "ratio", "negative_text", "negative_image", "model"]
    assert [item.id for item in VersatileFocus.define_schema().inputs] == ["context", "level", "rank", "semantic_drop", "style_keep"]


@pytest.mark.parametrize("node", NODES)
def test_every_node_has_a_page_and_every_input_its_tooltip(root, node):
    schema = node.define_schema()
    assert (root / "web" / "docs" / f"{schema.node_id}.md").read_text().startswith(f"# {schema.display_name}\n")
    assert all(len(item.tooltip or "") > 20 for item in schema.inputs) and all(item.tooltip for item in schema.outputs)


def test_text_and_picture_through_the_stock_sampler(model, clip, vision):
    shown, report = run(VersatileImageContext, clip_vision=vision, image=picture(100, 140))
    assert "image context: 1 row of 257 tokens, 64 values" in report
    results = {}
    for ratio in (0.0, 0.5, 1.0):
        positive, negative, report = run(VersatileDualContext, text=words(clip, "a red circle"), image=shown, ratio=ratio, negative_text=words(clip, ""), model=model)
        results[ratio] = ksampler(model, EMPTY, positive, negative, steps=2)
        assert f"ratio {ratio:g}" in report and "text connected, image zeros" in report
        assert ("alone is computed" in report) is (ratio != 0.5)
    alone = ksampler(model, EMPTY, shown, run(VersatileEmptyImage, like=shown)[0], steps=2)
    assert torch.equal(results[0.0], alone)
    assert torch.equal(results[1.0], ksampler(model, EMPTY, words(clip, "a red circle"), words(clip, ""), steps=2))
    assert relative(results[0.5], results[0.0]) > 1e-3 < relative(results[0.5], results[1.0])


def test_negatives_of_a_dual_context():
    text, image = [[context(77), {"area": (8, 8, 0, 0)}]], image_conditioning([context(257, 1), context(257, 2)])
    _, negative, report = run(VersatileDualContext, text=text, image=image)
    (tokens, options), = negative
    assert float(tokens.abs().max()) == float(options["versatile_image"].abs().max()) == 0
    assert options["versatile_image"].shape == (1, 514, 64) and options["versatile_ratio"] == 0.5 and "area" not in options
    assert "text zeros, image zeros" in report
    other = image_conditioning([context(257, 9)])
    _, negative, _ = run(VersatileDualContext, text=text, image=image, negative_text=[[context(77, 4), {}]], negative_image=other)
    assert torch.equal(negative[0][1]["versatile_image"], other[0][0])


def test_an_ordinary_model_is_refused_where_it_is_connected_and_warns_of_nothing_elsewhere(root, caplog, vision):
    """Regression: no page said that such a model takes the tokens for a prompt, and draws; contexts of a picture alone could not be checked."""
    ordinary, text, image = tiny_sd15(context_dim=64, channel_mult=(1, 1, 1, 1)), [[context(77), {}]], image_conditioning([context(257)])
    for node, inputs in ((VersatileDualContext, {"text": text, "image": image}), (VersatileImageContext, {"clip_vision": vision, "image": picture(32, 32)}),
                         (VersatileLoadContext, {"file": "none"})):
        with pytest.raises(ValueError, match="SD15, which cannot read") as error:
            run(node, **inputs, model=ordinary)
        assert "\n" not in str(error.value) and str(error.value).endswith(".")
    positive, negative, _ = run(VersatileDualContext, text=text, image=image)
    plain = ksampler(ordinary, EMPTY, text, [[torch.zeros(1, 77, 64), {}]], steps=1)
    assert torch.equal(ksampler(ordinary, EMPTY, positive, negative, steps=1), plain) and not [line for line in caplog.records if line.name == "palimpsest"]
    assert "An ordinary Stable Diffusion model" in (root / "web" / "docs" / "PalimpsestVersatileImageContext.md").read_text()


def test_replaced_cross_attention_runs_in_both_branches_and_can_tell_them_apart(model):
    """Regression: the mechanism of IP-Adapter was not tried on the dual model."""
    from comfy.ldm.modules.attention import optimized_attention

    blocks = [*(("input", number) for number in (1, 2, 4, 5, 7, 8)), ("middle", 0), *(("output", number) for number in range(3, 12))]

    def replaced(scales):
        seen, patched = set(), model.clone()

        def attention(q, k, v, extra_options):
            which = extra_options[BRANCH]
            seen.add((*extra_options["block"], which, k.shape[1]))
            return scales[which] * optimized_attention(q, k, v, extra_options["n_heads"], attn_precision=extra_options["attn_precision"])

        for block in blocks:
            patched.set_model_attn2_replace(attention, *block)
        return patched, seen

    def sampled(one, ratio):
        text, image = [[context(77), {}]], image_conditioning([context(257, 1)])
        positive, negative, _ = run(VersatileDualContext, text=text, image=image, ratio=ratio, negative_text=[[context(77, 5), {}]])
        return ksampler(one, EMPTY, positive, negative, steps=2)

    neutral, seen = replaced({"text": 1, "image": 1})
    assert torch.equal(sampled(neutral, 0.5), sampled(model, 0.5))
    assert seen == {(*block, which, tokens) for block in blocks for which, tokens in (("text", 77), ("image", 257))}
    louder, _ = replaced({"text": 1, "image": 2})
    assert relative(sampled(louder, 0.5), sampled(model, 0.5)) > 1e-4
    assert torch.equal(sampled(louder, 1.0), sampled(model, 1.0)), "the text's branch is left alone"


def test_tooltips_tell_that_what_hangs_on_the_picture_is_dropped():
    """Regression: only the words' areas, ranges and ControlNets were mentioned."""
    tooltips = {item.id: item.tooltip for item in VersatileDualContext.define_schema().inputs}
    assert "ControlNets on it are dropped" in tooltips["image"] and "dropped" in tooltips["negative_image"]


def test_weight_focus_mask_and_batches_of_an_image_context(vision):
    image = picture(90, 90, batch=2)
    plain = run(VersatileImageContext, clip_vision=vision, image=image)[0]
    assert plain[0][0].shape == (2, 257, 64)
    with torch.inference_mode():
        tokens = encode_pictures(vision, image)
    changed = run(VersatileImageContext, clip_vision=vision, image=image, weight=0.8, focus=0.3)[0]
    assert torch.equal(changed[0][0], focus(tokens, 0.3) * 0.8), "the focus first, then the weight"
    together = run(VersatileImageContext, clip_vision=vision, image=image, batch="together")[0]
    assert together[0][0].shape == (1, 514, 64) and together[0][1]["versatile_pictures"] == (257, 257)
    mask = torch.zeros(1, 30, 30)
    mask[:, :10] = 1
    masked, report = run(VersatileImageContext, clip_vision=vision, image=image, mask=mask)
    assert "masked" in report and relative(masked[0][0], plain[0][0]) > 0.01


def test_focus_treats_each_picture_by_itself_and_keeps_the_rest():
    one, two = context(257, 1), context(257, 2)
    (tokens, options), = image_conditioning([one, two])
    given = [[tokens, {**options, "strength": 0.5}]]
    (moved, kept), = run(VersatileFocus, context=given, level=0.8)[0]
    assert torch.equal(moved[:, :257], focus(one, 0.8)) and torch.equal(moved[:, 257:], focus(two, 0.8)) and kept["strength"] == 0.5
    assert torch.equal(run(VersatileFocus, context=given)[0][0][0], tokens)
    with pytest.raises(ValueError, match="context is a text context"):
        run(VersatileFocus, context=[[one, {}]])


def test_combining_pictures():
    parts = [image_conditioning([context(257, seed)]) for seed in range(3)]
    (tokens, options), = run(VersatileCombineImages, context_1=parts[0], context_3=parts[1], context_4=parts[2], weight_3=0.5)[0]
    assert torch.equal(tokens, torch.cat([parts[0][0][0], parts[1][0][0] * 0.5, parts[2][0][0]], 1)) and options["versatile_pictures"] == (257,) * 3
    again = run(VersatileCombineImages, context_1=[[tokens, options]], context_2=parts[0])[0]
    assert again[0][1]["versatile_pictures"] == (257,) * 4
    with pytest.raises(ValueError, match="context 2 is a text"):
        run(VersatileCombineImages, context_1=parts[0], context_2=[[context(77), {}]])


def test_empty_image_contexts(vision):
    zeros = run(VersatileEmptyImage)[0]
    assert zeros[0][0].shape == (1, 257, 768) and float(zeros[0][0].abs().max()) == 0 and zeros[0][1]["versatile_flow"] == "image"
    black, grey = (run(VersatileEmptyImage, kind=kind, clip_vision=vision)[0][0][0] for kind in ("black", "grey"))
    shown = run(VersatileEmptyImage, kind="picture", clip_vision=vision, picture=torch.full((1, 50, 50, 3), 127 / 255))[0][0][0]
    assert relative(black, grey) > 0.01 and relative(shown, grey) < 1e-5
    with pytest.raises(ValueError, match="encoded grey needs the vision encoder"):
        run(VersatileEmptyImage, kind="grey")
    with pytest.raises(ValueError, match="none is connected"):
        run(VersatileEmptyImage, kind="picture", clip_vision=vision)


def test_saved_contexts_are_listed_and_loaded(folders):
    assert "no context file yet" in VersatileLoadContext.validate_inputs("none found")
    given = image_conditioning([context(257)])
    name, = run(VersatileSaveContext, context=given)
    assert name.endswith(".context.safetensors [output]")
    assert name in VersatileLoadContext.define_schema().inputs[0].options and VersatileLoadContext.validate_inputs(name) is True
    loaded, report = run(VersatileLoadContext, file=name)
    assert torch.equal(loaded[0][0], given[0][0]) and "image context" in report
    assert VersatileLoadContext.fingerprint_inputs(name) != name
    assert "outside" in VersatileLoadContext.validate_inputs("../../x.safetensors")


def test_colors():
    out, = run(ColorMatch, image=picture(32, 32), reference=picture(64, 64, seed=3))
    assert out.shape == (1, 32, 32, 3) and not torch.equal(out, picture(32, 32))


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A models folder of the test's own."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {k: v for k, v in folder_paths.folder_names_and_paths.items() if k != files.FOLDER})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def test_the_loader(models, model):
    write_files(models / "versatile_diffusion", OFFICIAL_2023, common_names(model))
    name = "vd-four-flow-v1-0.safetensors"
    assert VersatileLoader.define_schema().inputs[0].options[0] == name and VersatileLoader.validate_inputs(name) is True
    loaded, clip, clip_vision, vae, report = run(VersatileLoader, model_name=name)
    assert clip is clip_vision is vae is None
    assert "official 2023 naming" in report and "blended" in report and "not chosen: clip, clip_vision, vae" in report
    state = loaded.model.diffusion_model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.model.diffusion_model.state_dict().items())
    assert run(VersatileLoader, model_name=name, flows="image")[0].model.sets == ("image",)
    before = VersatileLoader.fingerprint_inputs(name, FROM_MODEL, FROM_MODEL, FROM_MODEL)
    (models / "versatile_diffusion" / name).touch()
    assert VersatileLoader.fingerprint_inputs(name, FROM_MODEL, FROM_MODEL, FROM_MODEL) != before


def test_a_set_that_is_not_there_is_refused_before_the_encoders_are_read(models, model, monkeypatch):
    """Regression: gigabytes of CLIP were loaded first."""
    write_files(models / "versatile_diffusion", OFFICIAL_2023, {name: value for name, value in common_names(model).items() if name.part == "image"})
    loaded = []
    monkeypatch.setattr(loader, "load_extra", lambda *args: loaded.append(args))
    with pytest.raises(ValueError, match="no attention for text contexts"):
        run(VersatileLoader, model_name="vd-four-flow-v1-0.safetensors", flows="text")
    assert not loaded


def test_the_loader_says_where_files_belong(models):
    assert VersatileLoader.define_schema().inputs[0].options == [files.NONE_FOUND]
    assert "models/versatile_diffusion" in VersatileLoader.validate_inputs(files.NONE_FOUND)
    assert VersatileLoader.validate_inputs(None) is True and VersatileLoader.fingerprint_inputs(None) == ""
    with pytest.raises(ValueError, match="no file gone.safetensors in models/text_encoders"):
        picked("clip", "gone.safetensors")
    assert picked("vae", FROM_MODEL) is None
