"""Linking the checkout into custom_nodes."""
import os
import subprocess
import types

import pytest

from palimpsest.devtools import links
from palimpsest.devtools.server import free_port, prepare_base


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "__init__.py").touch()
    return folder


def test_a_link_leads_to_the_folder_and_goes_without_it(tmp_path, target):
    link = tmp_path / "link"
    links.link_folder(target, link)
    links.link_folder(target, link)
    assert (link / "__init__.py").is_file() and links.is_link(link) and not links.is_link(target)
    links.unlink_folder(link)
    links.unlink_folder(link)
    assert not link.exists() and (target / "__init__.py").is_file()


def test_a_link_to_another_checkout_is_replaced(tmp_path, target):
    link, other = tmp_path / "link", tmp_path / "other"
    other.mkdir()
    links.link_folder(other, link)
    links.link_folder(target, link)
    assert os.path.samefile(link, target)


def test_a_link_whose_target_is_gone_is_replaced(tmp_path, target):
    link = tmp_path / "link"
    links.link_folder(tmp_path / "gone", link)
    links.link_folder(target, link)
    assert os.path.samefile(link, target)


def test_a_users_own_folder_is_never_replaced(tmp_path, target):
    folder = tmp_path / "link"
    folder.mkdir()
    (folder / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="move it away"):
        links.link_folder(target, folder)
    links.unlink_folder(folder)
    assert (folder / "mine.txt").is_file()


def test_where_windows_refuses_symbolic_links_a_junction_is_made(tmp_path, target, monkeypatch):
    def refuse(*_, **__):
        raise OSError("A required privilege is not held by the client")

    commands = []
    monkeypatch.setattr(links, "os", types.SimpleNamespace(name="nt", symlink=refuse, path=os.path))
    monkeypatch.setattr(links, "subprocess", types.SimpleNamespace(run=lambda command, **_: commands.append(command)))
    links.link_folder(target, tmp_path / "link")
    assert commands == [["cmd", "/c", "mklink", "/J", str(tmp_path / "link"), str(target)]]
    assert subprocess.run is not links.subprocess.run


def test_a_base_directory_can_be_prepared_twice(tmp_path, host, root):
    prepare_base(tmp_path, host)
    prepare_base(tmp_path, host)
    assert os.path.samefile(tmp_path / "custom_nodes" / "palimpsest", root)
    assert (tmp_path / "input" / "example.png").is_file()
    links.unlink_folder(tmp_path / "custom_nodes" / "palimpsest")


def test_a_free_port_can_be_bound():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))
