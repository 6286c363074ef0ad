"""The README says what the repository holds."""
import re

import pytest

from palimpsest.devtools import readme
from palimpsest.nodes import all_nodes

LEAF = {"value": 0.8125, "n": 200, "seeds": [0], "versions": {}, "low": 0.75, "high": 0.86}


def test_its_tables_are_those_of_the_committed_figures():
    """After `dev.py score` or `bench` they are rewritten; a figure changed by hand fails here."""
    text = readme.README.read_text(encoding="utf-8")
    assert readme.filled(text) == text


def test_a_table_shows_value_interval_and_n():
    assert "| `pnp.edit_success` | 0.812 (0.75 to 0.86) | 200 |" in readme.table({"pnp": {"edit_success": LEAF}})


def test_figures_in_detail_are_folded_away():
    main, folded = readme.table({"pnp": {"edit_success": LEAF, "by_edit": {"color": LEAF}}}).split("<details>")
    assert "`pnp.edit_success`" in main and "by_edit" not in main and "`pnp.by_edit.color`" in folded and folded.endswith("</details>")
    assert readme.table({}) == readme.NONE_YET


def test_a_lost_mark_is_named():
    with pytest.raises(ValueError, match="scores:begin"):
        readme.filled("nothing")


def test_every_node_is_in_the_table_of_nodes():
    text = readme.README.read_text(encoding="utf-8").split("## Nodes")[1].split("\n## ")[0]
    missing = [node.GET_SCHEMA().display_name for node in all_nodes() if node.GET_SCHEMA().display_name.lower() not in text.lower()]
    assert not missing


def test_every_local_link_leads_somewhere(root):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", readme.README.read_text(encoding="utf-8"))
    assert not [link for link in links if not (root / link).exists()]
