"""Sessions, generate, stream and speculation, against the model's own loop and against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvpass
from kvpass.frontend.api import recording
from kvpass.generation.sampling import Sampling
from kvpass.generation.speculate import accept

transformers = pytest.importorskip("transformers")
VOCABULARY = 61


def llama(layers: int = 2, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # so that tokens differ
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def fast(model: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="kvpass", options={"cache": kvpass.Cache("64MiB"), "tiers": "compiled"})


def prompt(rows: int, seed: int = 1, batch: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, rows), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def greedy(model: Any, ids: Tensor, count: int) -> list[int]:
    """The model's own greedy tokens after ids [T], without any cache."""
    made: list[int] = []
    for _ in range(count):
        made.append(int(model(ids.unsqueeze(0), use_cache=False).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([made[-1]])])
    return made


def test_greedy_is_the_models_own(model: Any, fast: Any) -> None:
    ids = prompt(9)
    found = kvpass.generate(fast, ids, 20)
    assert found.shape == (1, 29)
    assert torch.equal(found[:, :9], ids)
    assert found[0, 9:].tolist() == greedy(model, ids[0], 20)


def test_the_first_capture_has_a_symbolic_length() -> None:
    """`torch.compile` alone would capture the first length as it is, and the model again at the second one."""
    torch._dynamo.reset()
    fast = torch.compile(llama(), backend="kvpass", options={"cache": (cache := kvpass.Cache("8MiB"))})
    with recording() as found:
        kvpass.generate(fast, prompt(9), 4)
    assert len(found) == 1
    assert cache.stats().rows_computed == 9 + 3


def test_prompts_of_any_lengths(model: Any, fast: Any) -> None:
    prompts = [prompt(9)[0], prompt(4, 2)[0], prompt(9, 3)[0], prompt(6, 4)[0].tolist()]
    found = kvpass.generate(fast, prompts, 8)
    for given, text in zip(prompts, found, strict=True):
        own = torch.as_tensor(given)
        assert text.tolist() == own.tolist() + greedy(model, own, 8)


def test_padding_is_cut_off(model: Any, fast: Any) -> None:
    ids, mask = prompt(7, batch=2), torch.ones(2, 7, dtype=torch.long)
    mask[1, :3] = 0
    found = kvpass.generate(fast, ids, 5, attention_mask=mask)
    assert found[1].tolist() == ids[1, 3:].tolist() + greedy(model, ids[1, 3:], 5)


def test_a_text_ends_at_its_own_end(model: Any, fast: Any) -> None:
    ids = torch.cat([prompt(9), prompt(9, 5)])
    own = [greedy(model, row, 12) for row in ids]
    end = own[0][4]
    cut = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in own]
    found = kvpass.generate(fast, ids, 12, eos_token_id=end, pad_token_id=1)
    for row, tokens in zip(found[:, 9:].tolist(), cut, strict=True):
        assert row == tokens + [1] * (len(row) - len(tokens))
    details = kvpass.generate(fast, ids, 12, eos_token_id=end, details=True)
    assert details.tokens == cut
    assert details.calls == max(map(len, cut))


def test_stops(model: Any, fast: Any) -> None:
    ids, own = prompt(9), greedy(model, prompt(9)[0], 10)
    first = next(k for k in range(2, 11) if own[k - 2 : k] == own[2:4])
    assert kvpass.generate(fast, ids, 10, stop=[own[2:4]], details=True).tokens == [own[:first]]
    assert kvpass.generate(fast, ids, 10, stop=lambda tokens: len(tokens) == 3, details=True).tokens == [own[:3]]
    with pytest.raises(kvpass.errors.InputError, match="a stop is"):
        kvpass.generate(fast, ids, 10, stop=["end"])


def test_a_seed_reproduces_whatever_else_is_in_the_batch(fast: Any) -> None:
    ids = torch.cat([prompt(9), prompt(9, 5)])
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "top_k": 20, "seed": 7}
    both = kvpass.generate(fast, ids, 12, **options)
    assert torch.equal(both, kvpass.generate(fast, ids, 12, **options))
    assert torch.equal(both[:1], kvpass.generate(fast, ids[:1], 12, **options))
    assert not torch.equal(both, kvpass.generate(fast, ids, 12, **options | {"seed": 8}))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"repetition_penalty": 1.4},
        {"temperature": 1.6, "top_k": 30, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_filters_are_those_of_transformers(options: dict[str, Any]) -> None:
    p = transformers.generation.logits_process
    theirs = {
        "repetition_penalty": p.RepetitionPenaltyLogitsProcessor,
        "temperature": p.TemperatureLogitsWarper,
        "top_k": p.TopKLogitsWarper,
        "top_p": p.TopPLogitsWarper,
        "min_p": p.MinPLogitsWarper,
    }
    ids, logits = prompt(30)[0], torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3)) * 4
    expected = logits.clone()[None]
    for name, kind in theirs.items():
        if name in options:
            expected = kind(options[name])(ids[None], expected)
    torch.testing.assert_close(Sampling(do_sample=True, **options).scores(ids, logits), expected[0])


def test_processors_of_transformers_are_taken(fast: Any) -> None:
    ids = prompt(9)
    ban = transformers.generation.logits_process.SuppressTokensLogitsProcessor(list(range(30)), device="cpu")
    made = kvpass.generate(fast, ids, 10, logits_processor=[ban], details=True).tokens[0]
    assert min(made) >= 30


class Streamer:
    def __init__(self) -> None:
        self.got: list[Any] = []

    def put(self, tokens: Tensor) -> None:
        self.got.append(tokens.tolist())

    def end(self) -> None:
        self.got.append("end")


def test_tokens_as_they_come(model: Any, fast: Any) -> None:
    ids, own = prompt(9), greedy(model, prompt(9)[0], 6)
    assert list(kvpass.stream(fast, ids, 6)) == own
    streamer = Streamer()
    kvpass.generate(fast, ids, 6, streamer=streamer)
    assert streamer.got == [ids.tolist(), *[[token] for token in own], "end"]
    with pytest.raises(kvpass.errors.InputError, match="one prompt, not 2"):
        kvpass.stream(fast, torch.cat([ids, ids]))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"top_k": 0},
        {"top_k": 2.5},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"max_new_tokens": -1},
        {"max_new_tokens": 2.5},
        {"seed": 0.5},
        {"eos_token_id": "end"},
        {"logits_processor": [3]},
        {"streamer": print},
        {"draft": "lookahead"},
        {"draft": "prompt-lookup", "k": 0},
        {"draft": "prompt-lookup", "k": 1.5},
    ],
    ids=str,
)
def test_what_is_out_of_range_is_named(fast: Any, options: dict[str, Any]) -> None:
    with pytest.raises(kvpass.errors.InputError):
        kvpass.generate(fast, prompt(5), **{"max_new_tokens": 2, **options})


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "at least one token"),
        (torch.zeros(0, 4, dtype=torch.long), "no prompt"),
        (torch.zeros(1, 4), "whole numbers"),
        ([], "at least one token"),
        ([[3, 4], ["a"]], "whole numbers"),
        ("abc", "whole numbers"),
        (None, "whole numbers"),
    ],
    ids=repr,
)
def test_prompts_that_are_none(fast: Any, ids: Any, sentence: str) -> None:
    with pytest.raises(kvpass.errors.InputError, match=sentence):
        kvpass.generate(fast, ids)


def test_a_number_may_stand_in_a_tensor_and_a_processor_by_itself(fast: Any) -> None:
    def low(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.arange(30), -torch.inf)

    ids, options = prompt(9), {"do_sample": True, "details": True}
    made = kvpass.generate(fast, ids, 10, seed=3, logits_processor=[low], **options).tokens[0]
    end = torch.tensor(made[4])
    found = kvpass.generate(
        fast, ids, torch.tensor(10), seed=torch.tensor(3), logits_processor=low, eos_token_id=end, **options
    )
    assert found.tokens == [made[: made.index(int(end)) + 1]]


class Plain(nn.Module):
    """A model that is nothing but ids to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return self.head(x + y)


def test_a_module_that_is_not_compiled_is_compiled() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    plain = Plain().eval()
    ids = prompt(6)[0]
    expected = ids
    with torch.no_grad():
        for _ in range(8):
            expected = torch.cat([expected, plain(expected[None])[0, -1].argmax().reshape(1)])
    with recording() as found:
        assert kvpass.generate(plain, ids, 8).tolist() == [expected.tolist()]
    assert any(record.program is not None for record in found)


class Turns(Plain):
    """Another function from the twelfth row on, and one more after twenty."""

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids)
        if ids.shape[1] > 12:
            logits = -logits
        return logits * 2 if ids.shape[1] <= 20 else logits.roll(1, dims=-1)


class Told(Plain):
    """The same, but for a flag of the caller's."""

    def forward(self, ids: Tensor, turned: bool = False) -> Tensor:
        logits = super().forward(ids)
        return -logits if turned else logits


@pytest.mark.parametrize("kind", [Plain, Turns, Told])
def test_a_loop_holds_to_what_the_length_decides(kind: type[Plain]) -> None:
    """In the model, where Dynamo guards it, and in a function around it, which runs in every call."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    plain = kind().eval()
    inner = kvpass.compile(plain, cache=kvpass.Cache("16MiB"), tiers="compiled")

    def around(model: Any, ids: Tensor) -> Tensor:
        return model(ids, ids.shape[1] > 12) if kind is Told else model(ids)

    ids = expected = prompt(5)
    with torch.no_grad():
        for _ in range(24):
            expected = torch.cat([expected, around(plain, expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(kvpass.generate(lambda ids: around(inner, ids), ids, 24), expected)


# -- sessions --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_session_goes_on_back_and_apart(model: Any, fast: Any) -> None:
    ids = prompt(9)
    with kvpass.open(fast, ids) as session:
        assert session.length == 9
        new = torch.tensor([[5, 6, 7]])
        logits = session.extend(new)
        whole = torch.cat([ids, new], 1)
        torch.testing.assert_close(logits, model(whole).logits[:, -3:], rtol=1e-4, atol=1e-4)
        session.rewind(2)
        assert torch.equal(session.ids, whole[:, :10])
        many = session.fork(3)
        logits = many.extend(torch.tensor([[1], [2], [3]]))
        texts = torch.cat([whole[:, :10].expand(3, -1), torch.tensor([[1], [2], [3]])], 1)
        torch.testing.assert_close(logits, model(texts).logits[:, -1:], rtol=1e-4, atol=1e-4)
        many.reorder([2, 0, 2])
        assert torch.equal(many.ids, texts[[2, 0, 2]])
        torch.testing.assert_close(many.extend(4), model(torch.cat([many.ids], 1)).logits[:, -1:], rtol=1e-4, atol=1e-4)
        assert session.length == 10
        with pytest.raises(kvpass.errors.InputError, match="at least one stays"):
            session.rewind(10)
        with pytest.raises(kvpass.errors.InputError, match="cannot follow"):
            session.extend(torch.zeros(2, 1, dtype=torch.long))
        session.close()
    for use in (lambda: session.extend(1), lambda: session.length, lambda: session.ids, lambda: session.fork(2)):
        with pytest.raises(kvpass.errors.InputError, match="closed"):
            use()


@torch.no_grad()
def test_a_session_and_a_call_find_each_others_rows(model: Any) -> None:
    torch._dynamo.reset()
    cache = kvpass.Cache("64MiB")
    fast = kvpass.compile(model, cache=cache)
    ids = prompt(40, 9)
    with kvpass.open(fast, ids) as session:
        session.extend(5)
    before = cache.stats().rows_computed
    longer = torch.cat([ids, torch.tensor([[5, 6]])], 1)
    fast(longer, use_cache=False)
    assert cache.stats().rows_computed - before == 1
    with kvpass.open(fast, longer):
        assert cache.stats().rows_computed - before == 2  # one row is always computed


@torch.no_grad()
def test_a_session_of_a_decoder_behind_an_encoder() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    heard, said = prompt(7), prompt(5, 2)
    fast = kvpass.compile(t5, cache=kvpass.Cache("16MiB"))
    with kvpass.open(fast, said, ids_name="decoder_input_ids", input_ids=heard, use_cache=False) as session:
        for token in (4, 9, 5):
            session.extend(token)
            expected = t5(input_ids=heard, decoder_input_ids=session.ids, use_cache=False).logits[:, -1:]
            torch.testing.assert_close(session.logits, expected, rtol=1e-4, atol=1e-4)
        both = session.fork(2)
        both.extend(torch.tensor([[3], [8]]))
        expected = t5(input_ids=heard.expand(2, -1), decoder_input_ids=both.ids, use_cache=False).logits[:, -1:]
        torch.testing.assert_close(both.logits, expected, rtol=1e-4, atol=1e-4)


# -- what each text has of its own ----------------------------------------------------------------------------------


class Conditioned(nn.Module):
    """Each text has a context, or a scale; all texts share a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)

    def forward(
        self, ids: Tensor, ctx: Tensor | None = None, bias: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        x = self.embed(ids)
        if ctx is not None:
            x = x + ctx[:, None]
        if bias is not None:
            x = x + bias
        y = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        logits = self.head(x + y) * 5
        return logits if scale is None else logits * scale[:, None, None]


@pytest.fixture
def conditioned() -> tuple[Any, Any]:
    torch._dynamo.reset()
    plain = Conditioned().eval()
    return plain, kvpass.compile(plain, cache=kvpass.Cache("16MiB"), tiers="eager")


@torch.no_grad()
def continued(plain: Any, ids: Tensor, count: int, **kwargs: Tensor) -> list[int]:
    for _ in range(count):
        ids = torch.cat([ids, plain(ids[None], **kwargs)[0, -1].argmax().reshape(1)])
    return ids.tolist()


@pytest.mark.parametrize("draft", [None, "prompt-lookup"])
@pytest.mark.parametrize("uneven", [False, True])
def test_each_text_gets_its_own_part(conditioned: tuple[Any, Any], draft: Any, uneven: bool) -> None:
    """Whether it runs in the batch, alone with a draft, or alone because it is the shortest or the last."""
    plain, fast = conditioned
    ids, ctx, bias = prompt(5, batch=3), torch.randn(3, 16), torch.randn(16)
    prompts = [ids[0], ids[1, :3], ids[2]] if uneven else list(ids)
    own = [continued(plain, text, 6, ctx=ctx[k : k + 1], bias=bias) for k, text in enumerate(prompts)]
    found = kvpass.generate(fast, prompts, 6, draft=draft, ctx=ctx, bias=bias)
    assert [text.tolist() for text in found] == own


def test_equal_texts_have_contexts_of_their_own(conditioned: tuple[Any, Any]) -> None:
    """The first text ends, and what is left has the ids that it had."""
    plain, fast = conditioned
    ids, ctx = prompt(5)[0], torch.randn(2, 16) * 3
    own = [continued(plain, ids, 6, ctx=ctx[k : k + 1])[5:] for k in range(2)]
    made = kvpass.generate(fast, [ids, ids], 6, ctx=ctx, eos_token_id=own[0][0], details=True).tokens
    end = own[1].index(own[0][0]) + 1 if own[0][0] in own[1] else 6
    assert made == [own[0][:1], own[1][:end]]


@torch.no_grad()
def test_a_shared_argument_that_is_as_long_as_the_batch_by_chance(conditioned: tuple[Any, Any]) -> None:
    plain, fast = conditioned
    bias, order = torch.randn(16), list(reversed(range(16)))
    session = kvpass.open(fast, prompt(6, batch=16), bias=bias)
    with pytest.raises(kvpass.errors.InputError, match=r"per_text=\['bias'\]"):
        session.reorder(order)
    session = kvpass.open(fast, prompt(6, batch=16), bias=bias, per_text=[])
    session.reorder(order).extend(3)
    torch.testing.assert_close(session.logits, plain(session.ids, bias=bias)[:, -1:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_number_of_each_text(conditioned: tuple[Any, Any]) -> None:
    plain, fast = conditioned
    scale = torch.tensor([1.0, 2.0])
    session = kvpass.open(fast, prompt(6, batch=2), scale=scale, per_text=["scale"])
    session.reorder([1, 0, 0]).extend(3)
    expected = plain(session.ids, scale=scale[[1, 0, 0]])[:, -1:]
    torch.testing.assert_close(session.logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(kvpass.errors.InputError, match="no argument"):
        kvpass.open(fast, prompt(6, batch=2), per_text=["scale"])
    with pytest.raises(kvpass.errors.InputError, match="no entry for each"):
        kvpass.open(fast, prompt(6, batch=2), bias=torch.randn(16), per_text=["bias"])


@torch.no_grad()
def test_a_shared_argument_stays_one_when_the_batch_has_grown(conditioned: tuple[Any, Any]) -> None:
    plain, fast = conditioned
    bias = torch.randn(16)
    session = kvpass.open(fast, prompt(6, batch=2), bias=bias).fork(8)
    session.extend(3, bias=bias)
    session.reorder(list(reversed(range(16)))).extend(4)
    torch.testing.assert_close(session.logits, plain(session.ids, bias=bias)[:, -1:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_prompt_whose_memory_is_used_again(conditioned: tuple[Any, Any]) -> None:
    _, fast = conditioned
    ids = prompt(6, batch=2)
    held = ids.clone()
    session = kvpass.open(fast, ids)
    ids.zero_()
    session.extend(5)
    assert torch.equal(session.ids[:, :6], held)


@torch.no_grad()
def test_logits_after_going_back(conditioned: tuple[Any, Any]) -> None:
    plain, fast = conditioned
    session = kvpass.open(fast, prompt(6, batch=2))
    session.extend([3, 4, 5])
    session.rewind(2)
    many = session.fork(2)
    torch.testing.assert_close(session.logits[:, -1], plain(session.ids)[:, -1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(many.logits[:, -1], plain(many.ids)[:, -1], rtol=1e-4, atol=1e-4)
    session.close()
    with pytest.raises(kvpass.errors.InputError, match="closed"):
        _ = session.logits


# -- speculation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["prompt-lookup", "itself", "another"])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_speculation_makes_the_greedy_text(model: Any, fast: Any, draft: str, k: int) -> None:
    helper: Any = {"itself": fast, "another": llama(1, seed=4)}.get(draft, draft)
    ids = torch.cat([prompt(6), prompt(6), prompt(5, 8)], 1)
    found = kvpass.generate(fast, ids, 15, draft=helper, k=k, details=True)
    assert found.tokens == [greedy(model, ids[0], 15)]
    if draft == "itself":
        assert found.acceptance == 1.0
        assert found.calls < 15


def test_speculation_ends_where_the_text_ends(model: Any, fast: Any) -> None:
    own = greedy(model, prompt(9)[0], 12)
    found = kvpass.generate(fast, prompt(9), 12, eos_token_id=own[5], draft=fast, k=4, details=True)
    assert found.tokens == [own[: own.index(own[5]) + 1]]


@pytest.mark.parametrize("certain", [False, True], ids=["drawn", "looked up"])
def test_the_rejection_rule_keeps_the_distribution(certain: bool) -> None:
    """Chi-square of 40,000 first tokens; 99.9 % of right samplers stay below the bound."""
    p = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04])
    q = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2])
    own, count = torch.Generator().manual_seed(0), 40_000
    seen = torch.zeros(5)
    for _ in range(count):
        token = 2 if certain else int(torch.multinomial(q, 1, generator=own))
        stand, after = accept([(token, None if certain else q)], [p, p], own)
        seen[token if stand else after] += 1
    expected = p * count
    assert float(((seen - expected) ** 2 / expected).sum()) < 18.5  # 4 degrees of freedom


def test_a_wrong_rule_would_be_seen() -> None:
    """The same test for a rule that draws again from the model's own distribution after a rejection."""
    p, q = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04]), torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2])
    own, count = torch.Generator().manual_seed(0), 40_000
    seen = torch.zeros(5)
    for _ in range(count):
        token = int(torch.multinomial(q, 1, generator=own))
        stands = float(torch.rand((), generator=own)) * float(q[token]) < float(p[token])
        seen[token if stands else int(torch.multinomial(p, 1, generator=own))] += 1
    expected = p * count
    assert float(((seen - expected) ** 2 / expected).sum()) > 18.5


def test_what_a_session_says_is_the_callers(model: Any, fast: Any) -> None:
    with kvpass.open(fast, prompt(9, batch=2)) as session:
        said = session.extend(prompt(2, seed=3, batch=2))
        kept = said.clone()
        said.zero_()
        session.logits.zero_()
        torch.testing.assert_close(session.logits, kept)
        torch.testing.assert_close(session.fork(2).logits, kept.repeat_interleave(2, 0))


@pytest.mark.parametrize(
    "rows", [[], torch.tensor([False, True]), torch.tensor([[0, 1]]), [0.0], [2], [-1], None], ids=repr
)
def test_texts_are_chosen_by_numbers(fast: Any, rows: Any) -> None:
    with kvpass.open(fast, prompt(9, batch=2)) as session, pytest.raises(kvpass.errors.InputError, match="number"):
        session.reorder(rows)


def test_what_is_no_whole_number_is_named(fast: Any) -> None:
    with pytest.raises(kvpass.errors.InputError, match="whole numbers"):
        kvpass.open(fast, [2.7, 3.0])
    with kvpass.open(fast, prompt(9)) as session:
        for tokens in (2.7, [2.0], "a", None, True):
            with pytest.raises(kvpass.errors.InputError, match="whole numbers"):
                session.extend(tokens)
        for copies in (0, -1, 1.5):
            with pytest.raises(kvpass.errors.InputError, match="k must be"):
                session.fork(copies)  # type: ignore[arg-type]
        with pytest.raises(kvpass.errors.InputError, match="rows must be"):
            session.rewind(1.5)  # type: ignore[arg-type]
        assert session.length == 9


class Masked(Plain):
    """A padding mask ``[B, S]``, and a bias that all rows share."""

    def forward(self, ids: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
        x = self.embed(ids) if bias is None else self.embed(ids) + bias
        i = torch.arange(ids.shape[1])
        seen = ((i <= i[:, None]) & mask[:, None].bool()) | (i == i[:, None])
        return self.head(x + nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=seen)) * 5


@pytest.fixture
def masked() -> tuple[Any, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = Masked().eval()
    return plain, kvpass.compile(plain, cache=kvpass.Cache("16MiB"), tiers="eager")


def padding(rows: int) -> Tensor:
    return (torch.arange(rows) >= torch.tensor([[0], [2]])).long()


@torch.no_grad()
def test_arguments_that_have_grown_are_cut_with_the_text(masked: tuple[Any, Any]) -> None:
    plain, fast = masked
    bias = torch.randn(16)
    session = kvpass.open(fast, prompt(6, batch=2), mask=padding(6), bias=bias)
    session.extend([3, 4, 5], mask=padding(9))
    session.rewind(1)
    torch.testing.assert_close(session.logits[:, -1], plain(session.ids, padding(8), bias)[:, -1])
    session.rewind(4)
    many = session.fork(2)
    many.extend(7, mask=padding(5).repeat_interleave(2, 0))
    many.rewind(2)
    expected = plain(many.ids, padding(3).repeat_interleave(2, 0), bias)
    torch.testing.assert_close(many.logits[:, -1], expected[:, -1])


@torch.no_grad()
def test_arguments_that_may_have_an_entry_for_each_row_are_asked_for(masked: tuple[Any, Any]) -> None:
    plain, fast = masked
    session = kvpass.open(fast, prompt(16, batch=2), mask=padding(16), bias=torch.zeros(16))
    with pytest.raises(kvpass.errors.InputError, match=r"say rewind\(2, mask="):
        session.rewind(2)
    with pytest.raises(kvpass.errors.InputError, match=r"say rewind\(2, bias="):
        session.rewind(2, mask=padding(14))
    session.rewind(2, mask=padding(14), bias=torch.ones(16))
    torch.testing.assert_close(session.logits[:, -1], plain(session.ids, padding(14), torch.ones(16))[:, -1])
    session.rewind(1)
    session.extend(3, mask=1 - padding(14))
    with pytest.raises(kvpass.errors.InputError, match=r"say rewind\(1, mask="):  # its earlier entries are others
        session.rewind(1)
    assert session.length == 14
