"""Somebody else's SAC, in the idiom of CleanRL, on three toy tasks in turn. The lines marked "# SSDE" are ours.

    python tests/transplants/ssde_sac.py

It prints how well each task is done after each phase: what is learned stays.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from lifting import lift

ssde = lift("ssde")  # SSDE: what ssde.py's docstring says to copy


@dataclass
class Args:
    seed: int = 1
    steps_per_task: int = 400
    learning_starts: int = 100
    batch_size: int = 64
    gamma: float = 0.8
    tau: float = 0.02
    alpha: float = 0.02
    policy_lr: float = 3e-3
    q_lr: float = 3e-3
    hidden: int = 64
    reset_every: int = 50


class PointEnv:
    """A point in the plane goes to the goal that it sees; in task 1 to its mirror image, in task 2 to it, turned."""

    MAPS = np.array([[[1, 0], [0, 1]], [[-1, 0], [0, -1]], [[0, -1], [1, 0]]])
    # what a sentence encoder would make of "go to the goal", "go to its mirror image" and "go to it, turned"
    SENTENCES = np.random.default_rng(0).standard_normal((3, 24)) + 1.5 * np.random.default_rng(1).standard_normal(24)

    def __init__(self, task, seed):
        self.map, self.rng = self.MAPS[task], np.random.default_rng(seed)

    def reset(self):
        self.x, self.goal, self.t = np.zeros(2), self.rng.uniform(-1, 1, 2), 0
        return np.concatenate([self.x, self.goal]).astype(np.float32)

    def step(self, action):
        self.x, self.t = self.x + 0.2 * action, self.t + 1
        distance = np.linalg.norm(self.x - self.map @ self.goal)
        return np.concatenate([self.x, self.goal]).astype(np.float32), -distance, self.t == 20


class SoftQNetwork(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.fc1 = nn.Linear(4 + 2, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, 1)

    def forward(self, x, a):
        x = torch.cat([x, a], 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


LOG_STD_MAX, LOG_STD_MIN = 2, -5


class Actor(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.fc1 = nn.Linear(4, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc_mean = nn.Linear(hidden, 2)
        self.fc_logstd = nn.Linear(hidden, 2)

    def forward(self, x):
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        mean = self.fc_mean(x)
        log_std = torch.tanh(self.fc_logstd(x))
        return mean, LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (log_std + 1)

    def get_action(self, x):
        mean, log_std = self(x)
        normal = torch.distributions.Normal(mean, log_std.exp())
        x_t = normal.rsample()
        action = torch.tanh(x_t)
        log_prob = normal.log_prob(x_t) - torch.log(1 - action.pow(2) + 1e-6)
        return action, log_prob.sum(1, keepdim=True), torch.tanh(mean)


def tensors(*columns):
    return [torch.from_numpy(np.array(column)).to(torch.get_default_dtype()) for column in columns]


def evaluate(actor, task, episodes=10):
    """Mean distance to the target per step of the mean action, on the same goals each time."""
    env, total = PointEnv(task, seed=99), 0.0
    for _ in range(episodes):
        obs, done = env.reset(), False
        while not done:
            with torch.no_grad():
                action = actor.get_action(*tensors(obs[None]))[2][0].numpy()
            obs, reward, done = env.step(action)
            total -= reward / 20 / episodes
    return total


def train(args, ssde=ssde, watch=lambda *_: None):
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    actor = Actor(args.hidden)
    shared = ssde.SharedPolicy(actor, ["fc1", "fc2"], heads=["fc_mean"], own_heads=["fc_logstd"])  # SSDE
    sentences = PointEnv.SENTENCES / np.linalg.norm(PointEnv.SENTENCES, axis=1, keepdims=True)  # SSDE
    widths, lambdas = [args.hidden] * 2, (0.1, 0.1)  # SSDE
    neurons = [ssde.task_neurons(e, task, widths, lambdas, args.seed) for task, e in enumerate(sentences)]  # SSDE

    distances = []
    for task in range(3):
        env, buffer = PointEnv(task, args.seed + task), []
        actor = shared.begin_task(neurons[task])  # SSDE: an Actor with small layers
        actor_optimizer = optim.Adam(list(actor.parameters()), lr=args.policy_lr)
        resets = ssde.DormantResets([actor.fc1, actor.fc2, actor.fc_mean], actor_optimizer, args.reset_every)  # SSDE
        qf1, qf2 = SoftQNetwork(args.hidden), SoftQNetwork(args.hidden)
        qf1_target, qf2_target = SoftQNetwork(args.hidden), SoftQNetwork(args.hidden)
        qf1_target.load_state_dict(qf1.state_dict())
        qf2_target.load_state_dict(qf2.state_dict())
        q_optimizer = optim.Adam(list(qf1.parameters()) + list(qf2.parameters()), lr=args.q_lr)
        obs = env.reset()
        for step in range(args.steps_per_task):
            if step < args.learning_starts:
                action = np.array([random.uniform(-1, 1), random.uniform(-1, 1)])
            else:
                with torch.no_grad():
                    action = actor.get_action(*tensors(obs[None]))[0][0].numpy()
            next_obs, reward, done = env.step(action)
            buffer.append((obs, action, reward, next_obs))
            obs = env.reset() if done else next_obs
            if step < args.learning_starts:
                continue

            batch = zip(*random.choices(buffer, k=args.batch_size), strict=True)
            b_obs, b_actions, b_rewards, b_next = tensors(*batch)
            with torch.no_grad():
                next_actions, next_log_pi, _ = actor.get_action(b_next)
                min_q = torch.min(qf1_target(b_next, next_actions), qf2_target(b_next, next_actions))
                next_q = b_rewards[:, None] + args.gamma * (min_q - args.alpha * next_log_pi)
            qf_loss = F.mse_loss(qf1(b_obs, b_actions), next_q) + F.mse_loss(qf2(b_obs, b_actions), next_q)
            q_optimizer.zero_grad()
            qf_loss.backward()
            q_optimizer.step()

            pi, log_pi, _ = actor.get_action(b_obs)
            min_q = torch.min(qf1(b_obs, pi), qf2(b_obs, pi))
            actor_loss = (args.alpha * log_pi - min_q).mean()
            actor_optimizer.zero_grad()
            actor_loss.backward()
            actor_optimizer.step()
            if resets.due(step):  # SSDE: of a task, every so many steps
                resets.reset(actor, tensors(*zip(*buffer[-200:], strict=True))[0])  # SSDE
            watch(task, step, shared, actor, actor_optimizer)

            for net, target in ((qf1, qf1_target), (qf2, qf2_target)):
                for param, target_param in zip(net.parameters(), target.parameters(), strict=True):
                    target_param.data.copy_(args.tau * param.data + (1 - args.tau) * target_param.data)

        shared.end_task(actor)  # SSDE
        distances.append([evaluate(shared.cut(old), old) for old in range(task + 1)])  # SSDE: each task by its policy
    return shared, distances


if __name__ == "__main__":
    torch.set_num_threads(1)
    shared, distances = train(Args())
    for task, row in enumerate(distances):
        widths = [len(indices) for indices in shared.neurons[task]]
        print(f"after task {task}, which uses {widths} neurons: distances", " ".join(f"{d:.3f}" for d in row))
