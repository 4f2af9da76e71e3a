"""The house: what is installed, what importing costs, which way imports run, what the make targets do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = sorted(init.parent.name for init in ROOT.glob("*/__init__.py"))
PROMISED = (
    "ControlNet IPAdapter load_adapter inspect load_pipeline attach Control ImagePrompt Request generate replay "
    "MahlstickError"
).split()
HEAVY = {"torch", "numpy", "diffusers", "transformers", "cv2", "PIL", "gradio", "pydantic"}


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)


def files_below(folder: Path) -> set[str]:
    """Relative paths of the files below a folder, without what Python and tools leave there."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if not re.search(r"__pycache__|(^|/)\.|\.egg-info", path.as_posix())}


def copy_tree(target: Path, *, links: bool = True) -> Path:
    """A copy of what a build reads; with `links=False`, as git checks it out where links are not supported."""
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, target)
    for folder in ("src", *FOLDERS):
        leftovers = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=leftovers)
    if not links:
        for folder in FOLDERS:
            link = target / "src/mahlstick" / folder
            pointee = link.readlink()
            link.unlink()
            link.write_text(str(pointee))
    return target


def build(tree: Path, *options: str) -> Path:
    """Build without a network; returns the folder with the results."""
    result = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", *options, cwd=tree)
    assert result.returncode == 0, result.stdout + result.stderr
    return tree / "dist"


def expected_in_wheel() -> set[str]:
    own = {f"mahlstick/{path.name}" for path in (ROOT / "src/mahlstick").iterdir() if path.is_file()}
    return own | {f"mahlstick/{folder}/{path}" for folder in FOLDERS for path in files_below(ROOT / folder)}


def modules_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_and_sdist_hold_each_file_once(tmp_path: Path) -> None:
    dist = build(copy_tree(tmp_path / "tree"))
    (wheel,) = dist.glob("*.whl")
    assert modules_in(wheel) == expected_in_wheel()
    assert wheel.stat().st_size < 100e6
    with zipfile.ZipFile(wheel) as archive:
        assert max(entry.file_size for entry in archive.infolist()) < 50e6

    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not [name for name in names if name.startswith(tuple(f"src/mahlstick/{folder}" for folder in FOLDERS))]
    assert {f"{folder}/{path}" for folder in FOLDERS for path in files_below(ROOT / folder)} <= names


def test_a_checkout_without_links_builds_the_same(tmp_path: Path) -> None:
    (wheel,) = build(copy_tree(tmp_path / "tree", links=False), "--wheel").glob("*.whl")
    assert modules_in(wheel) == expected_in_wheel()


def test_each_folder_has_its_link_for_editors() -> None:
    for folder in FOLDERS:
        assert (ROOT / "src/mahlstick" / folder).resolve() == ROOT / folder


@pytest.mark.parametrize("module", ["mahlstick", "mahlstick.cli"])
def test_import_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_type_checkers_see_the_names_that_load_on_first_use() -> None:
    import ast

    import mahlstick

    tree = ast.parse((ROOT / "src/mahlstick/__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {f"{alias.asname}": f"{node.module}" for node in imports for alias in node.names}
    assert seen == {name: f"mahlstick.{home}" for name, home in mahlstick._HOMES.items()}


def test_public_names_resolve() -> None:
    import mahlstick as ms

    assert set(PROMISED) <= set(ms.__all__)
    assert dir(ms) == sorted(ms.__all__)
    for name in ms.__all__:
        assert getattr(ms, name) is not None
    assert ms.__version__ == PROJECT["project"]["version"]
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ms.no_such_name


def test_imports_run_one_way(tmp_path: Path) -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    tree = copy_tree(tmp_path / "tree")
    kept = run(lint, "--no-cache", cwd=tree, PYTHONPATH="src")
    assert kept.returncode == 0, kept.stdout

    with (tree / "adapters/__init__.py").open("a") as module:
        module.write("\nimport mahlstick.pipelines\n")
    broken = run(lint, "--no-cache", cwd=tree, PYTHONPATH="src")
    assert broken.returncode == 1
    assert "mahlstick.adapters -> mahlstick.pipelines" in broken.stdout


def test_bare_folder_names_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("".join(f"import {folder}\n" for folder in FOLDERS))
    ruff = Path(sys.executable).with_name("ruff")
    result = run(ruff, "check", "--select", "TID251", "--config", ROOT / "pyproject.toml", script)
    assert re.findall(r"`(\w+)` is banned", result.stdout) == FOLDERS


def test_no_file_names_a_machine_or_a_registry() -> None:
    listing = run("git", "ls-files", "-z")
    if listing.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w.])/(?:work|root|home|Users)/|python[h]osted|pypi[.]org|index[-]url", re.IGNORECASE)
    guilty = []
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file() or b"\0" in path.read_bytes()[:8192]:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        guilty += [f"{name}: {match.group()}" for match in pattern.finditer(text)]
    assert not guilty


def test_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(re.fullmatch(r"([\w.-]+)==([\w.+!]+)", line).groups() for line in lines)  # type: ignore[union-attr]
    extras = PROJECT["project"]["optional-dependencies"].values()
    for requirement in [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]:
        name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups()  # type: ignore[union-attr]
        pin = {key.lower().replace("_", "-"): value for key, value in pins.items()}[name.lower()]
        assert [int(part) for part in bound.split(".")] <= [int(part) for part in re.findall(r"\d+", pin)]


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md"):
        assert set(re.findall(r"\bmake ([a-z]+)\b`", (ROOT / document).read_text())) <= targets


# Stands in for the interpreter: making an environment copies the script into it, and pip only notes that it ran.
PYTHON = """#!/bin/sh
case "$2" in
  venv) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; printf '#!/bin/sh\\necho demo >>log\\n' >"$3/bin/mahlstick";
        chmod +x "$3/bin/mahlstick";;
  pip) echo install >>log; exit "${PIP_EXIT:-0}";;
esac
"""


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_installs_when_needed_and_only_then(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def demo(**env: str) -> list[str]:
        """What one `make demo` did, in order."""
        log = tmp_path / "log"
        log.write_text("")
        run("make", "demo", f"PYTHON={python}", cwd=tmp_path, **env)
        return log.read_text().split()

    assert demo(PIP_EXIT="1") == ["install"]
    assert demo() == ["install", "demo"]
    assert demo() == ["demo"]
    for name in ("pyproject.toml", "constraints.txt"):
        newer = (tmp_path / ".venv/.installed").stat().st_mtime + 10
        os.utime(tmp_path / name, (newer, newer))
        assert demo(PIP_EXIT="1") == ["install"]
        assert demo() == ["install", "demo"]
        os.utime(tmp_path / name, (newer - 60, newer - 60))
