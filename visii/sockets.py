"""The type of a learned instruction on the wire, one for all nodes that make or take one."""

from comfy_api.latest import io

InstructionType = io.Custom("PALIMPSEST_INSTRUCTION")
