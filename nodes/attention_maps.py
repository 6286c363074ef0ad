"""Collect Attention Maps, Attention Map Preview, Collect Features, Feature PCA Preview: schema and wiring."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention_patches.heat import sheet, shrunk
from ..attention_patches.looking import collect_features, collect_maps
from ..attention_patches.maps import average_maps, principal_components
from ..inversion.display import show
from ..inversion.filmstrip import strip
from ..p2p.syntax import split_list

MapsType = io.Custom("PALIMPSEST_ATTENTION_MAPS")
FeaturesType = io.Custom("PALIMPSEST_FEATURES")


def _fraction(name: str, default: float, tooltip: str):
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


class CollectAttentionMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestCollectAttentionMaps",
            display_name="Collect Attention Maps",
            category="Palimpsest/views",
            description=(
                "Notes during the sampler's run where each word of the positive prompt is looked at. The picture stays bit for bit the same. "
                "Show them with Attention Map Preview."
            ),
            inputs=[
                io.Model.Input("model", tooltip="SD1.x, SD2.x or SDXL."),
                io.Clip.Input("clip", tooltip="The text encoder of the positive prompt."),
                io.String.Input("prompt", multiline=True, default="", tooltip="The sampler's positive prompt, once more: it says which token belongs to which word."),
                io.String.Input("words", default="", tooltip="Words to show, separated by commas; several words in one entry are added up. Empty: every word."),
                io.String.Input(
                    "layers",
                    default="preset default",
                    tooltip="Cross-attention layers to average: d2-5, u0-5. Presets: default (a quarter and half of the latent's sides), all, decoder.",
                ),
                _fraction("start", 0.0, "Share of the schedule, from the noisy end, at which collecting starts (0 to 1)."),
                _fraction("end", 1.0, "Share of the schedule at which collecting ends (0 to 1)."),
            ],
            outputs=[
                io.Model.Output("watched_model", display_name="model", tooltip="The model that notes its maps, for the sampler."),
                MapsType.Output("maps", display_name="maps", tooltip="For Attention Map Preview."),
            ],
        )

    @classmethod
    def execute(cls, model, clip, prompt, words, layers, start, end, **kwargs) -> io.NodeOutput:
        watched, results, names = collect_maps(model, clip, prompt, split_list(words), layers, start, end)
        return io.NodeOutput(watched, (results, names))


class AttentionMapPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestAttentionMapPreview",
            display_name="Attention Map Preview",
            category="Palimpsest/views",
            description="A heat map per word over the picture, after the sampler has run, as one labelled sheet.",
            inputs=[
                MapsType.Input("maps", tooltip="From Collect Attention Maps."),
                io.Latent.Input("latent", tooltip="The sampler's result: makes this node run after it."),
                io.Image.Input("image", tooltip="The decoded result, drawn under the maps."),
                io.Int.Input("columns", default=5, min=1, max=16, step=1, tooltip="Pictures per row of the sheet."),
            ],
            outputs=[
                io.Image.Output("sheet", display_name="sheet", tooltip="The picture and one heat map per word, each scaled to its own maximum, which is given."),
                io.Mask.Output("heat", display_name="maps", tooltip="The maps as masks [pictures x words, h, w], each scaled to 0..1."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, maps, latent, image, columns, **kwargs) -> io.NodeOutput:
        results, names = maps
        found = results.read()
        means = average_maps(found)
        drawn = sheet(image[: len(means)], means, names, columns)
        steps = max(count for _, count, _ in found.values())
        report = f"{len(names)} words, {len(found)} layers, {steps} steps, maps of {means.shape[-1]} x {means.shape[-2]}"
        masks = means.flatten(0, 1)
        return io.NodeOutput(drawn, masks / masks.amax((1, 2), keepdim=True).clamp(min=1e-12), ui=show(cls, report, drawn))


class CollectFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestCollectFeatures",
            display_name="Collect Features",
            category="Palimpsest/views",
            description="Notes the features of UNet layers during the sampler's run. The picture stays bit for bit the same. Show them with Feature PCA Preview.",
            inputs=[
                io.Model.Input("model", tooltip="SD1.x, SD2.x or SDXL."),
                io.String.Input("layers", default="u1", tooltip="Layers to look at: u1 is the one whose features Plug-and-Play injects; d2, m0, u0-8, output4."),
                io.Combo.Input("what", options=["resblock", "self-attention"], default="resblock", tooltip="Features of the ResBlocks, or the tokens that enter self-attention."),
                _fraction("start", 0.0, "Share of the schedule, from the noisy end, at which collecting starts (0 to 1)."),
                _fraction("end", 0.5, "Share of the schedule at which it ends (0 to 1); the features of the last step before it are kept."),
            ],
            outputs=[
                io.Model.Output("watched_model", display_name="model", tooltip="The model that notes its features, for the sampler."),
                FeaturesType.Output("features", display_name="features", tooltip="For Feature PCA Preview."),
            ],
        )

    @classmethod
    def execute(cls, model, layers, what, start, end, **kwargs) -> io.NodeOutput:
        return io.NodeOutput(*collect_features(model, layers, what, start, end))


class FeaturePCAPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PalimpsestFeaturePCAPreview",
            display_name="Feature PCA Preview",
            category="Palimpsest/views",
            description="The first three principal components of UNet features as colours: places that the model takes for the same kind of thing look alike.",
            inputs=[
                FeaturesType.Input("features", tooltip="From Collect Features."),
                io.Latent.Input("latent", tooltip="The sampler's result: makes this node run after it."),
                io.Image.Input("image", tooltip="The decoded result, shown beside."),
            ],
            outputs=[io.Image.Output("sheet", display_name="sheet", tooltip="Per picture one row: the picture and each layer's components as red, green and blue.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, features, latent, image, **kwargs) -> io.NodeOutput:
        found = sorted(features.read().items(), key=lambda item: item[0].order)
        layers = [(f"{point.part}{point.number}" + (f".{point.index}" if point.kind != "resblock" else ""), principal_components(values)) for point, values in found]
        rows = []
        for number, picture in enumerate(image[: len(layers[0][1])].cpu()):
            small = shrunk(picture[..., :3])
            size = tuple(small.shape[:2])
            tiles = [(small, f"picture {number + 1}")]
            for name, colors in layers:
                stretched = colors[number].repeat_interleave(max(1, size[0] // colors.shape[1]), 0).repeat_interleave(max(1, size[1] // colors.shape[2]), 1)
                tiles.append((stretched, name))
            rows.append(tiles)
        drawn = strip(rows)
        return io.NodeOutput(drawn, ui=show(cls, f"{len(layers)} layers, the first three principal components of each", drawn))


NODES = [CollectAttentionMaps, AttentionMapPreview, CollectFeatures, FeaturePCAPreview]
