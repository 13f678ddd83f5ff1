"""Which questions an evaluation asks, by which strategy, and how their answers get to disk as they come."""
import hashlib
import inspect
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from prompts import strategies
from prompts.allocation import budgeted
from prompts.critique import critique_redo, self_refine
from prompts.records import Request, Strategy
from prompts.search import Puzzle, Search, check_search, tree_of_thought
from prompts.templates import DIRECT, WORKED, Style
from prompts.thoughts import game_of_24, worked_steps
from prompts.voting import stopper
from stages.evals import journal, scoring
from stages.evals.backends import LocalModel
from stages.evals.endpoint import Endpoint
from stages.evals.judge import reward_judge
from stages.evals.scheduler import Backend, Judge, run
from stages.evals.tasks import Task
from stages.evals.vllm_engine import check_installed
from stages.models.training import barrier, rank, world_size
from stages.run.config import StageConfig, fill, option
from stages.run.console import progress, table
from stages.run.manifest import Run, hash_data, is_main, say

MODELS = {"base": ("pretrain", False), "base_chat": ("pretrain", True), "sft": ("sft", True), "ppo": ("ppo", True),
          "endpoint": ("", True)}  # run, chat
USUAL = ("direct", "few_shot", "zero_shot_cot", "few_shot_cot", "self_consistency")
STRATEGIES = (*USUAL, "two_stage_cot", "adaptive_consistency", "weighted_vote", "best_of_n", "budgeted", "self_refine",
              "critique_redo", "tree_of_thought")
PROBE = 50  # prompts measured to foresee the tokens of all
ENDPOINT_SETTINGS = inspect.signature(Endpoint).parameters.keys() - {"seed"}
Cell = tuple[str, str, str]  # model, task, strategy


@dataclass(frozen=True, kw_only=True)
class AskingConfig(StageConfig):
    """What decides the requests of an evaluation."""

    models: dict[str, list[str]] = option(
        {"base": list(USUAL), "base_chat": ["zero_shot_cot"], "sft": list(USUAL), "ppo": list(USUAL)},
        f"strategies for each of {', '.join(MODELS)}: {', '.join(STRATEGIES)}")
    shots: int = option(2, "examples in a few-shot prompt")
    num_samples: int = option(8, "chains that vote in self-consistency, or that are chosen from; at most, where a rule stops")
    temperature: float = option(1.0, "temperature of these chains")
    chain_shots: int = option(0, "examples before each of these chains")
    round_size: int | None = option(None, "draw chains in rounds and stop when settled (then no figure for one sampled chain)")
    stop: str = option("beta:0.95", "adaptive_consistency: beta:0.95, window:5 or binomial:0.05")
    budget: int = option(256, "budgeted: generated tokens a question, on average over a cell")
    refine_rounds: int = option(2, "self_refine, critique_redo: reviews at most")
    tree: dict[str, Any] = option({}, "tree_of_thought: order, thoughts, judge, width, beam, depth, threshold, judgements, temperature, "
                                 "nodes")
    step_tokens: int = option(32, "tokens of a thought, a proposal or a valuation")
    max_tokens_worked: int = option(96, "tokens of a worked answer")
    max_tokens_direct: int = option(16, "tokens of a direct answer")
    cues: dict[str, str] = option({}, "phrases for `worked` and `direct`, instead of those that belong to the task")
    system: str | None = option(None, "system turn of every chat")
    batch_size: int = option(256, "rows decoded together; changes speed only", recorded_only=True)
    dtype: Literal["float32", "bfloat16"] = option("float32", "precision of the model")
    engine: Literal["transformers", "vllm"] = option("transformers", "what runs the models: transformers, or vllm where it is installed")
    endpoint: dict[str, Any] = option({}, "of the model `endpoint`, asked over HTTP in OpenAI's protocol: url, model; timeout_s, retries, "
                                      "wait_s, connections, key_variable as you like")


def check(config: AskingConfig) -> None:
    """Raises ValueError for a model or strategy that does not exist and for settings under which nothing can be asked."""
    for model, chosen in config.models.items():
        if model not in MODELS:
            raise ValueError(f"unknown model {model!r} in models: choose from {', '.join(MODELS)}")
        if unknown := set(chosen) - set(STRATEGIES):
            raise ValueError(f"unknown strategy {sorted(unknown)[0]!r} for {model}: choose from {', '.join(STRATEGIES)}")
    if unknown := set(config.cues) - {WORKED, DIRECT}:
        raise ValueError(f"unknown cue {sorted(unknown)[0]!r}: choose from worked, direct")
    if not any(config.models.values()):
        raise ValueError("nothing to evaluate: give at least one task, and one model with a strategy")
    if config.engine == "vllm":
        check_installed()
    if config.models.get("endpoint") and not {"url", "model"} <= config.endpoint.keys():
        raise ValueError("the model `endpoint` needs to know where it is: set endpoint to {url: http://localhost:8000/v1, model: its name}")
    if unknown := config.endpoint.keys() - ENDPOINT_SETTINGS:
        raise ValueError(f"unknown setting {min(unknown)!r} of endpoint: choose from {', '.join(sorted(ENDPOINT_SETTINGS))}")
    if any("budgeted" in chosen for chosen in config.models.values()) and config.budget < config.max_tokens_worked:
        raise ValueError(f"budgeted: a budget of {config.budget} tokens a question does not pay for one worked answer: set it to at least "
                         f"max_tokens_worked, {config.max_tokens_worked}")
    stopper(config.stop)
    fill(Search, config.tree, where="tree")


def cells(config: AskingConfig, tasks: Sequence[Task]) -> list[Cell]:
    return [(model, task.name, strategy) for model, chosen in config.models.items() for task in tasks for strategy in chosen]


def file_of(model: str, task: str, strategy: str) -> Path:
    return Path("results") / model / f"{task}.{strategy}.jsonl"


def first_prompts(config: AskingConfig, tasks: Sequence[Task]) -> list[str]:
    """A hash of what each cell asks first, over its problems: cells answered under other words are out of date."""
    by_name, hashes = {task.name: task for task in tasks}, []
    for model, task, strategy in cells(config, tasks):
        digest = hashlib.sha256()
        for request in first_requests(config, by_name[task], MODELS[model][1], strategy, by_name[task].rows):
            digest.update(hash_data(request.prompt).encode())
        hashes.append(digest.hexdigest())
    return hashes


def first_requests(config: AskingConfig, task: Task, chat: bool, name: str, rows: Sequence[dict]) -> Iterator[Request]:
    """The first request of each of these problems."""
    make = strategy_of(config, task, chat, "self_consistency" if name == "budgeted" else name)  # the same chains
    return (next(make(row))[0] for row in rows)  # type: ignore[misc]


def searches_by_reward(config: AskingConfig, tasks: Sequence[Task]) -> bool:
    return any(search_of(config, row).judge == "reward" for task in tasks for row in task.rows[:1])


def needs_judge(config: AskingConfig, tasks: Sequence[Task]) -> bool:
    """Whether a strategy asks for the reward model's scores."""
    named = {name for chosen in config.models.values() for name in chosen}
    return bool(named & {"weighted_vote", "best_of_n"}) or ("tree_of_thought" in named and searches_by_reward(config, tasks))


def search_of(config: AskingConfig, row: Mapping[str, Any]) -> Search:
    """How a problem's tree is searched: the settings, over what suits its kind."""
    usual: dict[str, Any] = {"thoughts": "propose", "depth": 3, "beam": 5, "width": 8, "judgements": 3, "temperature": .7} \
        if _is_game(row) else {"judge": "reward", "depth": 8}
    return Search(**usual | fill(Search, config.tree, where="tree"))


def _is_game(row: Mapping[str, Any]) -> bool:
    return row.get("verifier") == "game24"


def style_of(config: AskingConfig, task: Task, chat: bool) -> Style:
    return Style(chat=chat, cues={**task.cues, **config.cues}, system=config.system,
                 max_tokens={WORKED: config.max_tokens_worked, DIRECT: config.max_tokens_direct})


def strategy_of(config: AskingConfig, task: Task, chat: bool, name: str) -> Callable[[dict], Strategy]:
    """A strategy ready for a problem row (`budgeted` takes all rows of a cell instead: `budgeted_of`)."""
    style = style_of(config, task, chat)
    draws = {"n": config.num_samples, "temperature": config.temperature}

    def sampling(strategy: Callable[..., Strategy], **more: Any) -> Callable[[dict], Strategy]:
        return lambda row: strategy(row, style, task.examples(row, config.chain_shots, config.seed), **draws, **more)

    def tree(row: dict) -> Strategy:
        puzzle: Puzzle = game_of_24(row, style, step_tokens=config.step_tokens) if _is_game(row) else \
            worked_steps(row, style, task.examples(row, config.chain_shots, config.seed), step_tokens=config.step_tokens)
        search = search_of(config, row)
        check_search(search, puzzle)
        return tree_of_thought(row, style, puzzle, search)

    def shown(strategy: Callable[..., Strategy]) -> Callable[[dict], Strategy]:
        return lambda row: strategy(row, style, task.examples(row, config.shots, config.seed))

    return {"direct": lambda row: strategies.direct(row, style),
            "few_shot": shown(strategies.few_shot),
            "zero_shot_cot": lambda row: strategies.zero_shot_cot(row, style),
            "few_shot_cot": shown(strategies.few_shot_cot),
            "two_stage_cot": lambda row: strategies.two_stage_cot(row, style),
            "self_consistency": sampling(strategies.self_consistency, round_size=config.round_size),
            "adaptive_consistency": sampling(strategies.self_consistency, stop=config.stop),
            "weighted_vote": sampling(strategies.weighted_vote),
            "best_of_n": sampling(strategies.best_of_n),
            "self_refine": lambda row: self_refine(row, style, rounds=config.refine_rounds),
            "critique_redo": lambda row: critique_redo(row, style, rounds=config.refine_rounds, temperature=config.temperature),
            "tree_of_thought": tree}[name]


def budgeted_of(config: AskingConfig, task: Task, chat: bool, rows: Sequence[dict]) -> Any:
    """The one strategy over all problems of a cell."""
    shown = [task.examples(row, config.chain_shots, config.seed) for row in rows]
    return budgeted(rows, shown, style_of(config, task, chat), budget=config.budget * len(rows), most=4 * config.num_samples,
                    temperature=config.temperature)


def at_most(config: AskingConfig, row: Mapping[str, Any], name: str) -> tuple[int, int]:
    """(requests, generated tokens) that a strategy asks for one problem at most; of `budgeted`, on average over a cell at most."""
    n, worked, direct = config.num_samples, config.max_tokens_worked, config.max_tokens_direct
    refined = 1 + 2 * config.refine_rounds
    if name in ("direct", "few_shot"):
        return 1, direct
    if name == "tree_of_thought":
        search = search_of(config, row)
        grown = search.nodes if search.order == "depth" else 1 + search.beam * (search.depth - 1)  # states that are extended
        asked = grown * (1 if search.thoughts == "propose" else search.width)
        judged = search.judgements * (grown * search.width if search.judge == "value" else
                                      search.depth if search.judge == "vote" else 0)
        return asked + judged + (grown * search.width if search.judge == "reward" else 0), (asked + judged) * config.step_tokens
    return {"zero_shot_cot": (1, worked), "few_shot_cot": (1, worked), "two_stage_cot": (2, worked + direct),
            "self_consistency": (n, n * worked), "adaptive_consistency": (n, n * worked), "weighted_vote": (2 * n, n * worked),
            "best_of_n": (2 * n, n * worked), "budgeted": (4 * n, config.budget),
            "self_refine": (refined, refined * worked), "critique_redo": (refined, refined * worked)}[name]


def ask(config: AskingConfig, run_: Run, tasks: Sequence[Task]) -> None:
    """Answer every question that is not on disk yet, each process its share, and leave a whole file for every cell.

    Finished questions go to `asked/` at once, a file a process, and are put together in `results/` when a model has answered all.
    """
    by_name = {task.name: task for task in tasks}
    missing = [cell for cell in cells(config, tasks) if not (run_.directory / file_of(*cell)).is_file()]
    if is_main():
        for cell in missing:
            journal.repair(parts_of(run_.directory, cell))
            journal.repair(draws_of(run_.directory, cell))
    barrier()  # all have looked before the first cell is written, and no line is cut
    done = {cell: set(journal.places(parts_of(run_.directory, cell))) for cell in missing}
    barrier()  # and all know what is there before the first appends
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    judge = reward_judge(run_.parents["reward_model"].product("model"), device=device, batch_size=config.batch_size) \
        if "reward_model" in run_.parents else None
    total = sum(at_most(config, row, cell[2])[0] for cell in missing for row in _share(cell, missing, by_name[cell[1]].rows)
                if row["id"] not in done[cell])
    bar: Any = progress((), "answers", total=total)
    with bar:  # gone before an error is said
        for parent in dict.fromkeys(MODELS[model][0] for model, _, _ in missing):
            chosen = [cell for cell in missing if MODELS[cell[0]][0] == parent]
            backend: Backend = LocalModel(
                run_.parents[parent].product("model"), seed=config.seed, batch_size=config.batch_size, device=device, dtype=config.dtype,
                engine=config.engine) if parent else Endpoint(seed=config.seed, **config.endpoint)
            if is_main():
                announce(config, by_name, chosen, backend)
            _answer(config, run_.directory, by_name, chosen, missing, done, backend, judge, bar)
            barrier()
            if is_main():
                for cell in chosen:
                    target = run_.directory / file_of(*cell)
                    journal.merge(parts_of(run_.directory, cell), target, [row["id"] for row in by_name[cell[1]].rows])
    if is_main():
        shutil.rmtree(run_.directory / "asked", ignore_errors=True)  # empty folders by now
    barrier()


def _share(cell: Cell, missing: Sequence[Cell], rows: Sequence[dict]) -> Sequence[dict]:
    """This process's problems of a cell: every n-th, or of a strategy over many questions all or none."""
    if cell[2] == "budgeted":
        return rows if missing.index(cell) % world_size() == rank() else []
    return rows[rank()::world_size()]


def _answer(config: AskingConfig, directory: Path, by_name: Mapping[str, Task], chosen: Sequence[Cell], missing: Sequence[Cell],
            done: Mapping[Cell, set[str]], backend: Backend, judge: Judge | None, bar: Any) -> None:
    """All cells of one model at once: their requests share batches. A generator is made when its turn comes, and no earlier."""
    journals = {cell: journal.Journal(parts_of(directory, cell), rank()) for cell in chosen}
    owners: dict[int, tuple[Cell, list[dict]]] = {}  # of the strategies at work

    def jobs() -> Iterator[Any]:
        place = 0
        for cell in chosen:
            task, chat = by_name[cell[1]], MODELS[cell[0]][1]
            rows = _share(cell, missing, task.rows)
            if cell[2] == "budgeted":
                if any(row["id"] not in done[cell] for row in rows):  # begun again: its questions share a budget
                    owners[place] = (cell, list(rows))
                    place += 1
                    yield journal.remembered(budgeted_of(config, task, chat, rows), draws_of(directory, cell))
                continue
            make = strategy_of(config, task, chat, cell[2])
            for row in rows:
                if row["id"] not in done[cell]:
                    owners[place] = (cell, [row])
                    place += 1
                    yield make(row)

    # A batch is on disk when all of it is answered: of a server, which need not be filled with rows, no more than it works on at a time.
    together = 4 * (backend.connections if isinstance(backend, Endpoint) else config.batch_size)
    for place, returned in run(jobs(), backend, batch_size=together, judge=judge, advance=bar.update):
        cell, rows = owners.pop(place)
        for row, solution in zip(rows, returned if isinstance(returned, list) else [returned], strict=True):
            if row["id"] not in done[cell]:
                journals[cell].append(scoring.record(row, solution))
            bar.update(at_most(config, row, cell[2])[0] - solution.cost.requests)  # what it could have asked and did not
    for each in journals.values():
        each.close()


def parts_of(directory: Path, cell: Cell) -> Path:
    return directory / "asked" / cell[0] / f"{cell[1]}.{cell[2]}"


def draws_of(directory: Path, cell: Cell) -> Path:
    return directory / "asked" / "draws" / cell[0] / f"{cell[1]}.{cell[2]}"


def announce(config: AskingConfig, by_name: Mapping[str, Task], chosen: Sequence[Cell], backend: Backend) -> None:
    """What the cells of a model will cost at most, before they are asked. Prompts are taken to be as long as the first ones, which is
    too little where later ones hold what was said before (reviews, trees)."""
    shown = []
    for model, name, strategy in chosen:
        task = by_name[name]
        each = [at_most(config, row, strategy) for row in task.rows]
        requests = sum(r for r, _ in each)
        prompts = "?"
        if isinstance(backend, LocalModel):
            lengths = [len(backend.encode(r.prompt)) for r in first_requests(config, task, MODELS[model][1], strategy, task.rows[:PROBE])]
            prompts = f"{requests * sum(lengths) / len(lengths):,.0f}"
        shown.append([model, name, strategy, f"{len(each):,}", f"{requests:,}", prompts, f"{sum(t for _, t in each):,}"])
    say(table(["model", "task", "strategy", "problems", "requests at most", "prompt tokens", "generated at most"], shown))
