"""What counts as a command of a text."""

from tests.docs.text import inline_command, normal, script_lines


def test_script_lines() -> None:
    script = "make serve   # both\n\ncurl URL \\\n  -d '{\"a\": \"# no\"}'\n# nothing\nx 'a\nb'\n"
    assert script_lines(script) == ["make serve", 'curl URL -d \'{"a": "# no"}\'', "x 'a\nb'"]


def test_inline_commands() -> None:
    assert inline_command("make\n  bench") == "make bench"
    assert (
        inline_command("benchmarks.serve --ckpts DIR") == "python -m benchmarks.serve --ckpts DIR"
    )
    assert inline_command("HF_HUB_OFFLINE=1 python -m x") == "HF_HUB_OFFLINE=1 python -m x"
    for other in (
        "vllm",
        "kernels/quant_kernels/pack.py",
        "quant_kernels.pack",
        "attnserve: no",
        "timeouts.idle",
        "x = 1",
    ):
        assert inline_command(other) is None


def test_normal() -> None:
    assert normal(".venv/bin/python -m x") == "python -m x"
    assert normal("A=1 .venv/bin/python -m x") == "A=1 python -m x"
