"""Pages of this package in a real browser, where there is one."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)


def visit(page: Path, script: str, folder: Path, *, width: int) -> Any:
    """Run a script of this folder at the end of a page, and return what it wrote into the element `findings`."""
    visited = folder / "visited.html"
    code = Path(__file__).with_name(script).read_text("utf-8")
    ending = f'<pre id="findings"></pre><script>{code}</script></body>'
    visited.write_text(page.read_text("utf-8").replace("</body>", ending), "utf-8")
    command = [
        str(CHROMIUM),
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900"),
        *("--virtual-time-budget=5000", "--dump-dom", visited.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="findings">(.*?)</pre>', done.stdout)
    assert found is not None
    return json.loads(html.unescape(found.group(1)))
