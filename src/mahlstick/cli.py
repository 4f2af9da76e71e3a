"""The command line. Only typer is imported here, so that ``mahlstick --help`` answers at once."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import mahlstick
from mahlstick.errors import MahlstickError

PROGRAM = "mahlstick"
INTERRUPTED = 130
WORDS = "?"  # before what is searched in a library, where else a picture's name stands

app = typer.Typer(
    name=PROGRAM,
    help="""Steer Stable Diffusion with drawings and reference pictures.

    Start with:  mahlstick demo

    Any command takes --debug, which shows the traceback of an error.""",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; left out, the best there is.")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; left out, what suits the device.")]

Base = Annotated[str | None, typer.Option(help="'embedded', a diffusers folder, a hub id or a .safetensors file.")]
BaseConfig = Annotated[
    str | None, typer.Option(help="Folder with the configs of a single-file base, where the hub is out of reach.")
]
ImageEncoder = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="The vision model for --image-prompt, where the base brings none.")
]
LibraryFile = Annotated[
    str | None, typer.Option("--library", metavar="FILE", help="Of pictures, to search.  [default: library.sqlite]")
]
Least = Annotated[
    float | None, typer.Option(help="How similar to the words a find must be, up to 1; left out, the nearest is taken.")
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.  [default: 20]")]
Guidance = Annotated[
    float | None, typer.Option(help="How closely the prompt is followed; left out, as suits the base.")
]

Models = Annotated[str, typer.Option(metavar="FOLDER", help="Laid out as ComfyUI's models folder.")]
InputFolder = Annotated[str, typer.Option("--input", metavar="FOLDER", help="Pictures to load.")]
OutputFolder = Annotated[str, typer.Option(metavar="FOLDER", help="Where pictures are saved.")]
Packs = Annotated[
    list[str] | None,
    typer.Option(metavar="FOLDER", help="A pack of ComfyUI nodes to load, which runs its code. May be repeated."),
]
ResultCache = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Keeps results for the next run; left out, one of your own.")
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"{PROGRAM} {mahlstick.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="The folder for the pictures.")] = "out",
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1, max=1000)] = 20,
    device: Device = None,
    json_output: Json = False,
) -> None:
    """Show what drawings and references do, in a contact sheet.

    Uses the embedded model and its example pictures, and needs no download.

    Example:

      mahlstick demo --out out
    """
    from mahlstick.pipelines.demo import run

    _quiet_libraries()
    shown = run(Path(out), steps=steps, device=device, progress=not json_output)
    if json_output:
        typer.echo(json.dumps({"contact_sheet": str(shown.sheet), "images": [str(path) for path in shown.images]}))
        return
    drawing, reference = shown.example
    typer.echo(f"\nLook at {shown.sheet}. Then try:\n")
    typer.echo(f'  mahlstick generate -p "red penguin" --control lineart={drawing}:0.9 --seed 7 --out {out}/mine.png')
    typer.echo(f'  mahlstick generate -p "cactus" --image-prompt {reference}:0.6 --images 4 --out {out}')


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What to paint; (word:1.3) weighs a word more.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What to keep out.")] = None,
    base: Base = None,
    base_config: BaseConfig = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NET[@ANNOTATOR]=PICTURE[:SCALE]",
            help="Follow a drawing. NET is 'lineart' or a path to weights; with @canny the picture is a photo that the"
            " annotator turns into a drawing. May be repeated.",
        ),
    ] = None,
    image_prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[ADAPTER=]PICTURE[:SCALE]",
            help="Take after a reference picture, or with ?WORDS in its place after the one that the words find in a"
            " library. May be repeated.",
        ),
    ] = None,
    image_encoder: ImageEncoder = None,
    library: LibraryFile = None,
    least: Least = None,
    seed: Annotated[int | None, typer.Option(help="The same seed makes the same picture.")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="In pixels; left out, the base's own.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="euler, euler_a, ddim, dpm++_2m_karras, unipc, ...")] = None,
    images: Annotated[int | None, typer.Option(help="How many pictures, from seed, seed + 1, ...")] = None,
    init: Annotated[str | None, typer.Option(metavar="PICTURE", help="Start from this picture.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of --init is repainted, 0 to 1.")] = None,
    mask: Annotated[str | None, typer.Option(metavar="PICTURE", help="Repaint only the white part of --init.")] = None,
    request: Annotated[
        str | None, typer.Option(metavar="FILE", help="Read a JSON request; options given beside it win.")
    ] = None,
    save_request: Annotated[str | None, typer.Option(metavar="FILE", help="Write the request as JSON.")] = None,
    out: Annotated[
        str, typer.Option(help="A .png, which is replaced, or a folder, where the next free number is taken.")
    ] = "out",
    device: Device = None,
    dtype: Dtype = None,
    json_output: Json = False,
) -> None:
    """Make pictures from a prompt, drawings and references.

    Example:

      mahlstick generate -p "red apple" --control lineart=drawing.png:0.9 --image-prompt ref.png:0.6 --out out.png

    Every PNG carries its recipe: mahlstick replay out.png makes it again.
    """
    given = {
        "prompt": prompt,
        "negative_prompt": negative,
        "base": base,
        "base_config": base_config,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "scheduler": scheduler,
        "images": images,
        "init": init,
        "strength": strength,
        "mask": mask,
        "controls": [_control(text) for text in control or []],
        "image_prompts": _image_prompts(image_prompt or [], image_encoder, library, least),
        **_size(size),
    }
    fields = {**_fields(request), **{name: value for name, value in given.items() if value not in (None, [])}}
    if seed is not None and "seeds" in fields:
        fields.setdefault("images", len(fields.pop("seeds")))
    if "prompt" not in fields:
        raise MahlstickError('--prompt is missing; say what to paint, e.g. --prompt "red apple"')
    _generate(fields, Path(out), save_request, device, dtype, json_output)


def _fields(request: str | None) -> dict[str, Any]:
    if request is None:
        return {}
    from mahlstick.pipelines.request import read_fields

    return read_fields(request)


def _generate(
    fields: dict[str, Any], out: Path, save_request: str | None, device: str | None, dtype: str | None, as_json: bool
) -> None:
    from mahlstick.pipelines.request import Request

    request = Request(**fields)
    from mahlstick.pipelines.generate import check_target
    from mahlstick.pipelines.generate import generate as make

    check_target(out)
    _check_request_file(save_request)
    _quiet_libraries()
    existed = out.is_file()
    result = make(request, device=device, dtype=dtype, progress=sys.stderr.isatty() and not as_json)
    paths = result.save(out)
    if save_request is not None:
        request.save(save_request)
    seeds = result.recipe.request.seeds or []
    if as_json:
        typer.echo(json.dumps({"images": [str(path) for path in paths], "seeds": seeds}))
        return
    for path, used in zip(paths, seeds, strict=True):
        typer.echo(f"{path}  seed {used}{'  (replaced)' if existed else ''}")
    _tell_found(result.recipe.request.image_prompts)


def _tell_found(image_prompts: Sequence[Any]) -> None:
    for spec in image_prompts:
        for found in spec.found:
            typer.echo(f"{found.file}  was found for {spec.search!r}", err=True)


def _check_request_file(path: str | None) -> None:
    """Whether a request could be written there, before anything is made."""
    from mahlstick.pipelines.generate import check_folder

    if path is not None:
        check_folder(Path(path).parent)
        if os.path.isdir(path):
            raise MahlstickError(f"--save-request {path}: is a folder; give the name of a file")


def _size(text: str | None) -> dict[str, int]:
    if text is None:
        return {}
    width, _, height = text.lower().replace("×", "x").partition("x")
    try:
        return {"width": int(width), "height": int(height or width)}
    except ValueError:
        raise MahlstickError(f"--size {text}: give width x height in pixels, e.g. 512x768") from None


def _picture_and_scale(text: str) -> dict[str, Any]:
    """``drawing.png:0.8``; a file that exists under the whole text is the picture, and so is ``C:\\drawing.png``."""
    picture, colon, number = text.rpartition(":")
    if not colon or not picture or os.path.exists(text):
        return {"picture": text}
    try:
        return {"picture": picture, "scale": float(number)}
    except ValueError:
        return {"picture": text}


def _control(text: str) -> dict[str, Any]:
    adapter, equals, rest = text.partition("=")
    if not (adapter and equals and rest):
        raise MahlstickError(f"--control {text}: give NET=PICTURE, e.g. lineart=drawing.png:0.9")
    spec = _picture_and_scale(rest)
    return {**_net(adapter), "image": spec.pop("picture"), **spec}


def _net(text: str) -> dict[str, str]:
    """``net@canny``: an adapter and an annotator, unless a file of that whole name exists."""
    net, at, annotator = text.rpartition("@")
    if at and net and annotator.replace("_", "").isalnum() and not os.path.exists(text):
        return {"adapter": net, "annotator": annotator}
    return {"adapter": text}


def _image_prompts(
    texts: list[str], image_encoder: str | None, library: str | None, least: float | None
) -> list[dict[str, Any]]:
    specs = [{**_image_prompt(text), "image_encoder": image_encoder} for text in texts]
    if (library, least) != (None, None) and not any("search" in spec for spec in specs):
        raise MahlstickError('--library, --least: are for --image-prompt "?WORDS"; give that too, or leave them out')
    return [spec | {"library": library, "least": least} if "search" in spec else spec for spec in specs]


def _image_prompt(text: str) -> dict[str, Any]:
    adapter, equals, rest = text.partition("=")
    whole = _picture_and_scale(text)
    if not equals or text.startswith(WORDS) or os.path.exists(whole["picture"]):
        return _reference(whole)
    return {"adapter": adapter, **_reference(_picture_and_scale(rest))}


def _reference(spec: dict[str, Any]) -> dict[str, Any]:
    """``fox.png``, or ``?watercolour fox``: words that find a picture."""
    picture = spec.pop("picture")
    if picture.startswith(WORDS) and not os.path.exists(picture):
        return {"search": picture.removeprefix(WORDS).strip(), **spec}
    return {"images": [picture], **spec}


@app.command()
def animate(
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What to paint; (word:1.3) weighs a word more.")
    ] = None,
    prompt_at: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FRAME=PROMPT",
            help="From here another prompt, and a mixture on the way. May be repeated.",
        ),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What to keep out.")] = None,
    base: Base = None,
    base_config: BaseConfig = None,
    motion: Annotated[
        str | None,
        typer.Option(metavar="MODULE", help="Path or hub id of a motion module; left out, the embedded one."),
    ] = None,
    motion_lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:SCALE]", help="Such as a camera's movement. May be repeated.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="How many; left out, those of --init or of a control video, else 16.")
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames a second; left out, those of --init or of a control video, else 8.")
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NET[@ANNOTATOR]=VIDEO[:SCALE]",
            help="Follow a video, a folder of frames or one picture; with @canny the annotator draws each frame. May be"
            " repeated.",
        ),
    ] = None,
    image_prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[ADAPTER=]PICTURE[:SCALE]",
            help="Take after a reference picture, or each frame after its own of a video, or with ?WORDS after a"
            " picture of a library. May be repeated.",
        ),
    ] = None,
    image_encoder: ImageEncoder = None,
    library: LibraryFile = None,
    least: Least = None,
    init: Annotated[str | None, typer.Option(metavar="VIDEO", help="Repaint this video.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much of --init is repainted, 0 to 1.")] = None,
    audio: Annotated[
        str | None, typer.Option(metavar="FILE", help="Keep this file's sound; left out, that of --init.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Frames of a window over a long clip.  [default: 16]")] = None,
    overlap: Annotated[int | None, typer.Option(help="Frames that two windows share; left out, a quarter.")] = None,
    schedule: Annotated[
        str | None,
        typer.Option(metavar="HOW", help="uniform, static, or looped: the end flows into the beginning."),
    ] = None,
    extend: Annotated[
        str | None,
        typer.Option(metavar="HOW", help="In place of windows stretch positions: interpolate, ntk or repeat."),
    ] = None,
    free_noise: Annotated[
        bool | None,
        typer.Option(
            "--free-noise/--no-free-noise",
            help="Begin all windows from the same noise, shuffled; default for long clips.",
        ),
    ] = None,
    free_init: Annotated[int | None, typer.Option(help="Passes more, each of which makes the clip steadier.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed makes the same clip.")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="In pixels; left out, the base's own.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="euler, euler_a, ddim, dpm++_2m_karras, unipc, ...")] = None,
    request: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Read a JSON request, or that of a clip; options given beside it win."),
    ] = None,
    save_request: Annotated[str | None, typer.Option(metavar="FILE", help="Write the request as JSON.")] = None,
    out: Annotated[
        str, typer.Option(help="A .mp4, .webm, .gif or .webp, which is replaced, or a new folder for the frames.")
    ] = "out.mp4",
    device: Device = None,
    dtype: Dtype = None,
    json_output: Json = False,
) -> None:
    """Make a clip of any length.

    From a prompt or several, videos, drawings and references.

    Examples:

      mahlstick animate -p "3D running shoe" --frames 16 --out clip.gif

      mahlstick animate -p "a fox in spring" --prompt-at "32=a fox in winter" --frames 64 --out clip.mp4

      mahlstick animate -p "red penguin" --control canny@canny=walk.mp4:0.9 --out penguin.mp4

    The file carries the request: mahlstick animate --request clip.mp4 makes it again.
    """
    given = {
        "prompt": prompt,
        "prompts": dict(_prompt_at(text) for text in prompt_at or []) or None,
        "negative_prompt": negative,
        "base": base,
        "base_config": base_config,
        "motion": motion,
        "motion_loras": [_motion_lora(text) for text in motion_lora or []],
        "frames": frames,
        "fps": fps,
        "controls": [_control(text) for text in control or []],
        "image_prompts": _image_prompts(image_prompt or [], image_encoder, library, least),
        "init": init,
        "strength": strength,
        "audio": audio,
        "context": context,
        "overlap": overlap,
        "schedule": schedule,
        "extend": extend,
        "free_noise": free_noise,
        "free_init": free_init,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "scheduler": scheduler,
        **_size(size),
    }
    fields = {**_clip_fields(request), **{name: value for name, value in given.items() if value not in (None, [])}}
    if "prompt" not in fields:
        raise MahlstickError('--prompt is missing; say what to paint, e.g. --prompt "3D running shoe"')
    _animate(fields, out, save_request, device, dtype, json_output)


def _animate(
    fields: dict[str, Any], out: str, save_request: str | None, device: str | None, dtype: str | None, as_json: bool
) -> None:
    from mahlstick.pipelines.request import VideoRequest

    asked = VideoRequest(**fields)
    from mahlstick.pipelines.animate import animate as make

    _check_request_file(save_request)
    _quiet_libraries()
    made = make(asked, out, device=device, dtype=dtype, progress=sys.stderr.isatty() and not as_json)
    if save_request is not None:
        asked.save(save_request)
    settled, figures = made.request, made.figures.to_dict()
    if as_json:
        facts = {"path": str(made.path), "frames": settled.frames, "fps": settled.fps, "seed": settled.seed}
        typer.echo(json.dumps(facts | {"windows": made.windows, "figures": figures}))
        return
    _tell_found(settled.image_prompts)
    windows = f", in windows of {made.windows[0]} that share {made.windows[1]}" if made.windows else ""
    typer.echo(f"{made.path}  {settled.frames} frames, {settled.fps:g} a second, seed {settled.seed}{windows}")
    typer.echo("  ".join(f"{name} {value:.3f}" for name, value in figures.items() if value is not None))


def _clip_fields(request: str | None) -> dict[str, Any]:
    """The fields of a request in a JSON file, or in a clip's comment."""
    if request is None or request.lower().endswith(".json"):
        return _fields(request)
    from mahlstick.pipelines.video import video_comment

    try:
        fields = json.loads(video_comment(request) or "")
    except ValueError:
        fields = None
    if not isinstance(fields, dict) or "prompt" not in fields:
        raise MahlstickError(f"--request {request}: holds no request; give a JSON file, or a clip that mahlstick made")
    return fields


def _prompt_at(text: str) -> tuple[int, str]:
    frame, equals, prompt = text.partition("=")
    if not (equals and prompt and frame.strip().isdecimal()):
        raise MahlstickError(f"--prompt-at {text}: give FRAME=PROMPT, e.g. 32=a fox in winter")
    return int(frame), prompt


def _motion_lora(text: str) -> dict[str, Any]:
    spec = _picture_and_scale(text)
    return {"path": spec.pop("picture"), **spec}


@app.command()
def annotate(
    name: Annotated[str | None, typer.Argument(help="An annotator; --list shows them.")] = None,
    picture: Annotated[str | None, typer.Argument(help="The picture to turn into a control picture.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="NAME=VALUE", help="Of the annotator. May be repeated."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="A .png; left out, PICTURE-NAME.png in the working folder.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Show every annotator and what it needs.")] = False,
    json_output: Json = False,
) -> None:
    """Turn a picture into edges, lines, depth, pose, ...

    Example:

      mahlstick annotate canny photo.jpg --option low=80 --out edges.png
    """
    from mahlstick import annotators

    if show:
        _list_annotators(json_output)
        return
    if name is None or picture is None:
        raise MahlstickError("annotate: give an annotator and a picture, e.g. annotate canny photo.jpg; or --list")
    from mahlstick.pictures import save_png

    options = dict(_option(text) for text in option or [])
    target = Path(out) if out is not None else Path(f"{Path(picture).stem}-{name}.png")
    _quiet_libraries()
    path = save_png(annotators.annotate(name, picture, **options), target)
    typer.echo(json.dumps({"image": str(path)}) if json_output else path)


def _list_annotators(as_json: bool) -> None:
    from mahlstick import annotators

    known = [annotators.get(name) for name in annotators.names()]
    if as_json:
        rows = [
            {"name": a.name, "description": a.description, "needs": a.needs, "options": list(a.options)} for a in known
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    wide = max(len(a.name) for a in known)
    for a in known:
        typer.echo(f"{a.name:<{wide}}  {a.description}")
        typer.echo(f"{'':<{wide}}  needs {a.needs}{'; options ' + ', '.join(a.options) if a.options else ''}")


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise MahlstickError(f"--option {text}: give NAME=VALUE, e.g. low=80")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Weights (file, folder or hub id), or a PNG that mahlstick made.")],
    tensors: Annotated[bool, typer.Option(help="List every tensor with its shape.")] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Say what each convolution of a ControlNet or of a UNet's encoder sees.")
    ] = False,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH",
            help="With --layers: of the control picture, or of a UNet's latents.  [default: 512x512, 64x64]",
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Say what weights are, or what made a PNG.

    Weights are read from their header alone.

    Examples:

      mahlstick inspect control_v11p_sd15_canny.pth

      mahlstick inspect lineart --layers --size 128x128
    """
    if layers:
        _inspect_layers(path, size, json_output)
        return
    if size is not None:
        raise MahlstickError("--size: is for --layers; give both, or neither")
    if path.lower().endswith(".png"):
        _inspect_picture(path, json_output)
        return
    info = mahlstick.inspect(path)
    facts = {
        "path": str(info.path),
        "kind": info.kind,
        "layout": info.layout,
        "base": info.base,
        "dtype": info.dtype,
        "parameters": info.parameters,
        "tensors": {name: list(shape) for name, shape in info.tensors.items()} if tensors else len(info.tensors),
        "config": info.config,
    }
    if json_output:
        typer.echo(json.dumps(facts, indent=2, default=list))
        return
    listed = facts.pop("tensors")
    for name, value in facts.items():
        if name == "config":
            continue
        typer.echo(f"{name:<10}  {f'{value:,}' if isinstance(value, int) else value}")
    typer.echo(f"{'tensors':<10}  {len(info.tensors):,}")
    for name, shape in listed.items() if isinstance(listed, dict) else ():
        typer.echo(f"  {name}  {tuple(shape)}")


def _inspect_layers(source: str, size: str | None, as_json: bool) -> None:
    from dataclasses import asdict

    from mahlstick.adapters.receptive import receptive_fields_of
    from mahlstick.pipelines.load import adapter_path, embedded_folder

    sides = _size(size)
    place = str(embedded_folder()) if source == "embedded" else adapter_path(source)
    layers = receptive_fields_of(place, (sides["height"], sides["width"]) if sides else None)
    if as_json:
        typer.echo(json.dumps([asdict(layer) for layer in layers], indent=2))
        return
    rows: list[tuple[str, ...]] = [
        ("layer", "kernel", "stride", "padding", "dilation", "output", "jump", "field", "start")
    ]
    for layer in layers:
        numbers = (layer.kernel, layer.stride, layer.padding, layer.dilation, layer.size, layer.jump, layer.field)
        told = [f"{a:g}" if a == b else f"{a:g}x{b:g}" for a, b in (*numbers, layer.start)]
        told[4] = "{}x{}".format(*layer.size)
        told[6] += " *" if layer.whole else ""
        rows.append((layer.name, *told))
    _print_table(rows)
    typer.echo(
        "\nHeight x width where they differ. jump: inputs between two outputs; field: inputs that one output sees;"
    )
    typer.echo("start: the middle of the first output's field, counted from the first input.")
    if any(layer.whole for layer in layers):
        typer.echo("*  behind an attention, which sees the whole picture; the number is of the convolutions alone.")


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows of cells in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(f"{cell:<{wide}}" for cell, wide in zip(row, widths, strict=True)).rstrip())


def _inspect_picture(path: str, as_json: bool) -> None:
    from mahlstick.pipelines.recipe import read_recipe

    recipe = read_recipe(path)
    typer.echo(recipe.to_json() if as_json else recipe.text()["parameters"])


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="An adapter in any layout (file, folder or hub id), or a workflow (.json, .png, .py).")
    ],
    target: Annotated[
        str, typer.Argument(help="The folder or .safetensors file to write; of a workflow, a .json or .py.")
    ],
    layout: Annotated[str, typer.Option(help="diffusers or original; of a workflow's .json, api or ui.")] = "diffusers",
    dtype: Dtype = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads, which some files do not tell.")] = None,
    base: Annotated[str | None, typer.Option(help="The base model that a 'difference' file was taken from.")] = None,
    pack: Packs = None,
    overwrite: Annotated[bool, typer.Option(help="Replace TARGET where it exists.")] = False,
    json_output: Json = False,
) -> None:
    """Rewrite an adapter or a workflow in another form.

    Examples:

      mahlstick convert control_v11p_sd15_canny.pth canny/ --layout diffusers --dtype float16

      mahlstick convert workflow.json workflow.py
    """
    from mahlstick.adapters import formats

    if os.path.exists(target) and not overwrite:
        raise MahlstickError(f"{target}: exists already; give another name, or --overwrite")
    if Path(target).suffix in (".json", ".py"):
        from mahlstick.nodes import runner

        if layout not in ("diffusers", "api", "ui"):
            raise MahlstickError(f"--layout {layout}: of a workflow it is api or ui")
        nodes = runner.available(pack or [])
        written = runner.write(source, Path(target), "ui" if layout == "ui" else "api", nodes)
        typer.echo(json.dumps({"path": str(written), "kind": "workflow"}) if json_output else written)
        return
    kind = formats.inspect(source).kind
    config: dict[str, Any] = {} if heads is None else {"heads": heads}
    if base is not None:
        from mahlstick.pipelines.load import load_pipeline

        _quiet_libraries()
        config["base"] = load_pipeline(base, device="cpu").unet
    settings, tensors = formats.read(source, kind, **config)
    if dtype is not None:
        from mahlstick.pipelines.load import choose_dtype

        cast = choose_dtype(dtype, "cpu")
        tensors = {name: value.to(cast) if value.is_floating_point() else value for name, value in tensors.items()}
    written = formats.write(target, kind, settings, tensors, layout=layout)
    typer.echo(json.dumps({"path": str(written), "kind": kind, "layout": layout}) if json_output else written)


@app.command()
def replay(
    picture: Annotated[str, typer.Argument(help="A PNG that mahlstick made.")],
    out: Annotated[str | None, typer.Option(help="A .png; left out, PICTURE-replay.png.")] = None,
    weights: Annotated[str | None, typer.Option(metavar="FOLDER", help="Where weights that moved are now.")] = None,
    device: Device = None,
    json_output: Json = False,
) -> None:
    """Make a picture again from the recipe in it.

    Says whether it came out the same: it does, bit for bit, on the same machine with the same versions.

    Example:

      mahlstick replay out.png
    """
    from PIL import Image, ImageChops

    from mahlstick.pipelines.generate import check_target
    from mahlstick.pipelines.generate import replay as make
    from mahlstick.pipelines.recipe import read_recipe

    recipe = read_recipe(picture)
    target = Path(out) if out is not None else Path(picture).with_name(f"{Path(picture).stem}-replay.png")
    check_target(target)
    _quiet_libraries()
    images = make(picture, weights=weights, device=device, progress=sys.stderr.isatty() and not json_output)
    from mahlstick.pictures import save_png

    with Image.open(picture) as before:
        same = before.size == images[0].size and not ImageChops.difference(before.convert("RGB"), images[0]).getbbox()
    path = save_png(images[0], target, recipe.text())
    if json_output:
        typer.echo(json.dumps({"image": str(path), "identical": same}))
    else:
        typer.echo(f"{path}  {'identical to' if same else 'differs from'} {picture}")


@app.command()
def run(
    workflow: Annotated[
        str, typer.Argument(help="A .json that ComfyUI saved or exported, a picture that holds one, or a .py script.")
    ],
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NODE.INPUT=VALUE", help="NODE is an id or a title. May be repeated."),
    ] = None,
    models: Models = "models",
    input_folder: InputFolder = "input",
    output: OutputFolder = "output",
    pack: Packs = None,
    target: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Run only this node and what it needs. May be repeated.")
    ] = None,
    cache: ResultCache = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Keep nothing, and use nothing that was kept.")] = False,
    json_output: Json = False,
) -> None:
    """Run a ComfyUI workflow.

    What has not changed since the last run is not made again.

    Examples:

      mahlstick run workflow.json --set 6.text="a blue fox"

      mahlstick run picture.png --set KSampler.seed=7 --models ComfyUI/models
    """
    from mahlstick.nodes import runner
    from mahlstick.nodes.folders import Folders, using

    changes = dict(_change(text) for text in change or [])
    _quiet_libraries()
    kept = None if fresh else runner.open_cache(cache or runner.default_cache())
    with using(Folders(Path(models), Path(input_folder), Path(output), Path(output) / "temp")):
        nodes = runner.available(pack or [])
        api = runner.load(workflow, nodes)
        with runner.Bar(api, hidden=json_output or not sys.stderr.isatty()) as bar:
            outcome = runner.run(api, changes, nodes=nodes, cache=kept, targets=target, listen=bar)
        files = [str(path) for path in runner.saved(outcome)]
    if json_output:
        typer.echo(json.dumps({"files": files, "executed": outcome.executed, "cached": outcome.cached}))
        return
    for file in files:
        typer.echo(file)
    typer.echo(f"{_counted(len(outcome.executed), 'node')} ran, {len(outcome.cached)} had not changed", err=True)


def _change(text: str) -> tuple[str, str]:
    place, sign, value = text.partition("=")
    node, _, name = place.rpartition(".")
    if not (sign and node and name):
        raise MahlstickError(f'--set {text}: give NODE.INPUT=VALUE, e.g. --set 6.text="a blue fox"')
    return place, value


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Another address than your own machine's needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8188,
    token: Annotated[
        str | None, typer.Option(help="What clients must show; left out, made where others can reach HOST.")
    ] = None,
    models: Models = "models",
    input_folder: InputFolder = "input",
    output: OutputFolder = "output",
    pack: Packs = None,
    cache: ResultCache = None,
) -> None:
    """Serve workflows to ComfyUI clients.

    Answers ComfyUI's HTTP and WebSocket protocol, so that its clients work unchanged.

    Example:

      mahlstick serve --models ComfyUI/models
    """
    from mahlstick.nodes import runner, server
    from mahlstick.nodes.folders import Folders

    _quiet_libraries()
    server.serve(
        runner.available(pack or []),
        folders=Folders(Path(models), Path(input_folder), Path(output), Path(output) / "temp"),
        cache=runner.open_cache(cache or runner.default_cache()),
        host=host,
        port=port,
        token=token,
        announce=typer.echo,
    )


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    short_help="Teach an adapter from your own pictures.",
)
def train(context: typer.Context) -> None:
    """Teach an adapter from your own pictures: mahlstick train --help lists what can be set."""
    from mahlstick.training.config import from_flags

    config = from_flags(context.args)
    _quiet_libraries()
    from mahlstick.training.run import train as learn

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out = learn(config)
    typer.echo(f"\n{out} holds what was learned; {out}/README.md says how well.")


@app.command()
def caption(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Pictures, with captions or without.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Folder or hub id of a BLIP, BLIP-2, InstructBLIP, LLaVA, Qwen2-VL, Florence-2, GIT or another"
            " captioner; 'none' writes no captions.  [default: embedded]",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What the captioner is told; left out, as suits it.")] = None,
    captions: Annotated[
        int | None,
        typer.Option(help="Of a picture; several are drawn, a single one is the likeliest.  [default: 1]"),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Of a caption at most.  [default: 60]")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of drawing: less is surer.  [default: 1.0]")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest up to this.  [default: 0.9]")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same captions.")] = None,
    existing: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="Of pictures that have captions: add to them, skip these pictures, or replace what is learned.  "
            "[default: add]",
        ),
    ] = None,
    unnamed: Annotated[
        bool, typer.Option("--unnamed", help="Caption pictures too that metadata.jsonl does not name yet.")
    ] = False,
    filtered: Annotated[
        str | None,
        typer.Option(
            "--filter",
            metavar="JUDGE",
            help="Score the captions: a CLIP, a SigLIP, a BLIP, BLIP-2 or ViLT with a matching head, or 'embedded'.",
        ),
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Drop captions that score less.")] = None,
    quantile: Annotated[float | None, typer.Option(help="Drop this share of the captions instead, e.g. 0.2.")] = None,
    report: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="The filter's report.  [default: caption-report]")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures at once.  [default: 8]")] = None,
    device: Device = None,
    dtype: Dtype = None,
    json_output: Json = False,
) -> None:
    """Write captions for pictures, and drop those that do not fit.

    Writes metadata.jsonl into the folder, which mahlstick train reads. Captions that were there are kept beside, and so
    are those that a filter drops. Given again, the command goes on where it stopped, and asks no model twice.

    Examples:

      mahlstick caption my_pictures

      mahlstick caption my_pictures --model path/to/blip --captions 4 --filter path/to/clip --quantile 0.2

      mahlstick caption my_pictures --model none --filter path/to/blip-itm --threshold 0.5

    docs/seeing.md says more.
    """
    given = {
        "model": model,
        "prompt": prompt,
        "captions": captions,
        "tokens": tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "existing": existing,
        "unnamed": unnamed,
        "filter": filtered,
        "threshold": threshold,
        "quantile": quantile,
        "report": report,
        "batch": batch,
    }
    from mahlstick.training.captions.run import CaptionConfig
    from mahlstick.training.captions.run import caption as write

    config = CaptionConfig(data=folder, **{name: value for name, value in given.items() if value is not None})
    _quiet_libraries()
    done = write(config, device=device, dtype=dtype, progress=sys.stderr.isatty() and not json_output)
    if json_output:
        typer.echo(done.to_json())
        return
    typer.echo(f"{folder}/metadata.jsonl  {_counted(done.kept, 'caption')} of {_counted(done.pictures, 'picture')}")
    if done.outcome is not None:
        typer.echo(
            f"{done.outcome.dropped} of {_counted(done.outcome.captions, 'caption')} dropped; look at {done.report}"
        )
    if done.skipped:
        typer.echo(f"{_counted(len(done.skipped), 'picture')} could not be read", err=True)


@app.command()
def evaluate(
    pictures: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="FOLDER", help="True pictures, or clips, with captions that no training has seen."
        ),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(
            metavar="NET[@ANNOTATOR][:SCALE]",
            help="A ControlNet, and the annotator that draws its control pictures and looks for them in the results.",
        ),
    ] = None,
    image_prompt: Annotated[
        str | None, typer.Option(metavar="ADAPTER[:SCALE]", help="An IP-Adapter; 'ip-adapter' is the embedded one.")
    ] = None,
    motion: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE[:SCALE]", help="A motion module, which makes clips; 'motion' is the embedded one."
        ),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Of a clip, with --motion.  [default: 16]")] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames a second to take from videos, with --motion.  [default: 8]")
    ] = None,
    base: Base = None,
    base_config: BaseConfig = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="NAME=VALUE", help="Of the annotator. May be repeated."),
    ] = None,
    control_pictures: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Control pictures, named like the pictures.")
    ] = None,
    references: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="References, named like the pictures; left out, the pictures themselves."),
    ] = None,
    image_encoder: ImageEncoder = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="CLIP", help="Folder or hub id of a CLIP; left out, the base's own image encoder."),
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            metavar="NETWORK", help="Folder or hub id of an image classifier: is what the caption names seen?"
        ),
    ] = None,
    features: Annotated[
        str | None, typer.Option(metavar="NETWORK", help="Folder or hub id of a vision model, for likeness and FID.")
    ] = None,
    matcher: Annotated[
        str | None,
        typer.Option(metavar="NETWORK", help="A BLIP, BLIP-2 or ViLT with a matching head: do picture and words fit?"),
    ] = None,
    asker: Annotated[
        str | None,
        typer.Option(metavar="NETWORK", help="A BLIP or ViLT that answers questions: does the caption follow?"),
    ] = None,
    questions: Annotated[
        str | None, typer.Option(metavar="FILE", help="Lines of JSON with questions for --asker, and right answers.")
    ] = None,
    count: Annotated[int | None, typer.Option(help="How many of the pictures or clips; left out, all.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels of a side; left out, the base's own.")] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures at once.  [default: 4]")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Annotated[int | None, typer.Option(help="Draws the pictures that --count leaves, and their noise.")] = None,
    out: Annotated[str | None, typer.Option(metavar="FOLDER", help="The report.  [default: evaluation]")] = None,
    device: Device = None,
    dtype: Dtype = None,
    json_output: Json = False,
) -> None:
    """Measure whether an adapter works, or a base.

    Makes each picture of a folder again from its caption, without the adapter and with it, and compares both with the
    true one: does the result keep the control, show the words, resemble the reference? Without an adapter it judges
    the base alone. Clips are made with a motion module and compared with the true ones: do they move as much and as
    steadily?

    Examples:

      mahlstick evaluate --data held_out --control my_net@canny

      mahlstick evaluate --data held_out --control my_net@canny:0.8 -o low=50

      mahlstick evaluate --data held_out --image-prompt my_ip --judge my_clip

      mahlstick evaluate --data held_out --base my_base --classifier my_classifier

      mahlstick evaluate --data held_out_clips --motion my_motion

    The folder of the report holds report.md, contact_sheet.png, figures.json, report.jsonl and all pictures. Given
    again, the command goes on where it stopped. docs/evaluate.md says how to read it.
    """
    if pictures is None:
        raise MahlstickError("--data is missing; give a folder of pictures, e.g. --data held_out")
    given = {
        "data": pictures,
        "base": base,
        "base_config": base_config,
        "annotator_options": dict(_option(text) for text in option or []),
        "control_pictures": control_pictures,
        "references": references,
        "image_encoder": image_encoder,
        "frames": frames,
        "fps": fps,
        "judge": judge,
        "classifier": classifier,
        "features": features,
        "matcher": matcher,
        "asker": asker,
        "questions": questions,
        "count": count,
        "resolution": resolution,
        "batch": batch,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "out": out,
        **_evaluated("control", control),
        **_evaluated("image_prompt", image_prompt),
        **_evaluated("motion", motion),
    }
    from mahlstick.training.evaluate import EvaluateConfig
    from mahlstick.training.evaluate import evaluate as measure

    config = EvaluateConfig(**{name: value for name, value in given.items() if value is not None})
    _quiet_libraries()
    found = measure(config, device=device, dtype=dtype, progress=sys.stderr.isatty() and not json_output)
    if json_output:
        typer.echo(found.to_json())
        return
    _print_table(found.table())
    typer.echo("".join(f"\n{note}" for note in found.notes))
    typer.echo(f"\nLook at {found.report} and the contact sheet beside it.")


def _evaluated(field: str, text: str | None) -> dict[str, Any]:
    """``net@canny:0.8`` as the fields of a config."""
    if text is None:
        return {}
    whole = _picture_and_scale(text)
    spec = _net(whole["picture"]) if field == "control" else {"adapter": whole["picture"]}
    return {field: spec.pop("adapter"), f"{field}_scale": whole.get("scale"), **spec}


libraries = typer.Typer(
    name="library",
    help="""Keep pictures that words or a likeness find, for image prompts.

    Example:

      mahlstick library add my_pictures

      mahlstick library search "watercolour fox" --show grid.png

      mahlstick generate -p "a lighthouse" --image-prompt "?watercolour fox:0.6"

    Each picture's features and captions are kept in one file; the pictures stay where they are.""",
    rich_markup_mode=None,
    no_args_is_help=True,
)
app.add_typer(libraries)

Encoder = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Folder or hub id of a CLIP, SigLIP or DINOv2; left out, the library's, and of a new one the embedded.",
    ),
]


@libraries.command("add")
def library_add(
    pictures: Annotated[list[str], typer.Argument(help="Folders of pictures, or pictures.")],
    into: Annotated[
        str, typer.Option("--into", "--library", metavar="FILE", help="The library, which need not be there yet.")
    ] = "library.sqlite",
    encoder: Encoder = None,
    device: Device = None,
    json_output: Json = False,
) -> None:
    """Add pictures, with their captions.

    Captions come from metadata.jsonl or from a .txt beside each picture, as in training. What is known is not encoded
    again, so the command given again adds what is new, and goes on where it was stopped.

    Example:

      mahlstick library add my_pictures fox.png --into styles.sqlite
    """
    from mahlstick.pipelines.library import Library

    given = _with_captions(pictures)
    _quiet_libraries()
    library = Library(into, encoder, device)
    report = library.add(given, progress=sys.stderr.isatty() and not json_output)
    for name, reason in report.skipped:
        _complain(f"warning: {name} is left out: {reason}")
    if json_output:
        typer.echo(json.dumps({"library": into, "pictures": len(library), **vars(report)}))
    else:
        told = f"{_counted(report.added, 'picture')} added, {report.changed} changed, {report.known} known"
        typer.echo(f"{into}  {told}, {len(library)} in all")
    if report.skipped and not report.added + report.changed + report.known:
        raise MahlstickError(f"none of {_counted(len(given), 'picture')} could be read; see the warnings")


def _with_captions(sources: list[str]) -> dict[Path, tuple[str, ...]]:
    """Pictures with their captions, from folders as training reads them, and from single files."""
    from mahlstick.training.data import FileSource, caption_lines, read_dataset

    found: dict[Path, tuple[str, ...]] = {}
    for source in map(Path, sources):
        if source.is_dir():
            for example in read_dataset(source):
                if not isinstance(example.picture, FileSource) or example.picture.size >= 0:
                    raise MahlstickError(f"{source}: its pictures are no files of their own; unpack them into a folder")
                found[example.picture.path] = example.captions
        elif source.is_file():
            side = source.with_suffix(".txt")
            found[source] = caption_lines(side.read_bytes(), str(side)) if side.is_file() else ()
        else:
            raise MahlstickError(f"{source}: no such picture or folder; check the path")
    return found


@libraries.command("search")
def library_search(
    words: Annotated[str | None, typer.Argument(help='What to look for, e.g. "watercolour fox".')] = None,
    like: Annotated[str | None, typer.Option(metavar="PICTURE", help="Look for pictures like this one.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 9,
    least: Annotated[float | None, typer.Option(help="How similar they must be, up to 1.")] = None,
    show: Annotated[str | None, typer.Option(metavar="FILE", help="Write the finds into this .png.")] = None,
    library: LibraryFile = None,
    encoder: Encoder = None,
    device: Device = None,
    json_output: Json = False,
) -> None:
    """Find pictures by words, by likeness, or by both.

    With a CLIP or SigLIP, words are compared with pictures and captions; with the embedded encoder or a DINOv2, they
    find captions that hold them. The numbers are cosines, comparable within one library only.

    Examples:

      mahlstick library search "watercolour fox" --show grid.png

      mahlstick library search --like fox.png --least 0.8
    """
    from mahlstick.pipelines.library import LIBRARY, Library, grid

    _quiet_libraries()
    hits = Library(library or LIBRARY, encoder, device).search(words, like, count, least)
    if show is not None and hits:
        from mahlstick.pictures import save_png

        save_png(grid(hits), show)
    if json_output:
        facts = ("name", "sha256", "captions", "state", "similarities")
        rows = [{name: getattr(hit, name) for name in facts} | {"file": str(hit.file)} for hit in hits]
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    if not hits:
        raise MahlstickError(f"nothing in {library or LIBRARY} reaches --least {least:g}; give a smaller one")
    kinds = sorted({kind for hit in hits for kind in hit.similarities})
    table = [("picture", *(kinds if len(kinds) > 1 else ["similarity"]), "caption")]
    for hit in hits:
        numbers = (f"{hit.similarities[kind]:.2f}" if kind in hit.similarities else "" for kind in kinds)
        table.append((_with_state(hit), *numbers, "; ".join(hit.captions)[:80]))
    _print_table(table)


def _with_state(entry: Any) -> str:
    return entry.name if entry.state == "here" else f"{entry.name} ({entry.state})"


@libraries.command("list")
def library_list(library: LibraryFile = None, json_output: Json = False) -> None:
    """Show what a library holds, and which pictures are missing or changed.

    Example:

      mahlstick library list --library styles.sqlite
    """
    from mahlstick.pipelines.library import LIBRARY, Library

    entries = Library(library or LIBRARY).pictures()
    if json_output:
        facts = ("name", "sha256", "captions", "state")
        rows = [{name: getattr(entry, name) for name in facts} | {"file": str(entry.file)} for entry in entries]
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    if entries:
        _print_table([(_with_state(entry), "; ".join(entry.captions)[:80]) for entry in entries])
    lost = {state: sum(entry.state == state for entry in entries) for state in ("missing", "changed")}
    told = "".join(f", {count} {state}" for state, count in lost.items() if count)
    typer.echo(f"{_counted(len(entries), 'picture')}{told}", err=True)
    if told:
        _complain("library add takes changed pictures anew; library remove --missing forgets those that are gone")


@libraries.command("remove")
def library_remove(
    pictures: Annotated[
        list[str] | None, typer.Argument(help="Pictures, folders of them, or the beginnings of their sha256.")
    ] = None,
    missing: Annotated[bool, typer.Option("--missing", help="All whose files are gone.")] = False,
    library: LibraryFile = None,
    json_output: Json = False,
) -> None:
    """Take pictures out of a library; their files stay.

    Example:

      mahlstick library remove fox.png
    """
    from mahlstick.pipelines.library import LIBRARY, Library

    if not pictures and not missing:
        raise MahlstickError("library remove: name pictures, or give --missing")
    removed = Library(library or LIBRARY).remove(pictures or [], missing)
    if json_output:
        typer.echo(json.dumps({"removed": removed}))
        return
    typer.echo(f"{_counted(len(removed), 'picture')} removed")


@app.command("app")
def page(
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    listen: Annotated[bool, typer.Option("--listen", help="Listen to the whole network: --host 0.0.0.0.")] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen at.")] = 7860,
    auth: Annotated[str | None, typer.Option(metavar="USER:PASSWORD", help="Ask for it before anything.")] = None,
    models: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Base models and adapters to choose from, beside the embedded.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Its folders of pictures may be trained on.")
    ] = None,
    library: Annotated[
        str | None, typer.Option(metavar="FILE", help="Its pictures are found by words, for image prompts.")
    ] = None,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="The folder for the pictures.")] = "out",
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Open the page: draw, choose, paint, in a browser.

    Example:

      mahlstick app --models ~/models
    """
    from mahlstick.page.app import serve

    _quiet_libraries()
    serve("0.0.0.0" if listen else host, port, auth, models, out, device, dtype, data, library)


def _quiet_libraries() -> None:
    """Loading bars and advice of the libraries below are no news to a person at the shell."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _complain(message: str) -> None:
    typer.echo(f"{PROGRAM}: {' '.join(message.split())}", err=True)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _complain(f"warning: {message}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for failures, 2 for bad input, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"] or ["--help"]
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=UserWarning, module=r"mahlstick\.")
            warnings.showwarning = _show_warning
        try:
            code = app(arguments, prog_name=PROGRAM, standalone_mode=False) or 0
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            if debug:
                raise
            code = _fail(error)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code without a word
        _complain("interrupted; nothing half-written is left")
    return int(code)


def _fail(error: Exception) -> int:
    """One line on stderr, and the exit code."""
    name, reason = type(error).__name__, (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, MahlstickError):
        _complain(str(error))
        return 2
    if hasattr(error, "format_message"):  # typer's own: unknown options and the like
        _complain(f"{error.format_message()} (see {PROGRAM} --help)")
        return int(getattr(error, "exit_code", 2))
    if isinstance(error, BrokenPipeError):
        return 1
    if name == "OutOfMemoryError" or isinstance(error, MemoryError) or "out of memory" in reason:
        _complain("out of memory; take a smaller --size, --dtype float16 or --device cpu")
        return 1
    _complain(f"unexpected {name}: {reason}; --debug shows the traceback")
    return 1


if __name__ == "__main__":
    sys.exit(main())
