"""Text and pictures on the node itself."""

from __future__ import annotations

import sys

import comfy.utils
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy_api.latest import ui
from PIL import Image


def say(node, text: str) -> None:
    """Show `text` on a node of the class `node` now, while it runs or after; without a running server there is nobody to show it to."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    instance = getattr(server, "instance", None)
    node_id = node.hidden.unique_id if node.hidden is not None else None
    if instance is not None and node_id is not None:
        instance.send_progress_text(text, node_id)


def show(node, text: str, image=None) -> dict:
    """UI output of a node class `node`: `text` (also in the history of API users), and `image` [B, H, W, 3] as preview.

    The front end draws returned text for its own nodes only, so the text is also sent the way the host's
    GetImageSize does.
    """
    say(node, text)
    node_id = node.hidden.unique_id if node.hidden is not None else None
    output = ui.PreviewText(text).as_dict()
    if image is not None:
        output |= ui.PreviewImage(image, cls=node).as_dict()
        if node_id is not None and args.preview_method != LatentPreviewMethod.NoPreviews:
            # the page shows a node's last live preview rather than its picture, so the picture becomes the last preview
            pixels = (image[0].clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy()
            comfy.utils.ProgressBar(1).update_absolute(1, 1, ("JPEG", Image.fromarray(pixels), None))
    return output
