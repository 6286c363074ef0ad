"""Whether a model file holds the tensors that its kind has."""

from __future__ import annotations


def compare_shapes(stored: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], what: str) -> None:
    """Raises ValueError, one sentence, when the shapes that a file (`what`: which) holds by name are not the expected ones."""
    missing, unexpected = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    wrong = [key for key in sorted(expected.keys() & stored.keys()) if expected[key] != stored[key]]
    for fault, keys in (("lacks", missing), ("has besides what belongs to it", unexpected), ("has in another shape than the rest of it asks for", wrong)):
        if keys:
            count = f"{len(keys)} tensor{'s' if len(keys) > 1 else ''}"
            raise ValueError(f"The {what} {fault} {count}, {keys[0]} first: it is damaged or was converted wrongly, so download it again.")
