"""The command `attnserve`: what it lists, what it refuses, and what it hands on."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from attnserve import __version__, command
from attnserve.errors import UserError
from serving.launch import serve

ROOT = Path(__file__).parent.parent
COMMAND = str(Path(sys.executable).with_name("attnserve"))


def attnserve(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def refused(*arguments: str) -> str:
    """Return the one line with which the command refuses wrong usage."""
    done = attnserve(*arguments)
    assert (done.returncode, done.stdout) == (2, ""), done
    (line,) = done.stderr.splitlines()
    assert line.startswith("attnserve")
    return line


def test_help_lists_every_command_with_one_line() -> None:
    done = attnserve("--help")
    assert done.returncode == 0
    listed = done.stdout.partition("Commands:\n")[2].splitlines()
    names = [line.split()[0] for line in listed]
    commands = "serve gateway doctor tune quantize convert sweep budgets evaluate look books keys"
    assert names == commands.split()
    assert all(line.rstrip().endswith(".") and len(line.split()) > 2 for line in listed)


def test_nothing_lists_the_commands_too() -> None:
    done = attnserve()
    assert done.returncode == 2
    assert done.stdout == attnserve("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["srve"], "No such command 'srve'. Did you mean 'serve'?"),
        (["quantise", "x"], "Did you mean 'quantize'?"),
        (["--ckpt=x"], "No such option: --ckpt"),
        (["serve", "x", "y"], "unexpected extra argument(s) (y)"),
        (["serve", "--vlm-port=1"], "Possible options: --vllm-port"),
        (["serve", "x", "--max-model-len=256"], "other options follow `--`"),
        (["serve", "--vllm-port=0"], "'--vllm-port'"),
        (["serve", "--vllm-port=65536"], "'--vllm-port'"),
        (["serve", "--gateway-port=http"], "'--gateway-port'"),
        (["doctor", "--vllm-port=0"], "'--vllm-port'"),
        (["gateway", "--check-config"], "--check-config needs --config FILE"),
        (["keys", "new", "two words"], "name: String should match"),
        (["~no1"], "No such command '~no1'"),
        (["serve", "~no1/x"], "there is no user no1: ~no1/x"),
        (["checkpoints/softpick"], "to serve it: attnserve serve checkpoints/softpick"),
    ],
)
def test_wrong_usage(arguments: list[str], part: str) -> None:
    assert part in refused(*arguments)


def test_bundled_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a checkout, the present folder's or the package's own; elsewhere one must be named."""
    monkeypatch.chdir(ROOT)
    assert serve.checkpoint_folder(None) == Path("checkpoints/softpick")
    monkeypatch.chdir(tmp_path)
    assert serve.checkpoint_folder(None) == ROOT / "checkpoints/softpick"
    monkeypatch.setattr(serve, "CHECKOUT", tmp_path)
    with pytest.raises(UserError, match="name a checkpoint's folder"):
        serve.checkpoint_folder(None)


def test_a_module_reads_its_own_arguments() -> None:
    done = attnserve("quantize", "--bits=nonsense")
    assert done.returncode == 2
    assert "'--bits'" in done.stderr and not done.stderr.startswith("attnserve: ")


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.missing("quant") == []
    monkeypatch.setattr(
        command, "requires", lambda _: ["torch>=2; extra == 'quant'", "nothing-such"]
    )
    assert command.missing("quant") == []
    monkeypatch.setattr(command, "requires", lambda _: ["no-such-thing; extra == 'quant'"])
    assert command.missing("quant") == ["no-such-thing"]
    assert command.missing("train") == []

    def unknown(name: str) -> list[str]:  # a checkout on PYTHONPATH
        raise PackageNotFoundError(name)

    monkeypatch.setattr(command, "requires", unknown)
    assert command.missing("quant") == []


def test_ctrl_c_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        command.main(stopped, "python -m works", [])
    assert ended.value.code == command.INTERRUPTED
    assert capsys.readouterr().err == "python -m works: interrupted\n"


def test_keys_show_a_secret_once() -> None:
    done = attnserve("keys", "new", "alice")
    key = done.stdout.split("only now: ")[1].split()[0]
    assert key.startswith("attnserve-") and done.stdout.count(key) == 1
    made = json.loads(attnserve("keys", "new", "alice", "--json").stdout)
    assert set(made) == {"name", "key", "sha256"}


def test_version() -> None:
    assert attnserve("--version").stdout.strip() == __version__
