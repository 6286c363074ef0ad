"""The real front end in headless Chromium."""
import os
import re
from pathlib import Path

import pytest

from palimpsest.devtools.browsers import find_chromium
from palimpsest.devtools.server import Server

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
LOADED = "window.app?.vueAppReady && window.app.graph?.nodes !== undefined"
UNKNOWN_NODES = "app.graph.nodes.filter(node => !(node.type in LiteGraph.registered_node_types) && !node.subgraph).map(node => node.type)"
MISSING_MODELS = "Missing Models"
ERRORS = "[app.lastNodeErrors && Object.keys(app.lastNodeErrors).length ? JSON.stringify(app.lastNodeErrors) : '', app.lastExecutionError?.exception_message ?? ''].filter(Boolean)"
# a picture that a node shows, complete and not broken
SHOWN = "app.graph.nodes.flatMap(node => node.imgs ?? []).filter(picture => picture.complete && picture.naturalWidth > 0).map(picture => picture.src)"


class FrontEnd:
    """One page of the running server."""

    def __init__(self, page, server: Server, pictures: Path) -> None:
        self.page, self.server, self.pictures = page, server, pictures

    def open_page(self) -> None:
        """Load ComfyUI's page and wait until its graph can be used."""
        # a first visit is greeted by the template browser, which would lie over the canvas
        self.server.request("/settings", {"Comfy.TutorialCompleted": True})
        self.page.goto(self.server.address)
        self.page.wait_for_function(LOADED, timeout=90_000)

    def open_workflow(self, path: Path) -> None:
        """Open a workflow file as Workflow > Open does."""
        self.page.set_input_files("#comfy-file-input", str(path))
        self.page.wait_for_function("name => app.extensionManager.workflow.activeWorkflow?.filename === name && app.graph.nodes.length > 0", arg=path.stem, timeout=30_000)

    def missing_nodes(self) -> list[str]:
        """Types on the canvas that the host does not know, and what a warning about them says."""
        self.page.wait_for_timeout(500)  # the dialog comes after the nodes
        dialogs = [text for text in self.dialogs() if re.search(r"missing", text, re.I) and not text.startswith(MISSING_MODELS)]
        return self.page.evaluate(UNKNOWN_NODES) + dialogs

    def missing_models(self) -> str:
        """What the page says about model files that the host has not got; it offers to download them."""
        return "\n".join(text for text in self.dialogs() if text.startswith(MISSING_MODELS))

    def dialogs(self) -> list[str]:
        return self.page.locator("[role=dialog]").all_inner_texts()

    def api_graph(self) -> dict:
        """The API graph of what is on the canvas, as Workflow > Export (API) writes it."""
        return self.page.evaluate("app.graphToPrompt().then(graph => graph.output)")

    def run(self, seconds: float = 500) -> list[str]:
        """Press Run, wait until the graph has run, return the addresses of the pictures on the canvas. Raises AssertionError with the page's own message."""
        known = set(self.server.get("/history"))
        self.page.get_by_role("button", name="Run", exact=True).click()
        for _ in range(int(seconds * 4)):
            self.page.wait_for_timeout(250)
            errors = self.page.evaluate(ERRORS)
            assert not errors, f"the page reports: {errors}"
            done = set(self.server.get("/history")) - known
            if done:
                break
        else:
            pytest.fail(f"the graph was not through within {seconds:.0f} seconds")
        status = self.server.get("/history")[done.pop()]["status"]
        assert status["status_str"] == "success", status["messages"]
        self.page.wait_for_function(f"{SHOWN}.length > 0", timeout=30_000)
        return self.page.evaluate(SHOWN)

    def screenshot(self, name: str) -> Path:
        """The canvas with everything in view, to output/browser/."""
        self.page.keyboard.press("Escape")
        self.page.locator("#graph-canvas").focus()
        self.page.keyboard.press(".")
        self.page.wait_for_timeout(800)
        self.pictures.mkdir(parents=True, exist_ok=True)
        path = self.pictures / f"{name}.png"
        self.page.screenshot(path=str(path))
        return path


@pytest.fixture(scope="session")
def chromium():
    """A headless browser, once for all tests; without one the tests are skipped, in CI they fail."""
    executable = find_chromium()
    if executable is None:
        reason = "no Chromium found: set CHROMIUM to one, or let `dev.py test --system-packages` install it"
        if os.environ.get("CI", "").lower() in ("1", "true", "yes"):
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def front_end(chromium, server, root):
    """A fresh page of the running server, ready for use. It reaches loopback only."""
    context = chromium.new_context(viewport={"width": 1600, "height": 1000})
    context.route(lambda address: not address.startswith((server.address, "data:", "blob:")), lambda route: route.abort())
    page = FrontEnd(context.new_page(), server, root / "output" / "browser")
    page.open_page()
    yield page
    context.close()
