"""The exam: marks worked by hand from scripted answers, both formats through a tiny model, the same whatever the processes."""
import itertools

import pytest
import torch

from prompts.intervals import wilson
from prompts.records import Result
from prompts.templates import BENCHMARK_CUES, STOP_PLAIN
from stages.data import curriculum
from stages.data.instructions import instructions
from stages.data.tokenizer import END, chat_ids, train_tokenizer
from stages.evals import battery
from stages.evals.backends import LocalModel
from stages.evals.statistics import paired_wilson
from stages.evals.tasks import Task
from stages.models.sizes import build_decoder, decoder_config
from stages.models.training import save_model

PROBLEMS = [{"id": "a", "task": "sums", "question": "What is 2 + 3?", "answer": "5"},
            {"id": "b", "task": "sums", "question": "What is 1 + 1?", "answer": "2"},
            {"id": "c", "task": "letters", "question": "Which letter ends Tom?", "answer": "m"}]
EXACT = [{"id": "i", "kind": "count", "prompt": "Write the word bread 2 times.", "answer": "bread bread"},
         {"id": "j", "kind": "case", "prompt": "Write in capital letters: fox", "answer": "FOX"}]
FOREIGN = Task(name="foreign", rows=[{"id": "f", "task": "svamp", "question": "Ann has 4. How many?", "answer": "4"}], pool=[],
               cues=BENCHMARK_CUES)
SAID = {"What is 2 + 3? Think step by step.": (" 2 + 3 = 5. The answer is 5.", True), "What is 2 + 3? Answer directly.": (" 5", True),
        "What is 1 + 1? Think step by step.": (" The answer is 2. The answer is 3.", True),
        "What is 1 + 1? Answer directly.": (" The answer is 3.", True),
        "Which letter ends Tom? Think step by step.": (" Tom ends in m. The answer is m.", False),
        "Which letter ends Tom? Answer directly.": (" The answer is m.", True),
        "Write the word bread 2 times.": (" bread bread", True), "Write in capital letters: fox": (" Fox", True),
        f"Ann has 4. How many? {BENCHMARK_CUES['worked']}": ("4 = 4. The answer is 4.", True)}
BY_HAND = {"stop_rate": [1, 1, 0, 1, 1, 1], "format_rate": [1, 0, 0, 0, 1, 1], "worked_accuracy": [1, 0, 1], "direct_accuracy": [1, 0, 1],
           "worked_accuracy/sums": [1, 0], "worked_accuracy/letters": [1], "instructions": [1, 0], "instructions/count": [1],
           "instructions/case": [0], "benchmark/foreign": [1]}


class Scripted:
    """Answers from a table by what is asked; `calls` holds the batches. Questions in `too_long` find no room."""

    context = 64

    def __init__(self, too_long=()):
        self.calls, self.too_long = [], too_long

    def generate(self, requests):
        self.calls.append(requests)
        results = []
        for request in requests:
            plain = isinstance(request.prompt, str)
            asked = request.prompt.removeprefix("Question: ").removesuffix("\nAnswer:") if plain else request.prompt[0]["content"]
            (text, finished), room = SAID[asked], asked not in self.too_long
            results.append(Result(text=text if room else "", prompt_tokens=2, generated_tokens=len(text.split()) if room else 0,
                                  finish="too_long" if not room else "stop" if finished else "length"))
        return results


@pytest.fixture
def scripted(monkeypatch):
    def use(backend, chat, **changes):
        monkeypatch.setattr(battery.LocalModel, "of", lambda *args, **more: backend)
        return battery.exam(None, None, **{"chat": chat, "stop_ids": [1], "problems": PROBLEMS, "instructions": EXACT,
                                           "benchmarks": [FOREIGN], "seed": 0, "max_new_tokens": 9, **changes})
    return use


@pytest.mark.parametrize("chat", [False, True])
def test_marks_worked_by_hand(scripted, chat):
    backend = Scripted()
    assert scripted(backend, chat) == BY_HAND
    [requests] = backend.calls  # one batch of everything
    assert {type(r.prompt) for r in requests} == {tuple if chat else str} and len(requests) == 2 * 3 + 2 + 1
    assert {r.max_tokens for r in requests if r.question in "ij"} == {32}
    assert {r.max_tokens for r in requests if r.question not in "ij"} == {9}
    assert {(r.temperature, r.stop) for r in requests} == {(0.0, () if chat else STOP_PLAIN)}


def test_parts_that_are_not_asked_have_no_columns(scripted):
    assert set(scripted(Scripted(), True, instructions=(), benchmarks=())) == {
        "stop_rate", "format_rate", "worked_accuracy", "direct_accuracy", "worked_accuracy/sums", "worked_accuracy/letters"}
    assert set(scripted(Scripted(), True, problems=[], benchmarks=())) == {"instructions", "instructions/count", "instructions/case"}
    assert scripted(Scripted(), True, problems=[], instructions=(), benchmarks=()) == {}
    with pytest.raises(ValueError, match="two benchmarks are called"):
        scripted(Scripted(), True, benchmarks=[FOREIGN, FOREIGN])


def test_what_finds_no_room_is_not_done_and_a_column_of_it_is_missing(scripted, capsys):
    too_long = {f"Ann has 4. How many? {BENCHMARK_CUES['worked']}", "What is 2 + 3? Think step by step."}
    columns = scripted(Scripted(too_long), False)
    assert columns == {name: values for name, values in {
        **BY_HAND, "stop_rate": [0, 1, 0, 1, 1, 1], "format_rate": [0, 0, 0, 0, 1, 1], "worked_accuracy": [0, 0, 1],
        "worked_accuracy/sums": [0, 0]}.items() if name != "benchmark/foreign"}
    assert "2 of 9 prompts leave no room for an answer in a context of 64 tokens" in capsys.readouterr().out


def test_summary_and_changes_state_n_and_interval():
    before = {"stop_rate": [0.0, 0.0, 1.0, 1.0], "only_before": [1.0]}
    after = {"stop_rate": [1.0, 1.0, 1.0, 0.0], "only_after": [1.0]}
    assert battery.summary(before, "before") == {
        "before/stop_rate": {"value": 0.5, "n": 4, "ci95": list(wilson(2, 4))},
        "before/only_before": {"value": 1.0, "n": 1, "ci95": list(wilson(1, 1))}}
    assert battery.changes(before, after) == {
        "change/stop_rate": {"value": 0.25, "n": 4, "ci95": list(paired_wilson(both=1, only_a=2, only_b=1, neither=0))}}
    with pytest.raises(ValueError, match="equally many"):
        battery.changes({"stop_rate": [0.0]}, {"stop_rate": [0.0, 1.0]})


@pytest.fixture(scope="module")
def tiny():
    """A random two-layer model and the project's tokenizer: its answers mean nothing, but they differ."""
    tokenizer = train_tokenizer([d["text"] for d in itertools.islice(curriculum.documents(0), 300)], vocab_size=500, context_length=256)
    model = build_decoder(decoder_config(tokenizer, hidden_size=32, num_layers=2, num_heads=2, context_length=256), seed=0)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, tokenizer


def sit(tiny, chat, **changes):
    """An exam in which many tokens end an answer, so that some of the random answers stop."""
    model, tokenizer = tiny
    problems = [p.as_row() for p in itertools.islice(curriculum.problems(0, split="validation", difficulties=(1, 2)), 10)]
    exact = list(itertools.islice(instructions(0, split="validation"), 5))
    settings = {"stop_ids": list(range(0, len(tokenizer), 40)), "problems": problems, "instructions": exact, "benchmarks": [FOREIGN],
                "seed": 0, "max_new_tokens": 12, "instruction_tokens": 8}
    return battery.exam(model, tokenizer, chat=chat, **settings | changes)


@pytest.mark.parametrize("chat", [False, True])
def test_exams_of_a_model_pair_with_each_other(tiny, chat):
    tiny[0].train()
    columns = sit(tiny, chat)
    assert tiny[0].training  # as it was
    lengths = {"stop_rate": 20, "format_rate": 20, "worked_accuracy": 10, "direct_accuracy": 10, "instructions": 5, "benchmark/foreign": 1}
    assert {name: len(columns[name]) for name in lengths} == lengths
    assert 0 < sum(columns["stop_rate"]) < 20  # some stop, some do not: what is compared below can differ
    assert sit(tiny, chat, batch_size=3) == columns
    assert all(change["value"] == 0 for change in battery.changes(columns, sit(tiny, chat)).values())
    assert sit(tiny, chat, stop_ids=[len(tiny[1]) - 1])["stop_rate"] != columns["stop_rate"]  # the ids given are those that end


@pytest.mark.parametrize("world", [3, 27])
def test_the_number_of_processes_changes_nothing(tiny, monkeypatch, world):
    alone, parts = sit(tiny, True), []
    monkeypatch.setattr(battery, "world_size", lambda: world)
    monkeypatch.setattr(battery, "gather", lambda rows: parts.append(rows) or rows)
    for rank in range(world):
        monkeypatch.setattr(battery, "rank", lambda rank=rank: rank)
        sit(tiny, True)
    assert [len(part) for part in parts] == [len(range(rank, 26, world)) for rank in range(world)]  # each its share, some none
    monkeypatch.setattr(battery, "gather", lambda rows: [row for part in parts for row in part])
    assert sit(tiny, True) == alone


def test_a_model_in_memory_answers_as_the_saved_one(tiny, tmp_path):
    model, tokenizer = tiny
    save_model(model, tokenizer, tmp_path)
    end = tokenizer.convert_tokens_to_ids(END)
    saved, held = (LocalModel(tmp_path, seed=0, batch_size=4),
                   LocalModel.of(model, tokenizer, stop_ids=[end], seed=0, batch_size=4))
    row, style = PROBLEMS[0], battery._style(True, curriculum.CUES, 12)
    requests = [next(battery.strategies.direct(row, style))[0], next(battery.strategies.zero_shot_cot(row, style))[0]]
    assert held.generate(requests) == saved.generate(requests)
    user = {"role": "user", "content": f"{row['question']} {curriculum.CUES['direct']}"}
    assert held.encode(requests[0].prompt) == chat_ids(tokenizer, [user], ask=True)  # as fine-tuning writes it
