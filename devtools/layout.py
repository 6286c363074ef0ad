"""Where the nodes of a canvas workflow stand: a frame per group, from left to right, the note before them. Lengths are canvas pixels."""
import math
import textwrap

WIDTH = 330  # of a column, unless a node asks for more
NOTE_WIDTH = 380
TITLE = 30  # above a node's body
SLOT, WIDGET = 20, 24
MARGIN, GAP, GROUP_TITLE = 20, 30, 40
LETTER, TITLE_ENDS = 7.2, 50  # width of a title's letter; of what stands around the title
STACK = TITLE + 14  # from one body to the next below it
PICTURE = 230  # room for a picture, once it is there
TEXT = 90  # room for a text that a node shows
TALLEST = 1150  # of a column, about what a window shows at READABLE
READABLE = 0.62  # below a scale of 0.6 the page leaves the texts out
# what a node shows once it has run; the page does not make room for it by itself
SHOWN = {
    "SaveImage": PICTURE, "PreviewImage": PICTURE, "LoadImage": PICTURE, "PreviewAny": TEXT,
    "KSampler": PICTURE, "KSamplerAdvanced": PICTURE, "SamplerCustomAdvanced": PICTURE,
    "PalimpsestDDIMInvert": PICTURE + 2 * TEXT, "PalimpsestReconstructCheck": PICTURE + TEXT, "PalimpsestMiniScene": TEXT,
    "PalimpsestPnPInjector": TEXT, "PalimpsestSaveTrajectory": TEXT, "PalimpsestLoadTrajectory": TEXT,
    "PalimpsestP2PController": PICTURE + 2 * TEXT, "PalimpsestP2PMaskPreview": PICTURE + TEXT, "PalimpsestNullTextOptimize": PICTURE + TEXT,
    "PalimpsestAttentionMapPreview": PICTURE + TEXT, "PalimpsestFeaturePCAPreview": PICTURE + TEXT,
    "PalimpsestSeeCoderLoader": TEXT, "PalimpsestSeeCoderEncode": 2 * TEXT, "PalimpsestSeeCoderCompare": PICTURE + TEXT,
    "PalimpsestMRSAConcept": PICTURE + TEXT, "PalimpsestMRSAConceptComposer": 2 * TEXT, "PalimpsestConceptMaskSAM": PICTURE + TEXT,
    "PalimpsestConceptAttentionPreview": PICTURE + TEXT,
    "PalimpsestInstructPix2PixConditioning": TEXT,
    "PalimpsestVisiiLearnInstruction": PICTURE + 2 * TEXT, "PalimpsestVisiiSaveInstruction": TEXT, "PalimpsestVisiiLoadInstruction": 2 * TEXT,
    "PalimpsestVersatileLoader": 2 * TEXT, "PalimpsestVersatileDualContext": 2 * TEXT, "PalimpsestVersatileImageContext": TEXT,
    "PalimpsestVersatileSaveContext": TEXT, "PalimpsestVersatileLoadContext": TEXT, "PalimpsestVersatileTextLoader": TEXT,
    "PalimpsestVersatileOptimusLoader": TEXT, "PalimpsestVersatileOptimusDecode": 2 * TEXT,
}
GROUP_COLORS = ("#3f789e", "#a1309b", "#8a8", "#b58b2a", "#b06634", "#88a")
VIEW = (1600, 900)  # window that the first look is made for


def node_height(kind: str, sockets: int, outputs: int, widgets: int, lines: int) -> int:
    """Height of a node's body: slots, then widgets (`lines` of them hold a text of several lines), then what it shows."""
    height = max(sockets, outputs, 1) * SLOT + 6
    if widgets:
        height += widgets * WIDGET + 8
    return height + lines * 80 + SHOWN.get(kind, 0)


def fitted(title: str, width: int) -> str:
    """The title, cut at a word where it is wider than its node: the page widens a node for its title once it shows a picture, over the next column."""
    room = int((width - TITLE_ENDS) / LETTER)
    return title if len(title) <= room else textwrap.shorten(title, room, placeholder=" ...")


def note_height(text: str, width: int = NOTE_WIDTH) -> int:
    """Height of a Markdown note that shows all of `text`."""
    columns = (width - 40) // 6
    lines = sum(max(1, math.ceil(len(line) / columns)) * (1.6 if line.startswith("#") else 1) for part in text.splitlines() for line in (textwrap.dedent(part),))
    return int(60 + 16 * lines)


def columns_of(heights: list[int]) -> list[list[int]]:
    """Members of a group (by index) as columns of about one height, none higher than a window shows where that can be."""
    total = sum(heights) + STACK * len(heights)
    limit = total / max(1, math.ceil(total / TALLEST))
    columns: list[list[int]] = [[]]
    filled = 0.0
    for index, height in enumerate(heights):
        # a node goes where its middle falls, so that the last column is not the highest
        if columns[-1] and filled + (height + STACK) / 2 > limit * len(columns):
            columns.append([])
        columns[-1].append(index)
        filled += height + STACK
    return columns


def place(nodes: list[dict], groups: list[str | None], wishes: list[int]) -> list[dict]:
    """Give every node its pos and size; returns the canvas's groups.

    nodes: canvas nodes whose size holds [0, height]; groups: the group title of each, groups stand in the order of their first node;
    wishes: width each node asks for, 0 for none.
    """
    x = NOTE_WIDTH + 2 * MARGIN + GAP
    framed = []
    for number, title in enumerate(dict.fromkeys(groups)):
        members = [index for index, group in enumerate(groups) if group == title]
        left, bottom = x, 0
        for column in columns_of([nodes[index]["size"][1] for index in members]):
            width = max([WIDTH, *(wishes[members[place]] for place in column)])
            y = GROUP_TITLE + TITLE + 10
            for index in (members[place] for place in column):
                node = nodes[index]
                node["pos"], node["size"] = [x, y], [width, node["size"][1]]
                node["title"] = fitted(node["title"], width)
                y += node["size"][1] + STACK
            bottom = max(bottom, y - STACK)
            x += width + GAP
        if title:
            framed.append({"id": number + 1, "title": title, "bounding": [left - MARGIN, 0, x - GAP - left + 2 * MARGIN, bottom + MARGIN],
                           "color": GROUP_COLORS[number % len(GROUP_COLORS)], "font_size": 24, "flags": {}})
        x += 2 * MARGIN
    return framed


def view(nodes: list[dict]) -> dict:
    """Scale and offset of the first look: all nodes, or as many as can be read."""
    right = max(node["pos"][0] + node["size"][0] for node in nodes) + MARGIN
    bottom = max(node["pos"][1] + node["size"][1] for node in nodes) + MARGIN
    left, top, bar = 80, 130, 60  # the page's side bar, menu and status line
    scale = round(max(READABLE, min(1.0, (VIEW[0] - left - MARGIN) / right, (VIEW[1] - top - bar) / bottom)), 3)
    return {"scale": scale, "offset": [round(left / scale), round(top / scale)]}
