"""The server helper's failures, without a server: see tests/server/test_server.py for the real one."""
import asyncio

import aiohttp
import pytest

from palimpsest.devtools import server as server_module
from palimpsest.devtools.server import Server, ServerError
from palimpsest.tests.helpers.stock import stock_graph


@pytest.mark.parametrize(("error", "words"), [
    (asyncio.TimeoutError(), "did not finish a graph within 7 seconds"),
    (TimeoutError("timed out"), "did not finish a graph within 7 seconds"),
    (ConnectionError("the websocket closed"), "ended or broke off"),
    (aiohttp.ServerDisconnectedError(), "ended or broke off"),
    (aiohttp.ClientPayloadError("cut"), "ended or broke off"),
])
def test_a_server_that_hangs_or_ends_is_one_error_that_names_the_node(monkeypatch, tmp_path, error, words):
    """Regression: a timeout, and most of aiohttp's errors, were tracebacks."""
    def breaks(address, graph, client_id, post, progress, timeout):
        progress("2", None, None)
        raise error

    running = Server(tmp_path)
    running.log_path = tmp_path / "server.log"
    running.log_path.write_text("the last line\n")
    interrupted = []
    monkeypatch.setattr(server_module, "run_graph", breaks)
    monkeypatch.setattr(Server, "interrupt", lambda self: interrupted.append(1))
    with pytest.raises(ServerError, match=words) as failed:
        running.run(stock_graph(), timeout=7)
    assert 'at node 2 (SaveImage "edit")' in str(failed.value) and str(failed.value).endswith("the last line")
    assert bool(interrupted) is ("finish" in words), "a graph that nobody waits for is cancelled"
