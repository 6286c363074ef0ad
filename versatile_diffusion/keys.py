"""The four namings of Versatile Diffusion's tensors, by rules.

Both diffusers, the one that makes pictures and the one that makes text, are UNets of the SD 1.x layout, so the names of that
layout ("ldm": `input_blocks.1.1.norm.weight`) serve as the common form: `Name(part, key)` with part "image" or "text".

| naming | the image diffuser | the text diffuser | time embedding |
| --- | --- | --- | --- |
| official 2022 | model.diffusion_model.unet_image. + ldm | model.diffusion_model.unet_text. + ldm | model.diffusion_model.time_embed., once |
| official 2023 | diffuser.image.{data,context}_blocks.N.0. + leaf | diffuser.text., the same | diffuser.image.time_embed., once |
| diffusers | image_unet. + its own names | text_unet. + its own names | in both |
| ldm | image. + ldm | text. + ldm | in both |

"image_unet." and "text_unet." stand for the folders of the diffusers format, whose files have no prefix.
"""

from __future__ import annotations

import re
from typing import NamedTuple

OFFICIAL_2022 = "official 2022"
OFFICIAL_2023 = "official 2023"
DIFFUSERS = "diffusers"
LDM = "ldm"
NAMINGS = (OFFICIAL_2022, OFFICIAL_2023, DIFFUSERS, LDM)

IMAGE, TEXT = "image", "text"
PARTS = (IMAGE, TEXT)
DATA, CONTEXT, GLOBAL = "data", "context", "global"

ROOT_2022, ROOT_2023 = "model.diffusion_model.", "diffuser."
PREFIX_2022 = {IMAGE: f"{ROOT_2022}unet_image.", TEXT: f"{ROOT_2022}unet_text."}
FOLDERS = {IMAGE: "image_unet", TEXT: "text_unet"}

LEVELS, ATTENTION_LEVELS = 4, 3

TIME = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
RESIDUAL = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
HEAD = {"0": "conv_norm_out", "2": "conv_out"}
# of a spatial transformer, the same in all namings
TRANSFORMER = re.compile(
    r"(norm|proj_in|proj_out)\.(weight|bias)|transformer_blocks\.\d+\.(norm[123]\.(weight|bias)|attn[12]\.(to_[qkv]\.weight|to_out\.0\.(weight|bias))"
    r"|ff\.net\.(0\.proj|2)\.(weight|bias))"
)


class Name(NamedTuple):
    """A tensor in the common form. part: the diffuser that owns it ("image", "text"); key: its ldm name there."""

    part: str
    key: str


class Module(NamedTuple):
    """A block of a diffuser. ldm, diffusers: its name there; group: "data" or "context"; number: its place in the 2023 list of the group; kind: which rule its leaves follow."""

    ldm: str
    diffusers: str
    group: str
    number: int
    kind: str


def _modules() -> list[Module]:
    """All blocks of a diffuser in running order, which is the order of the 2023 lists."""
    out: list[Module] = []

    def add(ldm: str, diffusers: str, kind: str) -> None:
        group = CONTEXT if kind == "attention" else DATA
        out.append(Module(ldm, diffusers, group, sum(module.group == group for module in out), kind))

    add("input_blocks.0.0", "", "stem")
    number = 1
    for level in range(LEVELS):
        for i in range(2):
            add(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{i}", "residual")
            if level < ATTENTION_LEVELS:
                add(f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{i}", "attention")
            number += 1
        if level < LEVELS - 1:
            add(f"input_blocks.{number}.0", f"down_blocks.{level}.downsamplers.0", "down")
            number += 1
    add("middle_block.0", "mid_block.resnets.0", "residual")
    add("middle_block.1", "mid_block.attentions.0", "attention")
    add("middle_block.2", "mid_block.resnets.1", "residual")
    for number in range(3 * LEVELS):
        level, i = divmod(number, 3)
        add(f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{i}", "residual")
        attention = level >= LEVELS - ATTENTION_LEVELS
        if attention:
            add(f"output_blocks.{number}.1", f"up_blocks.{level}.attentions.{i}", "attention")
        if i == 2 and level < LEVELS - 1:
            add(f"output_blocks.{number}.{1 + attention}", f"up_blocks.{level}.upsamplers.0", "up")
    add("out", "", "head")
    return out


MODULES = _modules()
_BY_LDM = {module.ldm: module for module in MODULES}
_BY_DIFFUSERS = {module.diffusers: module for module in MODULES if module.diffusers}
_BY_NUMBER = {(module.group, module.number): module for module in MODULES}


def _leaf_ok(kind: str, leaf: str, part: str) -> bool:
    """Whether a block of this kind has such a leaf under its ldm name."""
    if kind == "attention":
        return TRANSFORMER.fullmatch(leaf) is not None
    name, _, last = leaf.rpartition(".")
    if last not in ("weight", "bias"):
        return False
    # the text diffuser's samplers are bare linear layers
    samplers = {"down": "op", "up": "conv"} if part == IMAGE else {"down": "", "up": ""}
    return name in {"residual": RESIDUAL, "head": HEAD, "stem": {"": ""}}.get(kind, {samplers.get(kind): ""})


def _split(key: str, modules: dict[str, Module]) -> tuple[Module, str] | None:
    """The block that a key belongs to, and the rest of the key."""
    parts = key.split(".")
    for end in range(1, len(parts)):
        if module := modules.get(".".join(parts[:end])):
            return module, ".".join(parts[end:])
    return None


def _module_of(name: Name) -> tuple[Module, str]:
    found = _split(name.key, _BY_LDM)
    if found is None:
        raise KeyError(f"{name.key} is no tensor of a Versatile Diffusion diffuser")
    return found


def group_of(key: str) -> str | None:
    """ "data", "context" (a spatial transformer) or "global" (time embedding) for an ldm key, None for what is neither."""
    if key.rpartition(".")[0] in TIME:
        return GLOBAL
    found = _split(key, _BY_LDM)
    return found[0].group if found else None


def _checked(part: str, module: Module, leaf: str) -> Name | None:
    return Name(part, f"{module.ldm}.{leaf}") if _leaf_ok(module.kind, leaf, part) else None


def _ldm(part: str, key: str) -> Name | None:
    name, _, last = key.rpartition(".")
    if name in TIME and last in ("weight", "bias"):
        return Name(part, key)
    found = _split(key, _BY_LDM)
    return _checked(part, *found) if found else None


def _parse_2022(key: str) -> Name | None:
    for part, prefix in PREFIX_2022.items():
        if key.startswith(prefix):
            rest = key[len(prefix):]
            return None if rest.startswith("time_embed.") else _ldm(part, rest)
    rest = key.removeprefix(ROOT_2022)
    return _ldm(IMAGE, rest) if rest != key and rest.startswith("time_embed.") else None


def _parse_2023(key: str) -> Name | None:
    if match := re.fullmatch(r"diffuser\.(image|text)\.(data|context)_blocks\.(\d+)\.0\.(.+)", key):
        part, group, number, leaf = match.groups()
        module = _BY_NUMBER.get((group, int(number)))
        return _checked(part, module, leaf) if module else None
    rest = key.removeprefix(f"{ROOT_2023}{IMAGE}.")
    return _ldm(IMAGE, rest) if rest != key and rest.startswith("time_embed.") else None


_TIME_BACK = {value: key for key, value in TIME.items()}
_RESIDUAL_BACK = {value: key for key, value in RESIDUAL.items()}
_HEAD_BACK = {value: key for key, value in HEAD.items()}


def parse_diffusers(key: str, part: str) -> Name | None:
    """The common form of a key of the file in the folder of `part`.

    A file that was saved from a dual pipeline holds both attention sets as `attentions.N.transformers.0` (of the image
    diffuser) and `.1` (of the text diffuser).
    """
    name, _, last = key.rpartition(".")
    if last not in ("weight", "bias"):
        return None
    if name in _TIME_BACK:
        return Name(part, f"{_TIME_BACK[name]}.{last}")
    if name == "conv_in":
        return Name(part, f"input_blocks.0.0.{last}")
    if name in _HEAD_BACK:
        return Name(part, f"out.{_HEAD_BACK[name]}.{last}")
    if match := re.fullmatch(r"(.*\.attentions\.\d+)\.transformers\.([01])\.(.*)", key):
        key, part = f"{match[1]}.{match[3]}", PARTS[int(match[2])]
    found = _split(key, _BY_DIFFUSERS)
    if found is None:
        return None
    module, leaf = found
    name, _, last = leaf.rpartition(".")
    if module.kind == "residual":
        leaf = f"{_RESIDUAL_BACK[name]}.{last}" if name in _RESIDUAL_BACK else ""
    elif module.kind == "down" and part == IMAGE:
        leaf = f"op.{last}" if name == "conv" else ""
    return _checked(part, module, leaf)


def parse(key: str, naming: str) -> Name | None:
    """The common form of a key, None for what is no tensor of a diffuser (a schedule buffer, CLIP, a VAE).

    The time embedding of an official file belongs to the image diffuser, which is where 2023 keeps it.
    """
    if naming == OFFICIAL_2022:
        return _parse_2022(key)
    if naming == OFFICIAL_2023:
        return _parse_2023(key)
    for part in PARTS:
        prefix = f"{FOLDERS[part]}." if naming == DIFFUSERS else f"{part}."
        if key.startswith(prefix):
            rest = key[len(prefix):]
            return parse_diffusers(rest, part) if naming == DIFFUSERS else _ldm(part, rest)
    return None


def _write_diffusers(name: Name) -> str:
    stem, _, last = name.key.rpartition(".")
    if stem in TIME:
        return f"{TIME[stem]}.{last}"
    module, leaf = _module_of(name)
    stem, _, last = leaf.rpartition(".")
    if module.kind == "stem":
        return f"conv_in.{last}"
    if module.kind == "head":
        return f"{HEAD[stem]}.{last}"
    if module.kind == "residual":
        leaf = f"{RESIDUAL[stem]}.{last}"
    elif module.kind == "down" and name.part == IMAGE:
        leaf = f"conv.{last}"
    return f"{module.diffusers}.{leaf}"


def write(name: Name, naming: str) -> str:
    """The key of a tensor in a naming. Raises KeyError for a name that no diffuser has."""
    if naming == LDM:
        return f"{name.part}.{name.key}"
    if naming == DIFFUSERS:
        return f"{FOLDERS[name.part]}.{_write_diffusers(name)}"
    if group_of(name.key) == GLOBAL:
        return f"{ROOT_2022}{name.key}" if naming == OFFICIAL_2022 else f"{ROOT_2023}{IMAGE}.{name.key}"
    if naming == OFFICIAL_2022:
        return f"{PREFIX_2022[name.part]}{name.key}"
    module, leaf = _module_of(name)
    return f"{ROOT_2023}{name.part}.{module.group}_blocks.{module.number}.0.{leaf}"


def translate(key: str, source: str, target: str) -> tuple[str, ...]:
    """A key's names in another naming: none for what is no tensor of a diffuser; two where the other naming keeps the time embedding twice."""
    name = parse(key, source)
    if name is None:
        return ()
    owners = PARTS if group_of(name.key) == GLOBAL else (name.part,)
    return tuple(dict.fromkeys(write(Name(part, name.key), target) for part in owners))


def convert(state: dict, source: str, target: str) -> dict:
    """A table (tensors, shapes, anything) with the keys of another naming; the two time embeddings of the diffusers format are taken to be equal, as they are."""
    return {new: value for key, value in state.items() for new in translate(key, source, target)}
