"""Palimpsest: picture editing by published diffusion methods, as nodes for ComfyUI."""
WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called once by the host when it loads the pack; returns the ComfyExtension that lists our nodes."""
    from .nodes import PalimpsestExtension

    return PalimpsestExtension()
