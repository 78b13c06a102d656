"""A JupyterLab of our own for a while: its server, its kernel, and a notebook run in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.browser.browsing import Watched

ROOT = Path(__file__).parents[2]
SECONDS = 60  # for the server to start; it takes two

# As the menu's Run All Cells; the page of JupyterLab is there before its kernel is.
_RUN_ALL = """
async () => {
    const lab = window.jupyterapp
    await lab.restored
    const panel = lab.shell.currentWidget
    await panel.context.ready
    await panel.sessionContext.ready
    await lab.commands.execute('notebook:run-all-cells')
}
"""


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Serve a folder, apart from the user's settings; gives the address of notebooks in it, with `{}` for a name."""
    config, runtime = folder / "config", folder / "runtime"
    (config / "labconfig").mkdir(parents=True)
    # It asks whether to show news, over what the tests click on.
    disabled = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (config / "labconfig" / "page_config.json").write_text(json.dumps(disabled), encoding="utf-8")
    (folder / "notebooks").mkdir()
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(config), "JUPYTER_RUNTIME_DIR": str(runtime),
        "JUPYTER_DATA_DIR": str(folder / "data"), "IPYTHONDIR": str(folder / "ipython"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser", "--port=0",
        f"--ServerApp.root_dir={folder / 'notebooks'}",
    ]  # fmt: skip
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            yield _address(runtime, process, folder / "log")
        finally:
            process.terminate()  # it ends its kernels
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _address(runtime: Path, process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until the server has written where it listens."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        for path in runtime.glob("jpserver-*.json"):
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError:  # half written
                continue
            return f"{found['url']}doc/tree/{{}}?token={found['token']}"
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text(encoding='utf-8')}")


def write(path: Path, *cells: str) -> None:
    """Write a notebook of code cells that have not been run."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    parts: list[dict[str, Any]] = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": cell}
        for i, cell in enumerate(cells)
    ]
    whole = {"cells": parts, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(whole), encoding="utf-8")


def run_all(browser: Any, address: str) -> Watched:
    """Open a notebook and run its cells; what is watched begins with the run."""
    home = address.partition("/doc/")[0]
    watched = Watched(browser.new_context(viewport={"width": 1280, "height": 900}), home)
    watched.page.goto(address)
    watched.page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext")
    watched.page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    watched.requests.clear()
    watched.errors.clear()
    watched.page.evaluate(_RUN_ALL)
    return watched
