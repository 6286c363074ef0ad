"""The type of a loaded Optimus on the wire."""

from comfy_api.latest import io

OptimusType = io.Custom("PALIMPSEST_OPTIMUS")
