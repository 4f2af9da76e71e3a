"""The page under load, and how soon it is there: `python -m benchmarks.page_load [--clients 20] [--requests 100]`.

Starts `mahlstick app` with the embedded model. Load: so many requests from so many gradio_client clients at once, each
with a seed of its own; every picture must carry its own seed, and the server's memory afterwards is compared with what
it was after a first round of as many clients. Speed, where Playwright and Chromium are: from the printed address until
the Paint button can be seen, beside a page of one gr.Button, which shows what gradio and the machine take by
themselves.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median

import psutil
from gradio_client import Client

from mahlstick.pipelines.load import embedded_folder
from mahlstick.pipelines.recipe import read_recipe
from mahlstick.pipelines.request import data_url, open_picture

_BARE = """
import gradio, threading
with gradio.Blocks(analytics_enabled=False) as page:
    gradio.Button("Paint", elem_id="paint")
page.launch(server_port={port}, prevent_thread_lock=True, quiet=True, ssr_mode=False)
print("at http://127.0.0.1:{port}/", flush=True)
threading.Event().wait()
"""
_NO_BROWSER = "Playwright and Chromium are not here; the time until the page is seen is left out"


@contextmanager
def served(*command: str) -> Iterator[tuple[psutil.Process, str]]:
    """The process and its address, as soon as that is printed."""
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as on:
        assert on.stdout is not None
        try:
            address = next(line.split()[-1] for line in on.stdout if "http" in line)
            yield psutil.Process(on.pid), address
        finally:
            on.terminate()


def app(out: str, port: int) -> list[str]:
    return ["-m", "mahlstick.cli", "app", "--out", out, "--port", str(port)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def load(address: str, clients: int, requests: int, first_seed: int) -> float:
    """Asks for ``requests`` pictures and returns the seconds. Raises ``AssertionError`` where one is another's."""
    drawing = open_picture(str(embedded_folder().parent / "examples" / "penguin-drawing.png"), "drawing")
    control = {"adapter": "lineart", "image": data_url(drawing)}
    asking = [Client(address, verbose=False, download_files=False) for _ in range(clients)]

    def ask(seed: int) -> None:
        fields = {"prompt": "penguin", "seed": seed, "steps": 2, "controls": [control]}
        (made,) = asking[seed % clients].predict(fields, api_name="/generate")
        assert read_recipe(made["path"]).request.seeds == [seed], made

    began = time.monotonic()
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(ask, range(first_seed, first_seed + requests)))
    return time.monotonic() - began


def until_seen(*command: str) -> float:
    """Seconds from the printed address until the Paint button can be seen, in a browser that runs already."""
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page()
        with served(*command) as (_, address):
            began = time.monotonic()
            page.goto(address, wait_until="commit")
            page.locator("#paint").wait_for(timeout=120_000)
            return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3, help="of the time until the page is seen")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        try:
            mine = median(until_seen(*app(out, free_port())) for _ in range(given.repeats))
            bare = median(until_seen("-c", _BARE.format(port=free_port())) for _ in range(given.repeats))
            print(f"seen after {mine:.2f} s; a page of one button after {bare:.2f} s; ratio {mine / bare:.2f}")
        except ImportError:
            print(_NO_BROWSER)
        with served(*app(out, free_port())) as (process, address):
            load(address, given.clients, given.clients, first_seed=10_000)
            before = process.memory_info().rss
            seconds = load(address, given.clients, given.requests, first_seed=0)
            time.sleep(5)
            after = process.memory_info().rss
        print(
            f"{given.requests} requests from {given.clients} clients in {seconds:.1f} s, each its own picture; "
            f"memory {before / 2**20:.0f} MB before, {after / 2**20:.0f} MB after ({after / before - 1:+.1%})"
        )


if __name__ == "__main__":
    main()
