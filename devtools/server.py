"""The real host as a child process, and a client for its HTTP and websocket API: shared by demo, serve and the tests.

Runs inside the environment (needs aiohttp, which the host requires). Every server gets a base directory of its own whose
custom_nodes holds a link to this checkout, so nothing is written into the user's ComfyUI.
"""
import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from . import graphs
from .client import GraphError, Result, run_graph
from .links import link_folder, unlink_folder

ROOT = Path(__file__).resolve().parent.parent
PACK = "palimpsest"  # name of the link in custom_nodes
# a proxy of the environment must not see loopback requests
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
RECORD = re.compile(r"^\[(DEBUG|INFO|WARNING|ERROR|CRITICAL)\] \[([^\]]*)\] ", re.M)


class ServerError(RuntimeError):
    """The server did not start, or ended; the message carries the end of its log."""


@dataclass(frozen=True)
class LogRecord:
    level: str
    path: str  # source file that logged
    message: str


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def prepare_base(base: Path, host: Path) -> None:
    """Fill a base directory: the linked pack, the host's example pictures, a file that names the host's model folders."""
    for folder in ("custom_nodes", "input", "output", "models"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    link_folder(ROOT, base / "custom_nodes" / PACK)
    shutil.copytree(ROOT / "devtools" / "host_aid", base / "custom_nodes" / "devtools_host_aid", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("__pycache__"))
    for picture in (host / "input").glob("*.png"):
        shutil.copy(picture, base / "input" / picture.name)
    models = host / "models"
    folders = {folder.name: folder.name for folder in models.iterdir() if folder.is_dir()} if models.is_dir() else {}
    # JSON is YAML too
    (base / "model_paths.yaml").write_text(json.dumps({"host": {"base_path": str(models), **folders}} if folders else {}), encoding="utf-8")


@dataclass
class Server:
    """One running ComfyUI. Use as a context manager, or call start() and stop()."""
    host: Path
    arguments: list[str] = field(default_factory=list)  # further arguments for main.py
    base: Path | None = None  # kept if given; else temporary
    port: int | None = None
    overlay: Path | None = None  # packages that come before the environment's
    cpu: bool = True
    echo: bool = False  # log to the console instead of a file

    def __post_init__(self) -> None:
        self.temporary = self.base is None
        self.process: subprocess.Popen | None = None
        self.ready_at = 0  # length of the log when the server was ready

    def start(self, seconds: float = 180) -> "Server":
        """Start it and wait until it answers. Raises ServerError."""
        self.base = Path(tempfile.mkdtemp(prefix="comfyui-base-")) if self.temporary else Path(self.base).resolve()
        prepare_base(self.base, self.host)
        self.port = self.port or free_port()
        env = {**os.environ, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", "PALIMPSEST_END_WITH_PARENT": "1"}
        if self.overlay:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(self.overlay), env.get("PYTHONPATH")]))
        command = [sys.executable, str(self.host / "main.py"), "--port", str(self.port), "--base-directory", str(self.base),
                   "--database-url", "sqlite:///:memory:", "--extra-model-paths-config", str(self.base / "model_paths.yaml"),
                   *(["--cpu"] if self.cpu else []), *self.arguments]
        self.log_path = self.base / "server.log"
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=self.host, env=env, stdin=subprocess.PIPE,
                                            **({} if self.echo else {"stdout": log, "stderr": subprocess.STDOUT}))
        try:
            self._wait_until_ready(seconds)
        except BaseException:
            self.stop()
            raise
        self.ready_at = self.log_path.stat().st_size
        return self

    def _wait_until_ready(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI ended while starting (exit status {self.process.returncode}):\n{self.log_tail()}")
            try:
                self.get("/system_stats", timeout=5)
                return
            except OSError:
                time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer within {seconds:.0f} seconds:\n{self.log_tail()}")

    def stop(self) -> None:
        """End the server and remove its temporary base directory. Harmless when it is not running."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process.stdin.close()
            self.process = None
        if self.temporary and self.base is not None:
            # first the link: nothing may ever walk through it and delete the checkout
            unlink_folder(self.base / "custom_nodes" / PACK)
            shutil.rmtree(self.base, ignore_errors=True)

    def __enter__(self) -> "Server":
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # -- log

    def log(self, start: int = 0) -> str:
        """Everything logged since byte `start` (`len` of an earlier log, or ready_at)."""
        return self.log_path.read_bytes()[start:].decode("utf-8", "replace")

    def log_tail(self, lines: int = 25) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def log_records(self, start: int = 0) -> list[LogRecord]:
        """The log cut into records; a record's message keeps its further lines (tracebacks)."""
        text = self.log(start)
        found = list(RECORD.finditer(text))
        ends = [match.start() for match in found[1:]] + [len(text)]
        return [LogRecord(match[1], match[2], text[match.end():end].strip()) for match, end in zip(found, ends, strict=True)]

    def startup_records(self) -> list[LogRecord]:
        """What was logged until the server was ready."""
        return self.log_records()[:len(RECORD.findall(self.log()[:self.ready_at]))]

    # -- HTTP

    def request(self, path: str, data: bytes | dict | None = None, timeout: float = 60) -> bytes:
        """Body of the answer to a GET, or with `data` to a POST. Raises OSError (HTTPError for a status of 400 and above)."""
        body = json.dumps(data).encode() if isinstance(data, dict) else data
        request = urllib.request.Request(self.address + path, data=body, headers={"Content-Type": "application/json"} if body is not None else {})
        with OPENER.open(request, timeout=timeout) as answer:
            return answer.read()

    def get(self, path: str, timeout: float = 60):
        """The JSON at `path`."""
        return json.loads(self.request(path, timeout=timeout))

    def object_info(self) -> dict:
        """Description of every node the server offers, by id."""
        return self.get("/object_info")

    def view(self, picture: dict) -> bytes:
        """The file that a node's output names ({filename, subfolder, type})."""
        query = urllib.parse.urlencode({key: picture.get(key, "") for key in ("filename", "subfolder", "type")})
        return self.request(f"/view?{query}")

    def upload(self, name: str, content: bytes) -> None:
        """Put a file into the server's input directory."""
        target = self.base / "input" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def interrupt(self) -> None:
        """Cancel the running graph, as the Cancel button does."""
        self.request("/interrupt", b"{}")

    # -- graphs

    def run(self, graph: dict, progress=None, timeout: float = 600) -> Result:
        """Queue an API graph and follow it to its end.

        progress(node_id, value, maximum) is called for every step; value is None when the node has just begun.
        Raises GraphError (node and message), client.Interrupted, ServerError.
        """
        graph = graphs.nodes_of(graph)
        client_id = uuid.uuid4().hex
        at = "before its first node"

        def watched(node_id, value, maximum):
            nonlocal at
            at = f"at {graphs.node_name(graph, node_id)}"
            if progress:
                progress(node_id, value, maximum)

        try:
            result = run_graph(self.address, graph, client_id, lambda: self._post(graph, client_id), watched, timeout)
            history = self.get(f"/history/{result.prompt_id}").get(result.prompt_id, {})
        # before Python 3.11 asyncio has a TimeoutError of its own
        except (asyncio.TimeoutError, TimeoutError) as error:
            with contextlib.suppress(OSError):
                self.interrupt()  # nobody waits for it now, and the next graph would wait behind it
            raise ServerError(f"ComfyUI did not finish a graph within {timeout:g} seconds, it was {at}:\n{self.log_tail()}") from error
        except (ConnectionError, urllib.error.URLError, aiohttp.ClientError) as error:
            raise ServerError(f"ComfyUI ended or broke off while it ran a graph, {at} ({error}):\n{self.log_tail()}") from error
        result.outputs.update(history.get("outputs", {}))
        return result

    def _post(self, graph: dict, client_id: str) -> str:
        try:
            return json.loads(self.request("/prompt", {"prompt": graph, "client_id": client_id}))["prompt_id"]
        except urllib.error.HTTPError as error:
            raise GraphError.from_refusal(graph, json.loads(error.read())) from None
