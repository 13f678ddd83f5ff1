"""The sampler: draws from the softmax, keyed noise, agreement with transformers' own generate."""
import pytest
import torch
from scipy import stats
from transformers import AutoConfig, AutoModelForCausalLM

from stages.models.sampling import draw, exponential_noise, prompt_key, row_words, sample

VOCAB, PAD, EOS = 61, 0, 1


def tiny(architecture: str, seed: int = 0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2, head_dim=8, intermediate_size=48, max_position_embeddings=128,
                                  pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None, initializer_range=0.5)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def make_prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (int(torch.randint(1, 12, (), generator=generator)),), generator=generator).tolist()
            for _ in range(count)]


def noise_for(keys, seed=0, position=0, vocab=VOCAB):
    return exponential_noise(row_words(keys, seed, position), torch.arange(vocab, dtype=torch.int32))


def run(model, prompts, **changes):
    arguments = {"keys": [(prompt_key(str(p)), 0) for p in prompts], "seed": 3, "temperature": 1.0, "max_new_tokens": 20,
                 "eos_ids": [EOS], "pad_id": PAD, "batch_size": 7}
    return sample(model, prompts, **{**arguments, **changes})


def test_noise_is_standard_exponential():
    noise = noise_for([(prompt_key("p"), i) for i in range(2000)])
    assert stats.kstest(noise.flatten().numpy(), "expon").pvalue > 1e-3
    assert (noise > 0).all() and noise.isfinite().all()


@pytest.mark.parametrize("vary", ["sample", "position", "prompt", "seed"])
def test_draws_follow_the_softmax_whichever_counter_runs(vary):
    """Chi-square of 20,000 draws against the probabilities, and of consecutive pairs against independence."""
    n, vocab = 20_000, 12
    logits = torch.linspace(-2, 2, vocab)
    if vary == "sample":
        words = row_words([(prompt_key("p"), i) for i in range(n)], 0, 0)
    elif vary == "prompt":
        words = row_words([(prompt_key(f"p{i}"), 0) for i in range(n)], 0, 0)
    elif vary == "position":
        words = torch.cat([row_words([(prompt_key("p"), 0)], 0, i) for i in range(n)])
    else:
        words = torch.cat([row_words([(prompt_key("p"), 0)], i, 0) for i in range(n)])
    drawn = draw(logits.expand(n, -1), exponential_noise(words, torch.arange(vocab, dtype=torch.int32)), 0.7)
    expected = (logits / 0.7).softmax(0).numpy()
    expected = expected / expected.sum(dtype="float64")
    assert stats.chisquare(torch.bincount(drawn, minlength=vocab).numpy(), expected * n, sum_check=False).pvalue > 1e-4
    high = (drawn >= vocab - 2).long()
    pairs = torch.bincount(high[:-1] * 2 + high[1:], minlength=4).view(2, 2).numpy()
    assert stats.chi2_contingency(pairs).pvalue > 1e-4


def test_noise_of_neighbouring_keys_is_uncorrelated():
    """Rows that differ by one in sample, position, seed or prompt, and neighbouring tokens, share nothing."""
    base = noise_for([(5, i) for i in range(400)])
    others = [noise_for([(5, i + 1) for i in range(400)]), noise_for([(5, i) for i in range(400)], position=1),
              noise_for([(5, i) for i in range(400)], seed=1), noise_for([(6, i) for i in range(400)]), base.roll(1, dims=1)]
    for other in others:
        correlation = torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 5 / base.numel() ** 0.5


def test_noise_is_fixed():
    """A change of the hash would change every recorded run."""
    assert row_words([(prompt_key("a"), 2)], 7, 3).tolist() == [[-22353464, 1308623580]]
    noise = noise_for([(prompt_key("a"), 2)], seed=7, position=3)[0, :3]
    torch.testing.assert_close(noise, torch.tensor([2.117102, 0.944382, 0.366788]))


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_greedy_equals_generate(architecture):
    """Left padding, position ids, cache, dropping of finished rows: all must be right for every token to agree."""
    model, prompts = tiny(architecture).train(), make_prompts(20)
    ours = run(model, prompts, temperature=0.0)
    assert model.training
    model.eval()
    for prompt, response in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        assert response == whole[0, len(prompt):].tolist()
    assert len({len(r) for r in ours}) > 1, "the case needs responses that end at different times"


def test_gpt2_with_learned_positions_under_left_padding():
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.5,
                                  bos_token_id=None, eos_token_id=EOS)
    model, prompts = AutoModelForCausalLM.from_config(config).eval(), make_prompts(9)
    assert run(model, prompts, batch_size=9, temperature=0.0) == run(model, prompts, batch_size=1, temperature=0.0)


def test_same_draw_whatever_the_batch_and_order():
    model, prompts = tiny("qwen3"), make_prompts(30)
    expected = run(model, prompts, batch_size=30)
    assert run(model, prompts, batch_size=1) == expected
    assert run(model, prompts, batch_size=4) == expected
    assert run(model, prompts[::-1])[::-1] == expected
    assert run(model, prompts[10:20]) == expected[10:20]
    assert run(model, prompts, seed=4) != expected


def test_samples_of_one_prompt_differ_and_agree_with_the_same_prompt_alone():
    """Equal prompts are read once and share their cache at the start; their rows must not be mixed up."""
    model, prompt = tiny("llama"), [5, 9, 2]
    prompts = [prompt, [7], prompt, prompt]
    keys = [(1, 0), (2, 0), (1, 1), (1, 2)]
    together = run(model, prompts, keys=keys)
    assert together == [run(model, [p], keys=[k])[0] for p, k in zip(prompts, keys, strict=True)]
    assert len({tuple(together[i]) for i in (0, 2, 3)}) == 3


def test_ends_at_the_end_token_and_at_the_limit():
    model, prompts = tiny("qwen3"), make_prompts(40)
    responses = run(model, prompts)
    assert all(1 <= len(r) <= 20 and EOS not in r[:-1] for r in responses)
    assert any(r[-1] == EOS for r in responses) and any(r[-1] != EOS and len(r) == 20 for r in responses)
    two_ends = run(model, prompts, eos_ids=[EOS, 7])
    assert all(not {EOS, 7} & set(r[:-1]) for r in two_ends) and two_ends != responses


def test_empirical_distribution_of_a_model():
    """First tokens of many samples of one prompt against the model's own probabilities at the temperature."""
    model, prompt, n = tiny("qwen3").eval(), [4, 8, 15], 4000
    responses = run(model, [prompt] * n, keys=[(9, i) for i in range(n)], max_new_tokens=1, temperature=2.0, batch_size=1000)
    first = [r[0] for r in responses]
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1].double() / 2).softmax(-1)
    common = expected * n > 5
    counts = torch.bincount(torch.tensor(first), minlength=VOCAB).double()
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]]) * n
    assert stats.chisquare(observed.numpy(), wanted.numpy(), sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_never_to_be_drawn_is_not(temperature):
    model, prompts = tiny("qwen3"), make_prompts(12)
    free = run(model, prompts, temperature=temperature)
    never = sorted({token for response in free[:6] for token in response[:2]} - {EOS})
    found = run(model, prompts, temperature=temperature, never=never)
    assert len(never) > 1 and not set(never) & {token for response in found for token in response}
    untouched = [i for i, response in enumerate(free) if not set(never) & set(response)]
    assert [found[i] for i in untouched] == [free[i] for i in untouched]


@pytest.mark.parametrize("changes", [{"keys": [(1, 0)]}, {"temperature": -1.0}, {"max_new_tokens": 0}])
def test_bad_arguments(changes):
    with pytest.raises(ValueError):
        run(tiny("qwen3"), [[3], [4]], **changes)
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        run(tiny("qwen3"), [[3], []])
