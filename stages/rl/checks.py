"""What can go wrong with what a policy learns from: scores that are no numbers, and rollouts that teach nothing."""
from stages.rl.rollouts import Experience
from stages.run.manifest import say


def warn_once(experience: Experience, missing_eos_penalty: float | None, warned: set[str]) -> None:
    """Say what makes this rollout worthless, each kind once a run (`warned` remembers them); the metrics go on saying it.

    Kinds: no response ended (`response/eos_rate` is 0), and all shaped scores equal (`reward/zero_variance` is 1).
    """
    metrics, count = experience.metrics, len(experience.responses)
    kinds = {}
    if metrics["response/eos_rate"] == 0:
        left = "keeps its score" if missing_eos_penalty is None else f"gets missing_eos_penalty {missing_eos_penalty:g} for a score"
        kinds["truncated"] = (f"none of {count} responses ended by itself, the longest has {experience.mask.size(1)} tokens; each {left}: "
                              "raise max_new_tokens, or tune the start until it ends what it says")
    if metrics["reward/zero_variance"]:
        kinds["variance"] = (f"all {count} responses of a rollout have the score {metrics['objective/shaped_score']:.4g}: nothing tells "
                             "them apart, and what is learned from is the KL and the critic's own errors; look at the reward, or at "
                             "score_clip")
    for kind, text in kinds.items():
        if kind not in warned:
            warned.add(kind)
            say(f"ppo: warning: {text} (said once; see response/eos_rate and reward/zero_variance)")
