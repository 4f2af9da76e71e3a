"""The library's sentences, which are English, in the language of the page: those that people often meet there."""

from __future__ import annotations

import re

import gradio as gr

from mahlstick.page.texts import reads_chinese, words

# field of a request -> what the page calls it in Chinese
_SAME = (
    "prompt", "steps", "guidance", "seed", "width", "height", "strength", "scale", "start", "end", "controls",
    "image_prompts",
)  # fmt: skip
_OTHERS = {"negative_prompt": "negative", "images": "pictures", "base": "model"}
_FIELDS = words({name: name for name in _SAME} | _OTHERS)["zh"] | {"init": "起始图片", "mask": "蒙版"}
_FIELD = r"(?P<field>[a-z_]+(?:\[\d+\])?(?:\.[a-z_]+)?)"
_NUMBER = r"(?P<number>[-+.\d e]+?)"

_CHINESE = [
    (rf"{_FIELD}: should be greater than or equal to {_NUMBER}(?:, not .*)?", "{field}：不能小于 {number}"),
    (rf"{_FIELD}: should be greater than {_NUMBER}(?:, not .*)?", "{field}：必须大于 {number}"),
    (rf"{_FIELD}: should be less than or equal to {_NUMBER}(?:, not .*)?", "{field}：不能大于 {number}"),
    (rf"{_FIELD}: should be a multiple of {_NUMBER}(?:, not .*)?", "{field}：必须是 {number} 的倍数"),
    (rf"{_FIELD}: should be a valid (?:integer|number).*", "{field}：请填写数字"),
    (r"width and height: give both or neither", "宽度和高度：请都填写，或都留空"),
    (r"strength: .* leaves no step; raise strength or steps", "重绘强度乘以步数不足一步，请提高重绘强度或步数"),
    (rf"{_FIELD}: start .* is not before end .*; give a smaller start", "{field}：开始必须早于结束"),
    (rf"{_FIELD}: (?P<what>.+) is not offered on this page.*", "{field}：本页不提供 {what}，请从列表中选择"),
    (r"prompt: weight (?P<what>\S+) is outside 0 to 10", "提示词：权重 {what} 超出 0 到 10"),
    (
        r".*\blow is (?P<low>\S+) and high is (?P<high>\S+); low must not exceed high",
        "low（{low}）不能大于 high（{high}）",
    ),
    # Compare and Animate.
    (rf"{_FIELD}: (?P<what>'.*') is no (?:whole )?number; .*", "{field}：{what} 不是数字；请写成 0.5, 1 或范围 1-5"),
    (rf"{_FIELD}: give the values to compare, .*", "{field}：请填写要对比的取值"),
    (rf"{_FIELD}: (?P<what>'.*') is unknown; choose from (?P<names>.+)", "{field}：没有 {what}；可选 {names}"),
    (rf"{_FIELD}: '.*' are {_NUMBER} values; give at most (?P<most>\d+)", "{field}：{number} 个取值，最多 {most} 个"),
    (
        r"(?:negative )?prompt: (?P<what>'.*') is not in the (?:negative )?prompt; .*",
        "提示词中没有 {what}；请先写其中的文字，再写替换它的文字",
    ),
    (r"x and y: both are .*", "横向和纵向是同一参数，请改选其中之一"),
    (r"strength: nothing is repainted; .*", "重绘强度：请先提供起始图片"),
    (r"(?P<what>.+): is a grid of pictures; .*", "{what}：是网格，请提供单张图片，或拖到“对比”页"),
    (r"(?P<what>.+): is one picture; .*", "{what}：是单张图片，请提供网格，或拖到“创作”页"),
    (
        r"prompt travel, line (?P<line>\d+): (?P<what>'.*') is no change of words; .*",
        "第 {line} 行 {what}：请写成“帧: 文字”，例如 16: a fox in winter",
    ),
    (
        r"prompts: frame (?P<frame>\d+) is none of the clip's, which are 0 to (?P<last>\d+)",
        "没有第 {frame} 帧，帧号为 0 到 {last}",
    ),
    (r"frames: (?P<number>\d+) are too many here; ask for at most (?P<most>\d+)", "帧数：最多 {most}"),
    (
        r"(?P<what>.+) has (?P<held>\d+) frames at (?P<fps>\S+) a second, and (?P<number>\d+) are asked for: .*",
        "{what}：每秒 {fps} 帧时只有 {held} 帧，而需要 {number} 帧；请减少帧数或提高帧率",
    ),
    (r"(?P<what>.+): holds no recipe; only a clip .*", "{what}：没有配方；只有 mahlstick 生成且未经改动的视频才有"),
    (r"(?P<what>.+?):? holds no recipe; .*", "{what}：没有配方；只有 mahlstick 保存且未经改动的 PNG 才有"),
    (r"(?P<what>.+): not a readable picture; .*", "{what}：无法读取；请提供 mahlstick 保存的 PNG"),
    (r"(?P<what>.+) is (?:not a|no) picture; .*", "{what}：不是图片；请提供 PNG、JPEG 或 WebP"),
    (r"(?P<what>.+) is damaged or truncated .*", "{what}：文件已损坏，请重新保存或下载"),
    (r"(?P<what>.+) is too large.*", "{what}：太大，请缩小图片"),
    (r"too many pictures are waiting; .*", "排队的任务太多，请一分钟后再试"),
    (r".*\binpaint needs a part that is repainted and one that is kept; .*", "请涂抹要重绘的部分，并保留一部分不涂"),
    (
        r".*annotator '(?P<what>\w+)': .* cannot be loaded from .*",
        "预处理器 {what} 需要的权重无法加载，请检查网络，或换用不带 ↓ 的",
    ),
    (
        r".*this (?P<what>[\w -]+) was made for (?P<ours>.+), the UNet is (?P<theirs>.+), and they differ in .*",
        "该 {what} 用于 {ours}，而模型是 {theirs}，请选用匹配的",
    ),
    (r".* gave NaN pictures; .*", "生成的图片无效（NaN）：模型文件损坏，或精度不足，请使用 float32"),
]
_PATTERNS = [(re.compile(english), chinese) for english, chinese in _CHINESE]


def translated(sentence: str, browser: gr.Request | None) -> str:
    """The sentence in the language of the browser; in English where nobody has translated it."""
    if not reads_chinese(browser):
        return sentence
    for pattern, chinese in _PATTERNS:
        if found := pattern.fullmatch(sentence):
            parts = found.groupdict()
            return chinese.format(**parts | {"field": _field(parts.get("field", ""))})
    return sentence


def _field(name: str) -> str:
    """``controls[0].scale`` as 控制 1 权重."""
    words = []
    for part in name.split("."):
        stem, _, place = part.rstrip("]").partition("[")
        words += [_FIELDS.get(stem, stem), str(int(place) + 1) if place else ""]
    return " ".join(word for word in words if word)
