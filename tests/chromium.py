"""A headless Chromium that tests drive: the DevTools protocol over two pipes, which needs nothing but the browser itself."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions", "--disable-background-networking", "--remote-debugging-pipe")


class BrowserError(RuntimeError):
    """The browser ended, was silent for too long, or refused a command."""


def found() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab. ``console``: what its scripts complained of; ``requests``: every address that it asked for."""

    def __init__(self, process: subprocess.Popen[bytes], read: int, write: int) -> None:
        self.process, self.read, self.write = process, read, write
        self.buffer, self.last = b"", 0
        self.session: str | None = None
        self.console: list[str] = []
        self.requests: list[str] = []
        self.loaded = False

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer of one command."""
        self.last += 1
        message: dict[str, Any] = {"id": self.last, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            got = self._next(f"an answer to {method}")
            if got.get("id") == self.last:
                if "error" in got:
                    raise BrowserError(f"{method}: {got['error']['message']}")
                result: dict[str, Any] = got["result"]
                return result

    def _next(self, what: str, seconds: float = 60.0) -> dict[str, Any]:
        until = monotonic() + seconds
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(0.0, until - monotonic()))
            part = os.read(self.read, 1 << 20) if ready else b""
            if not part:
                raise BrowserError(f"no {what} within {seconds:.0f} s; exit code {self.process.poll()}")
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        got: dict[str, Any] = json.loads(line)
        self._note(got.get("method", ""), got.get("params", {}))
        return got

    def _note(self, method: str, said: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.console.append(said["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.console.append(str([a.get("value", a.get("description")) for a in said["args"]]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.console.append(said["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loaded = True

    def open(self, file: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file and wait until it is drawn."""
        self.open_url(file.resolve().as_uri(), width, height, dark)

    def open_url(self, url: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.loaded = False
        self.send("Page.navigate", url=url)
        while not self.loaded:
            self._next("load event")
        self.settle()

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, promises awaited."""
        got = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in got:
            raise BrowserError(got["exceptionDetails"].get("exception", {}).get("description", script))
        return got["result"].get("value")

    def settle(self) -> None:
        """Until two frames have been drawn."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def key(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.settle()

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """``kind``: mouseMoved, mousePressed, mouseReleased or mouseWheel (with deltaX and deltaY)."""
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)
        self.settle()

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


@contextmanager
def browser() -> Iterator[Page]:
    """A page of a fresh browser. Raises BrowserError where none is installed."""
    path = found()
    if path is None:
        raise BrowserError(f"no browser: none of {', '.join(NAMES)} is on PATH")
    (their_read, our_write), (our_read, their_write) = os.pipe(), os.pipe()
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:  # a helper process of the browser may write for a moment longer
        shell = f'exec "$0" "$@" 3<&{their_read} 4>&{their_write}'  # the protocol's pipes are file descriptors 3 and 4
        command = ["/bin/bash", "-c", shell, path, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, pass_fds=(their_read, their_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(their_read)
        os.close(their_write)
        try:
            yield Page(process, our_read, our_write)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(our_read)
            os.close(our_write)
