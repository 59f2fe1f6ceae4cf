"""training.convert: the swap is the one of the paper, fine-tuning trains what it says, and a
conversion that makes no sense is refused in one line."""

import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from attn_kernels import get_variant, variant_names
from attnserve.errors import UserError
from attnserve.evaluation.texts import read_tokens
from hf_attn import VariantLlamaForCausalLM
from tests.conftest import Commands
from tests.tiny import LICENSE, tiny_checkpoint, tiny_tokenizer
from training import finetune, fused
from training.conversion import convert, initial_scale, teacher_of
from training.convert import convert as command
from training.data import data_tokens
from training.finetune import FineTune
from training.recipe import Conversion, FineTuning
from training.resumable import STATE
from training.tokenizer import PARAGRAPHS
from training.tokens import tokens

TRAINED = Path(__file__).resolve().parents[2] / "checkpoints" / "softmax"
LENGTH = 64
"""`max_position_embeddings` of the checkpoint that is converted."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama whose attention is far from uniform, with grouped heads; float32."""
    tokenizer = tiny_tokenizer(512)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=LENGTH,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = tmp_path_factory.mktemp("plain")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ids(plain: Path) -> Tensor:
    """Three times as many tokens as the checkpoint was trained on: `[1, 192]`."""
    tokens = read_tokens([LICENSE], AutoTokenizer.from_pretrained(plain))
    return torch.from_numpy(tokens[None, : 3 * LENGTH])


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    output: Tensor = model(input_ids=ids, use_cache=False).logits
    return output


def test_initial_scale() -> None:
    assert initial_scale(1024) == pytest.approx(0.168, abs=5e-4)  # the paper's number
    for length in (2, 3, 100, 8192):
        mean = np.log(np.arange(1, length + 1)).mean()
        assert initial_scale(length) == pytest.approx(1 / mean, rel=1e-12)


def test_ssmax_is_softmax_with_queries_scaled_by_hand(
    plain: Path, ids: Tensor, tmp_path: Path, commands: Commands
) -> None:
    """At the n-th token the scores are ln(n) / mean(ln n over the training length) as large."""
    commands.run(command, plain, tmp_path / "ssmax", "--variant", "ssmax")
    ln = torch.arange(1, ids.shape[1] + 1, dtype=torch.float64).log()
    factor = (ln / ln[:LENGTH].mean()).float()[:, None]
    model = load(plain)
    unchanged = logits(model, ids)
    for layer in model.model.layers:  # RoPE rotates: a factor before it is a factor after it
        layer.self_attn.q_proj.register_forward_hook(lambda _module, _input, q: q * factor)
    by_hand = logits(model, ids)
    converted = load(tmp_path / "ssmax")
    assert isinstance(converted, VariantLlamaForCausalLM)
    torch.testing.assert_close(logits(converted, ids), by_hand, atol=2e-4, rtol=1e-4)
    assert (by_hand - unchanged).abs().max() > 0.1

    stored = load_file(tmp_path / "ssmax" / "model.safetensors")
    for layer in range(2):
        scale = stored[f"model.layers.{layer}.self_attn.ssmax_scale"]
        torch.testing.assert_close(scale, torch.full((4,), initial_scale(LENGTH)))


def test_gates_start_near_softmax(plain: Path, ids: Tensor) -> None:
    """Every gate is open but for what lets it learn: a token fades to 1 / e over LENGTH."""
    converted = convert(plain, {"name": "forgetting"}, Conversion(train_length=LENGTH))
    for layer in converted.model.layers:
        gates = layer.self_attn.variant.gate(layer.self_attn.f_proj(torch.randn(5, 64)))
        torch.testing.assert_close(gates * LENGTH, torch.full_like(gates, -1), atol=0.1, rtol=0)
    far, near = (
        (logits(x, ids) - logits(load(plain), ids)).abs().max()
        for x in (converted, convert(plain, {"name": "forgetting"}, Conversion(train_length=10**6)))
    )
    assert near < 1e-2 * far


@pytest.mark.parametrize("name", [n for n in variant_names() if not get_variant(n).tensors])
def test_variants_without_tensors_only_change_the_name(name: str, plain: Path, ids: Tensor) -> None:
    converted = convert(plain, {"name": name}, Conversion())
    stock = load(plain, attn_implementation=name)
    torch.testing.assert_close(logits(converted, ids), logits(stock, ids), atol=1e-4, rtol=1e-4)
    assert converted.config.variant.name == name


def test_options(plain: Path, ids: Tensor) -> None:
    """Training length, rotary base, positions, and a variant's own parameters."""
    change = Conversion(train_length=1000, rope_theta=2e4, positions=4096)
    model = convert(plain, {"name": "ssmax", "bias": True}, change)
    for layer in model.model.layers:
        assert layer.self_attn.ssmax_scale.tolist() == pytest.approx([initial_scale(1000)] * 4)
        assert layer.self_attn.ssmax_bias.tolist() == [0.0] * 4
    assert model.config.max_position_embeddings == 4096
    theta = model.config.rope_parameters["rope_theta"]
    assert theta == 2e4

    wider = convert(plain, {"name": "softmax"}, Conversion(rope_theta_factor=50.0))
    rope = {"rope_type": "default", "rope_theta": 50 * 10000.0}
    torch.testing.assert_close(
        logits(wider, ids), logits(load(plain, rope_parameters=rope), ids), atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(logits(wider, ids), logits(load(plain), ids), atol=0.1)


def test_dtype_and_the_projects_own_format(tmp_path: Path, commands: Commands) -> None:
    """A `variant_llama` of softmax is converted too, and 16-bit weights stay as they are."""
    tiny_checkpoint(tmp_path / "source", "softmax")
    source = load(tmp_path / "source").to(torch.bfloat16)
    source.save_pretrained(tmp_path / "source")
    commands.run(command, tmp_path / "source", tmp_path / "out", "--variant", "ssmax")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "out"))
    added = {f"model.layers.{layer}.self_attn.ssmax_scale" for layer in range(3)}
    assert set(after) - set(before) == added
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_chat_template_and_pad_token_are_added_where_there_are_none(
    plain: Path, tmp_path: Path, commands: Commands
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(plain)
    assert tokenizer.chat_template is None and tokenizer.pad_token is None
    commands.run(command, plain, tmp_path / "bare", "--variant", "softpick")
    made = AutoTokenizer.from_pretrained(tmp_path / "bare")
    assert made.chat_template == PARAGRAPHS
    assert (made.pad_token, len(made)) == (tokenizer.eos_token, len(tokenizer))
    assert made.padding_side == "left"

    tokenizer.chat_template, tokenizer.pad_token = "{{ messages }}", "a"
    shutil.copytree(plain, tmp_path / "own")
    tokenizer.save_pretrained(tmp_path / "own")
    commands.run(command, tmp_path / "own", tmp_path / "kept", "--variant", "softpick")
    kept = AutoTokenizer.from_pretrained(tmp_path / "kept")
    assert (kept.chat_template, kept.pad_token) == ("{{ messages }}", "a")
    assert kept.padding_side == tokenizer.padding_side


def test_the_same_variant_keeps_its_scales(tmp_path: Path, commands: Commands) -> None:
    """A checkpoint that learned its scales takes another rotary base and more positions."""
    tiny_checkpoint(tmp_path / "learned", "ssmax")
    options = ("--rope-theta-factor", "50", "--positions", "4096")
    commands.run(command, tmp_path / "learned", tmp_path / "wide", "--variant", "ssmax", *options)
    files = (tmp_path / name / "model.safetensors" for name in ("learned", "wide"))
    before, after = map(load_file, files)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 50 * 10000.0
    assert config["max_position_embeddings"] == 4096
    assert json.loads((tmp_path / "wide" / "conversion.json").read_text())["train_length"] == 1024


def mean_loss(model: Any, ids: Tensor) -> float:
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids, use_cache=False).loss)


def tune_arguments(*extra: str) -> list[str]:
    return ["--data", str(LICENSE), "--sequence", "48", "--batch", "2", *extra]


def test_finetuning_the_scales(tmp_path: Path, commands: Commands) -> None:
    """Only the scales change, and the loss gets lower: of a model that was trained, swapped."""
    swapped, tuned = tmp_path / "swapped", tmp_path / "tuned"
    commands.run(command, TRAINED, swapped, "--variant", "ssmax")
    options = ("--steps", "30", "--learning-rate", "0.02", "--seed", "3", "--sequence", "96")
    argv = (TRAINED, tuned, "--variant", "ssmax", *tune_arguments(*options), "--json")
    record = json.loads(commands.run(command, *argv))
    assert record == json.loads((tuned / "conversion.json").read_text())
    assert record["finetuning"]["seed"] == 3
    assert len(record["finetuning"]["losses"]) == 30

    before, after = (load_file(folder / "model.safetensors") for folder in (swapped, tuned))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.self_attn.ssmax_scale" for layer in range(4)}
    assert all(len(after[name].unique()) == 4 for name in changed), "each head has its own"
    tokens = read_tokens([LICENSE], AutoTokenizer.from_pretrained(TRAINED))
    ids = torch.from_numpy(tokens[: 10 * 96].reshape(10, 96))
    assert mean_loss(load(tuned), ids) < mean_loss(load(swapped), ids) - 0.02
    assert not (tmp_path / "tuned.part").exists()


def test_finetuning_everything(
    plain: Path, ids: Tensor, tmp_path: Path, commands: Commands
) -> None:
    options = ("--steps", "30", "--train", "all", "--learning-rate", "0.003")
    commands.run(
        command, plain, tmp_path / "all", "--variant", "softpick", *tune_arguments(*options)
    )
    before, after = load(plain, attn_implementation="softpick"), load(tmp_path / "all")
    assert mean_loss(after, ids) < mean_loss(before, ids) - 0.15
    old = dict(before.named_parameters())
    assert not any(torch.equal(p, old[name]) for name, p in after.named_parameters())


def test_what_is_distilled(tmp_path: Path) -> None:
    """The divergence of the first step is that of the predictions, and training lowers it."""
    tokens = read_tokens([LICENSE], AutoTokenizer.from_pretrained(TRAINED))
    settings = FineTuning(
        steps=20, train="all", learning_rate=5e-5, sequence=64, batch=2, distill=1.0, blend=0.5
    )
    model = convert(TRAINED, {"name": "softpick"}, Conversion()).float()
    teacher = teacher_of(TRAINED, "fp32", "cpu")

    def divergence(ids: Tensor) -> float:
        ours, theirs = (logits(each, ids).double().log_softmax(-1) for each in (model, teacher))
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    run = FineTune(model, settings, tokens, 0, tmp_path, teacher=teacher)
    (inputs, _), (others, _) = run.batches(0), run.batches(21)
    with fused.attention_forward(model, fused.blended(model, torch.tensor(1 / 11))):
        first = divergence(inputs)
    before = divergence(others)
    run.run(quiet=True)
    divergences = run.terms["divergence"]
    assert divergences[0] == pytest.approx(first, rel=1e-2) and len(divergences) == 20
    assert divergence(others) < 0.7 * before
    with pytest.raises(ValueError, match="go together"):
        FineTune(model, settings, tokens, 0, tmp_path)


def test_learned_tensors_learn_faster(tmp_path: Path) -> None:
    """Adam's first step is as long as the learning rate: 1e-4 for weights, 2e-3 for scales."""
    tokens = read_tokens([LICENSE], AutoTokenizer.from_pretrained(TRAINED))
    settings = FineTuning(steps=1, train="all", learning_rate=1e-4, sequence=64)
    model = convert(TRAINED, {"name": "ssmax"}, Conversion()).float()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    FineTune(model, settings, tokens, 0, tmp_path).run(quiet=True)
    for name, value in model.named_parameters():
        rate = 2e-3 if name.endswith("ssmax_scale") else 1e-4
        assert (value - before[name]).abs().max().item() == pytest.approx(rate, rel=0.05)


def test_chats_in_the_mix(plain: Path, tmp_path: Path, commands: Commands) -> None:
    """They are written as the chat template says, each followed by the end-of-text token."""
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.chat_template = PARAGRAPHS
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The licence."}]
    file = tmp_path / "chats.jsonl"
    file.write_text(f"{json.dumps({'messages': chat})}\n" * 2)
    found = data_tokens([file, LICENSE], tokenizer)
    one = [*tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False)), 0]
    assert "The licence." in tokenizer.decode(one)
    assert found.tolist() == 2 * one + read_tokens([LICENSE], tokenizer).tolist()
    file.write_text('{"messages": 3}\n')
    argv = (plain, tmp_path / "out", "--variant", "ssmax", "--steps", "1", "--data", file)
    assert "line 1, is no chat of this tokenizer" in commands.refused(command, *argv)


def test_stored_tokens_are_the_same_data(plain: Path, tmp_path: Path, commands: Commands) -> None:
    file = tmp_path / "text.npy"
    record = json.loads(commands.run(tokens, plain, file, "--data", LICENSE, "--json"))
    tokenizer = AutoTokenizer.from_pretrained(plain)
    wanted = read_tokens([LICENSE], tokenizer)
    assert np.array_equal(data_tokens([file, file], tokenizer), np.concatenate([wanted] * 2))
    assert record["tokens"] == len(wanted) and record["bytes"] < 2 * len(wanted) + 200
    assert "must be named *.npy" in commands.refused(tokens, plain, LICENSE, "--data", LICENSE)
    for wrong, message in (
        (np.array([1, 999]), "has tokens 1 to 999, and the tokenizer 512"),
        (np.array([-3, 4]), "has tokens -3 to 4, and"),
        (np.zeros((2, 2), np.int64), r"int64 \[2, 2\], not tokens in a row"),
        (np.zeros(3), r"float64 \[3\], not tokens"),
    ):
        np.save(file, wrong)
        with pytest.raises(UserError, match=message):
            data_tokens([file], tokenizer)
    for content in (b"text", b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"holds no tokens .*python -m training\.tokens"):
            data_tokens([file], tokenizer)
    with file.open("wb") as archive:
        np.savez(archive, tokens=wanted)
    with pytest.raises(UserError, match="is an archive of arrays"):
        data_tokens([file], tokenizer)


def test_so_many_minutes(
    plain: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The schedule goes by the clock, here by one on which each step takes half a minute: the
    variant's share and the learning rate reach their ends whatever a step takes."""
    clock = [0.0]
    shares: list[float] = []
    rates: list[float] = []
    take_step, between = FineTune._take_step, fused.blended

    def step(run: FineTune, loss_of: Any) -> None:
        rates.append(run.learning_rate)
        take_step(run, loss_of)
        clock[0] += 30.0

    def blended(model: VariantLlamaForCausalLM, share: Tensor, penalties: bool) -> Any:
        forward = between(model, share, penalties)

        def noted(*arguments: Any, **keywords: Any) -> Any:
            shares.append(share.item())
            return forward(*arguments, **keywords)

        return noted

    monkeypatch.setattr(FineTune, "_take_step", step)
    monkeypatch.setattr(finetune, "blended", blended)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    options = ("--minutes", "10", "--train", "all", "--learning-rate", "1", "--blend", "0.5")
    argv = (plain, tmp_path / "out", "--variant", "softpick", *tune_arguments(*options), "--json")
    record = json.loads(commands.run(command, *argv))["finetuning"]
    assert (record["steps"], record["minutes"], record["seconds"]) == (20, 10.0, 600.0)
    assert sorted(set(shares)) == pytest.approx(np.arange(10) / 10, abs=5e-3)
    assert rates == pytest.approx([0.01, 0.51, *(1 - np.arange(2, 20) / 20) / 0.9], rel=1e-6)
    both = (plain, tmp_path / "both", "--variant", "softpick", *tune_arguments(*options))
    assert "give one of them" in commands.refused(command, *both, "--steps", "3")


def test_with_the_memory_loss(tmp_path: Path, commands: Commands) -> None:
    """The layers need less of the text; and it is refused for what masks nothing."""
    options = ("--steps", "30", "--train", "all", "--learning-rate", "1e-3", "--distill", "0.5")
    weight = ("--memory-loss", "2", "--json")
    argv = (TRAINED, tmp_path / "out", "--variant", "selective", *tune_arguments(*options))
    record = json.loads(commands.run(command, *argv, *weight))["finetuning"]
    assert len(record["memory"]) == len(record["divergences"]) == 30
    assert 0 < sum(record["memory"][-5:]) < 0.9 * sum(record["memory"][:5]) < 0.9 * 5
    argv = (TRAINED, tmp_path / "no", "--variant", "softpick", *tune_arguments(*options), *weight)
    assert "masks no tokens: leave out --memory-loss" in commands.refused(command, *argv)


def tune(plain: Path, folder: Path, **changes: Any) -> FineTune:
    settings = FineTuning(
        steps=100, learning_rate=0.01, sequence=16, seed=1, distill=0.5, blend=0.5
    )
    tokens = read_tokens([LICENSE], AutoTokenizer.from_pretrained(plain))
    model = convert(plain, {"name": "ssmax"}, Conversion())
    settings = dataclasses.replace(settings, **changes)
    teacher = teacher_of(plain, "fp32", "cpu")
    return FineTune(model, settings, tokens, 0, folder, save_seconds=0.0, teacher=teacher)


def test_interrupted_and_continued_equals_uninterrupted(plain: Path, tmp_path: Path) -> None:
    def interrupt() -> None:
        while not (tmp_path / "part" / STATE).exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell's background job, which a test run may be, begins with this signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        tune(plain, tmp_path / "part").run(quiet=True)
    continued = tune(plain, tmp_path / "part")
    assert 0 < len(continued.losses) < 100
    continued.run(quiet=True)
    whole = tune(plain, tmp_path / "whole")
    whole.run(quiet=True)
    assert continued.losses == whole.losses
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(continued.model.state_dict()[name], tensor), name

    with pytest.raises(UserError, match="unfinished run with seed = 1, not 2"):
        tune(plain, tmp_path / "part", seed=2)


@pytest.mark.slow
def test_compiled_is_the_same_training(plain: Path, tmp_path: Path) -> None:
    """For a variant that no fused kernel has."""
    tokens = read_tokens([LICENSE], AutoTokenizer.from_pretrained(plain))
    settings = FineTuning(
        steps=4, train="all", learning_rate=1e-3, sequence=16, batch=2, memory_loss=0.1
    )
    losses = []
    for compiled in (False, True):
        model = convert(plain, {"name": "selective"}, Conversion())
        run = FineTune(model, settings, tokens, 0, tmp_path / str(compiled))
        run.run(compiled, quiet=True)
        losses.append(run.losses + run.terms["memory"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[0][0] != pytest.approx(losses[0][-1], abs=1e-3)


def test_learning_rate() -> None:
    settings = FineTuning(steps=40, learning_rate=1.0)
    rates = [settings.learning_rate_at(step) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.05
    assert FineTuning(steps=1, learning_rate=1.0).learning_rate_at(0) == 1.0


@pytest.mark.parametrize(("train", "rate"), [("scale", 2e-3), ("all", 2e-5)])
def test_default_learning_rates(
    train: str, rate: float, plain: Path, tmp_path: Path, commands: Commands
) -> None:
    options = ("--variant", "ssmax", "--train", train, "--steps", "1", "--sequence", "16")
    commands.run(command, plain, tmp_path / "out", *options, "--data", LICENSE)
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["finetuning"]["learning_rate"] == rate


REFUSED = {
    "no folder": (["{tmp}/none", "{tmp}/out"], "has no config.json: name a"),
    "not a Llama": (["{tmp}/gpt2", "{tmp}/out"], "is a gpt2: only Llamas can be converted"),
    "another variant": (["{tmp}/softpick", "{tmp}/out"], "has softpick attention already"),
    "quantized": (["{tmp}/quantized", "{tmp}/out"], "is quantized: convert the original"),
    "out is there": (["{plain}", "{tmp}"], "is there already: choose another folder"),
    "steps alone": (["{plain}", "{tmp}/out", "--steps", "2"], "and --data go together"),
    "data alone": (
        ["{plain}", "{tmp}/out", "--data", "{license}"],
        "--steps (or --minutes) and --data go together",
    ),
    "short data": (
        ["{plain}", "{tmp}/out", "--steps", "2", "--data", "{tmp}/softpick/config.json"],
        "too few for sequences of 1024: name more --data or shorter sequences",
    ),
    "a teacher alone": (["{plain}", "{tmp}/out", "--distill", "1"], "give --steps and --data too"),
    "no such device": (["{plain}", "{tmp}/out", "--device", "tpu"], "there is no device tpu"),
    "train length": (["{plain}", "{tmp}/out", "--train-length", "1"], "at least 2 tokens"),
    "no tensors": (
        ["{plain}", "{tmp}/out", "--variant", "lssa", "--steps", "2", "--data", "{license}"],
        "lssa learns no per-head tensors: use --train all",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(
    arguments: list[str],
    message: str,
    plain: Path,
    tmp_path: Path,
    commands: Commands,
) -> None:
    tiny_checkpoint(tmp_path / "softpick", "softpick")
    for name, fields in (
        ("gpt2", {"model_type": "gpt2"}),
        ("quantized", {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
    places = {"tmp": tmp_path, "plain": plain, "license": LICENSE}
    argv = [argument.format(**places) for argument in arguments]
    assert message in commands.refused(command, "--variant", "ssmax", *argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--variant", "softpik"], "did you mean 'softpick'"),
        (["--rope-theta", "0"], "0 is not a number above 0"),
        (["--positions", "-1"], "greater than or equal to 1"),
        (["--steps", "1", "--data", "nowhere.txt"], "nowhere.txt is not there"),
    ],
)
def test_wrong_options(
    option: list[str], message: str, plain: Path, tmp_path: Path, commands: Commands
) -> None:
    line = commands.refused(command, plain, tmp_path / "out", "--variant", "ssmax", *option)
    assert message in line
