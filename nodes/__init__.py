"""Gathers the nodes: every module of this folder offers a list `NODES` of io.ComfyNode classes."""
from importlib import import_module
from pathlib import Path

from comfy_api.latest import ComfyExtension, io


def all_nodes() -> list[type[io.ComfyNode]]:
    """Every node class of the pack, modules in alphabetical order."""
    modules = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")
    return [node for name in modules for node in import_module(f".{name}", __package__).NODES]


class PalimpsestExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return all_nodes()
