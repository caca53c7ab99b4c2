"""`docs/refusals.md`: every reason with an example that brings it. The page is made here, and held to the examples.

python -m pytest tests/test_reasons.py --accept     writes the page anew
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvpass
from kvpass import errors
from kvpass.frontend import backend
from kvpass.kernels import ops
from tests.reasons import REASONS, Reason

PAGE = Path(__file__).parents[1] / "docs" / "refusals.md"
BY_CODE = {reason.code: reason for reason in REASONS}
CLASSES: dict[str, type[errors.KvpassError]] = {
    kind.code: kind for kind in (*errors.REFUSALS, errors.OptionError, errors.InputError)
}
HEAD = """# Why a graph runs as it was written

kvpass rewrites a graph only where it has *proved* that each row it keeps depends on no later row. Where it cannot, the
model runs as it was written, is still right, and the reason is said with a code, the node, your source line and a hint:
in the log (`kvpass` at level WARNING), by `kvpass explain TARGET`, and by `kvpass.explain(model, ids)`.

`tests/test_reasons.py` runs the examples and compares this page with what they say. In them `x` is what a layer gets,
`[B, S, D]`, in front of causal attention; `q`, `k`, `v` are the queries, keys and values, `[B, H, S, D]`.
"""


class Layer(nn.Module):
    """An embedding, the example, and a head; causal attention where the example is not attention itself."""

    def __init__(self, example: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.key, self.out = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.whole = isinstance(example, type)
        self.example = example() if self.whole else example
        self.names = ["x"] if self.whole else list(inspect.signature(example).parameters)

    def forward(self, ids: Tensor, *more: Any) -> Tensor:
        if self.names[0] == "ids":
            return self.example(ids) + self.out(self.embed(ids)[:, -1:])  # type: ignore[no-any-return]
        x = self.embed(ids)
        if self.names[0] == "x":
            x = self.example(x, *more)
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (x, self.key(x), x))
        y = self.example(q, k, v, *more) if self.names[0] == "q" else sdpa(q, k, v, is_causal=True)
        return self.out(x + y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def broken(*_: Any, **__: Any) -> Any:
    raise KeyError("a planted fault")


FAULTS = {
    "incrementalise": lambda: mock.patch.object(backend, "incrementalise", broken),
    "append": lambda: mock.patch.object(ops, "append", lambda pool, rows, place, before: pool.zero_()),
    "": contextlib.nullcontext,
}


class Said(logging.Handler):
    """What is logged while a model is compiled and called."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    handler, log = Said(), logging.getLogger("kvpass")
    log.addHandler(handler)
    try:
        yield handler.texts
    finally:
        log.removeHandler(handler)


@cache
def said(code: str) -> str:
    """The text of the reason that an example brings: the message, where, and the hint."""
    reason = BY_CODE[code]
    if not inspect.signature(reason.example).parameters and not isinstance(reason.example, type):
        with pytest.raises(CLASSES[code]) as raised:
            reason.example()
        return f"{code} {type(raised.value).__name__}: {raised.value}"
    torch._dynamo.reset()
    with FAULTS[reason.fault](), listening() as texts:  # type: ignore[no-untyped-call]
        call(reason)
    found = [text[text.index(code) :] for text in texts if code in text]
    assert found, f"{code} was not said, but {texts}"
    return found[-1] if code == "KV101" else found[0]


def call(reason: Reason) -> None:
    """The example, compiled and as it is: the answers are the same."""
    device, grad = reason.options.get("device", "cpu"), reason.options.get("grad", False)
    store = kvpass.Cache(capacity=reason.options.get("capacity", 1 << 22))
    ids = (torch.arange(reason.batch * reason.rows).reshape(reason.batch, reason.rows) % 16).to(device)
    model = Layer(reason.example).eval().to(device)
    fast = torch.compile(model, backend="kvpass", options={"cache": store}, dynamic=True)
    with torch.set_grad_enabled(grad):
        for more in reason.calls:
            got, want = fast(ids, *more), model(ids, *more)
            if device == "cpu" and reason.code != "KV205":
                torch.testing.assert_close(got, want, equal_nan=True)


def shown(text: str) -> str:
    """A reason as the page has it, without the path and the line of this machine's copy of the example."""
    text = re.sub(r"(?m)^(\s*at )\S*reasons\.py:\d+ ", r"\1model.py:.. ", text)
    return re.sub(r"(?m)^\s*at \S*test_reasons\.py.*\n", "", text)


def section(reason: Reason) -> str:
    name = CLASSES[reason.code].__name__
    source = textwrap.dedent(inspect.getsource(reason.example)).strip()
    code = f"```python\n{source}\n```\n\n" if not reason.fault else ""
    how = {"KV102": "A text of one row.", "KV103": "The model is called while gradients are on.",
            "KV105": "The model lives on the device `meta`.", "KV108": "Ten texts of ten rows.",
            "KV302": "A cache of 1,024 bytes."}.get(reason.code, "")  # fmt: skip
    if how or reason.fault:
        code = f"{how or 'No model is known that brings it; the message is that of a planted fault.'}\n\n"
    if reason.code == "KV303":
        code += "It is called with 0.5 and then with 0.25.\n\n"
    if reason.code == "KV304":
        code += "It is called with ones and then with twos.\n\n"
    message = f"```text\n{shown(said(reason.code))}\n```\n\n"
    return f"## {reason.code} {name}\n\n{reason.means}\n\n{code}{message}**What to do.** {reason.do}\n"


def page() -> str:
    rows = [f"| [{r.code}](#{anchor(r)}) | {CLASSES[r.code].__name__} | {r.means} |" for r in REASONS]
    table = "\n".join(["| code | name | meaning |", "| --- | --- | --- |", *rows])
    return "\n".join([HEAD, table, "", *(section(reason) for reason in REASONS)])


def anchor(reason: Reason) -> str:
    return f"{reason.code}-{CLASSES[reason.code].__name__}".lower()


@pytest.mark.parametrize("code", BY_CODE)
def test_the_example_brings_the_reason(code: str) -> None:
    text = said(code)
    assert text.startswith(f"{code} {CLASSES[code].__name__}: ")
    assert code in ("KV401", "KV402") or "hint: " in text


def test_every_code_is_in_the_table_once() -> None:
    assert [reason.code for reason in REASONS] == sorted(CLASSES)
    assert len(CLASSES) == len(errors.REFUSALS) + 2


def test_the_page_is_what_the_examples_say(request: pytest.FixtureRequest) -> None:
    wanted = page()
    if request.config.getoption("--accept"):
        PAGE.write_text(wanted)
    found = PAGE.read_text() if PAGE.exists() else ""
    lines = difflib.unified_diff(found.splitlines(), wanted.splitlines(), "page", "examples", lineterm="")
    assert found == wanted, "\n".join(lines) + "\nwrite it anew: python -m pytest tests/test_reasons.py --accept"


def test_the_page_has_no_path_of_a_machine() -> None:
    assert not re.search(r"/(home|work|root|tmp)/", PAGE.read_text())


def test_a_page_that_says_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors.DependsOnFuture, "hint", "read the future")
    said.cache_clear()
    assert "read the future" in section(BY_CODE["KV202"])
    said.cache_clear()


@pytest.mark.parametrize("path", ["README.md", "ARCHITECTURE.md"])
def test_the_page_is_linked(path: str) -> None:
    assert "docs/refusals.md" in (PAGE.parents[1] / path).read_text()


def test_explain_says_where_the_reason_is_explained() -> None:
    report = kvpass.explain(Layer(BY_CODE["KV202"].example).eval(), torch.arange(20).reshape(2, 10) % 16)
    assert f"docs/refusals.md#{anchor(BY_CODE['KV202'])}" in str(report)
