"""Small whole models, each proven, exact over a history of calls, and every attention of it on a generated kernel."""

import pytest
import torch
from torch import Tensor

import kvpass
from kvpass.frontend.api import recording
from tests.property.oracle import check_same
from tests.spellings.modules import MODULES, SIZE, VOCAB

LENGTHS = (9, 10, 14, 6, 30)


def texts() -> list[Tensor]:
    """A text that grows, grows by several rows, is cut short, branches, and grows again."""
    ids = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    branch = ids.clone()
    branch[:, 4] = (branch[:, 4] + 1) % VOCAB
    return [*(ids[:, :rows] for rows in LENGTHS), branch[:, :12], branch[:, :13]]


@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch.*")
@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_module_is_proven_exact_and_lowered(name: str) -> None:
    torch._dynamo.reset()
    spec = MODULES[name]
    model = spec.build()
    memory = torch.randn(2, 5, SIZE, generator=torch.Generator().manual_seed(0))
    cache = kvpass.Cache(capacity="8MiB", page_size=4, poison=True)
    fast = kvpass.compile(model, cache=cache)
    with recording() as found:
        for ids in texts():
            check_same(fast, model, [ids, memory] if spec.memory else [ids])
    report = kvpass.Report.of(found)
    assert report.proven, str(report)
    assert not report.refusals
    assert not report.unrecognised, str(report)
    assert [attention.lowering[:3] for attention in report.attention] == ["C++"] * spec.attentions, str(report)
    assert cache.stats().rows_reused > 0
