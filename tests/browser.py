"""A real Chromium without a window, driven by the Chrome DevTools Protocol: pages as people see them."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = (
    "--headless=new",
    "--no-sandbox",  # which root, as in CI, cannot have
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-port=0",
    "--force-device-scale-factor=1",
)
SECONDS = 60.0


class Browser:
    """One tab.

    Attributes:
        problems: what the pages have written to the console as errors or warnings, and scripts' exceptions.
        requests: the addresses that the pages have asked for.
    """

    def __init__(self, connection: ClientConnection) -> None:
        """Takes over a tab's debugging connection."""
        self._connection = connection
        self._sent = 0
        self._loaded = False
        self.problems: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result; events that come before it are taken in."""
        self._sent += 1
        self._connection.send(json.dumps({"id": self._sent, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(timeout=SECONDS))
            if message.get("id") == self._sent:
                assert "error" not in message, message["error"]
                result: dict[str, Any] = message["result"]
                return result
            self._take(message)

    def open(self, page: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Opens a file, at the size of a window, by day or by night."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not self._loaded:
            self._take(json.loads(self._connection.recv(timeout=SECONDS)))

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def move_to(self, selector: str) -> None:
        """Moves the pointer onto the first element of a selector."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **self._middle(selector))

    def click(self, selector: str) -> None:
        """Clicks on the first element of a selector, as a mouse does."""
        place = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def picture(self, path: Path) -> Path:
        """Writes the whole page as a PNG file."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 16000), "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def _middle(self, selector: str) -> dict[str, float]:
        box: dict[str, float] | None = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null;"
            "e.scrollIntoView({block: 'center', behavior: 'instant'}); const b = e.getBoundingClientRect();"
            "return {x: b.x + b.width / 2, y: b.y + b.height / 2} })()"
        )
        assert box is not None, f"nothing on the page is {selector}"
        return box

    def _take(self, message: dict[str, Any]) -> None:
        method, given = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(given["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"):
            self.problems.append(str(given["args"]))
        elif method == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            self.problems.append(str(given["entry"]))


class _Process:
    """Chromium itself; it is ended on the way out."""

    def __init__(self, folder: Path) -> None:
        program = next((found for name in NAMES if (found := shutil.which(name))), None)
        assert program is not None, f"None of {', '.join(NAMES)} is installed; `make browser` installs Debian's."
        command = [program, *SWITCHES, f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.folder = folder

    def __enter__(self) -> str:
        """The address of the debugging server."""
        port = self.folder / "DevToolsActivePort"
        end = time.monotonic() + SECONDS
        while not (port.exists() and port.read_text().count("\n")):
            assert self.process.poll() is None, "Chromium ended at once."
            assert time.monotonic() < end, "Chromium did not start."
            time.sleep(0.05)
        number, path = port.read_text().splitlines()[:2]
        return f"ws://127.0.0.1:{number}{path}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait(timeout=SECONDS)


@contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """A browser for as long as this is open.

    Args:
        folder: for its profile.
    """
    with _Process(folder) as address:
        with connect(address, max_size=None, open_timeout=SECONDS) as server:
            server.send(json.dumps({"id": 1, "method": "Target.createTarget", "params": {"url": "about:blank"}}))
            target = json.loads(server.recv(timeout=SECONDS))["result"]["targetId"]
        page = address.rpartition("/devtools/")[0] + f"/devtools/page/{target}"
        with connect(page, max_size=None, open_timeout=SECONDS) as connection:
            yield Browser(connection)
