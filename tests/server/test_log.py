"""Which log lines count as this pack's; and that a server never outlives its starter."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from palimpsest.devtools.server import RECORD, LogRecord, Server
from palimpsest.tests.helpers.log import our_warnings


class Log:
    host = Path("/somewhere/palimpsest/.host/comfyui")
    base = Path("/somewhere/else/base")

    def __init__(self, *records):
        self.records = [LogRecord(*record) for record in records]

    def startup_records(self):
        return self.records


@pytest.mark.parametrize(("level", "path", "message", "counts"), [
    ("WARNING", "/somewhere/palimpsest/.host/comfyui/nodes.py", "Cannot import /somewhere/else/base/custom_nodes/palimpsest module for custom nodes: no", True),
    ("WARNING", "/somewhere/else/base/custom_nodes/palimpsest/nodes/pnp.py", "a file is missing", True),
    ("ERROR", "/somewhere/palimpsest/nodes/pnp.py", "a file is missing", True),
    ("INFO", "/somewhere/palimpsest/nodes/pnp.py", "all is well", False),
    ("WARNING", "/somewhere/palimpsest/.host/comfyui/nodes.py", "torchaudio missing", False),
    ("WARNING", "/somewhere/palimpsest/.host/comfyui/nodes.py", "cannot read /somewhere/palimpsest/.host/comfyui/input", False),
])
def test_a_warning_counts_if_it_names_the_pack_or_comes_from_it(level, path, message, counts):
    assert bool(our_warnings(Log((level, path, message)), Path("/somewhere/palimpsest"))) is counts


@pytest.mark.server
def test_every_line_of_the_servers_log_belongs_to_a_record(server):
    records = server.startup_records()
    assert {record.level for record in records} >= {"INFO"} and any("To see the GUI" in record.message for record in server.log_records())
    assert len(records) == len(RECORD.findall(server.log()[:server.ready_at]))


@pytest.mark.server
@pytest.mark.slow
def test_a_server_ends_when_its_starter_is_killed(host, root, tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from run import register_pack; register_pack()\n"
            "from pathlib import Path; from palimpsest.devtools.server import Server\n"
            "server = Server(Path(sys.argv[2]), ['--disable-api-nodes'], base=Path(sys.argv[3])).start()\n"
            "print(server.port, flush=True); input()")
    starter = subprocess.Popen([sys.executable, "-c", code, str(root / "devtools"), str(host), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    watched = Server(host, base=tmp_path, port=int(starter.stdout.readline()))
    assert watched.get("/system_stats")
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            watched.get("/system_stats", timeout=2)
        except OSError:
            break
        time.sleep(0.2)
    else:
        pytest.fail("the server still answers")
    assert os.path.samefile(tmp_path / "custom_nodes" / "palimpsest", root)
