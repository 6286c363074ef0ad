"""Score and benchmark files."""
import json

import pytest

from palimpsest.devtools import bench, figures, score

LEAF = {"value": 0.5, "n": 10, "seeds": [0, 1]}


@pytest.fixture(autouse=True)
def comfyui_path(monkeypatch, host):
    monkeypatch.setenv("COMFYUI_PATH", str(host))


def test_versions_are_filled_in_and_kept():
    done = figures.complete({"pnp": {"a": LEAF, "b": {**LEAF, "versions": {"x": "1"}}}})
    assert set(done["pnp"]["a"]["versions"]) >= {"palimpsest", "comfyui", "torch", "python"}
    assert done["pnp"]["b"]["versions"] == {"x": "1"}


@pytest.mark.parametrize(("leaf", "word"), [
    ({"value": 1.0, "n": 3}, "pnp.a lacks seeds"), (0.5, "pnp.a is a bare float"), ({**LEAF, "value": float("nan")}, "pnp.a is nan"),
])
def test_a_figure_that_says_too_little_is_refused_by_name(leaf, word):
    with pytest.raises(ValueError, match=word):
        figures.complete({"pnp": {"a": leaf}})


def test_other_scores_stay_when_one_is_recomputed(tmp_path):
    old = {"pnp": {"a": LEAF, "img2img": {"b": LEAF}}, "autoencoder": {"psnr_db": LEAF}}
    new = {"pnp": {"a": {**LEAF, "value": 0.9}}}
    merged = figures.merge(old, new)
    assert merged["pnp"]["a"]["value"] == 0.9 and merged["pnp"]["img2img"] == {"b": LEAF} and merged["autoencoder"] == old["autoencoder"]
    assert old["pnp"]["a"]["value"] == 0.5


def test_files_are_sorted_and_replaced_whole(tmp_path):
    path = tmp_path / "results" / "a.json"
    figures.write(path, {"b": LEAF, "a": LEAF})
    assert list(json.loads(path.read_text())) == ["a", "b"] and figures.read(path) == {"a": LEAF, "b": LEAF}
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_the_cuda_half_of_a_benchmark_outlives_a_run_on_the_cpu():
    both = bench.placed(bench.placed({}, {"a": 1}, cuda=True), {"a": 2}, cuda=False)
    assert both == {"a": 2, "cuda": {"a": 1}}
    assert bench.placed(both, {"a": 3}, cuda=True) == {"a": 2, "cuda": {"a": 3}}


def test_scores_below_their_loose_limit_are_named():
    module = type("Module", (), {"QUICK_LIMITS": {"pnp.a": 0.6, "pnp.gone": 0.1}})
    assert score.below_limits(module, {"pnp": {"a": LEAF}}) == ["pnp.a = 0.5, expected at least 0.6", "pnp.gone = None, expected at least 0.1"]
    assert score.below_limits(object(), {"pnp": {"a": LEAF}}) == []


def test_an_unknown_name_is_told_with_the_known_ones(capsys):
    assert score.main(["no-such-score"]) == 2 and bench.main(["no-such-benchmark"]) == 2
    assert capsys.readouterr().err.count("no-such-") == 2


@pytest.mark.parametrize("path", ["mini/scores.json", "benchmarks/results"])
def test_committed_figures_are_complete_and_sorted(root, path):
    files = [root / path] if path.endswith(".json") else sorted((root / path).glob("*.json"))
    for file in filter(lambda file: file.is_file(), files):
        text = file.read_text(encoding="utf-8")
        found = json.loads(text)
        assert figures.complete(found) == found, f"{file.name}: versions missing"
        assert text == json.dumps(found, indent=1, sort_keys=True) + "\n", f"{file.name} was edited by hand"
