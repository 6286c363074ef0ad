"""The types of the wires between Prompt-to-Prompt nodes."""

from comfy_api.latest import io

BlendMasksType = io.Custom("PALIMPSEST_BLEND_MASKS")
