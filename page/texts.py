"""Every word of the page, in English and in Chinese."""

from __future__ import annotations

import gradio as gr

_TEXTS = {
    # key: (English, Chinese)
    "tagline": ("Steer diffusion with drawings and pictures", "用草图和参考图引导扩散模型"),
    "create": ("Create", "创作"),
    "theme": ("Light or dark", "明暗切换"),
    "prompt": ("Prompt", "提示词"),
    "prompt_hint": ("What to paint, e.g. a red apple", "想画什么，例如 a red apple"),
    "negative": ("Negative prompt", "反向提示词"),
    "negative_hint": ("What to keep out", "不想出现的内容"),
    "paint": ("Paint", "生成"),
    "cancel": ("Cancel", "取消"),
    "settings": ("Settings", "参数"),
    "model": ("Model", "模型"),
    "embedded": ("embedded", "内置模型"),
    "width": ("Width", "宽度"),
    "height": ("Height", "高度"),
    "own": ("own", "默认"),
    "steps": ("Steps", "步数"),
    "guidance": ("Guidance", "引导强度"),
    "sampler": ("Sampler", "采样器"),
    "own_sampler": ("the model's own", "模型默认"),
    "seed": ("Seed", "随机种子"),
    "seed_hint": ("new each time", "每次随机"),
    "dice": ("Random", "随机"),
    "reuse": ("Reuse", "沿用"),
    "pictures": ("Pictures", "张数"),
    "controls": ("Controls", "控制"),
    "add_control": ("Add a control", "添加控制"),
    "remove": ("Remove", "移除"),
    "follow": ("Picture or drawing to follow", "要遵循的图片或草图"),
    "net": ("Control net", "控制网络"),
    "annotator": ("Annotator", "预处理器"),
    "no_annotator": ("none, as it is", "无：已是控制图"),
    "seen": ("What the net sees", "网络看到的图"),
    "scale": ("Scale", "权重"),
    "start": ("Start", "开始"),
    "end": ("End", "结束"),
    "mode": ("Mode", "模式"),
    "resize": ("Fit to size", "缩放方式"),
    "balanced": ("balanced", "均衡"),
    "prompt_mode": ("prompt matters more", "更看重提示词"),
    "control_mode": ("control matters more", "更看重控制"),
    "guess_mode": ("guess", "猜测"),
    "stretch": ("stretch", "拉伸"),
    "crop": ("crop", "裁剪"),
    "pad": ("pad", "填充"),
    "masked": ("Only where I paint", "仅作用于涂抹处"),
    "mask": ("Paint where it acts", "涂抹作用区域"),
    "image_prompts": ("Image prompts", "图像提示"),
    "add_image_prompt": ("Add an image prompt", "添加图像提示"),
    "references": ("Reference pictures", "参考图"),
    "adapter": ("Adapter", "适配器"),
    "blocks": ("Takes", "取用"),
    "all": ("everything", "全部"),
    "style": ("style only", "仅风格"),
    "layout": ("layout only", "仅构图"),
    "unlike": ("Unlike this picture", "避免像这张图"),
    "init": ("Start from a picture", "以图生图"),
    "init_hint": (
        "Paint over what is to be repainted; without paint, all of it is",
        "涂抹要重绘的部分；不涂则重绘整张",
    ),
    "strength": ("Strength", "重绘强度"),
    "result": ("Your pictures", "你的图片"),
    "search": ("Search your pictures by prompt", "按提示词搜索图片"),
    "to_init": ("Start from it", "以它为起点"),
    "to_control": ("Follow it", "作为控制"),
    "to_image_prompt": ("Take after it", "作为参考"),
    "restore": ("Restore its settings", "恢复参数"),
    "drop": ("Drop a PNG made here, and its settings come back", "拖入在此生成的 PNG 以恢复全部参数"),
    "code": ("Recipe and code", "配方与代码"),
    "refresh": ("Write the code of these settings", "写出当前参数的代码"),
    "recipe": ("Recipe", "配方"),
    "python": ("Python", "Python"),
    "shell": ("Command line", "命令行"),
    "empty": (
        "Say what to paint and press Paint, or Ctrl+Enter. Or begin with an example:",
        "写下想画的内容，点击“生成”或按 Ctrl+Enter。也可以从示例开始：",
    ),
    "example_text": ("From words", "文生图"),
    "example_control": ("From a drawing", "从草图"),
    "example_image_prompt": ("After a reference", "按参考图"),
    # What the server says.
    "waiting": ("Waiting: {ahead} before you", "排队中：前面还有 {ahead} 个"),
    "loading": ("Getting ready …", "准备中……"),
    "painting": ("Step {step} of {total}", "第 {step} / {total} 步"),
    "left": ("{seconds} s left", "剩余 {seconds} 秒"),
    "cancelled": ("Cancelled; nothing was kept.", "已取消，没有保存任何内容。"),
    "finishing": ("Almost done …", "即将完成……"),
    "restored": ("The settings of this picture are back.", "这张图片的参数已恢复。"),
    "restored_without": (
        "The settings are back, without what this page cannot show: {names}.",
        "参数已恢复，但本页无法显示：{names}。",
    ),
    "no_selection": ("Choose one of your pictures first.", "请先选择一张图片。"),
    "full": ("No unit is free; remove one first.", "没有空闲的单元，请先移除一个。"),
    "no_prompt": ("Say what to paint first.", "请先写下想画的内容。"),
    "failed": (
        "Something went wrong ({reason}); the log of the server says more.",
        "出错了（{reason}），详见服务器日志。",
    ),
    "no_memory": ("Out of memory; take a smaller size or fewer pictures.", "内存不足，请减小尺寸或张数。"),
}

# Gradio has texts of its own under short names.
_PREFIX = "mahlstick_"


def _all(language: int) -> dict[str, str]:
    return {_PREFIX + key: texts[language] for key, texts in _TEXTS.items()}


translations = gr.I18n(**{"en": _all(0), "zh": _all(1), "zh-CN": _all(1)})


def label(key: str) -> gr.I18nData:
    """A text that the browser shows in its own language."""
    assert key in _TEXTS, key
    return translations(_PREFIX + key)


def say(key: str, request: gr.Request | None = None, **values: object) -> str:
    """A sentence of the server, in the language of the browser that asked."""
    accepted = request.headers.get("accept-language", "") if request is not None and request.headers else ""
    return _TEXTS[key][accepted.startswith("zh")].format(**values)
