"""Checkpoints with one thing wrong, whatever it is: each is one line and exit code 2, with nothing
written, or has become a checkpoint that can be loaded and computes numbers.

A part of all mutations is tried, drawn from a fixed seed; the test that is marked slow tries more.
"""

from __future__ import annotations

import copy
import functools
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from attnserve.command import main
from attnserve.evaluation.texts import Text
from quant.checkpoint import Recipe, quantize_checkpoint
from quant.convert import convert
from quant.quantize import quantize
from tests import foreign
from tests.conftest import Commands
from tests.tiny import tiny_checkpoint

Change = Callable[[Path], object]

ABSENT = object()
VALUES = [ABSENT, None, "x", -1, 0, 7, 1.5, [], {}, True, [None], {"a": None}]
DTYPES = (
    *(torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64),
    *(torch.float64, torch.float8_e4m3fn),
)
MUTATED = ("layers.1.mlp.down_proj", "layers.1.self_attn.q_proj", "embed_tokens", "model.norm")
TEXT = Text("numbers", 0, [list(range(start, start + 48)) for start in range(3, 99, 8)])


def ours(recipe: Recipe, source: Path, folder: Path) -> None:
    quantize_checkpoint(source, folder, recipe, TEXT if recipe.calibrated else None, "a test")


WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "plain": shutil.copytree,
    "gptq": functools.partial(foreign.write_gptq, desc_act=True),
    "awq": foreign.write_awq,
    "nf4": foreign.write_nf4,
    "int8": foreign.write_int8,
    "compressed-tensors": functools.partial(foreign.write_compressed, act_order=True),
    "ours": functools.partial(ours, Recipe(3, "rtn", embeddings=8)),
    "two-level": functools.partial(ours, Recipe(2, "two-level")),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a whole checkpoint of each format."""
    folder = tmp_path_factory.mktemp("made")
    fields = {"intermediate_size": 192, "num_hidden_layers": 2, "max_position_embeddings": 64}
    source = tiny_checkpoint(folder / "source", "softmax", **fields)
    for name, write in WRITERS.items():
        write(source, folder / name)
    return {name: folder / name for name in WRITERS}


def places(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where the values of a JSON value are, itself included."""
    yield at
    entries = dict(enumerate(node)) if isinstance(node, list) else node
    if isinstance(entries, dict):
        for key, value in entries.items():
            yield from places(value, (*at, key))


def changed_entry(at: tuple[Any, ...], value: Any) -> Change:
    """Return what gives config.json another value at a place."""

    def change(folder: Path) -> None:
        config = copy.deepcopy(json.loads((folder / "config.json").read_text()))
        parent = config
        for key in at[:-1]:
            parent = parent[key]
        if value is ABSENT:
            del parent[at[-1]]
        else:
            parent[at[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def other_tensors(tensor: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    """Yield what may be in a tensor's place."""
    yield "absent", None
    yield "one dimension more", tensor[None]
    yield "one number", tensor.flatten()[0].clone()
    if tensor.dim():
        yield "a row less", tensor[:-1]
        yield "a row more", torch.cat((tensor, tensor[:1]))
        yield "empty", tensor[:0]
    if tensor.dim() == 2:
        yield "transposed", tensor.T
        yield "a column less", tensor[:, :-1]
        yield "flat", tensor.flatten()
    for dtype in DTYPES:
        yield f"of {dtype}", tensor.to(dtype)
    if tensor.is_floating_point():
        for value in (torch.nan, torch.inf):
            other = tensor.clone()
            other.view(-1)[-1] = value
            yield f"with {value}", other
    else:
        yield "large", torch.full_like(tensor, torch.iinfo(tensor.dtype).max)


def changed_tensor(name: str, tensor: Tensor | None) -> Change:
    """Return what puts a tensor in the place of another."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor.contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def changed_file(name: str, content: bytes | None) -> Change:
    """Return what puts other bytes, or none, in the place of a file."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return change


def mutations(folder: Path) -> Iterator[tuple[str, Change]]:
    """Yield what may be wrong with a checkpoint, with a name."""
    config = json.loads((folder / "config.json").read_text())
    is_quantized = "quantization_config" in config
    for at in places(config):
        if not at or (is_quantized and at[0] != "quantization_config"):
            continue
        for value in VALUES:
            yield f"{at} = {value}", changed_entry(at, value)
    for name, tensor in load_file(folder / "model.safetensors").items():
        if any(part in name for part in MUTATED):
            for how, other in other_tensors(tensor):
                yield f"{name} {how}", changed_tensor(name, other)
    for name in ("config.json", "model.safetensors"):
        whole = (folder / name).read_bytes()
        for content in (None, b"", b"[]", b"\xff\xfe", whole[: len(whole) // 2]):
            yield f"{name} = {content and content[:20]!r}", changed_file(name, content)


def check(name: str, change: Change, made: Path, folder: Path, commands: Commands) -> bool:
    """Return whether a checkpoint with a change is refused, and check what comes of it."""
    shutil.copytree(made, folder / "theirs")
    change(folder / "theirs")
    command, options = (
        (quantize, ["--bits=4", "--scheme=rtn"]) if name == "plain" else (convert, [])
    )
    arguments = [str(folder / "theirs"), str(folder / "out"), *options]
    commands.capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(command, "the command", arguments)
    said = commands.capsys.readouterr().err
    if ended.value.code:
        assert ended.value.code == 2, said
        assert [line for line in said.splitlines() if line.startswith("the command: ")], said
        assert {path.name for path in folder.iterdir()} == {"theirs"}
        return True
    model = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
    with torch.inference_mode():
        assert model(input_ids=torch.arange(3, 40)[None]).logits.isfinite().all()
    return False


def try_some(
    name: str, count: int, made: dict[str, Path], tmp_path: Path, commands: Commands
) -> None:
    """Try so many mutations of a format; most are refused."""
    refused = 0
    drawn = random.Random(name).sample(list(mutations(made[name])), count)
    for place, (what, change) in enumerate(drawn):
        folder = tmp_path / f"{place}"
        folder.mkdir()
        try:
            refused += check(name, change, made[name], folder, commands)
        except Exception as error:
            raise AssertionError(f"{name}: {what}") from error
        shutil.rmtree(folder)
    assert refused > count // 4


@pytest.mark.parametrize("name", WRITERS)
def test_some(name: str, made: dict[str, Path], tmp_path: Path, commands: Commands) -> None:
    try_some(name, 8, made, tmp_path, commands)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_many(name: str, made: dict[str, Path], tmp_path: Path, commands: Commands) -> None:
    try_some(name, 120, made, tmp_path, commands)
