"""The pictures of the repository."""
import pytest
from PIL import Image

from palimpsest.devtools import pictures
from palimpsest.devtools.graphs import api_graphs, load_graph, role
from palimpsest.devtools.sheet import Row
from palimpsest.nodes import all_nodes

ALL = [node.GET_SCHEMA().node_id for node in all_nodes()]
IDS = [node for node in ALL if node not in pictures.WORDS_ONLY]


def picture(color, size=(128, 128)):
    return Image.new("RGB", size, color)


ROW = Row("mini pnp", [("input: a red circle", picture("red")), ("film strip", picture("grey", (900, 128))), ("edit: a blue circle", picture("blue"))])


def test_a_thumbnail_shows_the_input_and_the_edit_in_its_middle_band():
    card = pictures.thumbnail(pictures.for_thumbnail([ROW]))
    side = pictures.THUMBNAIL
    assert card.size == (side, side)
    assert [card.getpixel((x, side // 2)) for x in (side // 4, 3 * side // 4)] == [(255, 0, 0), (0, 0, 255)]


def test_a_thumbnail_of_concepts_shows_each_and_what_became_of_them():
    row = Row("mini", [("concept a: a red circle", picture("red")), ("concept b", picture("blue")), ("edit: both", picture("green")), ("edit: both", picture("white"))])
    assert [one.getpixel((0, 0)) for one in pictures.for_thumbnail([row])] == [(255, 0, 0), (0, 0, 255), (0, 128, 0)]
    assert pictures.thumbnail(pictures.for_thumbnail([row])).size == (pictures.THUMBNAIL, pictures.THUMBNAIL)


def test_a_graph_without_an_input_shows_its_first_picture():
    card = pictures.thumbnail(pictures.for_thumbnail([Row("mini", [("picture", picture("green"))])]))
    assert card.getpixel((200, 200)) == (0, 128, 0)


def test_a_strip_holds_the_chosen_pictures_in_order():
    whole = pictures.strip(pictures.chosen([ROW], 1, ("edit", "input")))
    middle = pictures.GAP + pictures.CELL // 2
    assert whole.getpixel((middle, middle)) == (0, 0, 255)
    assert whole.getpixel((middle + pictures.CELL + pictures.GAP, middle)) == (255, 0, 0)
    assert whole.height > pictures.CELL + 2 * pictures.GAP, "captions stand below"


def test_a_picture_that_the_graph_does_not_show_is_named():
    with pytest.raises(KeyError, match="target"):
        pictures.chosen([ROW], 1, ("target",))


def test_a_grid_has_room_for_every_strip():
    strips = [picture("red", (100, 40)), picture("blue", (80, 60)), picture("green", (100, 10))]
    whole = pictures.grid(strips)
    assert whole.size == (200, 70) and whole.getpixel((101, 1)) == (0, 0, 255) and whole.getpixel((1, 61)) == (0, 128, 0)


@pytest.mark.parametrize("node", IDS)
def test_every_node_is_shown_by_a_graph_that_has_it(node):
    graph, number, names = pictures.SHOWN[node]
    nodes = load_graph(next(path for path in api_graphs() if path.stem == graph)).values()
    assert any(entry["class_type"] == node for entry in nodes)
    assert set(names) <= {role(entry).name for entry in nodes if role(entry).row == number}


@pytest.mark.parametrize("node", IDS)
def test_the_picture_of_every_node_is_in_the_readme_and_on_its_help_page(root, node):
    """Remake them with `python dev.py workflows --pictures`."""
    file = pictures.NODES / f"{node}.jpg"
    assert file.stat().st_size < 150_000
    assert file.relative_to(root).as_posix() in (root / "README.md").read_text(encoding="utf-8")
    assert f"](pictures/{node}.jpg)" in (root / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("node", sorted(pictures.WORDS_ONLY))
def test_a_node_without_a_picture_makes_words_and_stands_in_a_graph_that_shows_them(root, node):
    """The exemption is for words only: no output of such a node is a picture, and its help page promises none."""
    schema = next(entry.GET_SCHEMA() for entry in all_nodes() if entry.GET_SCHEMA().node_id == node)
    assert "IMAGE" not in {output.io_type for output in schema.outputs} and node not in pictures.SHOWN
    graphs = [load_graph(path).values() for path in api_graphs()]
    having = [nodes for nodes in graphs if any(entry["class_type"] == node for entry in nodes)]
    assert having and all(any(entry["class_type"] == "PreviewAny" for entry in nodes) for nodes in having)
    assert "](pictures/" not in (root / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")


def test_a_card_of_words_is_drawn_in_its_middle():
    whole = pictures.card(("picture", "text"))
    side = pictures.THUMBNAIL
    assert whole.size == (side, side)
    assert whole.getcolors(side * side)[0][0] < side * side, "something is written"
    margins = [whole.crop(box).getcolors() for box in ((0, 0, side, side // 6), (0, side - side // 6, side, side))]
    assert all(len(colors) == 1 for colors in margins)


def test_every_graph_without_pictures_of_its_own_has_a_twin_or_a_card():
    stems = {path.stem for path in api_graphs()}
    assert {stem for stem in stems if not stem.startswith("mini-")} == set(pictures.TWINS) | set(pictures.CARDS)
    assert not set(pictures.TWINS) & set(pictures.CARDS)
    assert set(pictures.TWINS.values()) <= stems
