"""Text as ComfyUI encodes it, on transformers' CLIP models: weighted words, prompts of any length, textual inversion.

ComfyUI's behaviour is the specification: ``(word)`` weighs 1.1 times as much, ``(word:1.2)`` weighs 1.2 whatever is
around it, ``\\(`` is a bracket, and ``embedding:name`` stands for a file's vectors. The tokens are cut into chunks of
the encoder's length, each with its begin, end and padding. A token's state z of weight w becomes
``(z - z_empty) · w + z_empty``, where z_empty is the state at that place of a text without words.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mahlstick.adapters.formats.checkpoint import open_checkpoint
from mahlstick.errors import MahlstickError
from mahlstick.nodes import folders
from mahlstick.nodes.values import Clip

#: A token's id, or the vector of a textual inversion in its place; and its weight.
Token = tuple[int | Tensor, float]
Chunk = list[Token]

DEEPEST = 100  # brackets in one another

_BREAKABLE = 8  # a run of this many tokens may be broken at the end of a chunk; a shorter one moves to the next
_EMBEDDING = "embedding:"
_EMBEDDING_KEYS = ("clip_l", "clip_g")  # of files that hold vectors for both encoders of XL


def encode(clip: Clip, *texts: str) -> tuple[Tensor, Tensor]:
    """The states of a text ``(1, length, dim)`` and the pooled one ``(1, dim)``, as float32 on the CPU.

    Give one text for all encoders, or one for each. The states of several encoders lie side by side; the pooled state
    is the last encoder's, of the first chunk.
    """
    chunks = tokenize(clip, *texts)
    with ExitStack() as patched, torch.no_grad():
        for patch in clip.patches:
            patched.enter_context(patch(clip.encoders))
        found = [_encode(clip, place, each) for place, each in enumerate(chunks)]
    states, pooled = zip(*found, strict=True)
    length = min(each.shape[1] for each in states)
    return torch.cat([each[:, :length] for each in states], dim=-1), pooled[-1]


def tokenize(clip: Clip, *texts: str) -> list[list[Chunk]]:
    """The chunks of each encoder. Texts that take more chunks than others make those longer, by empty ones."""
    one_each = texts * len(clip.encoders) if len(texts) == 1 else texts
    pairs = list(zip(clip.tokenizers, clip.encoders, strict=True))
    chunks = [_chunks(*pair, place, text) for place, (pair, text) in enumerate(zip(pairs, one_each, strict=True))]
    if len(texts) > 1:
        longest = max(map(len, chunks))
        empty = [_chunks(*pair, place, "") for place, pair in enumerate(pairs)]
        chunks = [each + nothing * (longest - len(each)) for each, nothing in zip(chunks, empty, strict=True)]
    return chunks


def weighted(text: str) -> list[tuple[str, float]]:
    """``"a (red:1.5) fox"`` -> ``[("a ", 1.0), ("red", 1.5), (" fox", 1.0)]``.

    Raises ``MahlstickError`` where brackets nest deeper than `DEEPEST`.
    """
    segments = _weighted(text.replace(r"\)", "\0\1").replace(r"\(", "\0\2"), 1.0, 0)
    return [(words.replace("\0\1", ")").replace("\0\2", "("), weight) for words, weight in segments]


def _weighted(text: str, weight: float, depth: int) -> Iterator[tuple[str, float]]:
    if depth > DEEPEST:
        raise MahlstickError(f"the text has more than {DEEPEST} brackets in one another; take some away.")
    for piece in _pieces(text):
        if len(piece) >= 2 and piece[0] == "(" and piece[-1] == ")":
            yield from _weighted(*_opened(piece[1:-1], weight), depth + 1)
        else:
            yield piece, weight


def _pieces(text: str) -> list[str]:
    """The text cut before and behind each outermost pair of brackets."""
    cuts, depth = [0], 0
    for place, letter in enumerate(text):
        if letter == "(":
            if depth == 0:
                cuts.append(place)
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                cuts.append(place + 1)
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True) if start < end]


def _opened(inner: str, weight: float) -> tuple[str, float]:
    """What brackets hold, and its weight: the number behind its last colon, or a little more than around it."""
    words, colon, number = inner.rpartition(":")
    if colon and words:
        try:
            return words, float(number)
        except ValueError:
            pass
    return inner, weight * 1.1


def _chunks(tokenizer: Any, encoder: Any, place: int, text: str) -> list[Chunk]:
    begin, end = tokenizer("").input_ids[:2]
    room = min(tokenizer.model_max_length, encoder.config.max_position_embeddings) - 2
    chunks: list[Chunk] = [[]]
    for run in _runs(tokenizer, encoder, place, text):
        breakable = len(run) >= min(_BREAKABLE, room)
        while len(run) > (free := room - len(chunks[-1])):
            chunks[-1] += run[:free] if breakable else []
            run = run[free:] if breakable else run
            chunks.append([])
        chunks[-1] += run
    padding = [(tokenizer.pad_token_id, 1.0)]
    return [[(begin, 1.0), *chunk, (end, 1.0), *padding * (room - len(chunk))] for chunk in chunks]


def _runs(tokenizer: Any, encoder: Any, place: int, text: str) -> Iterator[Chunk]:
    """The tokens that stay together where a chunk ends: those of one weight, or of one textual inversion."""
    for segment, weight in weighted(text):
        for part in re.split(rf"[ \n](?={_EMBEDDING})", segment):
            if part.startswith(_EMBEDDING):
                name, *rest = part.removeprefix(_EMBEDDING).split() or [""]
                bare = name.strip(",")
                yield [(vector, weight) for vector in _embedding(bare, encoder, place)]
                part = " ".join([name[len(bare) :], *rest]).strip()
            if part:
                yield [(token, weight) for token in tokenizer(part, verbose=False).input_ids[1:-1]]


def _embedding(name: str, encoder: Any, place: int) -> Sequence[Tensor]:
    """The vectors of a textual inversion; none, with a warning, where there is no such file or it does not fit."""
    found = [each for each in folders.listed("embeddings") if name in _names(each)]
    if not found:
        where = folders.current().models / "embeddings"
        warnings.warn(f"{_EMBEDDING}{name} is left out: there is no such file below {where}", stacklevel=2)
        return ()
    path = folders.find("embeddings", found[0])
    vectors = _read_embedding(path, folders.stamp(path), encoder.get_input_embeddings().embedding_dim, place)
    if vectors is None:
        warnings.warn(f"{_EMBEDDING}{name} is left out: {path} was made for another text encoder", stacklevel=2)
        return ()
    return list(vectors)


def _names(listed: str) -> set[str]:
    """The names by which a prompt may call a file: with or without its folder and its suffix."""
    path = Path(listed)
    return {listed, path.with_suffix("").as_posix(), path.name, path.stem}


@lru_cache(maxsize=64)
def _read_embedding(path: Path, stamp: str, width: int, place: int) -> Tensor | None:
    """Vectors ``(n, width)`` of a file by diffusers, A1111 or for XL; None where none has that width."""
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.load(checkpoint.tensors)
    named = [tensor for name, tensor in tensors.items() if name.split(".")[-1] == _EMBEDDING_KEYS[place]]
    fitting = [each for each in [*named, *tensors.values()] if each.ndim in (1, 2) and each.shape[-1] == width]
    return fitting[0].float().reshape(-1, width) if fitting else None


def _encode(clip: Clip, place: int, chunks: list[Chunk]) -> tuple[Tensor, Tensor]:
    """One encoder's states ``(1, length, dim)`` of the chunks in a row, and the pooled one of the first."""
    weights = torch.tensor([[weight for _, weight in chunk] for chunk in chunks])
    tokens = [[token for token, _ in chunk] for chunk in chunks]
    is_weighted = bool((weights != 1).any())
    if is_weighted:
        begin, end = clip.tokenizers[place]("").input_ids[:2]
        tokens.append([begin, end, *[clip.tokenizers[place].pad_token_id] * (len(tokens[0]) - 2)])
    states, pooled = _states(clip, clip.encoders[place], tokens)
    if is_weighted:
        states, empty = states[:-1], states[-1:]
        changed = (states - empty) * weights[..., None] + empty
        states = torch.where(weights[..., None] == 1, states, changed)
    return states.flatten(0, 1)[None], pooled[:1]


def _states(clip: Clip, encoder: Any, tokens: list[list[int | Tensor]]) -> tuple[Tensor, Tensor]:
    """Hidden states ``(n, length, dim)`` of the layer that is asked for, and the pooled ones ``(n, dim)``."""
    ids = torch.tensor([[0 if isinstance(token, Tensor) else token for token in chunk] for chunk in tokens])
    with _vectors_in_place(encoder, tokens):
        found = encoder(ids.to(encoder.device), output_hidden_states=True)
    xl, layer = _is_xl(clip), _layer(clip, encoder)
    states = found.last_hidden_state if layer is None else found.hidden_states[layer]
    if layer is not None and not xl:
        states = getattr(encoder, "text_model", encoder).final_layer_norm(states)
    pooled = found.text_embeds if hasattr(encoder, "text_projection") else found.pooler_output
    return states.float().cpu(), pooled.float().cpu()


def _is_xl(clip: Clip) -> bool:
    """Stable Diffusion XL reads hidden states before the final norm; its refiner has the second encoder alone."""
    return len(clip.encoders) > 1 or hasattr(clip.encoders[0], "text_projection")


def _layer(clip: Clip, encoder: Any) -> int | None:
    """The hidden state to read, counted from the end; None: the last, behind the final norm."""
    layers = encoder.config.num_hidden_layers
    # Stable Diffusion 2 reads the layer before the last of OpenCLIP-H, and diffusers leaves the last out of its files.
    open_clip_h = encoder.config.hidden_size == 1024
    layer = clip.layer or (-2 if _is_xl(clip) or open_clip_h else None)
    if layer is None or abs(layer) > (24 if open_clip_h else layers):
        return None
    return min(layer + 24 - layers, -1) if open_clip_h else layer


@contextmanager
def _vectors_in_place(encoder: Any, tokens: list[list[int | Tensor]]) -> Iterator[None]:
    """Within the block the vectors among the tokens stand where the encoder looks up an embedding for each id."""

    def put(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        for row, column, vector in given:
            output[row, column] = vector.to(output)
        return output

    places = ((row, column, token) for row, chunk in enumerate(tokens) for column, token in enumerate(chunk))
    given = [(row, column, token) for row, column, token in places if isinstance(token, Tensor)]
    handle = encoder.get_input_embeddings().register_forward_hook(put) if given else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
