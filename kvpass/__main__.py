"""The ``kvpass`` command: ``demo``, ``explain TARGET``, ``dump TARGET`` and ``kernels TARGET``.

Exit codes: 0 proven (for the demo: all token sequences equal), 2 refused, 1 any error, a wrong argument included;
130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kvpass.errors import InputError, KvpassError

if TYPE_CHECKING:
    from torch import nn

PROVEN, ERROR, REFUSED, INTERRUPTED = 0, 1, 2, 130

TARGET_HELP = """\
module:factory   a function of no arguments that returns a model, (model, args) or (model, args, kwargs)
hf:FOLDER        a folder with a Hugging Face model, or with one .gguf file
demo:NAME        smollm2, gemma3 or nanogpt"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors exit with 1, since 2 means refused here, and take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(ERROR, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; wrong arguments raise `SystemExit` with code 1."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("\nkvpass: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except (KvpassError, OSError) as error:
        print(f"kvpass: {error}", file=sys.stderr)
        return ERROR


def _parser() -> Parser:
    parser = Parser(prog="kvpass", description="Run an unmodified causal Transformer over a cache of its rows.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(commands)
    explain = _add_target_command(
        commands, "explain", "say whether a model is proven causal, and what is stored", _explain
    )
    explain.add_argument("--format", choices=["text", "json"], default="text")
    dump = _add_target_command(commands, "dump", "print the graph before and after", _dump)
    stages = ["captured", "facts", "plan", "incremental"]
    dump.add_argument("--stage", choices=stages, default="incremental", help="default: incremental, beside captured")
    dump.add_argument(
        "--kernels", dest="stage", action="store_const", const="kernels", help="the generated kernels, not a graph"
    )
    dump.add_argument("--format", choices=["text", "dot", "svg", "json"], default="text")
    _add_output(dump)
    _add_kernels(commands)
    return parser


def _add_kernels(commands: Any) -> None:
    from kvpass.lowering.architectures import ARCHITECTURES

    what = "print what each generated attention kernel costs on a GPU; none is needed"
    kernels = _add_target_command(commands, "kernels", what, _kernels)
    of_known = f"of {', '.join(ARCHITECTURES)}, with commas between (default: %(default)s)"
    kernels.add_argument("--arch", default="sm_90,gfx942", metavar="NAMES", help=of_known)
    for name, default, least, text in (
        ("--rows", 4096, 0, "cached rows of the call"),
        ("--new", 1, 1, "new rows of a decode"),
        ("--page-size", 64, 1, "rows of a page of the cache"),
    ):
        help_text = f"{text} (default: %(default)s)"
        kernels.add_argument(name, type=_at_least(least), default=default, metavar="N", help=help_text)
    dtypes = ["float32", "float16", "bfloat16"]
    kernels.add_argument("--dtype", choices=dtypes, help="of queries, keys and values (default: the model's)")
    kernels.add_argument("--format", choices=["text", "json"], default="text")
    _add_output(kernels)


def _add_output(command: Parser) -> None:
    text = "write here instead of standard output"
    command.add_argument("-o", "--output", type=_file_name, metavar="FILE", help=text)


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="generate text through kvpass and compare speeds")
    # The names stand here too, so that --help needs no torch; a test holds them against the registry.
    demo.add_argument("--model", choices=["smollm2", "gemma3", "nanogpt"], default="smollm2")
    demo.add_argument("--tokens", type=_token_count, default=48, metavar="N", help="tokens to generate (default 48)")
    demo.add_argument("--prompt", metavar="TEXT", help="what to continue or to answer")
    demo.set_defaults(run=_demo)


def _add_target_command(commands: Any, name: str, what: str, run: Callable[[argparse.Namespace], int]) -> Parser:
    parser: Parser = commands.add_parser(
        name, help=what, description=what, epilog=TARGET_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", metavar="TARGET", help="module:factory, hf:FOLDER or demo:NAME")
    parser.set_defaults(run=run)
    return parser


def _token_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens (at least 2)")
    return int(text)


def _file_name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("'' is no name of a file")
    return text


def _at_least(least: int) -> Callable[[str], int]:
    """A type of argument: a number of rows, as kernels count them."""

    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 1 << 31:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} up to 31 bits")
        return int(text)

    return number


def _demo(args: argparse.Namespace) -> int:
    from kvpass import demo

    return demo.run(args.model, args.tokens, args.prompt)


def _explain(args: argparse.Namespace) -> int:
    from kvpass.report.cli import explain_command

    return explain_command(_compilations(args.target), args)


def _dump(args: argparse.Namespace) -> int:
    from kvpass.report.cli import dump_command

    return dump_command(_compilations(args.target), args)


def _kernels(args: argparse.Namespace) -> int:
    from kvpass.report.cli import kernels_command
    from kvpass.report.kernels import architectures

    architectures(args.arch)  # a wrong name is said before a model is loaded
    return kernels_command(_compilations(args.target), args)


def _compilations(target: str) -> list[Any]:
    """The records of the compilations that one call of the TARGET causes."""
    model, args, kwargs = resolve(target)
    import torch

    from kvpass.frontend.api import compile, recording, wait

    with recording() as found, torch.no_grad(), _of_the_user(f"running {target} raised"):
        compile(model)(*args, **kwargs)
    wait()
    return found


@contextmanager
def _of_the_user(what: str) -> Iterator[None]:
    """Code of the user's: whatever it raises is the answer, ``sys.exit`` included.

    Raises:
        InputError: it does; one line says what, and where.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        said = next(iter(str(error).splitlines()), "")  # Dynamo adds hints for its own developers after it
        raise InputError(f"{what} {type(error).__name__}: {said}{_where(error)}") from error


def _where(error: BaseException) -> str:
    """The innermost line that is neither Python's, nor an installed package's, nor ours."""
    paths = sysconfig.get_paths()
    others = (paths["stdlib"], paths["purelib"], paths["platlib"], str(Path(__file__).parent), "<")
    lines = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
    return next((f" ({line})" for line in reversed(lines) if not line.startswith(others)), "")


def resolve(target: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A TARGET as a model with example arguments.

    Where the factory gives none, they are int64 ids [1, 16] below the size of the first embedding; a Hugging Face model
    is also told to use no cache of its own and to return the last row of logits.

    Raises:
        InputError: the target is malformed, or names nothing that can be loaded.
    """
    scheme, colon, rest = target.partition(":")
    if not colon or not scheme or not rest:
        raise InputError(f"{target!r} is no target: write module:factory, hf:FOLDER or demo:NAME")
    if scheme == "hf":
        from kvpass.huggingface import DECODE_KWARGS, load_folder

        return _with_example(load_folder(rest)[0], dict(DECODE_KWARGS))
    if scheme == "demo":
        from kvpass import demos

        return _with_example(demos.load(rest)[0], dict(demos.demo(rest).kwargs))
    return _from_factory(scheme, rest)


def _from_factory(module_name: str, name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    if "" not in sys.path:
        sys.path.insert(0, "")  # the installed command does not look into the current folder, `python -m` does
    if not all(module_name.split(".")):
        raise InputError(f"{module_name!r} is no module: write its name as in an import, from the top")
    with _of_the_user(f"cannot import {module_name!r}:"):
        module = importlib.import_module(module_name)
    factory = getattr(module, name, None)
    if not callable(factory):
        raise InputError(f"{module_name} has no factory {name!r}")
    with _of_the_user(f"{module_name}:{name} raised"):
        made = factory()
    return _unpack(f"{module_name}:{name}", made)


def _unpack(target: str, made: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    from torch import nn

    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        raise InputError(f"{target} must return a torch.nn.Module, (model, args) or (model, args, kwargs)")
    if len(parts) == 1:
        return _with_example(parts[0], {})
    args, kwargs = parts[1], parts[2] if len(parts) == 3 else {}
    if not isinstance(args, tuple | list) or not isinstance(kwargs, dict):
        raise InputError(f"{target} must return args as a tuple and kwargs as a dict")
    return parts[0].eval(), tuple(args), kwargs


def _with_example(model: nn.Module, kwargs: dict[str, Any]) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model with made-up ids, and those of ``kwargs`` that its forward takes."""
    import torch
    from torch import nn

    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings]
    if not sizes:
        why = f"{type(model).__name__} has no embedding with entries to make ids for"
        raise InputError(f"{why}; let the factory return (model, args)")
    taken = inspect.signature(model.forward).parameters
    ids = torch.randint(sizes[0], (1, 16), generator=torch.Generator().manual_seed(0))
    return model.eval(), (ids,), {name: value for name, value in kwargs.items() if name in taken}


if __name__ == "__main__":
    sys.exit(main())
