"""Does a task need its skill neurons more than others? What is left of a stored NBSP run's policies without them.

    python tests/benchmarks/ablate_neurons.py RUN_DIR --episodes 20

For each task of the run its final actor is scored as at a task's end. Then it plays the evaluation's episodes whole,
with its skill neurons silenced, and with as many random neurons of each layer silenced (mean of five draws, among those
that are not constant; skill neurons may be among them).
"""

import copy
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import nbsp
from common import metrics
from common.envs import make_env

RANDOM_DRAWS = 5
RANDOM_NEURONS = 4  # stream of random numbers


@dataclass
class Args:
    run_dir: tyro.conf.Positional[str]  # folder of a run of nbsp.py
    episodes: int = 20  # of each task and choice of neurons


def silenced(actor: nbsp.Actor, neurons: list[Tensor]) -> nbsp.Actor:
    """A copy whose hidden neurons in `neurons`, boolean (width,) for each layer, always output 0."""
    actor = copy.deepcopy(actor)
    for layer, off in zip(actor.hidden, neurons, strict=True):
        layer.register_forward_hook(lambda _, inputs, output, off=off: output.masked_fill(off, 0))
    return actor


def random_neurons(skill: list[Tensor], scores: list[Tensor], seed: tuple[int, ...]) -> list[Tensor]:
    """As many neurons of each layer as in `skill`, drawn from all that are not constant, as booleans like it."""
    generator, drawn = np.random.default_rng(seed), []
    for chosen, score in zip(skill, scores, strict=True):
        live = score.nonzero()[:, 0].numpy()
        rows = torch.from_numpy(generator.choice(live, int(chosen.sum()), replace=False))
        drawn.append(torch.zeros_like(chosen).index_fill(0, rows, True))
    return drawn


def ablation(actor: nbsp.Actor, args: nbsp.Args, task: int, env: gym.Env, one_hot: np.ndarray, episodes: int) -> dict:
    """Mean success and return on a task: `whole`, `without_skill`, `without_random`; neurons silenced in each layer.

    env: the task's environment as the policy of `nbsp.policy` takes it, without the one-hot.
    """
    seeing = gym.wrappers.TransformObservation(env, lambda obs: np.append(obs, one_hot), None)
    rollout = nbsp.score_rollout(actor, args, seeing, task, stop=lambda: False)
    q, measure = nbsp.goal_proximity(rollout, args.gpm)
    levels = [list(layer) for layer in actor.hidden] + [[actor.head]]
    scores = nbsp.neuron_scores(nbsp.hidden_activations(levels, lambda: actor(rollout["obs"])), q)
    skill = nbsp.skill_neurons(scores, args.skill_proportion)
    draws = [random_neurons(skill, scores, (args.seed, RANDOM_NEURONS, task, draw)) for draw in range(RANDOM_DRAWS)]
    report = {"scored_by": measure, "neurons_per_layer": [int(layer.sum()) for layer in skill]}
    for name, choices in {"whole": [None], "without_skill": [skill], "without_random": draws}.items():
        actors = [actor if neurons is None else silenced(actor, neurons) for neurons in choices]
        goals = (args.seed, nbsp.EVAL_GOALS, task)
        results = [metrics.evaluate(nbsp.policy(one, one_hot), env, episodes, goals) for one in actors]
        for result in ("success", "episode_return"):
            report[f"{result}_{name}"] = float(np.mean([row[result] for row in results]))
    return report


def main(options: Args) -> dict[str, dict]:
    """Print a line per task; -> the reports by task."""
    torch.set_num_threads(1)
    args, actor = nbsp.load_actor(options.run_dir)
    tasks, reports = nbsp.cycle_of(args), {}
    print(f"{'success':<34}{'whole':>10}{'without skill':>16}{'without random':>16}   silenced, scored by")
    for task, name in enumerate(tasks):
        with closing(make_env(name, seed=0)) as env:
            report = ablation(actor, args, task, env, nbsp.one_hots(args, tasks)[task], options.episodes)
        success = [report[f"success_{left}"] for left in ("whole", "without_skill", "without_random")]
        shown = "{:>10.2f}{:>16.2f}{:>16.2f}".format(*success)
        print(f"{name:<34}{shown}   {report['neurons_per_layer']}, {report['scored_by']}")
        reports[name] = report
    return reports


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
