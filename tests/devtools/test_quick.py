"""`--quick` of score and bench: a try-out that leaves everything committed alone."""
import sys
from types import SimpleNamespace

import pytest

from palimpsest.devtools import bench, score

FIGURES = {"example": {"value": 1.0, "n": 1, "seeds": "0"}}


@pytest.fixture
def command(request, monkeypatch, tmp_path, host):
    """score or bench with one example to run, writing below tmp_path; and the README's updates."""
    module, package, names = request.param
    updates = []
    example = SimpleNamespace(score=lambda quick: {"try": FIGURES}, bench=lambda quick: FIGURES)
    monkeypatch.setitem(sys.modules, f"palimpsest.{package}.example", example)
    monkeypatch.setattr(module, names, lambda: ["example"])
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "put_host_on_path", lambda *_: None)
    monkeypatch.setattr(module.readme, "update", lambda: updates.append(1))
    monkeypatch.setenv("COMFYUI_PATH", str(host))
    if module is score:
        monkeypatch.setattr(score, "SCORES_FILE", tmp_path / "mini" / "scores.json")
    else:
        monkeypatch.setattr(bench, "BENCHMARKS", tmp_path / "benchmarks")
    (tmp_path / "output").mkdir()
    for folder in ("mini", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    return module, updates


@pytest.mark.parametrize("command", [(score, "devtools.scores", "scores"), (bench, "benchmarks", "benchmarks")], indirect=True, ids=["score", "bench"])
@pytest.mark.parametrize("quick", [True, False])
def test_the_readme_is_written_from_full_runs_only(command, quick, tmp_path):
    """Regression: a quick run rewrote the README, too."""
    module, updates = command
    assert module.main(["example", *(["--quick"] if quick else [])]) == 0
    written = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.json")]
    assert len(written) == 1 and written[0].startswith("output/") is quick
    assert updates == ([] if quick else [1])


def test_there_is_a_benchmark_of_pnp_and_a_score_of_every_part():
    """Empty lists would leave the tests over them without cases."""
    assert "pnp" in bench.benchmarks()
    assert {"scene_reader", "autoencoder", "text_to_image", "inversion", "pnp"} <= set(score.scores())
