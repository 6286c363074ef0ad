"""Visii Learn Instruction, Combine Instruction with Text, Blend Instructions: schema and wiring."""

from dataclasses import replace

import pytest
import torch

from palimpsest.nodes import visii
from palimpsest.nodes.visii import NODES, VisiiBlendInstructions, VisiiCombineInstruction, VisiiLearnInstruction
from palimpsest.tests.helpers.models import tiny_sd15
from palimpsest.tests.helpers.prompts import WordClip
from palimpsest.tests.helpers.visii import WIDTH, random_instruction, tiny_edit
from palimpsest.visii.direction import Direction
from palimpsest.visii.learn import Settings

CLIP = WordClip(width=WIDTH)


class Vae:
    """Means of blocks of 8 pixels, and back."""

    latent_channels = 4

    def encode(self, pixels):
        return torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8).mean(1, keepdim=True).repeat(1, 4, 1, 1) * 8 - 4

    def decode(self, samples):
        return torch.nn.functional.interpolate(samples[:, :3], scale_factor=8).movedim(1, -1)


@pytest.fixture(scope="module")
def model():
    return tiny_edit()


def picture(seed, count=1, size=128):
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(seed))


def defaults(node):
    """Widget values as the host fills them in."""
    return {item.id: item.default for item in node.define_schema().inputs if getattr(item, "default", None) is not None}


def given(model, **changes):
    return {**defaults(VisiiLearnInstruction), "model": model, "clip": CLIP, "vae": Vae(), "before": picture(0), "after": picture(1), "start_text": "a red cat",
            "steps": 3, "learning_rate": 0.05, **changes}


def test_ids_and_order_are_for_ever():
    schema = VisiiLearnInstruction.define_schema()
    assert (schema.node_id, schema.display_name, schema.category) == ("PalimpsestVisiiLearnInstruction", "Visii Learn Instruction", "Palimpsest/visii")
    assert [item.id for item in schema.inputs] == [
        "model", "clip", "vae", "before", "after", "start_text", "steps", "learning_rate", "text_guidance", "image_guidance", "mse_weight", "direction_weight", "seed", "keep",
        "preview_every", "text_projection", "checkpointing", "clip_vision", "start_instruction",
    ]
    assert [(output.id, output.io_type) for output in schema.outputs] == [
        ("conditioning", "CONDITIONING"), ("result", "PALIMPSEST_INSTRUCTION"), ("previews", "IMAGE"), ("loss_plot", "IMAGE"), ("report", "STRING"),
    ]
    combine, mixed = VisiiCombineInstruction.define_schema(), VisiiBlendInstructions.define_schema()
    assert (combine.node_id, combine.display_name) == ("PalimpsestVisiiCombineInstruction", "Combine Instruction with Text")
    assert (mixed.node_id, mixed.display_name) == ("PalimpsestVisiiBlendInstructions", "Blend Instructions")
    assert [item.id for item in combine.inputs] == ["instruction", "clip", "text"] and [item.id for item in mixed.inputs] == ["instruction", "strength", "share", "second"]
    for node in NODES:
        schema = node.define_schema()
        assert all(item.tooltip for item in [*schema.inputs, *schema.outputs])
        node.GET_NODE_INFO_V1()
    assert NODES == [VisiiLearnInstruction, VisiiCombineInstruction, VisiiBlendInstructions]


def test_defaults_are_the_published_ones():
    found = defaults(VisiiLearnInstruction)
    assert {name: found[name] for name in ("steps", "learning_rate", "text_guidance", "image_guidance", "mse_weight", "direction_weight", "text_projection")} == {
        "steps": 1000, "learning_rate": 0.001, "text_guidance": 7.5, "image_guidance": 1.5, "mse_weight": 4.0, "direction_weight": 0.1, "text_projection": "none"}


@torch.inference_mode()
def test_what_is_learned_goes_on_to_every_other_node(model):
    out = VisiiLearnInstruction.execute(**given(model, preview_every=0))
    conditioning, instruction, strip, plot, report = out.args
    assert len(conditioning) == 1 and torch.equal(conditioning[0][0], instruction.tokens) and conditioning[0][0].shape == (1, 77, WIDTH)
    assert instruction.end == 4 and instruction.text == "a red cat" and instruction.info["steps"] == 3 and len(instruction.info["errors"]) == 3
    assert strip.shape[0] == plot.shape[0] == 1 and "3 of 3 steps" in report and out.ui["text"] == (report,) and len(out.ui["images"]) == 1
    assert "Direction loss: off, there is no CLIP_VISION and no text projection" in report

    hybrid = VisiiCombineInstruction.execute(instruction, CLIP, "a hat").args
    assert torch.equal(hybrid[0][0][0], hybrid[1].tokens) and hybrid[1].end == 9
    weak = VisiiBlendInstructions.execute(instruction, 0.5, 0.5).args[1]
    assert torch.allclose(weak.tokens, (instruction.tokens + instruction.null) / 2, atol=1e-5)
    mean = VisiiBlendInstructions.execute(instruction, 1.0, 0.5, hybrid[1]).args[1]
    assert torch.allclose(mean.tokens, (instruction.tokens + hybrid[1].tokens) / 2, atol=1e-5)
    again = VisiiLearnInstruction.execute(**given(model, preview_every=0, start_text="", start_instruction=instruction)).args[1]
    assert again.end == instruction.end and not torch.equal(again.tokens, instruction.tokens)


@torch.inference_mode()
def test_the_strip_holds_previews_through_the_vae(model, monkeypatch):
    from palimpsest.visii import learn_run, step

    for module in (step, learn_run):
        monkeypatch.setattr(module, "PREVIEW_STEPS", 2)
    strip = VisiiLearnInstruction.execute(**given(model, preview_every=2)).args[2]
    short = VisiiLearnInstruction.execute(**given(model, preview_every=0)).args[2]
    assert strip.shape[2] == 2 * short.shape[2], "before, after, step 2, result"


def test_every_input_reaches_the_learning(model, monkeypatch):
    class Enough(Exception):
        pass

    seen, ways = [], []

    def stop(*args, **kwargs):
        seen.append((args, kwargs))
        raise Enough

    monkeypatch.setattr(visii, "run_learn", stop)
    monkeypatch.setattr(visii.direction, "make_direction", lambda *args: ways.append(args) or Direction(reason="x"))
    start = random_instruction(tokens=77)
    with pytest.raises(Enough):
        VisiiLearnInstruction.execute(model, CLIP, Vae(), picture(0), picture(1), "a", 5, 0.02, 6.0, 1.2, 3.0, 0.2, 9, "last", 7, "some.safetensors", "on", "vision", start)
    (args, kwargs), ((clip_vision, name, before, after, width),) = seen[0], ways
    assert args[0] is model and args[2] is start and args[4] == Settings(5, 0.02, 6.0, 1.2, 3.0, 0.2, 9, "last", 7, "on") and args[5].reason == "x"
    assert torch.equal(args[1].before, picture(0)) and torch.equal(args[1].after, picture(1)) and args[1].target.shape == (1, 4, 16, 16)
    assert (clip_vision, name, width) == ("vision", "some.safetensors", WIDTH) and torch.equal(before, picture(0)) and torch.equal(after, picture(1))
    kwargs["say"]("told to nobody, as no server runs")


REFUSED = {
    "sizes": ({"after": picture(1, size=64)}, "before is 128 x 128 and after 64 x 64"),
    "one image": ({"before": picture(0, count=2)}, "2 before and 1 after"),
    "no edit": ({"after": picture(0)}, "are the same"),
    "empty": ({"start_text": ""}, "start text is empty"),
    "long": ({"start_text": "cat " * 80}, "start text has 80 tokens"),
    "not an edit model": ({"model": "plain"}, "Visii Learn Instruction needs an edit model, whose first layer takes 8 channels"),
    "another encoder's instruction": ({"start_instruction": replace(random_instruction(tokens=77), text="x")}, "another text encoder"),
    "another model's text encoder": ({"clip": WordClip(width=24)}, "gives 24 values per token, but the model takes 48"),
    "settings": ({"mse_weight": 0.0}, "above 0"),
}


@pytest.mark.parametrize("name", REFUSED)
@torch.inference_mode()
def test_bad_input_is_one_sentence(model, name):
    changes, words = REFUSED[name]
    if changes.get("model") == "plain":
        changes = {"model": tiny_sd15(context_dim=WIDTH, channel_mult=(1, 1, 1, 1))}
    with pytest.raises(ValueError, match=words) as refused:
        VisiiLearnInstruction.execute(**{**given(model), **changes})
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)
