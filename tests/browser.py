"""A headless Chromium that tests look through: chromedriver, spoken to in the WebDriver protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.dist.processes import free_port

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "" if CHROMIUM and DRIVER else "no chromium and chromedriver here: `make browser` installs Debian's"

# TensorBoard's pages are elements within elements, each with a tree of its own.
_ALL_TEXT = """
const walk = node => (node.shadowRoot ? walk(node.shadowRoot) : "")
  + [...node.childNodes].map(child => child.nodeType == 3 ? child.textContent + " " : walk(child)).join("");
return walk(document.body);
"""
_COUNT = """
const walk = node => (node.matches && node.matches(arguments[0]) && node.getBoundingClientRect().width > 20 ? 1 : 0)
  + (node.shadowRoot ? walk(node.shadowRoot) : 0)
  + [...node.children || []].map(walk).reduce((a, b) => a + b, 0);
return walk(document.body);
"""


class Browser:
    """One window; ends with all its processes when left.

    Args:
        folder: for its profile.
        size: of the window.
    """

    def __init__(self, folder: Path, size: tuple[int, int] = (1400, 900)) -> None:
        port = free_port()
        self._driver = subprocess.Popen([str(DRIVER), f"--port={port}"], stdout=subprocess.DEVNULL)
        self._at = f"http://127.0.0.1:{port}"
        arguments = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
            f"--user-data-dir={folder / 'profile'}", f"--window-size={size[0]},{size[1]}",
        ]  # fmt: skip
        options = {"goog:chromeOptions": {"binary": CHROMIUM, "args": arguments}}
        try:
            wait(lambda: self._call("GET", "/status")["ready"], self._driver)
            session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": options}})["sessionId"]
        except BaseException:
            self._driver.kill()
            raise
        self._at += f"/session/{session}"

    def open(self, address: str) -> None:
        """Go to a page."""
        self._call("POST", "/url", {"url": "about:blank"})  # else another part of the same page is no new page
        self._call("POST", "/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a piece of JavaScript returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def text(self) -> str:
        """All text on the page."""
        return str(self.run(_ALL_TEXT))

    def count(self, selector: str) -> int:
        """How many elements match and have a size."""
        return int(self.run(_COUNT, selector))

    def screenshot(self, path: Path) -> None:
        """What is to be seen."""
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._at + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return json.load(answer)["value"]

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait()


def wait(ready: Callable[[], Any], *servers: subprocess.Popen[bytes]) -> Any:
    """The first true answer; where none comes, pytest ends the test.

    Args:
        ready: what to ask.
        servers: processes that must go on meanwhile.
    """
    while True:
        try:
            if answer := ready():
                return answer
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        for server in servers:
            assert server.poll() is None, f"{server.args!r} ended with {server.returncode}"
        time.sleep(0.2)
