"""The type of reference concepts on the wire."""

from comfy_api.latest import io

ConceptType = io.Custom("PALIMPSEST_CONCEPT")
