"""Opens a page in headless Chromium: its screenshot is not blank, and nothing leaves the page.

Usage: python tools/check_page.py report.html   (needs chromium and pillow)

All of Chromium's traffic goes through a proxy that this script is, and that answers nothing. A page of one image from a host that
does not exist shows that a request would be seen; what Chromium asks for by itself, with an empty page, is left out.
"""

import http.server
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from PIL import Image

CONTROL = "http://request.invalid/image.png"


class Proxy(http.server.BaseHTTPRequestHandler):
    seen = set()

    def do_GET(self):
        Proxy.seen.add(self.path)
        self.send_error(502)

    do_POST = do_HEAD = do_CONNECT = do_GET

    def log_message(self, *_):
        pass


def requests_of(page, port, folder):
    """What is asked for while the page is shown, and its screenshot."""
    Proxy.seen = set()
    shot = folder / "shot.png"
    shot.unlink(missing_ok=True)
    subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,1600"]
        + ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
        + [f"--user-data-dir={folder}/profile", f"--proxy-server=http://127.0.0.1:{port}", "--proxy-bypass-list=<-loopback>"]
        + ["--virtual-time-budget=5000", f"--screenshot={shot}", page.resolve().as_uri()],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return set(Proxy.seen), Image.open(shot).convert("RGB")


def main():
    page = Path(sys.argv[1])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "empty.html").write_text("<!doctype html><p>")
        (folder / "control.html").write_text(f'<!doctype html><img src="{CONTROL}">')
        own, blank = requests_of(folder / "empty.html", server.server_port, folder)
        control, _ = requests_of(folder / "control.html", server.server_port, folder)
        assert CONTROL in control, f"a request was not seen: {control}"
        asked, shot = requests_of(page, server.server_port, folder)
        hosts = {url.split("/")[2] if "//" in url else url for url in own}
        asked = {url for url in asked if not any(host in url for host in hosts)}
        assert not asked, f"the page asks for {asked}"
        colours = len(shot.getcolors(1 << 24))
        assert colours > 200 > len(blank.getcolors(1 << 24)), f"{colours} colours"
        print(f"{page}: {colours} colours on the screenshot, no request")


if __name__ == "__main__":
    main()
