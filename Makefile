# Plumbline: raw text -> pretraining -> SFT -> preferences -> reward model -> PPO -> evaluation. `make help` lists the targets.
RECIPE ?= tiny
ARGS ?=
PYTHON ?= python3
PIP_FLAGS ?=
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 1)
RUNS = $(or $(PLUMBLINE_RUNS),runs)

GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU)
ACCELERATE ?= $(if $(filter 0,$(GPUS)),cpu,$(if $(filter 1,$(GPUS)),gpu,ddp))
# Several nodes: the same command on each, with these in the environment.
MAIN_PORT ?= 29500
NODES = $(if $(NUM_MACHINES),--num_machines $(NUM_MACHINES) --machine_rank $(MACHINE_RANK) --main_process_ip $(MAIN_ADDRESS) \
	--main_process_port $(MAIN_PORT) --num_processes $(shell expr $(NUM_MACHINES) \* $(GPUS)))
PROCESSES = $(if $(NUM_MACHINES),,$(if $(filter-out cpu cpu-bf16 cpu-2 gpu,$(ACCELERATE)),--num_processes $(GPUS)))

PY := .venv/bin/python
PIP = $(PY) -m pip install -q --disable-pip-version-check $(PIP_FLAGS)
HAS = $(PY) -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$(1)') is None)"
LAUNCH = .venv/bin/accelerate launch --config_file recipes/accelerate/$(ACCELERATE).yaml -q $(NODES) $(PROCESSES)
# A stage that was told to go (SIGTERM) ends with 143 here; accelerate launch itself makes a 1 of any failure.
# ARGS goes to the stages named on the command line (rlhf names three), not to those that run because others need them.
STAGE = $(if $(wildcard recipes/accelerate/$(ACCELERATE).yaml),,$(error ACCELERATE=$(ACCELERATE): choose from \
	$(basename $(notdir $(wildcard recipes/accelerate/*.yaml)))))$(LAUNCH) -m stages.$(1) --config recipes/$(RECIPE)/$(1).yaml $(if $(filter $(1) $(GROUP_$(1)),$(MAKECMDGOALS)),$(ARGS)) $(2) \
	|| (test -e $(RUNS)/$(RECIPE)/$(1).partial/PREEMPTED && exit 143)
GROUP_preferences := rlhf
GROUP_reward_model := rlhf
GROUP_ppo := rlhf
GROUP_evaluation := evaluate
# Before the first of them begins, names are checked for all that run: those that get ARGS, and those that these need.
STAGES = prepare $(if $(filter 0,$(LADDER)),,$(if $(wildcard recipes/$(RECIPE)/scaling.yaml),scaling)) pretrain sft preferences reward_model \
	ppo rejection_sampling evaluation report plan export adopt chat
NAMED = $(foreach stage,$(STAGES),$(if $(filter $(stage) $(GROUP_$(stage)),$(MAKECMDGOALS)),$(stage)))
NEEDED = $(if $(filter scaling pretrain,$(MAKECMDGOALS)),prepare) $(if $(filter pretrain,$(MAKECMDGOALS)),$(filter scaling,$(STAGES)))

.PHONY: help setup checked prepare scaling pretrain sft preferences reward_model ppo rejection_sampling rlhf evaluation evaluate report status \
	test test-quick test-browser annotate check plan study-sc study-seeds study-sft study-ranked study-gate study-hh study-alarms study-curves \
	study-critique bench-pretrain bench-sft bench-reward bench-ppo bench-eval study-ppo-peers rewardbench lm-eval test-lm-eval bench-prepare \
	bench-gpu test-gpu study-moe study-lr study-exemplars export adopt chat test-clients audit lock faults engines clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z][a-zA-Z_-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20
	@echo; echo "RECIPE=$(RECIPE)  ACCELERATE=$(ACCELERATE)  ARGS='--key value ...' overrides settings of the stages named"

# By hash where there are hashes. torch comes after: the lock names all it needs but the CUDA packages, which torch itself pins.
.venv/.installed: requirements.lock requirements-hashes.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) --require-hashes --no-deps -r requirements-hashes.lock
	$(PIP) -c requirements.lock torch
	$(PIP) --no-deps -e .
	@touch $@

setup: .venv/.installed ## install the pinned packages into .venv

checked: setup
	@$(PY) -m stages.run.check "$(RECIPE)" "$(strip $(NEEDED))" "$(strip $(NAMED))" $(ARGS)

prepare: checked ## raw text to tokens, tokenizer and problem sets
	$(call STAGE,prepare)

scaling: prepare ## a ladder of small models and the prediction for the main one (LADDER=0 leaves it out)
	$(if $(filter 0,$(LADDER)),@echo "scaling: left out",$(if $(wildcard recipes/$(RECIPE)/scaling.yaml),$(call STAGE,scaling),\
		@echo "scaling: recipe $(RECIPE) has no ladder"))

pretrain: scaling ## prepare, scaling, then the main model
	$(call STAGE,pretrain)

sft: checked ## supervised fine-tuning (LoRA) of the pretrained model
	$(call STAGE,sft)

preferences: checked ## sample responses of the SFT model and rank them
	$(call STAGE,preferences)

annotate: setup ## the page on which people rank responses: ARGS="--items FILE --out labels.jsonl" (docs/annotate.md)
	@$(call HAS,gradio) || $(PIP) -c requirements.lock -r requirements-annotate.lock
	$(PY) -m reward.annotate $(ARGS)

reward_model: checked ## train the reward model on the rankings
	$(call STAGE,reward_model)

ppo: checked ## PPO against the reward model
	$(call STAGE,ppo)

rejection_sampling: checked ## PPO's baseline: sample K, keep the best, fine-tune again
	$(call STAGE,rejection_sampling)

rlhf: preferences reward_model ppo status ## preferences, reward_model, ppo

evaluation: checked ## base, SFT and PPO model under every prompting strategy
	$(call STAGE,evaluation)

evaluate: evaluation ## the same as evaluation

report: checked ## runs/RECIPE/report/index.html and report.md; AGAINST=recipe or folder: two runs beside one another
	$(call STAGE,report,$(if $(AGAINST),--against $(AGAINST)))
	@$(PY) -m stages.run.status $(RECIPE)

status: setup ## what of RECIPE is finished, running, interrupted, out of date and why, or missing; time, memory, disk
	@$(PY) -m stages.run.status $(RECIPE)

export: checked ## a finished model as a folder for other programs: ARGS="--stage sft" (default ppo; docs/export.md)
	$(PY) -m stages.export --recipe $(RECIPE) $(ARGS)

adopt: checked ## a model trained elsewhere in a stage's place: ARGS="--stage sft --model DIR" (docs/export.md)
	$(PY) -m stages.adopt --recipe $(RECIPE) $(ARGS)

chat: checked ## talk with a product in the terminal: ARGS="--stage sft" (default ppo; docs/export.md)
	@$(PY) -m stages.chat --recipe $(RECIPE) $(ARGS)

plan: checked ## parameters, FLOPs, memory and hours of RECIPE, without training
	$(PY) -m stages.plan --recipe $(RECIPE) $(ARGS)

study-sc: setup ## self-consistency against greedy chain of thought, pooled over seeds
	$(PY) -m stages.evals.study_sc $(ARGS)

study-seeds: setup ## the whole road at seeds 0, 1 and 2, averaged (over an hour)
	$(PY) -m stages.evals.study_seeds $(ARGS)

study-sft: setup ## what fine-tuning teaches and forgets: methods and remedies over seeds (40 minutes; needs make prepare)
	$(PY) -m stages.evals.study_sft $(ARGS)

study-ranked: setup ## labelled prompts that a reward model needs with rankings of 8 and with pairs, over seeds (40 minutes; needs make prepare)
	$(PY) -m stages.evals.study_ranked $(ARGS)
rewardbench: setup ## a reward model on pairwise and best-of-n benchmarks: ARGS="--model DIR --data FILE_OR_HUB_ID"
	$(PY) -m stages.evals.rewardbench $(ARGS)

study-gate: setup ## does what is measured of a reward model foretell what PPO does on it: 24 models (40 minutes; needs make prepare)
	$(PY) -m stages.evals.study_gate $(ARGS)

study-moe: setup ## dense decoders against mixtures of experts over budgets and seeds: 27 runs (half an hour; needs make prepare)
	$(PY) -m stages.evals.study_moe $(ARGS)

study-lr: setup ## is the learning rate that a rule carries across widths near the best: 20 runs (20 minutes; needs make prepare)
	$(PY) -m stages.evals.study_lr $(ARGS)

study-hh: setup ## a reward model on HH-RLHF's pairs against TF-IDF and length, five folds (half an hour; docs/real-input.md)
	$(PY) -m stages.evals.study_hh $(ARGS)

study-alarms: setup ## alarms of reward hacking: lead before the gold peak, false alarms, and what helps (two hours; needs make prepare)
	$(PY) -m stages.evals.study_alarms $(ARGS)

study-curves: setup ## PPO's curves in a sound run and with one thing broken at a time: 17 runs (25 minutes; needs make prepare)
	$(PY) -m stages.evals.study_curves $(ARGS)

study-critique: setup ## can a model find the first wrong step, and does that help its answers (over an hour; needs make sft)
	$(PY) -m stages.evals.study_critique $(ARGS)

bench-prepare: setup ## MB/s and tokens/s of preparing 10 MB and 1 GB of text, and the memory it takes (half an hour)
	$(PY) -m stages.evals.bench_prepare $(ARGS)

study-exemplars: setup ## accuracy against exemplars in the prompt, and inference against training compute, over sizes (two to three hours; needs make sft rlhf)
	$(PY) -m stages.evals.study_exemplars $(ARGS)

bench-pretrain: setup ## tokens/s of pretraining, its share of the machine's matrix-product rate, where a step goes, by size and setting (half an hour)
	$(PY) -m stages.evals.bench_pretrain $(ARGS)

bench-sft: setup ## tokens/s and memory of fine-tuning: padded, flat, packed, and TRL's own trainer (needs make prepare)
	$(PY) -m stages.evals.bench_sft $(ARGS)

bench-reward: setup ## comparisons/s and memory of reward training on rankings of 8, beside TRL's RewardTrainer
	$(PY) -m stages.evals.bench_reward $(ARGS)

bench-gpu: setup ## on GPUs: MFU and memory at the shapes of recipes, compiled and under FSDP2; samples/s of PPO, by vLLM where it is (docs/gpus.md)
	$(PY) -m stages.evals.bench_pretrain --launch gpu --sizes 100m 350m --variants muon adamw "adamw, compile" "adamw, documents, compile"
	$(PY) -m stages.evals.bench_pretrain --launch gpu --sizes 1b --variants adamw "adamw, compile"
	$(PY) -m stages.evals.bench_pretrain --launch fsdp2 --sizes 100m 1b --variants adamw
	$(PY) -m stages.evals.bench_ppo --gpu --sizes 100m --batch-size 256 --variants critic lora $$($(call HAS,vllm) && echo vllm)

test-gpu: setup ## what needs a CUDA device; each test says why where it is left out
	HF_HUB_OFFLINE=1 $(PY) -m pytest -q -rs -m gpu

# The peer of bench-ppo: all packages of requirements.lock but trl.
.venv-trl112/.installed: requirements.lock requirements-trl112.lock
	$(PYTHON) -m venv .venv-trl112
	grep -v '^trl==' requirements.lock | cat - requirements-trl112.lock > .venv-trl112/requirements.txt
	.venv-trl112/bin/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -r .venv-trl112/requirements.txt
	@touch $@

bench-ppo: setup .venv-trl112/.installed ## samples/s, split of the time and memory of PPO, beside TRL 1.12's PPO and TRL's GRPO (20 minutes)
	$(PY) -m stages.evals.bench_ppo $(ARGS)

study-ppo-peers: setup .venv-trl112/.installed ## wall time to the same gold score: our PPO, TRL 1.12's, GRPO (over an hour; needs make sft rlhf)
	$(PY) -m stages.evals.study_ppo_peers $(ARGS)

# lm-eval wants an older python-dateutil than requirements.lock has, so it gets an environment of its own.
.venv-lm-eval/.installed: requirements.lock requirements-lm-eval.lock
	$(PYTHON) -m venv .venv-lm-eval
	grep -v '^python-dateutil==' requirements.lock | cat - requirements-lm-eval.lock > .venv-lm-eval/requirements.txt
	.venv-lm-eval/bin/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -r .venv-lm-eval/requirements.txt
	@touch $@

lm-eval: .venv-lm-eval/.installed ## lm-eval as it is: ARGS="--model hf --model_args pretrained=runs/tiny/sft/model --tasks ..." (docs/evaluation.md)
	.venv-lm-eval/bin/lm_eval $(ARGS)

bench-eval: setup .venv-lm-eval/.installed ## questions/s and memory of self-consistency, all chains and adaptive, beside lm-eval (20 minutes; needs make sft)
	$(PY) -m stages.evals.bench_eval $(ARGS)

test-lm-eval: .venv-lm-eval/.installed ## greedy answers are lm-eval's, document by document
	HF_HUB_OFFLINE=1 .venv-lm-eval/bin/python -m pytest -q tests/test_evals_lm_eval.py

# The oldest transformers that an export has to load in, and ctranslate2, which is pinned below transformers 5.
.venv-clients/.installed: requirements-clients.lock
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -r requirements-clients.lock
	@touch $@

test-clients: setup .venv-clients/.installed ## exported models in transformers 4.57 and ctranslate2: equal logits and greedy tokens
	HF_HUB_OFFLINE=1 $(PY) -m pytest -q -m clients tests/test_export_clients.py

test: setup ## all tests, one full pass of the smoke recipe included
	HF_HUB_OFFLINE=1 $(PY) -m pytest -q

test-quick: setup ## without the slow ones
	HF_HUB_OFFLINE=1 $(PY) -m pytest -q -m "not slow and not browser"

faults: setup ## kill, signal, fill the disk, damage files, start twice: the same command then ends alike (an hour; docs/faults.md)
	OMP_NUM_THREADS=1 $(PY) -m tests.faults --runs $(RUNS)/faults $(ARGS)

engines: setup ## every training stage on DDP, FSDP2 and ZeRO with two CPU processes, and the matrix of docs/engines.md (half an hour)
	OMP_NUM_THREADS=1 $(PY) -m tests.engines --runs $(RUNS)/engines --page docs/engines.md $(ARGS)

test-browser: setup ## the annotation page and the report in a headless Chromium (installed beforehand, or named by CHROMIUM=)
	@$(call HAS,gradio) || $(PIP) -c requirements.lock -r requirements-annotate.lock
	@$(call HAS,playwright) || $(PIP) -c requirements.lock -c requirements-annotate.lock playwright==1.65.2
	$(PY) -m pytest -q -m browser tests/test_reward_annotate.py tests/test_report_browser.py

# A tool of its own each, in an environment of its own: neither is needed to run anything.
.venv-audit/.installed:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install -q --disable-pip-version-check pip-audit==2.10.1 uv==0.13.9
	@touch $@

lock: .venv-audit/.installed ## write requirements-hashes.lock anew after a change of requirements.lock (needs the network)
	grep -v '^torch==' requirements.lock > .venv-audit/plain.txt
	.venv-audit/bin/uv pip compile -q --no-config --no-deps --generate-hashes --universal --python-version 3.11 --no-header --no-annotate \
		.venv-audit/plain.txt -o .venv-audit/hashed.txt
	(sed -n '/^#/p' requirements-hashes.lock; cat .venv-audit/hashed.txt) > .venv-audit/new.txt && cp .venv-audit/new.txt requirements-hashes.lock

audit: .venv-audit/.installed ## known vulnerabilities of the pinned packages (needs the network, and says so when it could not look)
	@rm -f .venv-audit/found.json
	-@.venv-audit/bin/pip-audit --disable-pip --no-deps --progress-spinner off -f json -o .venv-audit/found.json -r requirements.lock
	@$(PYTHON) -m stages.run.audit .venv-audit/found.json

check: setup ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/mypy

clean: ## remove the runs of RECIPE
	rm -rf $(RUNS)/$(RECIPE)
