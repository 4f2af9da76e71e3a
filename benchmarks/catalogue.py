"""Which of diffusers' pipelines take units: `python -m benchmarks.catalogue` writes docs/pipelines.md.

The list comes from the installed diffusers: every pipeline class with a component declared as a `UNet2DConditionModel`.
One that is not in `NOT_APPLICABLE` counts as tested, and `tests/test_pipelines.py` fails where it does not run it.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs/pipelines.md"

SOUND = "makes sound; the UNet denoises spectrograms"
PIXELS = "not a Stable Diffusion UNet: denoises pixels, with the text added to the keys and values of self-attention"
KANDINSKY = "not a Stable Diffusion UNet: conditioned on image embeddings in the keys and values of self-attention"
MOTION = "the UNet is turned into a `UNetMotionModel`; attach `Motion` to the plain pipeline instead"
MARIGOLD = "estimates a map from a picture; there is nothing to steer"
VERSATILE = "not a Stable Diffusion UNet: image and text UNets that trade their attention layers"
BLIP = "its Q-Former does not run with transformers 5"
MERGED = "the UNet is merged with its control network into a `UNetControlNetXSModel`"

NOT_APPLICABLE: dict[str, str] = {
    "AnimateDiffControlNetPipeline": MOTION,
    "AnimateDiffPAGPipeline": MOTION,
    "AnimateDiffPipeline": MOTION,
    "AnimateDiffSDXLPipeline": MOTION,
    "AnimateDiffSparseControlNetPipeline": MOTION,
    "AnimateDiffVideoToVideoControlNetPipeline": MOTION,
    "AnimateDiffVideoToVideoPipeline": MOTION,
    "PIAPipeline": MOTION,
    "BlipDiffusionControlNetPipeline": BLIP,
    "BlipDiffusionPipeline": BLIP,
    "AudioDiffusionPipeline": SOUND,
    "AudioLDMPipeline": SOUND,
    "MusicLDMPipeline": SOUND,
    "IFImg2ImgPipeline": PIXELS,
    "IFImg2ImgSuperResolutionPipeline": PIXELS,
    "IFInpaintingPipeline": PIXELS,
    "IFInpaintingSuperResolutionPipeline": PIXELS,
    "IFPipeline": PIXELS,
    "IFSuperResolutionPipeline": PIXELS,
    "UnCLIPImageVariationPipeline": PIXELS,
    "UnCLIPPipeline": PIXELS,
    "KandinskyCombinedPipeline": KANDINSKY,
    "KandinskyImg2ImgCombinedPipeline": KANDINSKY,
    "KandinskyImg2ImgPipeline": KANDINSKY,
    "KandinskyInpaintCombinedPipeline": KANDINSKY,
    "KandinskyInpaintPipeline": KANDINSKY,
    "KandinskyPipeline": KANDINSKY,
    "KandinskyV22CombinedPipeline": KANDINSKY,
    "KandinskyV22ControlnetImg2ImgPipeline": KANDINSKY,
    "KandinskyV22ControlnetPipeline": KANDINSKY,
    "KandinskyV22Img2ImgCombinedPipeline": KANDINSKY,
    "KandinskyV22Img2ImgPipeline": KANDINSKY,
    "KandinskyV22InpaintCombinedPipeline": KANDINSKY,
    "KandinskyV22InpaintPipeline": KANDINSKY,
    "KandinskyV22Pipeline": KANDINSKY,
    "MarigoldDepthPipeline": MARIGOLD,
    "MarigoldIntrinsicsPipeline": MARIGOLD,
    "MarigoldNormalsPipeline": MARIGOLD,
    "StableDiffusionControlNetXSPipeline": MERGED,
    "StableDiffusionXLControlNetXSPipeline": MERGED,
    "StableDiffusionLatentUpscalePipeline": "a K-diffusion upscaler: its UNet has other blocks than Stable Diffusion's",
    "VersatileDiffusionDualGuidedPipeline": VERSATILE,
    "VersatileDiffusionImageVariationPipeline": VERSATILE,
    "VersatileDiffusionPipeline": VERSATILE,
    "VersatileDiffusionTextToImagePipeline": VERSATILE,
}

PLUGINS = """
## As a plug-in of diffusers

A custom pipeline that takes the units of each call. diffusers asks for `trust_remote_code` even where the code is on
your disk:

```python
from diffusers import DiffusionPipeline
from mahlstick.pipelines import custom

kind = custom.STABLE_DIFFUSION  # or custom.STABLE_DIFFUSION_XL
pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline=kind, trust_remote_code=True)
images = pipe("a red fox", units=[ms.Control(net, edges), ms.ImagePrompt(ip, [ref])]).images
```

For any other class: `class Inpaint(custom.UnitsMixin, StableDiffusionInpaintPipeline): ...`

A block of the modular pipelines, which diffusers has for SDXL:

```python
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks
from mahlstick.pipelines.modular import with_units

pipe = with_units(StableDiffusionXLAutoBlocks()).init_pipeline(base)
pipe.load_components()
images = pipe(prompt="a red fox", units=[ms.Control(net, edges)], output="images")
```

## A grid of pictures

What a setting does is seen best where nothing else differs. `ms.compare` makes a request's picture for each value of
one field or two, and all of them in one picture with labels:

```python
request = ms.Request(prompt="red apple", seed=7)
comparison = ms.compare(request, x=("steps", [5, 10, 20]), y=("guidance", [1, 4]))
comparison.save("grid.png")
comparison.results[1][0].save("five-steps.png")  # the second row's first picture, with its own recipe
```

A field is `seed`, `steps`, `guidance`, `scheduler`, `strength`, `prompt` or `negative_prompt`; `scale`, `start`, `end`,
`mode` or `adapter` of a control, as in `controls[0].scale`; `scale`, `start`, `end`, `blocks` or `adapter` of an image
prompt. A prompt is searched for the first value, and each value stands in its place: `("prompt", ["red", "green"])`.

Each picture is bit for bit what its request makes alone. The grid carries its recipe: `read_grid("grid.png")`, in
`mahlstick.pipelines.compare`, has the request and both axes.
"""


def owners() -> dict[str, type]:
    """Every pipeline class of the installed diffusers that owns a `UNet2DConditionModel`, by name."""
    import diffusers.pipelines
    from diffusers import DiffusionPipeline

    packages = pkgutil.walk_packages(diffusers.pipelines.__path__, "diffusers.pipelines.", onerror=lambda name: None)
    for module in packages:
        # Helpers of other models ask for packages that this project has no use for.
        with contextlib.suppress(ImportError):
            import_module(module.name)
    found = {pipeline.__name__: pipeline for pipeline in subclasses(DiffusionPipeline) if owns_unet(pipeline)}
    return dict(sorted(found.items()))


def subclasses(parent: type) -> Iterator[type]:
    for child in parent.__subclasses__():
        if child.__module__.startswith("diffusers."):
            yield child
        yield from subclasses(child)


def owns_unet(pipeline: type) -> bool:
    parameters = inspect.signature(pipeline.__init__).parameters.values()
    return any(re.search(r"\bUNet2DConditionModel\b", str(parameter.annotation)) for parameter in parameters)


def applicable() -> list[str]:
    return [name for name in owners() if name not in NOT_APPLICABLE]


def render() -> str:
    """The page as Markdown."""
    from diffusers import __version__

    from mahlstick.pipelines.attach import tells_guidance

    classes = owners()
    count = len(applicable())
    lines = [
        "# diffusers' pipelines and units",
        "",
        "<!-- Written by `python -m benchmarks.catalogue`; edit that file. -->",
        "",
        "`ms.attach(pipe, ...)` works on any diffusers pipeline with a Stable Diffusion UNet. This is every pipeline",
        f"class of diffusers {__version__} that owns a `UNet2DConditionModel`: {len(classes)}, of which {count} are",
        f"tested and {len(classes) - count} are not applicable.",
        "",
        "*Tested* means that `tests/test_pipelines.py` runs the class on a tiny random model with a `Control` and an",
        "`ImagePrompt` attached: both change the picture, and once detached the pipeline gives the same picture as",
        "before, to the bit.",
        "",
        "*Tested, tell it* is the same for pipelines that do not let others know whether a call is guided: give",
        "`attach(pipe, ..., guidance=True)`, so that the unconditional half of the batch is known. `attach` warns.",
        "",
        "| Pipeline | Module | |",
        "|---|---|---|",
    ]
    for name, pipeline in classes.items():
        module = pipeline.__module__.removeprefix("diffusers.pipelines.").rpartition(".")[0]
        known = "tested" if tells_guidance(pipeline) else "tested, tell it"
        verdict = f"not applicable: {NOT_APPLICABLE[name]}" if name in NOT_APPLICABLE else known
        lines.append(f"| `{name}` | {module} | {verdict} |")
    return "\n".join(lines) + "\n" + PLUGINS


def main() -> None:
    new = PAGE.with_suffix(".md.new")
    new.write_text(render(), encoding="utf-8")
    os.replace(new, PAGE)


if __name__ == "__main__":
    main()
