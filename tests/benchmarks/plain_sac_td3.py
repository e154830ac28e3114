"""SAC and TD3 in the usual shape of a one-file script (CleanRL's), for `update_speed.py` to time ours beside.

Two critics that are modules of their own, Adam as it comes, transitions in NumPy arrays, targets averaged parameter by
parameter in Python, gradients of the actor's loss in the critics too. What would wait for a GPU in every update
(`.item()`) is left out.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(inputs: int, width: int, layers: int, outputs: int) -> nn.Sequential:
    """Hidden layers of one width with ReLU, and a linear head."""
    stack = nn.Sequential()
    for _ in range(layers):
        stack.extend([nn.Linear(inputs, width), nn.ReLU()])
        inputs = width
    return stack.append(nn.Linear(inputs, outputs))


class Replay:
    """Transitions in NumPy arrays, full of random numbers from the start."""

    def __init__(self, capacity: int, obs_dim: int, act_dim: int):
        sizes = {"obs": (obs_dim,), "action": (act_dim,), "reward": (), "next_obs": (obs_dim,), "terminated": ()}
        random = np.random.default_rng(0)
        self.data = {name: random.standard_normal((capacity, *size), np.float32) for name, size in sizes.items()}
        self.data["terminated"][:] = 0
        self.added, self.capacity = 0, capacity

    def add(self, obs, action, reward: float, next_obs, terminated: bool, truncated: bool) -> None:
        row = self.added % self.capacity
        for name, value in zip(self.data, (obs, action, reward, next_obs, terminated), strict=True):
            self.data[name][row] = value
        self.added += 1

    def sample(self, batch_size: int, device: torch.device) -> list[Tensor]:
        """obs, action, reward, next_obs, terminated: (batch, ...) each."""
        rows = np.random.randint(self.capacity, size=batch_size)
        return [torch.from_numpy(column[rows]).to(device) for column in self.data.values()]


class Critics:
    """Two critics, their targets and their optimizer."""

    def __init__(self, inputs: int, width: int, layers: int, learning_rate: float, device: torch.device):
        self.first, self.second = (mlp(inputs, width, layers, 1).to(device) for _ in range(2))
        self.first_target, self.second_target = copy.deepcopy(self.first), copy.deepcopy(self.second)
        parameters = [*self.first.parameters(), *self.second.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=learning_rate)

    def step(self, obs: Tensor, action: Tensor, y: Tensor) -> None:
        """Both towards the target values y (batch,)."""
        x = torch.cat([obs, action], 1)
        loss = F.mse_loss(self.first(x).view(-1), y) + F.mse_loss(self.second(x).view(-1), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def minimum(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], 1)
        return torch.min(self.first(x), self.second(x)).view(-1)

    def target_minimum(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], 1)
        return torch.min(self.first_target(x), self.second_target(x)).view(-1)

    def move_targets(self, tau: float) -> None:
        average(self.first, self.first_target, tau)
        average(self.second, self.second_target, tau)


def average(network: nn.Module, target: nn.Module, tau: float) -> None:
    """The target follows: by `tau` of the way."""
    for parameter, slow in zip(network.parameters(), target.parameters(), strict=True):
        slow.data.copy_(tau * parameter.data + (1 - tau) * slow.data)


class SAC:
    """Every second update trains the actor and the temperature, twice."""

    def __init__(self, obs_dim: int, act_dim: int, width: int, layers: int, capacity: int, device: torch.device):
        self.act_dim, self.device, self.updates = act_dim, device, 0
        self.actor = mlp(obs_dim, width, layers, 2 * act_dim).to(device)
        self.critics = Critics(obs_dim + act_dim, width, layers, 1e-3, device)
        self.log_alpha = torch.zeros(1, requires_grad=True, device=device)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=3e-4)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=1e-3)
        self.replay = Replay(capacity, obs_dim, act_dim)

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.actor(obs).chunk(2, dim=-1)
        log_std = -5 + 0.5 * (2 + 5) * (torch.tanh(log_std) + 1)
        normal = torch.distributions.Normal(mean, log_std.exp())
        x = normal.rsample()
        action = torch.tanh(x)
        log_prob = normal.log_prob(x) - torch.log(1 - action.pow(2) + 1e-6)
        return action, log_prob.sum(1)

    def explore(self, obs: np.ndarray) -> np.ndarray:
        action, _ = self.sample(torch.Tensor(obs[None]).to(self.device))
        return action.detach().cpu().numpy()[0]

    def update(self) -> None:
        self.updates += 1
        obs, action, reward, next_obs, terminated = self.replay.sample(256, self.device)
        alpha = self.log_alpha.exp().detach()
        with torch.no_grad():
            next_action, next_log_prob = self.sample(next_obs)
            next_q = self.critics.target_minimum(next_obs, next_action) - alpha * next_log_prob
            y = reward + (1 - terminated) * 0.99 * next_q
        self.critics.step(obs, action, y)
        if self.updates % 2 == 0:
            for _ in range(2):
                new_action, log_prob = self.sample(obs)
                loss = (self.log_alpha.exp().detach() * log_prob - self.critics.minimum(obs, new_action)).mean()
                self.actor_optimizer.zero_grad()
                loss.backward()
                self.actor_optimizer.step()
                with torch.no_grad():
                    _, log_prob = self.sample(obs)
                loss = (-self.log_alpha.exp() * (log_prob - self.act_dim)).mean()
                self.alpha_optimizer.zero_grad()
                loss.backward()
                self.alpha_optimizer.step()
        self.critics.move_targets(0.005)


class TD3:
    """Every second update trains the actor and moves the targets."""

    def __init__(self, obs_dim: int, act_dim: int, width: int, layers: tuple[int, int], capacity: int, device):
        """layers: hidden ones of the actor, and of each critic."""
        self.act_dim, self.device, self.updates = act_dim, device, 0
        self.actor = mlp(obs_dim, width, layers[0], act_dim).append(nn.Tanh()).to(device)
        self.actor_target = copy.deepcopy(self.actor)
        self.critics = Critics(obs_dim + act_dim, width, layers[1], 3e-4, device)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=3e-4)
        self.replay = Replay(capacity, obs_dim, act_dim)

    def explore(self, obs: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            action = self.actor(torch.Tensor(obs[None]).to(self.device))
            action += torch.normal(0, 0.1 * torch.ones(self.act_dim, device=self.device))
        return action.cpu().numpy()[0].clip(-1, 1)

    def update(self) -> None:
        self.updates += 1
        obs, action, reward, next_obs, terminated = self.replay.sample(256, self.device)
        with torch.no_grad():
            noise = (0.2 * torch.randn_like(action)).clamp(-0.5, 0.5)
            next_action = (self.actor_target(next_obs) + noise).clamp(-1, 1)
            y = reward + (1 - terminated) * 0.99 * self.critics.target_minimum(next_obs, next_action)
        self.critics.step(obs, action, y)
        if self.updates % 2 == 0:
            loss = -self.critics.first(torch.cat([obs, self.actor(obs)], 1)).mean()
            self.actor_optimizer.zero_grad()
            loss.backward()
            self.actor_optimizer.step()
            average(self.actor, self.actor_target, 0.005)
            self.critics.move_targets(0.005)
