"""A graph of stock nodes that runs in no time: for checks of the server itself."""
from itertools import count

_seed = count(1)


def stock_graph() -> dict:
    """A one-colour picture, saved. Another colour at every call, so that the host cannot answer from its cache."""
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": next(_seed)}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "stock"}, "_meta": {"title": "edit"}},
    }
