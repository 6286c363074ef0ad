"""Types of the multi-reference nodes on the wire."""

from comfy_api.latest import io

ConceptType = io.Custom("PALIMPSEST_CONCEPT")
SharesType = io.Custom("PALIMPSEST_CONCEPT_SHARES")
