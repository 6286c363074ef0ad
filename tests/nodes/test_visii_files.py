"""Save Instruction and Load Instruction as nodes, in the host's own folders."""

import os

import pytest
import torch

from palimpsest.nodes.visii_files import FILES, NODES, VisiiLoadInstruction, VisiiSaveInstruction
from palimpsest.tests.helpers.prompts import WordClip
from palimpsest.tests.helpers.visii import random_instruction
from palimpsest.visii.start import from_text

CLIP = WordClip(width=768)
pytestmark = pytest.mark.usefixtures("folders")


def saved(prefix="instructions/one", instruction=None):
    return VisiiSaveInstruction.execute(instruction or random_instruction(), prefix)


def test_ids_and_order_are_for_ever():
    save, load = (node.define_schema() for node in (VisiiSaveInstruction, VisiiLoadInstruction))
    assert (save.node_id, save.display_name) == ("PalimpsestVisiiSaveInstruction", "Save Instruction")
    assert (load.node_id, load.display_name) == ("PalimpsestVisiiLoadInstruction", "Load Instruction")
    assert [item.id for item in save.inputs] == ["instruction", "filename_prefix"] and [item.id for item in load.inputs] == ["file", "start_text", "clip"]
    assert [output.io_type for output in load.outputs] == ["CONDITIONING", "PALIMPSEST_INSTRUCTION", "STRING"]
    for node in NODES:
        assert all(item.tooltip for item in [*node.define_schema().inputs, *node.define_schema().outputs])
        node.GET_NODE_INFO_V1()


def test_save_then_load():
    out = saved()
    name = out.args[0]
    assert name == "instructions/one_00001_.instruction.safetensors [output]" and FILES.names() == [name]
    assert VisiiLoadInstruction.validate_inputs(name) is True
    conditioning, instruction, report = VisiiLoadInstruction.execute(name, "").args
    assert torch.equal(instruction.tokens, random_instruction().tokens) and torch.equal(conditioning[0][0], instruction.tokens)
    assert "12 tokens of 48 values, 5 learned positions" in report and '"text 0"' in report and "MB" in out.ui["text"][0]
    assert saved().args[0] == "instructions/one_00002_.instruction.safetensors [output]"


def test_the_report_says_how_it_was_learned():
    info = {"steps": 300, "errors": [0.1] * 300, "text_scale": 7.5, "image_scale": 1.5, "learning_rate": 0.01, "seed": 4, "pictures": ["a", "b"]}
    before = random_instruction()
    name = saved(instruction=before.with_tokens(before.tokens, info=info, end=None)).args[0]
    report = VisiiLoadInstruction.execute(name, "").args[2]
    assert "300 of 300 steps at guidance 7.5 (text) and 1.5 (image), learning rate 0.01, seed 4, from 1 pair(s)" in report and "no words can be added" in report


def test_a_file_of_the_released_code(folders):
    start = from_text(CLIP, "a red cat")
    torch.save(torch.cat([start.tokens + 0.0, start.null, start.null]), folders / "input" / "prompt_embeds_best.pt")
    assert FILES.names() == ["prompt_embeds_best.pt"]
    assert VisiiLoadInstruction.execute("prompt_embeds_best.pt", "").args[1].end is None
    found = VisiiLoadInstruction.execute("prompt_embeds_best.pt", "a red cat", CLIP).args[1]
    assert found.end == 4 and torch.equal(found.tokens, start.tokens)


def test_a_connected_clip_is_checked():
    name = saved(instruction=from_text(CLIP, "a red cat")).args[0]
    assert VisiiLoadInstruction.execute(name, "", CLIP).args[1].end == 4
    with pytest.raises(ValueError, match="another text encoder"):
        VisiiLoadInstruction.execute(name, "", WordClip(width=768, seed=3))


def test_the_list_holds_instructions_only(folders):
    saved()
    for name in ("picture.png", "model.safetensors", "mine.instruction.safetensors", "prompt_embeds_0.PT"):
        (folders / "input" / name).write_bytes(b"")
    assert FILES.names() == ["mine.instruction.safetensors", "prompt_embeds_0.PT", "instructions/one_00001_.instruction.safetensors [output]"]


def test_a_changed_file_is_read_again():
    name = saved().args[0]
    before = VisiiLoadInstruction.fingerprint_inputs(name, start_text="")
    os.utime(FILES.resolve(name), ns=(1, 1))
    assert VisiiLoadInstruction.fingerprint_inputs(name, start_text="") != before and VisiiLoadInstruction.fingerprint_inputs("gone.pt") == "gone.pt"


@pytest.mark.parametrize(
    "name, words",
    [("none found", "no instruction file yet"), ("gone.pt", "does not exist"), ("/etc/passwd", "outside"), ("../x.pt", "outside"), ("picture.png", "does not end in")],
)
def test_bad_names_are_one_sentence(name, words):
    said = VisiiLoadInstruction.validate_inputs(name)
    assert words in said and said.endswith(".") and "\n" not in said


def test_a_linked_name_is_only_known_when_it_runs():
    assert VisiiLoadInstruction.validate_inputs(None) is True
