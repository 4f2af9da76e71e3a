"""Every word of the page, in English and in Chinese."""

from __future__ import annotations

from collections.abc import Mapping

import gradio as gr
from gradio.i18n import I18nData

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
    "own_sampler": ("model's own", "模型默认"),
    "seed": ("Seed", "随机种子"),
    "seed_hint": ("new each time", "每次随机"),
    "dice": ("Random", "随机"),
    "reuse": ("Reuse", "沿用"),
    "pictures": ("Pictures", "张数"),
    "controls": ("Controls", "控制"),
    "add_control": ("Add a control", "添加控制"),
    "remove": ("Remove", "移除"),
    "remove_sure": ("Remove it for good?", "确定彻底删除吗？"),
    "remove_do": ("Yes, remove it", "是，删除"),
    "remove_not": ("Keep it", "保留"),
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
    "found_by": ("Or words that find one in the library", "或用文字在图库中查找"),
    "found_by_hint": ("watercolour fox", "水彩狐狸"),
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
    "workflow": ("Workflow", "工作流"),
    "run_it": ("Run it with: {command}", "运行：{command}"),
    "left_out": ("What it cannot say: {what}.", "未能表达：{what}。"),
    "overlay": ("Lay the control over the picture", "叠加显示控制图"),
    "empty": (
        "Say what to paint and press Paint, or Ctrl+Enter. Or begin with an example:",
        "写下想画的内容，点击“生成”或按 Ctrl+Enter。也可以从示例开始：",
    ),
    "example_text": ("From words", "文生图"),
    "example_control": ("From a drawing", "从草图"),
    "example_image_prompt": ("After a reference", "按参考图"),
    # On a canvas.
    "draw_hint": ("Draw here, or drop, paste or upload a picture", "在此绘制，或拖入、粘贴、上传图片"),
    "mask_hint": ("Drop, paste or upload a picture, then paint on it", "拖入、粘贴或上传图片，然后在上面涂抹"),
    "strip_hint": ("Drop, paste or upload pictures", "拖入、粘贴或上传图片"),
    "strip_hint_one": ("Drop, paste or upload a picture", "拖入、粘贴或上传一张图片"),
    "upload": ("Upload a picture", "上传图片"),
    "camera": ("Take a photo", "拍照"),
    "pen": ("Pen", "画笔"),
    "eraser": ("Eraser", "橡皮"),
    "pen_size": ("Size of the pen", "笔刷大小"),
    "undo": ("Undo", "撤销"),
    "clear": ("Clear", "清除"),
    "black": ("Black", "黑色"),
    "white": ("White", "白色"),
    "grey": ("Grey", "灰色"),
    "take_photo": ("Take it", "拍摄"),
    "close_camera": ("Close", "关闭"),
    "unreadable": (
        "This file is no picture that the browser can show; give a PNG, JPEG or WebP.",
        "浏览器无法显示该文件，请提供 PNG、JPEG 或 WebP 图片。",
    ),
    "large": ("This file is larger than 32 MB; scale the picture down.", "文件超过 32 MB，请缩小图片。"),
    # What the server says.
    "waiting": ("Waiting: {ahead} before you", "排队中：前面还有 {ahead} 个"),
    "loading": ("Getting ready …", "准备中……"),
    "painting": ("Step {step} of {total}", "第 {step} / {total} 步"),
    "left": ("{seconds} s left", "剩余 {seconds} 秒"),
    "cancelled": ("Cancelled; nothing was kept.", "已取消，没有保存任何内容。"),
    "cancelled_kept": (
        "Cancelled; made so far and now on Create: {count}.",
        "已取消；已生成的 {count} 张图片在“创作”页。",
    ),
    "finishing": ("Almost done …", "即将完成……"),
    "restored": ("The settings of this picture are back.", "这张图片的参数已恢复。"),
    "restored_without": (
        "The settings are back, without what this page cannot show: {names}.",
        "参数已恢复，但本页无法显示：{names}。",
    ),
    "no_selection": ("Choose one of your pictures first.", "请先选择一张图片。"),
    "full": ("No unit is free; remove one first.", "没有空闲的单元，请先移除一个。"),
    "idle_unit": (
        "Without a picture this does nothing; give one, or remove it.",
        "没有图片，此项不起作用；请提供图片或移除它。",
    ),
    "none_found": ("None of your pictures was made from these words.", "没有图片的提示词包含这些文字。"),
    "no_prompt": ("Say what to paint first.", "请先写下想画的内容。"),
    "failed": (
        "Something went wrong ({reason}); the log of the server says more.",
        "出错了（{reason}），详见服务器日志。",
    ),
    "no_memory": ("Out of memory; take a smaller size or fewer pictures.", "内存不足，请减小尺寸或张数。"),
    # Workflows.
    "workflows": ("Workflows", "工作流"),
    "wf_drop": (
        "Drop a workflow: ComfyUI's JSON, or a picture that carries one",
        "拖入工作流：ComfyUI 的 JSON，或带有工作流的图片",
    ),
    "wf_example": ("Or begin with an example", "或从示例开始"),
    "wf_files": ("Files that it loads", "工作流要加载的文件"),
    "wf_files_hint": ("Drop pictures, videos or sounds; they keep their names", "拖入图片、视频或声音，文件名保持不变"),
    "wf_picture": ("Picture", "图片"),
    "wf_more": ("More", "更多"),
    "wf_run": ("Run", "运行"),
    "wf_others": ("Other files that it made", "生成的其他文件"),
    "wf_code": ("As files", "导出文件"),
    "wf_write": ("Write these settings as files", "将当前参数写成文件"),
    "wf_written": (
        "For ComfyUI's page, for its API, and as a Python script",
        "ComfyUI 页面格式、API 格式与 Python 脚本",
    ),
    "wf_empty": (
        "A workflow is a graph of nodes, as ComfyUI draws them. Drop one, or choose an example: its inputs become a"
        " form here, and what it makes is shown in this place.",
        "工作流是由节点组成的图，与 ComfyUI 相同。拖入一个工作流或选择示例，其输入会变成表单，结果显示在这里。",
    ),
    "wf_kinds": (
        "Give a .json, or a .png or .webp that carries a workflow.",
        "请提供 .json，或带有工作流的 .png、.webp。",
    ),
    "wf_unknown": (
        "This workflow needs nodes that are not here: {names}. Packs of nodes run with mahlstick run --pack.",
        "该工作流需要此处没有的节点：{names}。节点包可用 mahlstick run --pack 运行。",
    ),
    "wf_missing": (
        "Not here: {names}. Choose others below, or add the files.",
        "缺少：{names}。请在下方另选，或添加这些文件。",
    ),
    "wf_node": ("{node} ({number} of {total})", "{node}（第 {number} / {total} 个）"),
    # Inspect.
    "inspect": ("Inspect", "检查"),
    "in_drop": ("Drop a file of weights, or a PNG made here", "拖入权重文件，或在此生成的 PNG"),
    "in_choose": ("Or choose one that is here", "或选择已有的文件"),
    "in_large": (
        "Files beyond 32 MB are not uploaded. Begin with `mahlstick app --models FOLDER`, and they can be chosen"
        " above.",
        "超过 32 MB 的文件不上传。用 `mahlstick app --models 文件夹` 启动后即可在上方选择。",
    ),
    "in_empty": (
        "What is this file, and what does it fit? Drop one here. Only its header is read, and no code that is in it"
        " ever runs.",
        "这个文件是什么，适用于哪个模型？把它拖到这里。只读取文件头，绝不运行其中的代码。",
    ),
    "in_gone": ("{name} is not here any more; choose another.", "{name} 已不存在，请另选。"),
    "in_what": ("What it is", "种类"),
    "in_layout": ("Layout", "格式"),
    "in_base": ("Made for", "适用基座"),
    "in_fit": ("The model chosen in Create", "“创作”中所选模型"),
    "in_size": ("Size", "大小"),
    "in_parameters": ("Parameters", "参数量"),
    "in_tensors": ("Tensors", "张量数"),
    "in_use": ("Use", "用法"),
    "in_fits": ("It fits.", "适用。"),
    "in_untold": ("The file does not tell whether it fits.", "无法从文件判断是否适用。"),
    "in_unfit": ("It does not fit: {why}", "不适用：{why}"),
    # Train.
    "train": ("Train", "训练"),
    "tr_task": ("What is learned", "训练内容"),
    "tr_controlnet": ("a control net", "控制网络"),
    "tr_ip-adapter": ("an image prompt adapter", "图像提示适配器"),
    "tr_lora": ("a LoRA", "LoRA"),
    "tr_motion": ("a motion module", "运动模块"),
    "tr_qformer": ("a Q-Former", "Q-Former"),
    "tr_data": ("Folder of pictures, or of clips", "图片或视频片段文件夹"),
    "tr_zip": ("Or drop a .zip of pictures with captions", "或拖入带说明文字的图片 .zip"),
    "tr_no_data": (
        "Begin with `mahlstick app --data FOLDER`, and the folders in it can be chosen here; or drop a .zip of up to"
        " 32 MB.",
        "用 `mahlstick app --data 文件夹` 启动后即可选择其中的文件夹；也可拖入不超过 32 MB 的 .zip。",
    ),
    "tr_unpacked": ("{name}: {kept} files, {left} left out.", "{name}：{kept} 个文件，忽略 {left} 个。"),
    "tr_name": ("Name of the result", "结果名称"),
    "tr_control": ("Folder of control pictures", "控制图文件夹"),
    "tr_reference": ("Folder of references", "参考图文件夹"),
    "tr_made": ("made by the annotator", "由预处理器生成"),
    "tr_itself": ("the pictures themselves", "图片本身"),
    "tr_batch": ("Batch", "批量"),
    "tr_rate": ("Learning rate", "学习率"),
    "tr_resolution": ("Resolution", "分辨率"),
    "tr_more": ("More settings", "更多参数"),
    "tr_start": ("Start", "开始训练"),
    "tr_stop": ("Stop", "停止"),
    "tr_resume": ("Resume", "继续"),
    "tr_remove": ("Remove this run", "删除此训练"),
    "tr_remove_data": ("Remove this archive", "删除此压缩包"),
    "tr_runs": ("Your runs", "你的训练"),
    "tr_loss": ("Loss", "损失"),
    "tr_fidelity": ("Fidelity", "保真度"),
    "tr_samples": ("Newest samples", "最新样本"),
    "tr_result": ("What was learned", "训练结果"),
    "tr_empty": (
        "Choose pictures with captions and what is to be learned. A run goes on when the browser is closed, and here"
        " you find it again: its loss, its samples and, in the end, its result in the lists of Create.",
        "选择带说明文字的图片和训练内容。关闭浏览器后训练继续；回到这里可以看到损失、样本，完成后结果会出现在“创作”的列表中。",
    ),
    "tr_waiting": ("Waiting for what the machine is doing", "等待当前任务完成"),
    "tr_preparing": ("Reading and encoding the pictures …", "正在读取和编码图片……"),
    "tr_stopping": ("Stopping …", "正在停止……"),
    "tr_stopped": (
        "Stopped at step {step} of {total}. Resume goes on from there.",
        "已停在第 {step} / {total} 步，可由此继续。",
    ),
    "tr_done": (
        "Done: {total} steps. {name} is in the lists of Create, or below.",
        "已完成 {total} 步。{name} 已在“创作”的列表中，或见下方。",
    ),
    "tr_failed": ("It failed: {reason}", "训练失败：{reason}"),
    "tr_no_name": ("Give the result a name of letters, digits, - and _.", "请用字母、数字、- 和 _ 为结果命名。"),
    "tr_taken": (
        "You have a run called {name}; choose another name, or resume that one.",
        "已有名为 {name} 的训练，请换个名称或继续它。",
    ),
    "tr_choose_data": ("Choose a folder, or drop a .zip.", "请选择文件夹，或拖入 .zip。"),
    "tr_at_once": ("One of your runs is at work; stop it first.", "你已有训练在进行，请先停止。"),
    "waiting_for_training": (
        "Waiting: a training is at work, and then {ahead} before you",
        "等待中：正在训练，之后前面还有 {ahead} 个",
    ),
    # Compare.
    "compare": ("Compare", "对比"),
    "cmp_from": (
        "Every picture of the grid has the settings of Create, but for one or two that you choose here.",
        "网格中的每张图都使用“创作”页的参数，只有此处选择的一两项不同。",
    ),
    "cmp_x": ("From left to right", "横向"),
    "cmp_y": ("From top to bottom", "纵向"),
    "cmp_none": ("nothing", "无"),
    "cmp_values": ("Values", "取值"),
    "cmp_fill": ("Take all of them", "全部填入"),
    "cmp_numbers": (
        "A list, a range 1-5, or a range with how many values: 0-1 [5]",
        "列表、范围 1-5，或带个数的范围 0-1 [5]",
    ),
    "cmp_words": (
        "Words of the prompt, and then what replaces them; in double quotes where a comma is in them",
        "先写提示词中的文字，再写替换它的文字；含逗号时请用英文双引号",
    ),
    "cmp_nothing": ("The grid has one row.", "网格只有一行。"),
    "cmp_run": ("Compare", "对比"),
    "cmp_grids": ("Your grids", "你的网格"),
    "cmp_drop": ("Drop a grid made here, and its settings come back", "拖入在此生成的网格以恢复参数"),
    "cmp_empty": (
        "See what a setting does: choose one or two and their values, and get all pictures in one. Or begin with an"
        " example:",
        "看看参数的作用：选择一两项参数及其取值，所有结果会排成一张图。也可以从示例开始：",
    ),
    "cmp_example_steps": ("Steps and seeds", "步数与种子"),
    "cmp_example_guidance": ("Guidance and samplers", "引导强度与采样器"),
    "cmp_example_control": ("How much control", "控制的强弱"),
    "cmp_restored": ("The settings of this grid are back, here and on Create.", "网格的参数已恢复到此处和“创作”页。"),
    "cmp_no_prompt": (
        "Say on Create what to paint first; the grid starts from there.",
        "请先在“创作”页写下想画的内容，网格以它为基础。",
    ),
    "cmp_no_axis": ("Choose what is to differ.", "请选择要对比的参数。"),
    "cmp_too_many": (
        "That is {count} pictures, and a grid has at most {most} here; give fewer values.",
        "共 {count} 张，此处网格最多 {most} 张，请减少取值。",
    ),
    "cmp_no_controls": (
        "Control {number} has no picture; give it one on Create, or choose another setting.",
        "控制 {number} 没有图片；请在“创作”页提供，或选择其他参数。",
    ),
    "cmp_no_image_prompts": (
        "Image prompt {number} has no picture; give it one on Create, or choose another setting.",
        "图像提示 {number} 没有图片；请在“创作”页提供，或选择其他参数。",
    ),
    # Animate.
    "animate": ("Animate", "动画"),
    "an_run": ("Animate", "生成动画"),
    "an_motion": ("Motion module", "运动模块"),
    "an_motion_scale": ("How strongly the frames mix", "帧间融合强度"),
    "an_frames": ("Frames", "帧数"),
    "an_fps": ("Frames a second", "每秒帧数"),
    "an_format": ("Format", "格式"),
    "an_travel": ("Words that change", "随帧变化的提示词"),
    "an_travel_hint": ("16: a fox in winter", "16: a fox in winter"),
    "an_context": ("Long clips", "长视频"),
    "an_length": ("Frames of a window", "窗口帧数"),
    "an_overlap": ("Frames that two share", "重叠帧数"),
    "an_control": ("Follow a video", "以视频为控制"),
    "an_init": ("Start from a video", "以视频为起点"),
    "an_file": ("A video, an animated GIF or WebP", "视频、动态 GIF 或 WebP"),
    "an_init_seen": ("Its first frames", "前几帧"),
    "an_strip": ("Frames", "各帧"),
    "an_clip": ("Your clip", "你的视频"),
    "an_clips": ("Your clips", "你的全部视频"),
    "an_drop": ("Drop a clip made here, and its settings come back", "拖入在此生成的视频以恢复参数"),
    "an_empty": (
        "A motion module lets the frames of a clip look at each other. Say what is to move and press Animate. What you"
        " leave empty is the module's own, or the video's that you give.",
        "运动模块让各帧彼此关联。写下想要的内容并点击“生成动画”；留空的参数取自模块或所给的视频。",
    ),
    "an_restored": ("The settings of this clip are back.", "这段视频的参数已恢复。"),
    "an_motion_figure": ("motion, sides a frame", "运动幅度（每帧，边长）"),
    "an_change_figure": ("change from frame to frame", "帧间变化"),
    "an_flicker_figure": ("flicker", "闪烁"),
    "an_consistency_figure": ("consistency, at most 1", "一致性（最大为 1）"),
    "an_seam_figure": ("seam of windows, 1 is none", "窗口接缝（1 为无）"),
}

# What Compare calls the fields of a request.
_TEXTS |= {f"cmp_{key}": _TEXTS[key] for key in ("seed", "steps", "guidance", "strength", "prompt")}
_TEXTS |= {"cmp_scheduler": _TEXTS["sampler"], "cmp_negative_prompt": _TEXTS["negative"]}
_TEXTS |= {
    f"cmp_{units}_{i}_{part}": (f"{unit[0]} {i + 1}: {_TEXTS[key][0].lower()}", f"{unit[1]} {i + 1}：{_TEXTS[key][1]}")
    for units, unit in {"controls": ("Control", "控制"), "image_prompts": ("Image prompt", "图像提示")}.items()
    for i in range(4)
    for part, key in [*((key, key) for key in ("scale", "start", "end", "mode", "blocks")), ("adapter", "net")]
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


def words(wanted: Mapping[str, str | I18nData]) -> dict[str, dict[str, str]]:
    """Texts for a script in the browser, by language and by the script's names for them."""
    keys = {
        name: found.key.removeprefix(_PREFIX) if isinstance(found, I18nData) else found
        for name, found in wanted.items()
    }
    return {language: {name: _TEXTS[key][i] for name, key in keys.items()} for i, language in enumerate(("en", "zh"))}


def say(key: str, request: gr.Request | None = None, **values: object) -> str:
    """A sentence of the server, in the language of the browser that asked."""
    return _TEXTS[key][reads_chinese(request)].format(**values)


def reads_chinese(request: gr.Request | None) -> bool:
    """Whether the browser that asked is a Chinese one."""
    accepted = request.headers.get("accept-language", "") if request is not None and request.headers else ""
    return bool(accepted.startswith("zh"))
