"""Clients that others wrote for ComfyUI drive the server: they queue, follow the progress and fetch the picture."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import subprocess
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_server import Served, png, served, sketch, wait

NPM_CLIENT = ("@stable-canvas/comfyui-client@1.5.9", "ws@8.18.0")  # Node 20 has no WebSocket of its own

SCRIPT = """
const { Client } = require("@stable-canvas/comfyui-client");
const [host, prompt, broken] = process.argv.slice(1);
(async () => {
  const client = new Client({ api_host: host, WebSocket: require("ws"), fetch });
  await client.connect();
  const steps = [], kinds = [];
  let previews = 0;
  client.on("b_preview", () => previews++);
  for (const kind of ["execution_start", "executing", "executed", "execution_success"])
    client.on(kind, () => kinds.push(kind));
  const progress = (p) => steps.push([p.value, p.max]);
  const { images, prompt_id } = await client.enqueue(JSON.parse(prompt), { progress });
  const saved = images.find((image) => image.type === "url");  // the others are previews
  const picture = Buffer.from(await (await fetch(saved.data)).arrayBuffer()).toString("base64");
  const refusal = await client.enqueue(JSON.parse(broken)).catch((error) => String(error.message));
  const { History } = await client.getHistory();
  const { Running, Pending } = await client.getQueue();
  await client.interrupt();
  await client.free({ free_memory: true });
  const nodes = Object.keys(await client.getNodeDefs());
  const version = (await client.getSystemStats()).system.comfyui_version;
  const queue = Running.length + Pending.length;
  const heard = { steps, kinds, previews, picture, refusal, prompt_id };
  console.log(JSON.stringify({ ...heard, history: History.length, queue, nodes, version }));
  client.close();
})();
"""


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("clients")) as running:
        yield running


def test_a_client_from_pypi(studio: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """comfy-api-simplified, which writes down what it hears over the socket."""
    simplified = pytest.importorskip("comfy_api_simplified", reason="needs the dev extra's comfy-api-simplified")
    caplog.set_level(logging.DEBUG, "comfy_api_simplified")
    client = simplified.ComfyApiWrapper(f"http://{studio.host}")
    source = tmp_path / "workflow.json"
    prompt = sketch(40)
    prompt["1"]["_meta"] = {"title": "Draw"}
    prompt["2"]["_meta"] = {"title": "Save"}
    source.write_text(json.dumps(prompt))
    workflow = simplified.ComfyWorkflowWrapper(str(source))
    workflow.set_node_param("Draw", "shade", 41)

    studio.prompt(wait(seconds=0.7))  # the client opens its socket when the job is in the queue
    id, previews = asyncio.run(client.queue_prompt_and_wait(workflow))
    assert previews and all(each.startswith(b"\xff\xd8") for each in previews)
    told = [record.msg for record in caplog.records if isinstance(record.msg, dict)]
    assert [each["data"]["value"] for each in told if each.get("type") == "progress"] == [1, 2, 3, 4]
    (image,) = client.get_history(id)[id]["outputs"]["2"]["images"]
    picture = client.get_image(image["filename"], image["subfolder"], image["type"])
    assert picture == (studio.folders.output / image["filename"]).read_bytes()

    (tmp_path / "reference.png").write_bytes(png(7))
    told = client.upload_image(tmp_path / "reference.png", subfolder="references")
    assert told == {"name": "reference.png", "subfolder": "references", "type": "input"}
    assert "Sketch" in client.get_object_info() and client.get_queue() == {"queue_running": [], "queue_pending": []}
    client.interrupt()
    workflow.set_node_param("Draw", "shade", 999)
    with pytest.raises(simplified.ComfyApiError, match="400"):
        client.queue_prompt(workflow)


def test_a_client_from_npm(studio: Served, pytestconfig: pytest.Config) -> None:
    """@stable-canvas/comfyui-client, installed once into pytest's cache."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if not npm or not node:
        pytest.skip("needs Node.js with npm")
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("npm-clients")
    if not (folder / "node_modules" / "ws").exists():
        install = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", folder, *NPM_CLIENT]
        installed = subprocess.run(install, capture_output=True, text=True)
        if installed.returncode:
            pytest.skip(f"npm cannot install {NPM_CLIENT[0]}: {installed.stderr.strip()[-200:]}")

    arguments = [studio.host, json.dumps(sketch(50)), json.dumps(sketch(999))]
    ran = subprocess.run([node, "-e", SCRIPT, *arguments], cwd=folder, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["steps"] == [[step, 4] for step in (1, 2, 3, 4)]
    assert {"execution_start", "executing", "executed"} <= set(told["kinds"])
    assert told["previews"] > 0
    (image,) = studio.history(told["prompt_id"])["outputs"]["2"]["images"]
    assert b64decode(told["picture"]) == (studio.folders.output / image["filename"]).read_bytes()
    assert "400" in told["refusal"]
    assert told["history"] >= 1 and told["queue"] == 0 and "Sketch" in told["nodes"] and told["version"]
