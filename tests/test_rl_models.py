"""Policy and critic: windows, padding, temperature, dropout; and the sources of scores."""
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stages.rl.models import UNPADDED, PolicyWithCritic, align_right, pad_sequences, policy_stats, remove_dropout
from stages.rl.rewards import Response, build_reward, load_critic
from tests.rl_tiny import END, LETTERS, PAD, VOCAB, classifier, early_letters, policy, tokenizer

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
RESPONSES = [[3, END], [4, 5, 6, 7, END], [12]]


def one_by_one(model, temperature):
    """Log-probabilities, entropies of each response token by a plain forward without any padding."""
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1].double() / temperature
        logp = logits.log_softmax(-1)
        rows.append((logp.gather(-1, torch.tensor(response)[:, None])[:, 0].float(), -(logp.exp() * logp).sum(-1).float()))
    return align_right([r[0] for r in rows]), align_right([r[1] for r in rows])


def test_pad_sequences():
    batch = pad_sequences(PROMPTS[:2], RESPONSES[:2], PAD)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 3, END], [9, 4, 5, 6, 7, END]]
    batch = pad_sequences(PROMPTS[1:], RESPONSES[1:], PAD)
    assert batch["input_ids"].tolist() == [[9, 4, 5, 6, 7, END], [PAD, PAD, PAD, 10, 11, 12]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [0, 0, 0, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 2]]
    assert batch["response_mask"].tolist() == [[True] * 5, [False] * 4 + [True]]


def test_masks_come_from_lengths_when_pad_is_the_end_token():
    batch = pad_sequences(PROMPTS, RESPONSES, END)
    assert batch["response_mask"].sum().item() == 8 and batch["attention_mask"].sum().item() == 15


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_stats_equal_those_without_padding(architecture, temperature):
    """gpt2 has learned absolute positions: without position ids from the mask its padded rows are far off."""
    model = policy(architecture=architecture).eval()
    inputs = pad_sequences(PROMPTS, RESPONSES, PAD)
    logprobs, entropy, _ = policy_stats(model, inputs, temperature)
    expected_logprobs, expected_entropy = one_by_one(model, temperature)
    torch.testing.assert_close(logprobs, expected_logprobs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=1e-4)
    if architecture == "gpt2":
        wrong = {**inputs, "position_ids": torch.arange(inputs["input_ids"].size(1)).expand_as(inputs["input_ids"])}
        assert (policy_stats(model, wrong, temperature)[0] - expected_logprobs).abs().max() > 1e-2


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2"])
def test_values_stand_before_each_response_token(architecture):
    critic = classifier(architecture=architecture).eval()
    critic.config.score_mean, critic.config.score_std = 0.5, 2.0
    values = PolicyWithCritic(policy(), critic)(**pad_sequences(PROMPTS, RESPONSES, PAD)).values
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        hidden = critic.base_model(torch.tensor([prompt + response])).last_hidden_state
        rows.append((critic.score(hidden)[0, len(prompt) - 1:-1, 0] - 0.5) / 2)
    torch.testing.assert_close(values, align_right(rows), atol=1e-5, rtol=1e-4)


def read_tokens(model, inputs):
    """Tokens that each embedding of the model looks up in a forward pass, and what the pass says."""
    seen = []
    hooks = [each.get_input_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0].numel()))
             for each in (model.policy, model.critic) if each is not None]
    stats = model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen, stats


@pytest.mark.parametrize("trunk", [False, True])
@pytest.mark.parametrize("architecture", UNPADDED)
def test_no_padding_is_read_and_nothing_else_changes(architecture, trunk):
    """Statistics and gradients equal those of padded rows, which eager attention reads."""
    def build(attention):
        model = PolicyWithCritic(policy(architecture=architecture), None if trunk else classifier(architecture=architecture))
        if trunk:
            torch.nn.init.ones_(model.value_head.weight)
        for each in (model.policy, model.critic):
            if each is not None:
                each.set_attn_implementation(attention)
        return model.train()

    inputs = pad_sequences(PROMPTS, RESPONSES, PAD)
    models = build("sdpa"), build("eager")
    (seen, stats), (seen_padded, expected) = (read_tokens(model, inputs) for model in models)
    assert set(seen) == {int(inputs["attention_mask"].sum())} and set(seen_padded) == {inputs["input_ids"].numel()}
    weights = torch.linspace(-1, 1, stats.logprobs.numel()).view_as(stats.logprobs)  # the sum of all is blind to a token misplaced
    for found in (stats, expected):
        (weights * (found.logprobs + found.values)).sum().backward()
    for name in ("logprobs", "entropy", "values"):
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name), atol=1e-5, rtol=1e-4)
    for (name, own), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None), name
        if own.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, atol=2e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
    assert models[0].policy.config._attn_implementation == "sdpa", "the sampler's cache wants its own attention back"


def test_the_last_network_reads_only_what_predicts_a_response_token():
    model = PolicyWithCritic(policy(), classifier())
    read = []
    for each in (model.policy, model.critic):
        for layer in each.base_model.layers:
            layer.mlp.register_forward_hook(lambda _, args, out: read.append(args[0].size(1)))
    inputs = pad_sequences(PROMPTS, RESPONSES, PAD)
    model(**inputs)
    every, few = int(inputs["attention_mask"].sum()), int(inputs["response_mask"].sum())
    one = [every] * (len(model.policy.base_model.layers) - 1) + [few]
    assert read == one * 2
    read.clear()
    model.policy(input_ids=inputs["input_ids"])
    assert set(read) == {inputs["input_ids"].numel() // len(PROMPTS)}, "only there"


def test_padding_is_read_where_attention_by_rows_would_be_wrong():
    inputs = pad_sequences(PROMPTS, RESPONSES, PAD)
    padded = inputs["input_ids"].numel()
    windowed = policy(architecture="mistral", sliding_window=3)
    assert read_tokens(PolicyWithCritic(windowed, None), inputs)[0] == [padded]
    torch.testing.assert_close(policy_stats(windowed, inputs, 1.0)[0], one_by_one(windowed, 1.0)[0], atol=1e-5, rtol=1e-4)
    recomputing = policy().train()
    recomputing.gradient_checkpointing_enable()
    assert read_tokens(PolicyWithCritic(recomputing, None), inputs)[0] == [padded]


def test_attention_is_the_old_one_again_after_an_error(monkeypatch):
    model = policy()
    monkeypatch.setattr(model, "forward", lambda **_: {}["broken"])
    with pytest.raises(KeyError, match="broken"):
        policy_stats(model, pad_sequences(PROMPTS, RESPONSES, PAD), 1.0)
    assert model.config._attn_implementation == "sdpa"


def test_shared_trunk_reads_the_policys_hidden_states():
    model = PolicyWithCritic(policy(), None)
    inputs = pad_sequences(PROMPTS, RESPONSES, PAD)
    assert (model(**inputs).values == 0).all(), "the value head starts without an opinion"
    torch.nn.init.normal_(model.value_head.weight)
    hidden = model.policy.model(torch.tensor([PROMPTS[0] + RESPONSES[0]])).last_hidden_state
    expected = model.value_head(hidden)[0, len(PROMPTS[0]) - 1:-1, 0]
    torch.testing.assert_close(model(**inputs).values[0, -2:], expected, atol=1e-5, rtol=1e-4)
    model(**inputs).values.sum().backward()
    assert model.policy.model.embed_tokens.weight.grad.abs().sum() > 0


def test_both_models_get_gradients_in_one_backward():
    model = PolicyWithCritic(policy(), classifier())
    stats = model(**pad_sequences(PROMPTS, RESPONSES, PAD))
    (stats.logprobs.sum() + stats.values.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not stats.entropy.requires_grad


@pytest.mark.parametrize(("architecture", "changes"), [
    ("llama", {"attention_dropout": 0.5}), ("qwen3", {"attention_dropout": 0.5}),
    ("gpt2", {"attn_pdrop": 0.5, "embd_pdrop": 0.5, "resid_pdrop": 0.5})])
def test_dropout_is_off_in_training_mode(architecture, changes):
    inputs = pad_sequences(PROMPTS, RESPONSES, PAD)
    noisy = policy(architecture=architecture, **changes).train()
    expected = policy_stats(noisy.eval(), inputs, 1.0)[0]
    assert not torch.equal(policy_stats(noisy.train(), inputs, 1.0)[0], expected), "the case needs dropout that acts"
    torch.testing.assert_close(policy_stats(remove_dropout(noisy).train(), inputs, 1.0)[0], expected)


def test_composite_has_no_dropout_in_either_model():
    model = PolicyWithCritic(policy(attention_dropout=0.5), classifier(attention_dropout=0.5)).train()
    inputs = pad_sequences(PROMPTS, RESPONSES, PAD)
    first, second = model(**inputs), model(**inputs)
    assert torch.equal(first.logprobs, second.logprobs) and torch.equal(first.values, second.values)


def responses():
    return [Response({"id": str(i), "answer": "7", "solutions": []}, p, r, "a z", r[-1] == END)
            for i, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True))]


def test_reward_model_scores_the_last_token_normalised(tmp_path):
    model = classifier().eval()
    model.config.score_mean, model.config.score_std = 0.3, 0.5
    model.save_pretrained(tmp_path)
    scores = build_reward({"model": 1.0}, model_path=tmp_path, vocab_size=VOCAB)(responses())
    with torch.no_grad():
        raw = torch.stack([model(torch.tensor([p + r])).logits[0, 0] for p, r in zip(PROMPTS, RESPONSES, strict=True)])
    torch.testing.assert_close(scores, (raw - 0.3) / 0.5, atol=1e-5, rtol=1e-4)
    critic = PolicyWithCritic(policy(), model)  # reads after a response what the reward model reads at its last token
    after = critic(**pad_sequences([r.prompt_ids for r in responses()], [[*r.ids, 2] for r in responses()], PAD)).values[:, -1]
    torch.testing.assert_close(after, scores, atol=1e-5, rtol=1e-4)


def test_weighted_sum_of_sources(tmp_path):
    classifier().save_pretrained(tmp_path)
    alone = build_reward({"model": 1.0}, model_path=tmp_path, vocab_size=VOCAB)(responses())
    both = build_reward({str(tmp_path): 2.0, "tests.rl_tiny:early_letters": 10.0}, model_path=None, vocab_size=VOCAB)
    torch.testing.assert_close(both(responses()), 2 * alone + 5)
    assert early_letters([], ["a b z z"], []) == [0.5]


def test_gold_as_a_reward():
    reward = build_reward({"stages.rl.rewards:gold": 1.0}, model_path=None, vocab_size=VOCAB)
    right = Response({"answer": "7", "solutions": []}, [5], [6], "The answer is 7.", True)
    assert reward([right, right._replace(finished=False)]).tolist() == pytest.approx([1.0, 0.9])


def too_few(problems, texts, finished):
    return [1.0]


@pytest.mark.parametrize(("spec", "message"), [
    ({}, "no source"), ({"modle": 1.0}, "neither"), ({"tests.rl_tiny:nothing": 1.0}, "expected module:function"),
    ({"no_such_module:f": 1.0}, "expected module:function"), ({"tests.test_rl_models:too_few": 1.0}, "1 scores for 3 responses")])
def test_bad_rewards_name_what_was_expected(spec, message):
    with pytest.raises(ValueError, match=message):
        build_reward(spec, model_path=None, vocab_size=VOCAB)(responses())


def test_reward_model_of_another_vocabulary(tmp_path):
    classifier(vocab_size=50).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="50 tokens"):
        build_reward({"model": 1.0}, model_path=tmp_path, vocab_size=VOCAB)


def test_a_critic_of_another_vocabulary_is_refused(tmp_path):
    classifier(vocab_size=50).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be the critic: it has 50 tokens, the policy 28; set value_trunk to shared"):
        load_critic(tmp_path, vocab_size=VOCAB, tokenizer=tokenizer())


def trl_style(prompts, completions, answer, completion_ids, **kwargs):
    """A function as TRL's trainers take them: columns by name, messages where the prompts are messages."""
    said = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    asked = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
    assert set(kwargs) == {"id", "solutions"} and all(isinstance(ids, list) for ids in completion_ids)
    return [float(a in text) + len(question) for a, text, question in zip(answer, said, asked, strict=True)]


def trl_style_without_more(completions, answer):
    return [float(a in text) for a, text in zip(answer, completions, strict=True)]


def test_functions_with_trls_signature():
    name = "tests.test_rl_models:trl_style"
    problem = {"id": "x", "answer": "7", "solutions": []}
    plain = [Response(problem, [2, 3], [4, END], "7", True), Response(problem, [2, 3, 4], [4, END], "8", True)]
    reward = build_reward({name: 1.0}, model_path=None, vocab_size=VOCAB, tokenizer=tokenizer())
    assert reward(plain).tolist() == [1.0 + len("a b"), len("a b c")]
    messages = [r._replace(problem=problem | {"prompt": [{"role": "user", "content": "?"}]}) for r in plain]
    assert build_reward({name: 1.0}, model_path=None, vocab_size=VOCAB)(messages).tolist() == [2.0, 1.0]
    fewer = build_reward({"tests.test_rl_models:trl_style_without_more": 2.0}, model_path=None, vocab_size=VOCAB, tokenizer=tokenizer())
    assert fewer(plain).tolist() == [2.0, 0.0]
    with pytest.raises(ValueError, match="problem 'x' has no prompt in words"):
        build_reward({name: 1.0}, model_path=None, vocab_size=VOCAB)(plain)


TEMPLATE = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} <end> {% endfor %}"


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_a_reward_model_with_another_tokenizer_reads_the_text_in_its_own_form(tmp_path, capsys, template):
    """Its ids are those of its own tokenizer on prompt and response, by its chat template where it has one."""
    letters = ["<pad>", "<end>", *reversed(LETTERS), "more"]
    foreign = Tokenizer(models.WordLevel({token: i for i, token in enumerate(letters)}, unk_token="<pad>"))
    foreign.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = PreTrainedTokenizerFast(tokenizer_object=foreign, pad_token="<pad>", eos_token="<end>")
    own.chat_template = template
    own.save_pretrained(tmp_path)
    model = classifier(vocab_size=len(letters), pad_token_id=PAD if template else None).eval()  # many have none
    model.save_pretrained(tmp_path)
    given = [Response({"id": "x"}, [2, 3], [4, 5, END], "c d", True), Response({"id": "y"}, [2], [6], "e", False)]

    def build(name):
        return build_reward({name: 1.0}, model_path=tmp_path, vocab_size=VOCAB, tokenizer=tokenizer())

    with pytest.raises(ValueError, match=r"has 29 tokens, the policy 28: .*@text"):
        build("model")
    assert "reads text anew" not in capsys.readouterr().out
    scores = build("model@text")(given)
    printed = capsys.readouterr().out
    assert "reads text anew with its own tokenizer" in printed and ("chat template" in printed) == bool(template)
    assert "its scores keep their own scale" in printed
    rows = [own(text, add_special_tokens=False)["input_ids"] for text in (
        ["u a b <end> a c d <end>", "u a <end> a e <end>"] if template else ["a b c d", "a e"])]
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([row])).logits[0, 0] for row in rows])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(build(f"{tmp_path}@text")(given), scores)
    asked_by = [r._replace(problem=r.problem | {"prompt": [{"role": "user", "content": "z"}]}) for r in given]
    assert not torch.allclose(build("model@text")(asked_by), scores)
