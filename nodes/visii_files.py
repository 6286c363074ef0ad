"""Save Instruction and Load Instruction: schema and wiring."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.latest import io

from ..common import files
from ..inversion.display import show
from ..visii.instruction import check_same_encoder
from ..visii.published import SUFFIXES, load_published
from ..visii.sockets import InstructionType
from ..visii.start import null_text
from ..visii.storage import SUFFIX, load_instruction, save_instruction
from .visii import CATEGORY, instruction_outputs

FOLDER = "instructions"  # below the output folder: where Save Instruction writes unless told otherwise
NO_FILES = "none found"


def instruction_files() -> list[str]:
    """Names for the widget: instructions and files of torch in the input folder, and of the output folder's own place for instructions, marked [output].

    Names that are not in the list can be given all the same.
    """
    saved = files.listed(os.path.join(folder_paths.get_output_directory(), FOLDER), (SUFFIX,))
    return files.listed(folder_paths.get_input_directory(), (SUFFIX, *SUFFIXES)) + [f"{FOLDER}/{name} [output]" for name in saved]


def resolve(name: str) -> str:
    """Full path of a widget value. Raises ValueError, one sentence, for a name that leaves the host's folders or is of no kind that is read."""
    path = files.resolve(name, "instruction")
    if not path.lower().endswith((".safetensors", *SUFFIXES)):
        raise ValueError(f"An instruction is a .safetensors file, or a .pt of the released code, but {name} is neither: choose one written by Save Instruction.")
    return path


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
                    default=f"{FOLDER}/palimpsest",
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
        folder, filename, counter, subfolder, _ = folder_paths.get_save_image_path(filename_prefix, folder_paths.get_output_directory())
        name = f"{filename}_{counter:05}_{SUFFIX}"
        path = os.path.join(folder, name)
        save_instruction(instruction, path, files.workflow_of(cls))
        listed = f"{subfolder}/{name} [output]".lstrip("/").replace(os.sep, "/")
        return io.NodeOutput(listed, ui=show(cls, f"Saved {listed[: -len(' [output]')]} ({os.path.getsize(path) / 1e6:.2f} MB)"))


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
                    options=instruction_files() or [NO_FILES],
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
        path = resolve(file)
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
        # taking over this check lets API users name a file that was saved after the list was made
        if file is None:  # linked from another node, known only when it runs
            return True
        if file == NO_FILES:
            return "There is no instruction file yet: save one with Save Instruction, or copy one into the input folder."
        try:
            path = resolve(file)
        except ValueError as error:
            return str(error)
        if not os.path.isfile(path):
            return f"The instruction file {file} does not exist: choose another, or save one with Save Instruction."
        return True

    @classmethod
    def fingerprint_inputs(cls, file, **kwargs):
        try:
            status = os.stat(resolve(file))
        except (OSError, ValueError):
            return file
        return f"{status.st_mtime_ns}:{status.st_size}"


NODES = [VisiiSaveInstruction, VisiiLoadInstruction]
