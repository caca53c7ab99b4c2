"""Small whole models, each proven, exact over a history of calls, and every attention of it on a generated kernel."""

import pytest
import torch
from torch import Tensor

import kvpass
from kvpass.frontend.api import recording
from tests.property.oracle import check_same
from tests.spellings.modules import MODULES, PADDED, REFUSED, SIZE, VOCAB, Padded, causal_block_mask

LENGTHS = (9, 10, 14, 6, 30)


def texts() -> list[Tensor]:
    """A text that grows, grows by several rows, is cut short, branches, and grows again."""
    ids = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    branch = ids.clone()
    branch[:, 4] = (branch[:, 4] + 1) % VOCAB
    return [*(ids[:, :rows] for rows in LENGTHS), branch[:, :12], branch[:, :13]]


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")


@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_module_is_proven_exact_and_lowered(name: str) -> None:
    torch._dynamo.reset()
    spec = MODULES[name]
    model = spec.build()
    memory = torch.randn(2, 5, SIZE, generator=torch.Generator().manual_seed(0))
    cache = kvpass.Cache(capacity="8MiB", page_size=4, poison=True)
    fast = kvpass.compile(model, cache=cache, tiers="compiled")
    with recording() as found:
        for ids in texts():
            check_same(fast, model, [ids, memory] if spec.memory else [ids])
    report = kvpass.Report.of(found)
    assert report.proven, str(report)
    assert not report.refusals
    assert not report.unrecognised, str(report)
    assert [attention.lowering[:3] for attention in report.attention] == ["C++"] * spec.attentions, str(report)
    assert cache.stats().rows_reused > 0


@torch.no_grad()
def test_a_graph_for_some_lengths_is_checked_at_those(capfd: pytest.CaptureFixture[str]) -> None:
    """Two blocks of sixteen rows: at any other length the graph itself raises, and nothing can be compared."""
    torch._dynamo.reset()
    model = MODULES["blocks_by_split"].build()
    with recording() as found:
        kvpass.compile(model, cache=kvpass.Cache(capacity="8MiB"))(texts()[4])
    (program,) = [record.program for record in found]
    assert program is not None
    assert program.captured.takes(18)
    assert not program.captured.takes(16)
    assert program.checked
    assert not capfd.readouterr().err


@pytest.mark.parametrize("how", PADDED)
@torch.no_grad()
def test_rows_without_keys_are_what_they_were(how: str) -> None:
    """The padded rows are compared as well: NaN where the model has NaN, the same numbers where it has some."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    model = Padded(how).eval()
    fast = kvpass.compile(model, cache=kvpass.Cache(capacity="8MiB", page_size=4, poison=True))
    keep = torch.ones(2, 40, dtype=torch.long)
    keep[1, :3] = 0
    with recording() as found:
        for ids in texts():
            check_same(fast, model, [ids, keep[:, : ids.shape[1]]])
    assert model(texts()[0], keep[:, :9])[1, :3].isnan().all() == (how != "filled")
    report = kvpass.Report.of(found)
    assert report.proven, str(report)
    assert [a.lowering[:3] for a in report.attention] == ["C++"] * PADDED[how], str(report)


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_module_is_refused_and_answered(name: str) -> None:
    torch._dynamo.reset()
    make, code = REFUSED[name]
    model = make().eval()
    fast = kvpass.compile(model, cache=kvpass.Cache(capacity="8MiB"))
    with recording() as found:
        for ids in texts()[:3]:
            model.made = causal_block_mask(ids.shape[1])
            check_same(fast, model, [ids])
    report = kvpass.Report.of(found)
    assert not report.proven
    assert {refusal.code for refusal in report.refusals} == {code}, str(report)
