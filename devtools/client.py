"""Following one graph over the host's websocket."""
import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import aiohttp

from .graphs import node_name


class GraphError(RuntimeError):
    """A graph was refused or failed; `node_id`, `node` (its name) and `message` say where and why."""

    def __init__(self, graph: dict, node_id: str | None, message: str, exception_type: str = "", traceback: str = "") -> None:
        self.node_id, self.message, self.exception_type, self.traceback = node_id, message.strip(), exception_type, traceback
        self.node = node_name(graph, node_id) if node_id else "the graph"
        super().__init__(f"{self.node}: {self.message}")

    @classmethod
    def from_refusal(cls, graph: dict, answer: dict) -> "GraphError":
        """From the body of the host's status 400."""
        for node_id, entry in (answer.get("node_errors") or {}).items():
            first = entry["errors"][0]
            return cls(graph, node_id, ": ".join(filter(None, (first["message"], first.get("details")))), first.get("type", ""))
        error = answer.get("error") or {}
        if isinstance(error, str):
            error = {"message": error}
        return cls(graph, None, ": ".join(filter(None, (error.get("message"), error.get("details")))) or "refused without a reason", error.get("type", ""))


class Interrupted(RuntimeError):
    """The graph was cancelled."""


@dataclass
class Result:
    """What a finished graph left behind."""
    prompt_id: str
    outputs: dict = field(default_factory=dict)  # node id -> the node's ui output, e.g. {"images": [...], "text": [...]}
    executed: list[str] = field(default_factory=list)  # node ids in the order they ran (cached ones do not)
    previews: int = 0  # latent previews received on the way
    seconds: float = 0.0

    def images(self, node_id: str) -> list[dict]:
        """The files of a node's pictures, for Server.view."""
        return self.outputs.get(node_id, {}).get("images", [])

    def text(self, node_id: str) -> str:
        """A node's text output."""
        return "\n".join(map(str, self.outputs.get(node_id, {}).get("text", [])))


def run_graph(address: str, graph: dict, client_id: str, post: Callable[[], str], progress, timeout: float) -> Result:
    """Connect, call post() for the prompt id, follow the run. See Server.run."""
    # in a thread of its own: the caller's thread may have a running event loop (the browser tests do)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(asyncio.wait_for(_follow(address, graph, client_id, post, progress), timeout))).result()


async def _follow(address: str, graph: dict, client_id: str, post, progress) -> Result:
    started = time.monotonic()
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{address}/ws?clientId={client_id}", max_msg_size=0) as socket:
        result = Result(await asyncio.to_thread(post))
        failure = None
        async for message in socket:
            if message.type == aiohttp.WSMsgType.BINARY:
                result.previews += 1
                continue
            if message.type != aiohttp.WSMsgType.TEXT:
                break
            event = json.loads(message.data)
            kind, data = event["type"], event.get("data") or {}
            if data.get("prompt_id") != result.prompt_id:
                continue
            node_id = data.get("node")
            if kind == "executing" and node_id is None:
                # the host is through with this graph, also when it failed
                result.seconds = time.monotonic() - started
                if failure:
                    raise failure
                return result
            if kind == "executing":
                result.executed.append(node_id)
                if progress:
                    progress(node_id, None, None)
            elif kind == "progress" and progress:
                progress(node_id, data["value"], data["max"])
            elif kind == "executed" and data.get("output"):
                result.outputs[node_id] = data["output"]
            elif kind == "execution_error":
                failure = GraphError(graph, data["node_id"], data["exception_message"], data.get("exception_type", ""), "".join(data.get("traceback", [])))
            elif kind == "execution_interrupted":
                failure = Interrupted(f"cancelled at {node_name(graph, data.get('node_id'))}")
    raise ConnectionError("the websocket closed")
