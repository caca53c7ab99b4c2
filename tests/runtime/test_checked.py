"""What is compared before the cache serves a call."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvpass
from kvpass.frontend.api import recording


class Lengths(nn.Module):
    """The last row of each text; how many rows it has, the caller says."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(ids).unsqueeze(1)
        x = self.out(sdpa(x, x, x, is_causal=True)[:, 0])
        return x.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, 16)).squeeze(1)


@pytest.mark.parametrize("rows", [8, 44])
def test_a_number_that_speaks_of_rows_which_a_shorter_text_has_not(
    rows: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """The check takes the rows of the call, and what the model raises before that is nobody's business."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, cache = Lengths().eval(), kvpass.Cache("8MiB", page_size=4)
    ids, lengths = torch.randint(0, 16, (2, rows + 1)), torch.tensor([rows, rows - 2])
    with torch.no_grad(), recording() as found:
        fast = kvpass.compile(model, cache=cache, tiers="eager")
        for given in (ids[:, :rows], ids):
            torch.testing.assert_close(fast(given, lengths), model(given, lengths))
    assert found
    assert all(record.program is not None and record.program.checked for record in found)
    assert cache.stats().rows_computed == 2 * rows + 2
    assert "Traceback" not in capfd.readouterr().err
