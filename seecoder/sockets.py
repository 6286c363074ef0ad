"""The type of a loaded SeeCoder on the wire."""

from comfy_api.latest import io

SeeCoderType = io.Custom("PALIMPSEST_SEECODER")
