"""Save Instruction and Load Instruction: schema and wiring."""

from __future__ import annotations

from comfy_api.latest import io

from ..common.files import workflow_of
from ..common.saved import Kind, saved_line
from ..inversion.display import show
from ..visii.instruction import check_same_encoder
from ..visii.published import SUFFIXES, load_published
from ..visii.sockets import InstructionType
from ..visii.start import null_text
from ..visii.storage import SUFFIX, load_instruction, save_instruction
from .visii import CATEGORY, instruction_outputs

FILES = Kind("instruction", "instructions", SUFFIX, (".safetensors", *SUFFIXES), "Save Instruction", (SUFFIX, *SUFFIXES))


class VisiiSaveInstruction(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestVisiiSaveInstruction",
            display_name="Save Instruction",
            category=CATEGORY,
            description="Writes a learned instruction to the output folder (about 0.5 MB), with the settings and errors of its learning.",
            inputs=[
                InstructionType.Input("instruction", tooltip="From Visii Learn Instruction, Combine Instruction with Text or Blend Instructions."),
                io.String.Input(
                    "filename_prefix",
                    default=FILES.prefix,
                    tooltip="Folder and beginning of the file name below the output folder; a counter is added. %year%, %month%, %day% and the like are filled in. "
                    "Load Instruction lists the folder instructions.",
                ),
            ],
            outputs=[io.String.Output("file", display_name="file", tooltip="Name of the file as Load Instruction lists it.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, instruction, filename_prefix) -> io.NodeOutput:
        path, listed = FILES.new_file(filename_prefix)
        save_instruction(instruction, path, workflow_of(cls))
        return io.NodeOutput(listed, ui=show(cls, saved_line(listed, path)))


class VisiiLoadInstruction(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestVisiiLoadInstruction",
            display_name="Load Instruction",
            category=CATEGORY,
            description="Reads an instruction written by Save Instruction, or a prompt_embeds_*.pt of the released Visii code. Nothing in a file is ever executed.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=FILES.options(),
                    tooltip="A file of the input folder, or of output/instructions (marked [output]). Press R to refresh the list.",
                ),
                io.String.Input(
                    "start_text",
                    default="",
                    tooltip="Only for .pt files: the text learning started from (learned_prompt.txt). Without it the instruction works, but no words can be added.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder of the edit checkpoint: checks that the instruction belongs to it."),
            ],
            outputs=[
                *instruction_outputs(),
                io.String.Output("report", display_name="report", tooltip="What the file holds, as text."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, file, start_text, clip=None) -> io.NodeOutput:
        path = FILES.resolve(file)
        if path.lower().endswith(SUFFIXES):
            instruction = load_published(path, start_text, clip)
        else:
            instruction = load_instruction(path)
            if clip is not None:
                check_same_encoder(instruction, null_text(clip)[0], "the connected CLIP")
        report = cls.describe(instruction)
        return io.NodeOutput(instruction.conditioning, instruction, report, ui=show(cls, report))

    @staticmethod
    def describe(instruction) -> str:
        """What an instruction is, for people."""
        _, length, width = instruction.tokens.shape
        learned = "learned positions unknown: no words can be added" if instruction.end is None else f"{instruction.end - 1} learned positions"
        lines = [f"{length} tokens of {width} values, {learned}"]
        if instruction.text:
            lines.append(f"Start: \"{instruction.text}\"")
        info = instruction.info
        if "steps" in info:
            lines.append(
                f"Learned in {len(info.get('errors', []))} of {info['steps']} steps at guidance {info.get('text_scale')} (text) and {info.get('image_scale')} (image), "
                f"learning rate {info.get('learning_rate')}, seed {info.get('seed')}, from {len(info.get('pictures', [])) // 2} pair(s)"
            )
        return "\n".join(lines)

    @classmethod
    def validate_inputs(cls, file):
        return FILES.check(file)

    @classmethod
    def fingerprint_inputs(cls, file, **kwargs):
        return FILES.stamp(file)


NODES = [VisiiSaveInstruction, VisiiLoadInstruction]
