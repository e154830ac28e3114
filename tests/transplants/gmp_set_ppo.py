"""Somebody else's multi-task PPO, in the idiom of CleanRL, on two tasks in a room that it sees as an image.

    python tests/transplants/gmp_set_ppo.py --method gmp

It prints the return of each task and what is left of the network. The lines marked "# GMP, SET" and "# ReDo" are ours.
"""

import argparse

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from lifting import lift
from torch.distributions.categorical import Categorical

gmp_set, redo = lift("sparse_mtrl_gmp_set", 0), lift("sparse_mtrl_gmp_set", 1)  # GMP, SET  # ReDo


IMAGE = (3, 4, 4)  # channels for the agent, the red door, the blue door


def parse_args(words=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--method", default="gmp", choices=["gmp", "set", "dense"])
    parser.add_argument("--redo-every", type=int, default=0, help="updates between ReDo's recyclings; 0: never")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--every", type=int, default=40, help="updates between changes of GMP or SET")
    parser.add_argument("--local", action="store_true", help="GMP ranks each layer by itself")
    parser.add_argument("--num-iterations", type=int, default=40)
    parser.add_argument("--num-envs", type=int, default=32, help="of each task")
    parser.add_argument("--num-steps", type=int, default=16)
    parser.add_argument("--update-epochs", type=int, default=4)
    parser.add_argument("--num-minibatches", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--gamma", type=float, default=0.9)
    parser.add_argument("--gae-lambda", type=float, default=0.95)
    parser.add_argument("--clip-coef", type=float, default=0.2)
    parser.add_argument("--ent-coef", type=float, default=0.01)
    parser.add_argument("--vf-coef", type=float, default=0.5)
    parser.add_argument("--max-grad-norm", type=float, default=0.5)
    return parser.parse_args(words)


class RoomEnvs:
    """Copies of a 4 x 4 room with a red and a blue door. Task 0 pays for the red one, task 1 for the blue one."""

    def __init__(self, task, num_envs, rng):
        self.task, self.rng = task, rng
        self.cells, self.t = np.zeros((num_envs, 3, 2), int), np.zeros(num_envs, int)  # agent, red, blue

    def reset(self, done=None):
        for i in range(len(self.t)) if done is None else done.nonzero()[0]:
            self.cells[i] = np.stack(np.divmod(self.rng.choice(16, 3, replace=False), 4), 1)
            self.t[i] = 0
        image = np.zeros((len(self.t), *IMAGE), np.float32)
        for channel in range(3):
            image[np.arange(len(self.t)), channel, *self.cells[:, channel].T] = 1
        return image

    def step(self, action):
        moves = np.array([[0, 1], [0, -1], [1, 0], [-1, 0]])
        self.cells[:, 0] = np.clip(self.cells[:, 0] + moves[action], 0, 3)
        self.t += 1
        at_door = (self.cells[:, 1:] == self.cells[:, :1]).all(2)
        done = at_door.any(1) | (self.t == 12)
        reward = at_door[:, self.task].astype(np.float32) - 0.5 * at_door[:, 1 - self.task]
        return self.reset(done), reward, done


class TaskLinear(nn.Module):
    """A linear layer for each task: (tasks, batch, inputs) or (tasks * batch, inputs) -> (tasks, batch, outputs)."""

    def __init__(self, tasks, inputs, outputs, std=2**0.5):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([nn.init.orthogonal_(torch.empty(inputs, outputs), std)] * tasks))
        self.bias = nn.Parameter(torch.zeros(tasks, 1, outputs))

    def forward(self, x):
        return torch.baddbmm(self.bias, x.view(len(self.weight), -1, x.shape[-1]), self.weight)


class Agent(nn.Module):
    def __init__(self, tasks):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 2, bias=False)
        self.conv2 = nn.Conv2d(16, 16, 2)
        self.fc = nn.Linear(16 * 2 * 2, 64)
        self.task_fc = TaskLinear(tasks, 64, 32)
        self.actor = TaskLinear(tasks, 32, 4, std=0.01)
        self.critic = TaskLinear(tasks, 32, 1, std=1.0)

    def forward(self, x):  # (tasks, batch, *IMAGE)
        x = F.relu(self.conv1(x.flatten(0, 1)))
        x = F.relu(self.conv2(x))
        x = F.relu(self.fc(x.flatten(1)))
        x = F.relu(self.task_fc(x))
        return self.actor(x), self.critic(x)[..., 0]

    def get_action_and_value(self, x, action=None):
        logits, value = self(x)
        probs = Categorical(logits=logits)
        action = probs.sample() if action is None else action
        return action, probs.log_prob(action), probs.entropy(), value


def train(args):
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    envs = [RoomEnvs(task, args.num_envs, rng) for task in range(2)]
    agent = Agent(len(envs))
    optimizer = optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    num_updates = args.num_iterations * args.update_epochs * args.num_minibatches
    layers = [agent.conv1, agent.conv2, agent.fc, agent.task_fc]  # GMP, SET
    sparse = None  # GMP, SET
    if args.method == "gmp":  # GMP, SET
        numbers = {"sparsity": args.sparsity, "every": args.every, "local": args.local}  # GMP, SET
        sparse = gmp_set.GMP(layers, optimizer, num_updates, **numbers)  # GMP, SET
    elif args.method == "set":  # GMP, SET
        sparse = gmp_set.SET(layers, optimizer, sparsity=args.sparsity, every=args.every)  # GMP, SET

    shape = (args.num_steps, len(envs), args.num_envs)
    obs, actions = torch.zeros(*shape, *IMAGE), torch.zeros(shape, dtype=torch.long)
    logprobs, rewards, dones, values = (torch.zeros(shape) for _ in range(4))
    next_obs, next_done = torch.tensor(np.stack([env.reset() for env in envs])), torch.zeros(shape[1:])
    returns_seen, update = [], 0
    for _ in range(args.num_iterations):
        for step in range(args.num_steps):
            obs[step], dones[step] = next_obs, next_done
            with torch.no_grad():
                actions[step], logprobs[step], _, values[step] = agent.get_action_and_value(next_obs)
            results = [env.step(action.numpy()) for env, action in zip(envs, actions[step], strict=True)]
            next_obs, reward, next_done = (torch.tensor(np.stack(x)).float() for x in zip(*results, strict=True))
            rewards[step] = reward
        returns_seen.append(rewards.sum((0, 2)) / (dones.sum((0, 2)) + 1))

        with torch.no_grad():
            next_value = agent(next_obs)[1]
            advantages, lastgaelam = torch.zeros_like(rewards), 0
            for t in reversed(range(args.num_steps)):
                last = t == args.num_steps - 1
                nextnonterminal = 1 - (next_done if last else dones[t + 1])
                nextvalues = next_value if last else values[t + 1]
                delta = rewards[t] + args.gamma * nextvalues * nextnonterminal - values[t]
                lastgaelam = delta + args.gamma * args.gae_lambda * nextnonterminal * lastgaelam
                advantages[t] = lastgaelam
            returns = advantages + values

        # (steps, tasks, envs, ...) -> (tasks, steps * envs, ...)
        batch = [x.transpose(0, 1).flatten(1, 2) for x in (obs, actions, logprobs, advantages, returns)]
        for _ in range(args.update_epochs):
            for mb_inds in torch.randperm(args.num_steps * args.num_envs).chunk(args.num_minibatches):
                mb_obs, mb_actions, mb_logprobs, mb_advantages, mb_returns = (x[:, mb_inds] for x in batch)
                _, newlogprob, entropy, newvalue = agent.get_action_and_value(mb_obs, mb_actions)
                ratio = (newlogprob - mb_logprobs).exp()
                mb_advantages = mb_advantages - mb_advantages.mean(1, keepdim=True)
                mb_advantages = mb_advantages / (mb_advantages.std(1, keepdim=True) + 1e-8)
                clipped = torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
                pg_loss = torch.max(-mb_advantages * ratio, -mb_advantages * clipped).mean()
                v_loss = 0.5 * ((newvalue - mb_returns) ** 2).mean()
                loss = pg_loss - args.ent_coef * entropy.mean() + args.vf_coef * v_loss

                optimizer.zero_grad()
                loss.backward()
                if sparse:  # GMP, SET
                    sparse.before_step()  # GMP, SET
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
                if sparse:  # GMP, SET
                    sparse.after_step()  # GMP, SET
                update += 1
                if args.redo_every and update % args.redo_every == 0:  # ReDo
                    masks = dict(zip(sparse.weights, sparse.masks, strict=True)) if sparse else None  # ReDo
                    levels = [*layers, [agent.actor, agent.critic]]  # ReDo
                    redo.recycle(levels, optimizer, lambda obs=mb_obs: agent(obs), 0.025, masks)  # ReDo
    return agent, optimizer, sparse, torch.stack(returns_seen)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _, _, sparse, returns = train(parse_args())
    for name, first, last in zip(("red door", "blue door"), returns[:5].mean(0), returns[-5:].mean(0), strict=True):
        print(f"{name}: return per episode {first:.2f} at first, {last:.2f} at last")
    if sparse:
        print("density of conv1, conv2, fc, task_fc:", *(f"{mask.float().mean():.3f}" for mask in sparse.masks))
