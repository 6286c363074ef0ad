"""The pictures that the repository shows, made from the sample graphs' own outputs: thumbnails of the workflows, one row per node."""
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .graphs import ROOT, api_graphs
from .sheet import INK, PAPER, Row, wrapped

WORKFLOWS = ROOT / "workflows"
NODES = ROOT / "web" / "docs" / "pictures"
EDITS = NODES / "edits.jpg"
# Node -> (graph, row of its sheet, names of the pictures): what the README and the help page show of it.
SHOWN = {
    "PalimpsestMiniCheckpoint": ("mini-text_to_image", 1, ("picture",)),
    "PalimpsestMiniScene": ("mini-pnp-color", 1, ("input", "target")),
    "PalimpsestDDIMInvert": ("mini-ddim_invert", 1, ("input", "film strip")),
    "PalimpsestReconstructCheck": ("mini-ddim_invert", 1, ("comparison",)),
    "PalimpsestSaveTrajectory": ("mini-trajectory-save", 1, ("input", "film strip")),
    "PalimpsestLoadTrajectory": ("mini-trajectory-load", 1, ("input", "edit")),
    "PalimpsestPnPInjector": ("mini-pnp-background", 1, ("input", "edit")),
    "PalimpsestP2PController": ("mini-p2p-swap", 1, ("input", "edit", "alignment")),
    "PalimpsestP2PLocalBlend": ("mini-p2p-refine_blend", 1, ("input", "edit")),
    "PalimpsestP2PMaskPreview": ("mini-p2p-refine_blend", 1, ("mask of each step",)),
    "PalimpsestCollectAttentionMaps": ("mini-attention_maps", 1, ("picture",)),
    "PalimpsestAttentionMapPreview": ("mini-attention_maps", 1, ("attention maps",)),
    "PalimpsestCollectFeatures": ("mini-attention_maps", 1, ("picture",)),
    "PalimpsestFeaturePCAPreview": ("mini-attention_maps", 1, ("features",)),
    "PalimpsestNullTextOptimize": ("mini-null_text", 1, ("input", "reconstruction", "edit", "loss")),
    "PalimpsestSeeCoderLoader": ("mini-seecoder", 1, ("input", "edit")),
    "PalimpsestSeeCoderEncode": ("mini-seecoder", 1, ("input", "edit")),
    "PalimpsestSeeCoderCompare": ("mini-seecoder", 1, ("comparison",)),
    "PalimpsestMRSAConcept": ("mini-mrsa-two_concepts", 3, ("what is kept",)),
    "PalimpsestMRSAConceptComposer": ("mini-mrsa-two_concepts", 1, ("concept a", "concept b", "edit")),
    "PalimpsestConceptMaskSAM": ("mrsa-sd15", 3, ("mask",)),
    "PalimpsestConceptAttentionPreview": ("mini-mrsa-two_concepts", 3, ("where each concept is looked at",)),
    "PalimpsestMiniLora": ("mini-mrsa-two_concepts", 1, ("concept a", "concept b", "edit")),
    "PalimpsestInstructPix2PixCFG": ("mini-instruct_pix2pix", 1, ("input", "edit")),
    "PalimpsestInstructPix2PixConditioning": ("mini-instruct_pix2pix", 1, ("input", "edit")),
    "PalimpsestInstructPix2PixLoader": ("instruct_pix2pix-sd15", 1, ("input", "edit")),
    "PalimpsestVisiiLearnInstruction": ("mini-visii", 1, ("before", "after", "input", "edit")),
    "PalimpsestVisiiSaveInstruction": ("mini-visii", 3, ("previews",)),
    "PalimpsestVisiiLoadInstruction": ("mini-visii-load", 1, ("input", "edit")),
    "PalimpsestVisiiCombineInstruction": ("mini-visii", 2, ("edit",)),
    "PalimpsestVisiiBlendInstructions": ("mini-visii-load", 1, ("input", "half", "edit")),
    "PalimpsestMiniTowers": ("mini-visii", 1, ("before", "after")),
    "PalimpsestMiniControlNet": ("mini-seecoder-controlnet", 1, ("input", "layout", "picture")),
    "PalimpsestMiniOutline": ("mini-seecoder-controlnet", 1, ("layout",)),
    "PalimpsestVersatileLoader": ("versatile_dual-vd", 1, ("input", "edit")),
    "PalimpsestVersatileImageContext": ("mini-versatile-variation", 1, ("input", "edit")),
    "PalimpsestVersatileEmptyImage": ("mini-versatile-variation", 1, ("input", "edit")),
    "PalimpsestColorMatch": ("mini-versatile-variation", 2, ("input", "edit")),
    "PalimpsestVersatileDualContext": ("mini-versatile-dual", 1, ("input", "edit")),
    "PalimpsestVersatileFocus": ("mini-versatile-focus", 1, ("input", "edit")),
    "PalimpsestVersatileCombineImages": ("mini-versatile-combine", 1, ("concept a", "concept b", "edit")),
    "PalimpsestVersatileSaveContext": ("mini-versatile-context-save", 1, ("input", "edit")),
    "PalimpsestVersatileLoadContext": ("mini-versatile-context-load", 1, ("input", "edit")),
}
# Nodes of which there is no picture: what they make is words, and the mini family has no model that writes words. Each stands in a graph all the same.
WORDS_ONLY = frozenset({
    "PalimpsestVersatileTextLoader", "PalimpsestVersatileEmptyTextLatent", "PalimpsestVersatileOptimusLoader", "PalimpsestVersatileOptimusEncode",
    "PalimpsestVersatileOptimusEdit", "PalimpsestVersatileOptimusDecode",
})
# A graph on a checkpoint that nobody here has shows the pictures of its twin on the mini checkpoint.
TWINS = {"pnp-sd15": "mini-pnp-background", "ddim_invert-sd15": "mini-ddim_invert", "p2p-sd15": "mini-p2p-swap",
         "p2p_inverted-sd15": "mini-p2p-inverted", "seecoder-sd15": "mini-seecoder", "seecoder_controlnet-sd15": "mini-seecoder-controlnet",
         "mrsa-sd15": "mini-mrsa-two_concepts", "mrsa_controlnet-sd15": "mini-mrsa-controlnet",
         "instruct_pix2pix-sd15": "mini-instruct_pix2pix", "visii-sd15": "mini-visii",
         "versatile_text_to_image-vd": "mini-text_to_image", "versatile_variation-vd": "mini-versatile-variation", "versatile_dual-vd": "mini-versatile-dual",
         "versatile_multi-vd": "mini-versatile-combine", "versatile_focus-vd": "mini-versatile-focus",
         "versatile_text_edit-vd": "mini-versatile-dual"}
# A graph whose result is words, without a twin: its thumbnail says what is made of what.
CARDS = {"versatile_image_to_text-vd": ("picture", "text"), "versatile_text_variation-vd": ("text", "texts")}
CELL, GAP, QUALITY = 256, 8, 88
THUMBNAIL = 400


def name_of(label: str) -> str:
    """`edit: a blue circle` -> `edit`: the picture's name on the sheet."""
    return label.split(":")[0]


def caption_of(label: str) -> str:
    return label.partition(": ")[2]


def chosen(rows: list[Row], number: int, names: tuple[str, ...]) -> list[tuple[str, Image.Image]]:
    """(label, picture) of those names in a graph's row. Raises KeyError for a name that the row does not show."""
    offered = rows[number - 1].pictures
    found = [(label, picture) for name in names for label, picture in offered if name_of(label) == name]
    if {name_of(label) for label, _ in found} != set(names):
        raise KeyError(f"{rows[number - 1].title} shows {', '.join(name_of(label) for label, _ in offered)}, not all of {', '.join(names)}")
    return found


def scaled(picture: Image.Image, height: int) -> Image.Image:
    """To that height; small pictures keep their pixels sharp."""
    factor = height / picture.height
    return picture.resize((max(1, round(picture.width * factor)), height), Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS)


def strip(pictures: list[tuple[str, Image.Image]], captions: bool = True) -> Image.Image:
    """Pictures side by side, each with its caption below."""
    font = ImageFont.load_default(13)
    fitted = [(caption_of(label), scaled(picture, CELL)) for label, picture in pictures]
    lines = [wrapped(caption, picture.width, font, 4) if captions else [] for caption, picture in fitted]
    below = max(map(len, lines)) * 17 + (6 if any(lines) else 0)
    whole = Image.new("RGB", (sum(picture.width for _, picture in fitted) + GAP * (len(fitted) + 1), CELL + 2 * GAP + below), PAPER)
    draw, x = ImageDraw.Draw(whole), GAP
    for (_, picture), text in zip(fitted, lines, strict=True):
        whole.paste(picture, (x, GAP))
        for number, line in enumerate(text):
            draw.text((x, GAP + CELL + 4 + 17 * number), line, INK, font)
        x += picture.width + GAP
    return whole


def grid(strips: list[Image.Image], columns: int = 2) -> Image.Image:
    """Strips below each other, in columns."""
    width, heights = max(part.width for part in strips), []
    for start in range(0, len(strips), columns):
        heights.append(max(part.height for part in strips[start:start + columns]))
    whole = Image.new("RGB", (width * columns, sum(heights)), PAPER)
    for index, part in enumerate(strips):
        row, column = divmod(index, columns)
        whole.paste(part, (column * width, sum(heights[:row])))
    return whole


def thumbnail(pictures: list[Image.Image]) -> Image.Image:
    """A square card with one or a few pictures; several stand side by side, so that a card cut to any shape still shows them."""
    whole = Image.new("RGB", (THUMBNAIL, THUMBNAIL), PAPER)
    edge = (THUMBNAIL - GAP * (len(pictures) + 1)) // len(pictures)
    for index, picture in enumerate(pictures):
        fitted = scaled(picture, edge).crop((0, 0, edge, edge))
        whole.paste(fitted, (GAP + index * (edge + GAP), (THUMBNAIL - edge) // 2))
    return whole


def card(words: tuple[str, ...]) -> Image.Image:
    """A thumbnail of words: what is made of what, one below the other."""
    font, arrow = ImageFont.load_default(56), ImageFont.load_default(40)
    whole = Image.new("RGB", (THUMBNAIL, THUMBNAIL), PAPER)
    draw = ImageDraw.Draw(whole)
    lines = [part for word in words for part in ((word, font), ("to", arrow))][:-1]
    for number, (text, size) in enumerate(lines):
        draw.text((THUMBNAIL / 2, THUMBNAIL / 2 + 72 * (number - (len(lines) - 1) / 2)), text, INK, size, anchor="mm")
    return whole


def for_thumbnail(rows: list[Row]) -> list[Image.Image]:
    """The pictures that stand for a graph: the first input, or its concepts, and what became of them; or its first picture."""
    named = {}
    for label, picture in rows[0].pictures:
        named.setdefault(name_of(label), picture)
    after = named.get("edit") or named.get("reconstruction") or named.get("film strip")
    before = [picture for name, picture in named.items() if name == "input" or name.startswith("concept")]
    return [*before, after] if before and after else [next(iter(named.values()))]


def save(picture: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, quality=QUALITY, optimize=True)
    return path


def write_all(rows: dict[str, list[Row]]) -> list[Path]:
    """Make every picture from the rows of the graphs' contact sheet (graph name -> its rows); returns the files. Raises KeyError for a graph that is not there."""
    files = []
    for path in api_graphs():
        shown = card(CARDS[path.stem]) if path.stem in CARDS else thumbnail(for_thumbnail(rows[TWINS.get(path.stem, path.stem)]))
        files.append(save(shown, WORKFLOWS / f"{path.stem}.jpg"))
    for node, (graph, number, names) in SHOWN.items():
        files.append(save(strip(chosen(rows[TWINS.get(graph, graph)], number, names)), NODES / f"{node}.jpg"))
    edits = [row for graph, found in rows.items() if graph.startswith(("mini-pnp", "mini-p2p")) for row in found]
    files.append(save(grid([strip(chosen([row], 1, ("input", "edit"))) for row in edits]), EDITS))
    return files
