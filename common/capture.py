"""Updates and policies as CUDA graphs, launched at once and not operator by operator; losses that are compiled.

An update of small networks is hundreds of short operators, and to launch one takes longer than to run it. A graph is
recorded once, and one launch replays all of it, on the addresses that it was recorded with. So a captured function

* takes plain Python values, of which each combination is a graph of its own, and returns nothing,
* reads and writes tensors that stay where they are: state is changed in place, results are handed to `keep`,
* never waits for the device, and has no shape that depends on data.

Its Python does not run in a replay: counters stay outside, or are among the `schedules`. On a CPU there are no graphs.
"""

import functools
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

WARM_UP = 3  # calls before the capture: optimizers make their state, libraries their workspaces, `keep` its tensors


class Captured:
    """A function as CUDA graphs, one for each combination of its arguments. Without `graphs`: the function itself.

    schedules: called with the same arguments, returns what decides which connections exist. Each counts the calls of
    the function in `updates` and is `due` where the next one changes connections. That one runs operator by operator:
    it may wait for the device and draw on the CPU, and like all else it changes tensors in place.
    """

    def __init__(self, function: Callable, device: torch.device, graphs: bool, schedules: Callable | None = None):
        self.function, self.graphs = function, {} if graphs and device.type == "cuda" else None
        self.schedules, self.calls = schedules or (lambda *arguments: []), Counter()

    def __call__(self, *arguments, eager: bool = False) -> None:
        """Call it. eager: operator by operator, so that `.grad` holds this call's gradients."""
        if self.graphs is None or eager or any(schedule.due for schedule in self.schedules(*arguments)):
            return self.function(*arguments)
        self.calls[arguments] += 1
        if self.calls[arguments] <= WARM_UP:
            return self.warm_up(*arguments)
        if arguments not in self.graphs:
            self.graphs[arguments] = self.record(*arguments)
        self.graphs[arguments].replay()
        for schedule in self.schedules(*arguments):
            schedule.updates += 1

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        """Of the warm-up. One, as libraries keep a workspace for each."""
        return torch.cuda.Stream()

    def warm_up(self, *arguments) -> None:
        """An ordinary call on a stream of its own, as PyTorch asks for before a capture."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.function(*arguments)
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, *arguments) -> torch.cuda.CUDAGraph:
        """The graph of a call. Nothing runs on the device, and what the call counted is put back."""
        graph, schedules = torch.cuda.CUDAGraph(), self.schedules(*arguments)
        counts = [schedule.updates for schedule in schedules]
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on
            self.function(*arguments)
        for schedule, count in zip(schedules, counts, strict=True):
            schedule.updates = count
        return graph


class CapturedPolicy:
    """A policy for numpy arrays: an observation -> its action. With `graphs` one launch copies, computes, copies back.

    policy: the same for tensors on the device, (..., obs_dim) -> (..., act_dim). It may draw random numbers.
    """

    def __init__(self, policy: Callable[[Tensor], Tensor], device: torch.device, graphs: bool):
        self.policy, self.device, self.launch = policy, device, Captured(self.play, device, graphs)
        self.obs = self.action = None  # with graphs: in pinned memory, which the device reads and writes by itself

    @torch.no_grad()
    def __call__(self, obs: np.ndarray) -> np.ndarray:
        if self.obs is None:
            action = self.policy(torch.from_numpy(obs).to(self.device)).cpu()
            if self.launch.graphs is not None:
                self.obs, self.action = torch.from_numpy(obs).pin_memory(), action.pin_memory()
            return action.numpy()
        self.obs.copy_(torch.from_numpy(obs))
        self.launch()
        torch.cuda.current_stream().synchronize()
        return self.action.numpy().copy()

    def play(self) -> None:
        """From the pinned observation to the pinned action."""
        action = self.policy(self.obs.to(self.device, non_blocking=True))
        self.action.copy_(action, non_blocking=True)


def with_gradients(loss: Callable, optimizer: torch.optim.Optimizer, compiled: bool) -> Callable:
    """`loss`, which also leaves in `.grad` of the optimizer's parameters the gradients of the first value it returns.

    loss: returns the loss or a tuple that begins with it; of several elements the mean counts. compiled: from the
    arguments to the gradients it is one function of `torch.compile`. The optimizer's step is no part of it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def detached(results):
        return tuple(r.detach() for r in results) if isinstance(results, tuple) else results.detach()

    def loss_of(results) -> Tensor:
        return (results[0] if isinstance(results, tuple) else results).mean()

    def backward(*arguments):
        results = loss(*arguments)
        optimizer.zero_grad(set_to_none=True)
        loss_of(results).backward(inputs=parameters)
        return detached(results)

    if not compiled:
        return backward

    def gradients(*arguments) -> tuple:
        results = loss(*arguments)
        return detached(results), torch.autograd.grad(loss_of(results), parameters)

    torch._dynamo.config.trace_autograd_ops = True  # else `autograd.grad` would cut the function in two
    torch._inductor.config.fallback_random = True  # random numbers as they are without compilation
    gradients = torch.compile(gradients, fullgraph=True, dynamic=False)

    def compiled_backward(*arguments):
        optimizer.zero_grad(set_to_none=True)  # the old ones make room for the new
        results, new = gradients(*arguments)
        for parameter, gradient in zip(parameters, new, strict=True):
            parameter.grad = gradient
        return results

    return compiled_backward


def keep(store: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Write `values` over those of the same names in `store`. A graph's own tensors last until its next replay only."""
    for name, value in values.items():
        if name in store:
            store[name].copy_(value.detach())
        else:
            store[name] = value.detach().clone()
