"""Mini Towers: schema and wiring."""

from __future__ import annotations

from comfy_api.latest import io

from ..mini import checkpoint, towers


class MiniTowers(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestMiniTowers",
            display_name="Mini Towers",
            category="Palimpsest/mini",
            description=(
                "Loads the image tower of the mini family: what CLIP ViT-L/14 is to Stable Diffusion, for pictures of scenes. With it and the text projection mini_towers "
                "Visii Learn Instruction has its direction loss on the mini edit model, and Versatile Image Context gives the mini Versatile Diffusion its pictures."
            ),
            inputs=[],
            outputs=[
                io.ClipVision.Output(
                    "clip_vision", display_name="clip_vision",
                    tooltip="The host's CLIP_VISION, for pictures of 128 x 128; others are scaled, and squashed or cropped by the node that reads them.",
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(towers.load_clip_vision(checkpoint.WEIGHTS))

    @classmethod
    def fingerprint_inputs(cls):
        """Weights that were trained anew are loaded anew."""
        file = checkpoint.WEIGHTS / towers.FILE
        return f"{file.stat().st_mtime_ns} {file.stat().st_size}" if file.is_file() else ""


NODES = [MiniTowers]
