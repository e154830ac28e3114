"""Somebody else's multi-task PPO on MiniGrid, with GMP and SET: the half of their paper that needs no simulator.

    python tests/transplants/mtppo_minigrid.py --tasks mt5 --method gmp          # half an hour on one core
    python tests/transplants/mtppo_minigrid.py --tasks mt5 --critic-epochs 8     # dense, with a critic that is trained

The paper's base is MOORE's code for MiniGrid (arXiv 2311.11385): an actor and a critic of the same shape, three shared
convolutions and a head per task. An epoch is 2000 steps of every task and one fit, in which the critic makes a single
step, on all samples (--critic-epochs: passes over minibatches). The lines marked "# GMP, SET" are ours; both count the
actor's updates, for the critic too, and act once per epoch, as the paper's 500 and 2000 timesteps can. The paper's SET
is --sparse-layers heads. The files of a run count the steps of all tasks together.

Where we differ from MOORE's code: a minibatch has 256 samples of each task, not 1280 of all together; episodes are
seeded by run, task and number, so evaluations see the same layouts every time; one evaluation in ten epochs.
"""

import argparse
import json
import math
import sys
import time
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
from lifting import lift

sys.path.append(str(Path(__file__).parents[2]))
from common import metrics
from common.envs import seed_of

gmp_set = lift("sparse_mtrl_gmp_set", 0)  # GMP, SET
TASKS = {"mt2": ["Empty-5x5", "Empty-Random-6x6"], "mt3": ["LavaGapS7", "RedBlueDoors-6x6", "MemoryS11"]}
TASKS["mt5"] = ["DoorKey-6x6", "LavaGapS7", "RedBlueDoors-6x6", "DistShift1", "MemoryS11"]
TASKS["mt7"] = [*TASKS["mt5"], "SimpleCrossingS9N2", "MultiRoom-N2-S4"]
BEST = dict(zip(TASKS["mt7"], (0.9725, 0.9633, 0.99, 0.9607, 0.9777, 0.9583, 0.8875), strict=True))  # returns; Table 4
TRAINING, EVALUATION = 1, 2  # streams of random numbers
IMAGE, ACTIONS = (3, 7, 7), 7  # object, colour and state of each cell in view: integers up to 10, not scaled
LEARNING_RATE, GAMMA, GAE_LAMBDA, CLIP_COEF, ENT_COEF = 1e-3, 0.99, 0.95, 0.2, 0.01


def parse_args(words=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--tasks", default="mt5", choices=TASKS, help="mt2 is easy and ours, the others are the paper's"
    )
    parser.add_argument("--method", default="dense", choices=["dense", "gmp", "set"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--run-dir", type=Path, help="folder of the run; by default a new one under runs/")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    parser.add_argument("--epochs", type=int, default=200, help="rollouts, each with a fit")
    parser.add_argument("--epoch-steps", type=int, default=2000, help="steps of each task in a rollout")
    parser.add_argument("--eval-every", type=int, default=10, help="epochs between evaluations")
    parser.add_argument("--eval-episodes", type=int, default=16, help="of each task, with sampled actions")
    parser.add_argument("--actor-epochs", type=int, default=8, help="passes over a rollout")
    parser.add_argument("--critic-epochs", type=int, default=1, help="1: one step on all samples; else as the actor")
    parser.add_argument("--minibatch", type=int, default=256, help="samples of each task")
    parser.add_argument("--sparsity", type=float, default=0.95, help="of each network's layers: GMP's at the end")
    parser.add_argument("--prune-every", type=int, default=64, help="updates between GMP's pruning steps")
    parser.add_argument("--prune-scope", default="global", choices=["global", "layer"], help="what GMP ranks together")
    parser.add_argument("--evolve-every", type=int, default=64, help="updates between SET's rewirings")
    parser.add_argument("--sparse-layers", default="all", choices=["all", "heads", "convolutions"])
    return parser.parse_args(words)


class TaskLinear(nn.Module):
    """A linear layer for each task: (tasks, batch, inputs) -> (tasks, batch, outputs)."""

    def __init__(self, tasks, inputs, outputs):
        super().__init__()
        bound = inputs**-0.5  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(tasks, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(tasks, 1, outputs).uniform_(-bound, bound))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


class Network(nn.Module):
    """Observations (tasks, batch, 3, 7, 7) -> (tasks, batch, outputs)."""

    def __init__(self, tasks, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 2)
        self.conv2 = nn.Conv2d(16, 32, 2)
        self.conv3 = nn.Conv2d(32, 64, 2)
        self.hidden = TaskLinear(tasks, 64 * 4 * 4, 128)
        self.output = TaskLinear(tasks, 128, outputs)

    def forward(self, x):
        h = F.relu(self.conv1(x.flatten(0, 1)))
        h = F.relu(self.conv2(h))
        h = torch.tanh(self.conv3(h))
        h = torch.tanh(self.hidden(h.flatten(1).view(*x.shape[:2], -1)))
        return self.output(h)


def make_envs(names):
    return [gym.make(f"minigrid:MiniGrid-{name}-v0", disable_env_checker=True).unwrapped for name in names]


def image(obs):
    return obs["image"].transpose(2, 0, 1)


def act(actor, obs, gumbel):
    """Sampled actions: the largest of logits + Gumbel noise has the softmax's probabilities. Any (tasks, batch)."""
    return (actor(torch.from_numpy(obs).float()) + gumbel).argmax(-1).tolist()


def gumbel_noise(*shape, generator=None):
    return -torch.empty(*shape, ACTIONS).exponential_(generator=generator).log()


@torch.inference_mode()
def rollout(actor, envs, seeds, steps):
    """`steps` steps of every task, from new episodes on: arrays (tasks, steps, ...). seeds: an iterator per task."""
    shape = (len(envs), steps)
    obs, next_obs = np.zeros((2, *shape, *IMAGE), np.uint8)
    actions, (rewards, terminated, truncated) = np.zeros(shape, np.int64), np.zeros((3, *shape), np.float32)
    noise = gumbel_noise(steps, len(envs), 1)
    now = np.stack([image(env.reset(seed=next(s))[0]) for env, s in zip(envs, seeds, strict=True)])
    for t in range(steps):
        obs[:, t] = now
        actions[:, t] = chosen = np.array(act(actor, now[:, None], noise[t]))[:, 0]
        for i, env in enumerate(envs):
            new, rewards[i, t], terminated[i, t], truncated[i, t], _ = env.step(chosen[i])
            next_obs[i, t] = now[i] = image(new)
            if terminated[i, t] or truncated[i, t]:
                now[i] = image(env.reset(seed=next(seeds[i]))[0])
    return obs, next_obs, actions, rewards, terminated, truncated


@torch.inference_mode()
def evaluate(actor, tasks, episodes, seed):
    """Undiscounted returns and lengths (tasks, episodes), all episodes in one batch, the same layouts every time."""
    envs = [make_envs([name] * episodes) for name in tasks]
    starts = [[seed_of(seed, EVALUATION, i, n) for n in range(episodes)] for i in range(len(tasks))]
    obs = np.stack([[image(envs[i][n].reset(seed=s)[0]) for n, s in enumerate(row)] for i, row in enumerate(starts)])
    returns, lengths, running = np.zeros(obs.shape[:2]), np.zeros(obs.shape[:2], int), np.ones(obs.shape[:2], bool)
    generator = torch.Generator().manual_seed(seed_of(seed, EVALUATION))
    while running.any():
        actions = act(actor, obs, gumbel_noise(*obs.shape[:2], generator=generator))
        for i, n in zip(*running.nonzero(), strict=True):
            new, reward, terminated, truncated, _ = envs[i][n].step(actions[i][n])
            obs[i, n], running[i, n] = image(new), not (terminated or truncated)
            returns[i, n] += reward
            lengths[i, n] += 1
    return returns, lengths


def gae(rewards, values, next_values, terminated, truncated):
    """Advantages (tasks, steps): a terminal state has the value 0; the sum ends with an episode and the rollout."""
    deltas = rewards + GAMMA * next_values * (1 - terminated) - values
    goes_on = (1 - terminated) * (1 - truncated)
    advantages, lastgaelam = torch.zeros_like(rewards), 0
    for t in reversed(range(rewards.shape[1])):
        advantages[:, t] = lastgaelam = deltas[:, t] + GAMMA * GAE_LAMBDA * goes_on[:, t] * lastgaelam
    return advantages


def normalised(advantages):
    """Of each task by itself."""
    return (advantages - advantages.mean(1, keepdim=True)) / (advantages.std(1, correction=0, keepdim=True) + 1e-8)


def log_prob(logits, actions):
    return torch.log_softmax(logits, -1).gather(-1, actions[..., None])[..., 0]


def actor_loss(logits, actions, old_log_prob, advantages):
    """The clipped surrogate and the bonus for entropy."""
    ratio = (log_prob(logits, actions) - old_log_prob).exp()
    clipped = ratio.clamp(1 - CLIP_COEF, 1 + CLIP_COEF)
    log_pi = torch.log_softmax(logits, -1)
    entropy = -(log_pi.exp() * log_pi).sum(-1)
    return -torch.min(ratio * advantages, clipped * advantages).mean() - ENT_COEF * entropy.mean()


def minibatches(tasks, steps, size, passes):
    """Indices (tasks, up to size) of `passes` passes, in an order of its own for each task."""
    for _ in range(passes):
        yield from torch.stack([torch.randperm(steps) for _ in range(tasks)]).split(size, 1)


class Agent:
    def __init__(self, args, tasks):
        self.args, self.updates, self.sparse = args, 0, []  # sparse: GMP or SET of the actor, of the critic
        self.networks = {"actor": Network(tasks, ACTIONS), "critic": Network(tasks, 1)}
        self.actor, self.critic = self.networks.values()
        self.optimizers = [torch.optim.Adam(n.parameters(), LEARNING_RATE, fused=True) for n in self.networks.values()]
        total = args.epochs * args.actor_epochs * math.ceil(args.epoch_steps / args.minibatch)  # GMP, SET
        for network, optimizer in zip(self.networks.values(), self.optimizers, strict=True):  # GMP, SET
            layers = list(network.children())  # GMP, SET
            layers = {"all": layers, "heads": layers[3:], "convolutions": layers[:3]}[args.sparse_layers]  # GMP, SET
            if args.method == "gmp":  # GMP, SET
                numbers = {"every": args.prune_every, "local": args.prune_scope == "layer"}  # GMP, SET
                self.sparse.append(gmp_set.GMP(layers, optimizer, total, args.sparsity, **numbers))  # GMP, SET
            elif args.method == "set":  # GMP, SET
                self.sparse.append(gmp_set.SET(layers, optimizer, args.sparsity, every=args.evolve_every))  # GMP, SET

    def step(self, index, loss):
        """One step of the actor (0) or the critic (1)."""
        self.optimizers[index].zero_grad()
        loss.backward()
        if self.sparse:  # GMP, SET
            self.sparse[index].before_step()  # GMP, SET
        self.optimizers[index].step()

    def fit(self, data):
        """One fit to a rollout; returns what there is to log."""
        args = self.args
        obs, next_obs, actions, rewards, terminated, truncated = map(torch.from_numpy, data)
        obs, rows, (tasks, steps) = obs.float(), torch.arange(len(obs))[:, None], rewards.shape
        with torch.no_grad():
            values, next_values = self.critic(obs)[..., 0], self.critic(next_obs.float())[..., 0]
            old_log_prob = log_prob(self.actor(obs), actions)
        advantages = gae(rewards, values, next_values, terminated, truncated)
        returns, advantages = values + advantages, normalised(advantages)
        size = args.minibatch if args.critic_epochs > 1 else steps
        for b in minibatches(tasks, steps, size, args.critic_epochs):
            self.step(1, F.mse_loss(self.critic(obs[rows, b])[..., 0], returns[rows, b]))
        for b in minibatches(tasks, steps, args.minibatch, args.actor_epochs):
            for sparse in self.sparse if self.updates and args.method == "set" else ():  # GMP, SET: a rollout would
                sparse.after_step()  # GMP, SET: play connections that were not trained yet
            batch = (x[rows, b] for x in (actions, old_log_prob, advantages))
            self.step(0, actor_loss(self.actor(obs[rows, b]), *batch))
            self.updates += 1
            for sparse in self.sparse if args.method == "gmp" else ():  # GMP, SET
                sparse.after_step()  # GMP, SET
        return {"explained_variance": float(1 - (returns - values).var() / returns.var())}

    def measure(self, obs):
        """Plasticity of both networks on a tenth of a rollout's observations, and the share of weights they have."""
        obs = torch.from_numpy(obs[:, ::10]).float()
        scalars = metrics.plasticity({name: (network, (obs,)) for name, network in self.networks.items()})
        scalars = {name: float(value) for name, value in scalars.items()}
        for (name, network), sparse in zip(self.networks.items(), self.sparse, strict=False):  # GMP, SET
            weights = sum(layer.weight.numel() for layer in network.children())  # GMP, SET
            missing = sum(int((~mask).sum()) for mask in sparse.masks)  # GMP, SET
            scalars[f"sparsity/{name}/density"] = 1 - missing / weights  # GMP, SET
        return scalars


def main(args):
    run = f"mtppo_minigrid__{args.tasks}__{args.method}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir, tasks = args.run_dir or Path("runs") / run, TASKS[args.tasks]
    if (run_dir / "results.json").exists():
        sys.exit(f"--run-dir {run_dir}: holds a finished run")
    run_dir.mkdir(parents=True, exist_ok=True)
    epoch_steps = args.epoch_steps * len(tasks)
    config = {"script": "mtppo_minigrid", "args": vars(args) | {"run_dir": str(run_dir)}}
    config |= {"total_steps": args.epochs * epoch_steps, "versions": {n: version(n) for n in ("torch", "minigrid")}}
    (run_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    agent, envs, start = Agent(args, len(tasks)), make_envs(tasks), time.monotonic()
    seeds = [map(partial(seed_of, args.seed, TRAINING, task), count()) for task in range(len(tasks))]
    evaluations, training = [], []
    for epoch in range(args.epochs + 1):
        if epoch:
            data = rollout(agent.actor, envs, seeds, args.epoch_steps)
            scalars = agent.fit(data)
        if epoch % args.eval_every and epoch < args.epochs:
            continue
        returns, lengths = evaluate(agent.actor, tasks, args.eval_episodes, args.seed)
        step, seconds, rows = epoch * epoch_steps, time.monotonic() - start, []
        for i, task in enumerate(tasks):
            row = {"global_step": step, "phase": 0, "task_index": i, "task": task, "episodes": args.eval_episodes}
            row |= {"episode_return": returns[i].mean(), "success": (returns[i] > 0).mean()}
            rows.append(row | {"episode_length": lengths[i].mean()})
        evaluations += rows
        pd.DataFrame(evaluations).to_csv(run_dir / "evaluations.csv", index=False)
        if epoch:
            normalised = np.mean([row["episode_return"] / BEST.get(row["task"], 1) for row in rows])
            scalars |= {"normalised_return": normalised} | agent.measure(data[0])
            training.append({"global_step": step} | scalars)
            pd.DataFrame(training).to_csv(run_dir / "training.csv", index=False)
        if not args.quiet:
            shown = ", ".join(f"{row['task']} {row['episode_return']:.2f}" for row in rows)
            togo = f", {seconds / epoch * (args.epochs - epoch) / 60:.0f} min to go" if epoch else ""
            print(f"epoch {epoch} of {args.epochs}: mean return {returns.mean():.3f} ({shown}){togo}", flush=True)

    scalars = {"mean_return": returns.mean(), "mean_success": (returns > 0).mean()} | scalars
    scalars |= {f"return/{row['task']}": row["episode_return"] for row in rows}
    results = {"script": "mtppo_minigrid", "seed": args.seed, "global_step": step, "wall_seconds": round(seconds, 3)}
    results |= {"steps_per_second": round(step / seconds, 3), "metrics": scalars | {"updates": agent.updates}}
    (run_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main(parse_args())
