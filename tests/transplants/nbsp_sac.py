# ruff: noqa: B023 (the functions below are called in the loop's same turn)
"""Somebody else's SAC, in the idiom of CleanRL, on two toy tasks in turn. The lines marked "# NBSP" are ours.

    python tests/transplants/nbsp_sac.py

It prints how well each task is done after each visit, and how many neurons hold skills.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from lifting import lift

nbsp = lift("nbsp")  # NBSP: what nbsp.py's docstring says to copy


@dataclass
class Args:
    seed: int = 1
    visits: int = 4
    steps_per_visit: int = 300
    learning_starts: int = 100
    batch_size: int = 32
    gamma: float = 0.8
    tau: float = 0.02
    alpha: float = 0.02
    policy_lr: float = 3e-3
    q_lr: float = 3e-3
    hidden: int = 32
    score_steps: int = 200
    previous: int = 300


class PointEnv:
    """A point in the plane has to go to the goal that it sees; in task 1 to the goal's mirror image."""

    def __init__(self, task, seed):
        self.sign, self.rng = (1, -1)[task], np.random.default_rng(seed)

    def reset(self):
        self.x, self.goal, self.t = np.zeros(2), self.rng.uniform(-1, 1, 2), 0
        return np.concatenate([self.x, self.goal]).astype(np.float32)

    def step(self, action):
        self.x, self.t = self.x + 0.2 * action, self.t + 1
        distance = np.linalg.norm(self.x - self.sign * self.goal)
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


def rollout(actor, env, steps):
    """Observations, actions and rewards of the mean action."""
    rows, obs = [], env.reset()
    for _ in range(steps):
        with torch.no_grad():
            action = actor.get_action(torch.from_numpy(obs)[None])[2][0].numpy()
        next_obs, reward, done = env.step(action)
        rows.append((obs, action, reward))
        obs = env.reset() if done else next_obs
    return [torch.from_numpy(np.array(column, np.float32)) for column in zip(*rows, strict=True)]


def train(args):
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    actor, qf1, qf2 = Actor(args.hidden), SoftQNetwork(args.hidden), SoftQNetwork(args.hidden)
    qf1_target, qf2_target = SoftQNetwork(args.hidden), SoftQNetwork(args.hidden)
    qf1_target.load_state_dict(qf1.state_dict())
    qf2_target.load_state_dict(qf2.state_dict())
    q_optimizer = optim.Adam(list(qf1.parameters()) + list(qf2.parameters()), lr=args.q_lr)
    actor_optimizer = optim.Adam(list(actor.parameters()), lr=args.policy_lr)

    actor_masks = nbsp.SkillMasks([actor.fc1, actor.fc2, [actor.fc_mean, actor.fc_logstd]])  # NBSP
    q_masks = [nbsp.SkillMasks([qf.fc1, qf.fc2, qf.fc3]) for qf in (qf1, qf2)]  # NBSP
    previous = {}  # NBSP: transitions of earlier tasks
    updates, returns = 0, []

    for visit in range(args.visits):
        task, buffer = visit % 2, []
        env = PointEnv(task, args.seed + visit)
        obs = env.reset()
        for step in range(args.steps_per_visit):
            if visit < 2 and step < args.learning_starts:
                action = np.random.default_rng((args.seed, visit, step)).uniform(-1, 1, 2).astype(np.float32)
            else:
                with torch.no_grad():
                    action = actor.get_action(torch.from_numpy(obs)[None])[0][0].numpy()
            next_obs, reward, done = env.step(action)
            buffer.append((obs, action, reward, next_obs))
            obs = env.reset() if done else next_obs
            if step < args.learning_starts:
                continue

            updates += 1
            memory = buffer
            if previous and updates % 10 == 0:  # NBSP: Eq. 7
                memory = [row for rows in previous.values() for row in rows]  # NBSP
            batch = zip(*random.choices(memory, k=args.batch_size), strict=True)
            b_obs, b_actions, b_rewards, b_next = (torch.from_numpy(np.array(c, np.float32)) for c in batch)
            with torch.no_grad():
                next_actions, next_log_pi, _ = actor.get_action(b_next)
                min_q = torch.min(qf1_target(b_next, next_actions), qf2_target(b_next, next_actions))
                next_q = b_rewards[:, None] + args.gamma * (min_q - args.alpha * next_log_pi)
            qf_loss = F.mse_loss(qf1(b_obs, b_actions), next_q) + F.mse_loss(qf2(b_obs, b_actions), next_q)
            q_optimizer.zero_grad()
            qf_loss.backward()
            [masks.before_step() for masks in q_masks]  # NBSP
            q_optimizer.step()
            [masks.after_step() for masks in q_masks]  # NBSP

            pi, log_pi, _ = actor.get_action(b_obs)
            actor_loss = (args.alpha * log_pi - torch.min(qf1(b_obs, pi), qf2(b_obs, pi))).mean()
            actor_optimizer.zero_grad()
            actor_loss.backward()
            actor_masks.before_step()  # NBSP
            actor_optimizer.step()
            actor_masks.after_step()  # NBSP

            for qf, target in ((qf1, qf1_target), (qf2, qf2_target)):
                for param, target_param in zip(qf.parameters(), target.parameters(), strict=True):
                    target_param.data.copy_(args.tau * param.data + (1 - args.tau) * target_param.data)

        # NBSP: the reward, minus the distance to the goal, is the goal proximity q
        s, a, q = rollout(actor, PointEnv(task, 1000 + visit), args.score_steps)  # NBSP
        actor_masks.end_task(task, lambda: actor(s), q)  # NBSP
        for masks, qf in zip(q_masks, (qf1, qf2), strict=True):  # NBSP
            masks.end_task(task, lambda: qf(s, a), q)  # NBSP
        previous[task] = random.sample(buffer, args.previous // 2)  # NBSP
        returns.append([rollout(actor, PointEnv(which, 7), 200)[2].mean().item() for which in range(2)])
    return {"actor": actor, "critics": (qf1, qf2), "masks": [actor_masks, *q_masks], "returns": returns}


if __name__ == "__main__":
    trained = train(Args())
    for visit, (first, second) in enumerate(trained["returns"]):
        print(f"after visit {visit}, to task {visit % 2}: mean reward {first:.2f} on task 0, {second:.2f} on task 1")
    for name, masks in zip(("actor", "qf1", "qf2"), trained["masks"], strict=True):
        print(f"{name}: {[int((mask < 1).sum()) for mask in masks.masks]} neurons of each layer hold skills")
