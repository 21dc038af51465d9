"""A headless browser that opens a page in a frame of some width and says what it sees there.

The page itself is served unchanged, so that its own content policy holds. The page around it, of the same origin, looks
into the frame and sends what it measured. Every request arrives at the test's server, or at a proxy that is none.
"""

import json
import shutil
import subprocess
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FIREFOXES = ("firefox", "firefox-esr")
PATIENCE_S = 60

WATCHER = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe id="f" style="border:0;width:WIDTHpx;height:900px"></iframe>
<script>
const frame = document.getElementById("f");
frame.onload = () => setTimeout(() => {
  const page = frame.contentDocument, view = frame.contentWindow, wide = [];
  const scrolls = (node) => node.closest(".scroll, pre") && !node.matches(".scroll, pre");
  for (const node of page.body.querySelectorAll("*")) {
    const box = node.getBoundingClientRect();
    if (node.closest("svg") !== node && node.closest("svg")) continue;
    if (!scrolls(node) && box.right > view.innerWidth + 0.5) wide.push(node.tagName + "." + node.className);
  }
  const size = (node) => { const box = node.getBoundingClientRect(); return [box.width, box.height]; };
  const cut = [];
  for (const drawing of page.querySelectorAll("svg")) {
    const outer = drawing.getBoundingClientRect();
    for (const words of drawing.querySelectorAll("text")) {
      const box = words.getBoundingClientRect();
      if (box.left < outer.left - 1 || box.right > outer.right + 1 || box.top < outer.top - 1 ||
          box.bottom > outer.bottom + 1) cut.push(words.textContent);
    }
  }
  fetch("/seen", {method: "POST", body: JSON.stringify({
    title: page.title, wide, cut, inner: view.innerWidth, scroll: page.documentElement.scrollWidth,
    images: [...page.images].map((each) => ({own: each.naturalWidth, box: size(each), alt: each.alt})),
    drawings: [...page.querySelectorAll("svg")].map(size),
    requests: view.performance.getEntriesByType("resource").map((each) => each.name),
    paper: view.getComputedStyle(page.body).backgroundColor, ink: view.getComputedStyle(page.body).color,
    links: [...page.querySelectorAll("nav a")].map((each) => !!page.querySelector(each.getAttribute("href"))),
  })});
}, 200);
frame.src = "/page";
</script>"""


def find_browser() -> str | None:
    """A browser that is installed, None without."""
    return next((found for name in (*CHROMIUMS, *FIREFOXES) if (found := shutil.which(name))), None)


def look(browser: str, page: str, width: int, is_dark: bool = False) -> tuple[dict[str, Any], list[str], list[str]]:
    """Open a page.

    Args:
        browser: what `find_browser` found.
        page: its text.
        width: of the frame, CSS pixels.
        is_dark: whether the reader prefers dark pages.

    Returns:
        What was measured, the paths that were asked for, and the lines of the console.
    """
    seen: list[dict[str, Any]] = []
    paths: list[str] = []
    has_seen = threading.Event()
    answers = {"/": WATCHER.replace("WIDTH", str(width)), "/page": page}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            text = answers.get(self.path)
            self.send_response(404 if text is None else 200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write((text or "").encode())

        def do_POST(self) -> None:
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            has_seen.set()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        output = Path(profile) / "console"
        with output.open("wb") as console:
            process = subprocess.Popen(
                _command(browser, profile, address, is_dark), stdout=console, stderr=subprocess.STDOUT
            )
            try:
                assert has_seen.wait(PATIENCE_S), (
                    f"{browser} told nothing: {output.read_text(errors='replace')[-2000:]}"
                )
            finally:
                process.terminate()
                process.wait(PATIENCE_S)
                server.shutdown()
                server.server_close()
        told = output.read_text(errors="replace").splitlines()
    marks = ("CONSOLE", "JavaScript error", "console.error")
    return seen[0], paths, [line for line in told if any(mark in line for mark in marks)]


def _command(browser: str, profile: str, address: str, is_dark: bool) -> list[str]:
    if Path(browser).name in FIREFOXES:
        wishes = {
            "network.proxy.type": 1,
            "network.proxy.http": "127.0.0.1",
            "network.proxy.http_port": 9,
            "network.proxy.ssl": "127.0.0.1",
            "network.proxy.ssl_port": 9,
            "ui.systemUsesDarkTheme": int(is_dark),
            "layout.css.prefers-color-scheme.content-override": 0 if is_dark else 1,
            "browser.shell.checkDefaultBrowser": False,
        }
        lines = [f"user_pref({json.dumps(key)}, {json.dumps(value)});" for key, value in wishes.items()]
        (Path(profile) / "user.js").write_text("\n".join(lines))
        return [browser, "--headless", "--no-remote", "--profile", profile, address]
    return [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"),
        *("--disable-background-networking", "--enable-logging=stderr", "--proxy-server=127.0.0.1:9"),
        *("--proxy-bypass-list=127.0.0.1", f"--user-data-dir={profile}", "--window-size=1400,1000"),
        f"--blink-settings=preferredColorScheme={0 if is_dark else 1}",
        address,
    ]
