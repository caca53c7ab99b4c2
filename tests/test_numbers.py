"""Numbers that the caller passes are part of what a row is known by."""

import torch
from torch import Tensor, nn

import kvpass


class Scaled(nn.Module):
    """Causal attention over embeddings that the caller scales by an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.key, self.head = nn.Embedding(19, 8), nn.Linear(8, 8), nn.Linear(8, 19)

    def forward(self, ids: Tensor, factor: int) -> Tensor:
        x = self.embed(ids) * factor
        y = nn.functional.scaled_dot_product_attention(x, self.key(x), x, is_causal=True)
        return self.head(y)


@torch.no_grad()
def test_rows_of_another_factor_are_not_reused() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Scaled().eval()
    cache = kvpass.Cache(page_size=4)
    fast = kvpass.compile(model, cache=cache)
    ids = torch.randint(0, 19, (1, 9))
    for factor in (2, 3, 4, 5, 3, 2):  # the second one makes Dynamo pass it as a symbol
        ids = torch.cat([ids, ids[:, :1]], 1)
        torch.testing.assert_close(fast(ids, factor), model(ids, factor), rtol=1e-4, atol=1e-4)
    assert cache.stats().rows_reused > 0
