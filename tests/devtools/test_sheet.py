"""The contact sheet."""
import io

from PIL import Image

from palimpsest.devtools.graphs import Role
from palimpsest.devtools.sheet import CELL, contact_sheet, rows_of


def png(colour, size=(128, 128)):
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def test_the_input_stands_left_of_the_edit_and_each_number_has_its_row():
    rows = rows_of("mini pnp", [
        (Role("edit", 1, "a blue circle"), [png("blue")], ""), (Role("edit", 2, ""), [png("green")], ""), (Role("input", 2, ""), [png("white")], ""),
        (Role("film strip", 1, ""), [png("grey", (512, 64))], ""), (Role("input", 1, ""), [png("red")], ""), (Role("score", 1, ""), [], "PSNR 31 dB"),
    ])
    assert [[label for label, _ in row.pictures] for row in rows] == [["input", "film strip", "edit: a blue circle"], ["input", "edit"]]
    assert rows[0].lines == ["score: PSNR 31 dB"]


def test_a_pair_stands_in_its_order_before_the_picture_that_it_is_applied_to():
    """Regression: the alphabet put the picture after to the left of the one before."""
    rows = rows_of("mini visii", [(Role(name, 1, ""), [png("red")], "") for name in ("edit", "after", "input", "before")])
    assert [label for label, _ in rows[0].pictures] == ["before", "after", "input", "edit"]


def test_a_text_called_edit_caption_stands_below_the_edit():
    rows = rows_of("row", [(Role("edit caption", 2, ""), [], "a blue circle"), (Role("edit", 2, ""), [png("blue")], ""), (Role("edit", 1, ""), [png("red")], "")])
    assert [[label for label, _ in row.pictures] for row in rows] == [["edit"], ["edit: a blue circle"]]
    assert [row.lines for row in rows] == [[], []]


def test_a_further_edit_stands_beside_the_same_input():
    rows = rows_of("row", [(Role("edit", 2, ""), [png("green")], ""), (Role("edit", 1, ""), [png("blue")], ""), (Role("input", 1, "a red circle"), [png("red")], "")])
    assert [[label for label, _ in row.pictures] for row in rows] == [["input: a red circle", "edit"]] * 2


def test_pictures_lie_side_by_side_on_the_sheet():
    sheet = contact_sheet(rows_of("row", [(Role("input", 1, ""), [png("red")], ""), (Role("edit", 1, ""), [png("blue")], "")]))
    colours = {sheet.getpixel((x, 12 + 26 + CELL // 2)) for x in (12 + CELL // 2, 24 + CELL + CELL // 2)}
    assert colours == {(255, 0, 0), (0, 0, 255)}


def test_a_wide_film_strip_and_a_long_text_stay_on_the_sheet():
    sheet = contact_sheet(rows_of("row", [(Role("strip", 1, "word " * 200), [png("red", (4096, 64))], "word " * 500)]))
    assert sheet.width < 5 * CELL and sheet.height < 4 * CELL


def test_text_without_a_picture_makes_no_row():
    assert rows_of("row", [(Role("score", 1, ""), [], "PSNR 31 dB")]) == []
