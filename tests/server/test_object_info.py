"""The nodes as the real server offers them."""
import json

import pytest

from palimpsest.devtools.graphs import options_of
from palimpsest.nodes import all_nodes
from palimpsest.tests.helpers.log import our_warnings

pytestmark = pytest.mark.server
IDS = [node.GET_SCHEMA().node_id for node in all_nodes()]


@pytest.fixture(scope="module")
def info(server):
    return {name: entry for name, entry in server.object_info().items() if name.startswith("Palimpsest")}


def inputs_of(entry: dict) -> list[tuple[str, str, object, dict]]:
    """(group, name, type, options) of every input, in the order that saved workflows depend on."""
    order = entry["input_order"]
    return [(group, name, entry["input"][group][name][0], (entry["input"][group][name] + [{}])[1])
            for group in order for name in order[group] if group != "hidden"]


def test_the_server_offers_every_node_of_the_pack_and_no_other(info):
    assert sorted(info) == sorted(IDS)
    assert len(set(IDS)) == len(IDS), "two nodes share an id"


@pytest.mark.parametrize("node_id", IDS)
def test_node_is_described(info, node_id):
    entry = info[node_id]
    assert entry["category"].split("/")[0] == "Palimpsest"
    assert entry["display_name"] and entry["display_name"] != node_id
    assert len(entry["description"]) > 20, "a description of at least a sentence, it fills the help panel"


@pytest.mark.parametrize("node_id", IDS)
def test_every_input_has_a_tooltip_and_every_number_its_range(info, node_id):
    for group, name, kind, options in inputs_of(info[node_id]):
        assert len(options.get("tooltip") or "") > 10, f"{node_id}.{name} ({group}) has no tooltip"
        if kind in ("INT", "FLOAT") and not options.get("forceInput"):
            lacking = [key for key in ("default", "min", "max", "step") if options.get(key) is None]
            assert not lacking, f"{node_id}.{name} lacks {', '.join(lacking)}"
            assert options["min"] <= options["default"] <= options["max"], f"{node_id}.{name}: default out of range"


@pytest.mark.parametrize("node_id", IDS)
def test_every_combo_default_is_one_of_its_choices(info, node_id):
    for _, name, _, options in inputs_of(info[node_id]):
        choices = options_of(info[node_id], name)
        if choices and options.get("default") is not None:
            assert options["default"] in choices, f"{node_id}.{name}"


@pytest.mark.parametrize("node_id", IDS)
def test_every_node_has_its_help_page(server, root, node_id):
    page = root / "web" / "docs" / f"{node_id}.md"
    assert page.is_file(), f"web/docs/{node_id}.md is missing"
    served = server.request(f"/extensions/palimpsest/docs/{node_id}.md").decode()
    assert served.startswith("#") and len(served) > 300


def test_no_help_page_without_a_node(root):
    pages = {page.stem for page in (root / "web" / "docs").glob("Palimpsest*.md")}
    assert pages <= set(IDS)


def test_ids_inputs_and_outputs_are_those_of_the_snapshot(info, root, request):
    """Saved workflows break when an id, an input's place or type, or an output changes. Meant changes: `python dev.py test --update-snapshot`."""
    path = root / "tests" / "server" / "object_info_snapshot.json"
    now = {name: {
        "inputs": [[group, input_name, "COMBO" if isinstance(kind, list) else kind] for group, input_name, kind, _ in inputs_of(entry)],
        "outputs": [[output_name, kind] for output_name, kind in zip(entry["output_name"], entry["output"], strict=True)],
    } for name, entry in info.items()}
    if request.config.getoption("--update-snapshot"):
        path.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert now == json.loads(path.read_text(encoding="utf-8"))


def test_no_warning_names_this_pack(server, root):
    assert our_warnings(server, root) == []
