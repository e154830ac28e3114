"""What tests share: the process's settings, logged metrics by their literal definitions, agents without a task."""

import contextlib
import copy
import functools
import io
import math
import os
import signal
from types import SimpleNamespace

import hypothesis
import mujoco
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mst_rigl
import nbsp
import neuroplastic_expansion as ne
import sparse_mtrl_gmp_set as gmp_set
import ssde
from common import capture
from common.descriptions import TASK_DESCRIPTIONS, encode_tasks
from common.recorder import restored, state_of


def pytest_configure(config):
    """Runs repeat byte by byte on a CPU: only `pytest tests/test_cuda.py` by itself sees a GPU.

    Hypothesis draws the same examples in each run; other ones with `--hypothesis-profile default`.

    Signals are heard, also under nohup or behind a script's `&`, which have them ignored in all that they start.
    """
    hypothesis.settings.register_profile("same", derandomize=True)
    if not config.getoption("hypothesis_profile", None):
        hypothesis.settings.load_profile("same")
    if not all("test_cuda" in path for path in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def process_settings():
    """One thread, as in a run: tiny networks gain nothing by more, and on a busy machine threads wait for each other.

    Denormal numbers are back on after a test: hypothesis draws none from a processor that flushes them.
    """
    torch.set_num_threads(1)
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True, scope="session")
def compiled_models():
    """MuJoCo compiles an XML file once; every environment gets a copy of the model, which takes no time.

    The subprocesses of the tests compile as users do, and end with the same bytes.
    """
    compiled = functools.cache(mujoco.MjModel.from_xml_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mujoco.MjModel, "from_xml_path", staticmethod(lambda path: copy.copy(compiled(path))))
        yield


@pytest.fixture
def assert_plasticity():
    """Compare what a script logs of one network with the hidden activations and the module that it should be of."""

    def check(plasticity: dict, net: str, module: torch.nn.Module, features: list[torch.Tensor], taus: dict) -> None:
        def logged(name: str) -> torch.Tensor:
            return plasticity[f"plasticity/{net}/{name}"]

        units = torch.cat([h.abs().mean(0) / h.abs().mean() for h in features])
        for name, tau in taus.items():
            assert logged(name) == pytest.approx((units <= tau).float().mean().item())
        positive = torch.cat([(h > 0).float().mean(0) for h in features]).mean().item()
        assert logged("active_fraction") == pytest.approx(positive)
        values = torch.linalg.svdvals(features[-1])
        assert logged("srank") == int((values.cumsum(0) / values.sum() < 0.99).sum()) + 1
        norm = math.sqrt(sum(float(p.detach().square().sum()) for p in module.parameters()))
        assert logged("weight_norm") == pytest.approx(norm, rel=1e-4)
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters()))
        assert logged("grad_norm") == pytest.approx(norm, rel=1e-4)

    return check


# ---------------------------------------------------------------- agents that learn from made-up transitions: `learner`

OBS_DIM, ACT_DIM = 6, 2
NBSP = {"hidden_dim": 32, "batch_size": 16, "buffer_size": 90, "previous_buffer_size": 60, "replay_every": 3}
SSDE = {"hidden_dim": 24, "hidden_layers": 2, "critic_hidden_dim": 16, "lambda_global": 0.05, "reset_every": 8}
SSDE |= {"lambda_local": 0.05, "batch_size": 16, "buffer_size": 90, "distill_steps": 9, "dormant_threshold": 0.9}
NE = {"hidden_dim": 16, "batch_size": 16, "buffer_size": 90, "topology_every": 8, "review_every": 5}
NE |= {"dormant_threshold": 0.3, "review_threshold": 0.5}
MST = {"buffer_size": 90, "batch_size": 16, "width_scale": 1 / 32, "target_update_every": 10, "rigl_every": 7}
GMP_SET = {"benchmark": "reach,push", "hidden_dim": 16, "hidden_layers": 2, "experts": 2, "buffer_size": 180}
GMP_SET |= {"batch_per_task": 8, "sparsity": 0.8, "prune_every": 5, "evolve_every": 5, "redo_every": 6}
GMP_SET |= {"reset_every": 20}


class Learner:
    """An agent of a script with tiny networks. `step` does what the script's loop does in a step of its environment.

    graphs: how many graphs a function should have been captured as, after a `border` in the middle of a run.
    updates: about so many are made in all, on which the schedules of NE, MST and GMP depend.
    """

    def __init__(self, arguments: dict, graphs: dict, device: torch.device, cuda_graph: bool, updates: int):
        self.device, self.graphs, self.updates = device, {"play": 1} | graphs, updates
        self.args = self.script.Args(**(self.small | self.length() | arguments), cuda_graph=cuda_graph)
        torch.manual_seed(0)
        self.rng, self.steps, self.borders = np.random.default_rng(0), 0, 0
        self.agent = self.build()
        self.fill()

    def length(self) -> dict:
        return {}

    def policy(self) -> capture.CapturedPolicy:
        return self.agent.explore

    def train(self, steps: int, border: int | None = None) -> None:
        """So many steps, with a task border before step `border`, counted from 0."""
        for step in range(steps):
            if step == border:
                self.border()
            self.step()

    def fill(self) -> None:
        for _ in range(20):
            self.add(self.uniform(), self.normal())

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal((*shape, OBS_DIM)).astype(np.float32)

    def uniform(self) -> np.ndarray:
        return self.rng.uniform(-1, 1, ACT_DIM).astype(np.float32)

    def add(self, action: np.ndarray, obs: np.ndarray, **more) -> None:
        transition = {"obs": obs, "next_obs": self.normal(), "action": action, "reward": float(self.rng.normal())}
        self.agent.replay.add(**transition, **more)

    def step(self) -> None:
        self.steps += 1
        obs = self.normal()
        self.add(self.agent.explore(obs), obs)
        self.update()

    def resumed(self, other: "Learner") -> None:
        """Go on where `other` is, through the bytes of a checkpoint."""
        file = io.BytesIO()
        torch.save(state_of(other.agent), file)
        file.seek(0)
        self.load(torch.load(file, map_location="cpu", weights_only=True))
        self.rng, self.steps, self.borders = copy.deepcopy(other.rng), other.steps, other.borders

    def load(self, state: dict) -> None:
        restored(self.agent, state, self.device)


class Nbsp(Learner):
    script = nbsp
    small = NBSP

    def build(self) -> nbsp.Agent:
        return nbsp.Agent(self.args, OBS_DIM, ACT_DIM, self.device)

    def update(self) -> None:
        self.agent.update()

    def border(self) -> None:
        rollout = {"obs": self.normal(40), "action": self.rng.uniform(-1, 1, (40, ACT_DIM)).astype(np.float32)}
        rollout = {name: torch.from_numpy(column).to(self.device) for name, column in rollout.items()}
        self.agent.end_task(self.borders % 2, rollout, torch.from_numpy(self.rng.random(40)).to(self.device))
        self.borders += 1
        self.fill()


class Ssde(Learner):
    script = ssde
    small = SSDE

    def build(self) -> ssde.Agent:
        sentences = encode_tasks([TASK_DESCRIPTIONS[f"{task}-v3"] for task in ("reach", "push", "hammer")], "bundled")
        agent = ssde.Agent(self.args, sentences, OBS_DIM, ACT_DIM, self.device)
        agent.begin_task()
        return agent

    def update(self) -> None:
        self.agent.update(logged=self.steps % 25 == 0)
        if self.agent.dormant and self.agent.dormant.due(self.steps):
            self.agent.reset_dormant()

    def border(self) -> None:
        self.agent.end_task()
        self.agent.begin_task()
        while self.agent.distilled < self.args.distill_steps:
            self.agent.distill()
        self.borders += 1
        self.fill()

    def load(self, state: dict) -> None:
        self.agent.load(state)


class Expansion(Learner):
    script = ne
    small = NE

    def build(self) -> ne.Agent:
        return ne.Agent(self.args, OBS_DIM, ACT_DIM, self.updates, self.device)

    def policy(self) -> capture.CapturedPolicy:
        return self.agent.captured_policy  # without the noise

    def add(self, action: np.ndarray, obs: np.ndarray) -> None:
        super().add(action, obs, terminated=float(self.rng.random() < 0.1))

    def update(self) -> None:
        self.agent.update()

    def border(self) -> None:
        self.agent.replay.added = 0
        self.fill()


class Mst(Learner):
    script = mst_rigl
    small = MST

    def length(self) -> dict:
        return {"total_steps": 20 + self.updates, "learning_starts": 20}

    def build(self) -> mst_rigl.Agent:
        self.episode_steps = 0
        return mst_rigl.Agent(self.args, OBS_DIM, ACT_DIM, self.device)

    def add(self, action: np.ndarray, obs: np.ndarray) -> None:
        """Episodes of 9 steps; after `border` they terminate."""
        self.episode_steps += 1
        last = self.episode_steps % 9 == 0
        ending = (last and self.borders > 0, last and self.borders == 0)
        self.agent.replay.add(obs, action, float(self.rng.normal()), self.normal(), *ending)

    def update(self) -> None:
        self.agent.update()

    def border(self) -> None:
        self.borders += 1

    def resumed(self, other: Learner) -> None:
        super().resumed(other)
        self.episode_steps = other.episode_steps


class GmpSet(Learner):
    script = gmp_set
    small = GMP_SET

    def length(self) -> dict:
        return {"total_steps": 2 * (20 + self.updates), "learning_starts": 40}

    def build(self) -> gmp_set.Agent:
        return gmp_set.Agent(self.args, 2, OBS_DIM, ACT_DIM, self.device)

    def normal(self, *shape: int) -> np.ndarray:
        return super().normal(2)

    def uniform(self) -> np.ndarray:
        return self.rng.uniform(-1, 1, (2, ACT_DIM)).astype(np.float32)

    def add(self, action: np.ndarray, obs: np.ndarray) -> None:
        reward = self.rng.standard_normal(2).astype(np.float32)
        self.agent.replay.add(obs=obs, next_obs=self.normal(), action=action, reward=reward)

    def update(self) -> None:
        self.agent.before_update()
        self.agent.update()
        self.agent.after_update()

    def border(self) -> None:
        """All tasks are learned together."""


RIGL = {f"{net}_regime": "rigl" for net in ("encoder", "critic", "actor")}
MRQ = mst_rigl.PRESETS["preset mrq"]
LEARNERS = {
    "nbsp": (Nbsp, {}, {"learn": 4}),
    "nbsp, gradients masked": (Nbsp, {"mask_target": "gradient", "replay_every": 4, "layer_norm": True}, {"learn": 3}),
    "nbsp, masks only": (Nbsp, {"method": "mask"}, {"learn": 2}),
    "nbsp, replay only": (Nbsp, {"method": "replay"}, {"learn": 4}),
    "sac": (Nbsp, {"method": "sac"}, {"learn": 2}),
    "ssde": (Ssde, {}, {"play": 2, "learn": 2, "learn_to_explore": 1}),
    "ssde, fine-tuned": (Ssde, {"method": "finetune"}, {"play": 2, "learn": 2}),
    "ssde, from scratch": (Ssde, {"method": "scratch", "bounded_mean": True}, {"play": 2, "learn": 2}),
    "ne": (Expansion, {}, {"learn": 2}),
    "ne, random growth": (Expansion, {"growth": "random", "prune": "magnitude", "policy_delay": 3}, {"learn": 2}),
    "ne, static": (Expansion, {"method": "static"}, {"learn": 2}),
    "td3": (Expansion, {"method": "td3"}, {"learn": 2}),
    "mst": (Mst, {}, {"learn_encoder": 2, "learn_critic_and_actor": 1}),
    "mst, all rigl, bfloat16": (Mst, RIGL | {"bf16": True}, {"learn_encoder": 2, "learn_critic_and_actor": 1}),
    "mrq": (Mst, MRQ | {"exploration_noise": 0.0}, {"learn_encoder": 2, "learn_critic_and_actor": 1}),
    "gmp": (GmpSet, {"sparsify_critic": True}, {"learn": 1}),
    "gmp, redo, moore": (GmpSet, {"intervention": "redo", "dormant_threshold": 0.3, "arch": "moore"}, {"learn": 1}),
    "set, reset": (GmpSet, {"method": "set", "intervention": "reset", "sparsify_critic": True}, {"learn": 1}),
    "set, weight decay, moe": (GmpSet, {"method": "set", "intervention": "weight-decay", "arch": "moe"}, {"learn": 1}),
    "dense, layernorm": (GmpSet, {"method": "dense", "intervention": "layernorm"}, {"learn": 1}),
}


def pytest_generate_tests(metafunc):
    """A test that takes `learner`, and does not say which, runs with every script in every variant."""
    chosen = any("learner" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "learner" in metafunc.fixturenames and not chosen:
        metafunc.parametrize("learner", LEARNERS, indirect=True)


@pytest.fixture
def learner(request, monkeypatch):
    """Makes the variant's `Learner`: learner(device, cuda_graph, updates)."""
    monkeypatch.setattr(nbsp, "LOG_EVERY", 25)
    kind, arguments, graphs = LEARNERS[request.param]
    return lambda device, cuda_graph, updates=60: kind(arguments, graphs, torch.device(device), cuda_graph, updates)


class Counts(dict):
    """Of each `Captured`: calls, those of them that must not be replayed, runs of its Python."""

    def replays(self, graphs: dict[str, int]) -> int:
        """How many there must be. Nothing but warm-ups, captures and what may not be replayed ran as Python."""
        found, replays = dict.fromkeys(graphs, 0), 0
        for captured, count in self.items():
            if captured.graphs:
                found[count.name] += len(captured.graphs)
                warm_ups = sum(min(calls, capture.WARM_UP) for calls in captured.calls.values())
                assert count.python == count.ordinary + warm_ups + len(captured.graphs), count
                replays += count.calls - count.ordinary - warm_ups
        assert found == graphs
        return replays


@pytest.fixture
def counted(monkeypatch):
    """`Counts` of each `Captured` that is made from now on."""
    counts, true_init, true_call = Counts(), capture.Captured.__init__, capture.Captured.__call__

    def init(captured, function, *arguments, **options):
        count = counts[captured] = SimpleNamespace(name=function.__name__, calls=0, ordinary=0, python=0)

        @functools.wraps(function)
        def counting(*values):
            count.python += 1
            return function(*values)

        true_init(captured, counting, *arguments, **options)

    def call(captured, *arguments, eager=False):
        count = counts[captured]
        count.calls += 1
        count.ordinary += eager or any(schedule.due for schedule in captured.schedules(*arguments))
        true_call(captured, *arguments, eager=eager)

    monkeypatch.setattr(capture.Captured, "__init__", init)
    monkeypatch.setattr(capture.Captured, "__call__", call)
    return counts


# ---------------------------------------------------------------------------------------- CUDA graphs without a GPU


def tensors_in(arguments) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]


class Capturable(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: to wait for a value or a shape, to move data between devices."""

    WAITS = ("_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "unique", "_unique2", "lift_fresh")
    WAITS += ("unique_consecutive", "unique_dim", "bincount", "equal", "is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function._schema.name.removeprefix("aten::"), kwargs or {}
        if function.namespace == "profiler":  # optimizers' marks
            return function(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        assert name not in self.WAITS, f"{name} waits for the device"
        if name.startswith(("index", "_index", "_unsafe_index")):
            booleans = [index for index in tensors_in(args[1:2]) if index.dtype == torch.bool]
            assert not booleans, f"{name} by booleans waits for the device"
        devices = {tensor.device.type for tensor in tensors}
        devices |= {torch.device(kwargs["device"]).type} if kwargs.get("device") else set()
        assert len(devices) == 1, f"{name} moves data between {devices}"
        return function(*args, **kwargs)


@pytest.fixture
def capturable():
    """Of tests that want this mode around their own calls."""
    return Capturable


class FakeGraph:
    """What torch.cuda.CUDAGraph does, on a CPU: a replay runs the recorded operators on the tensors of then."""

    replays = 0

    def __init__(self):
        self.calls = []

    @torch.no_grad()
    def replay(self) -> None:
        FakeGraph.replays += 1
        for function, args, kwargs, outputs in self.calls:
            result = function(*args, **kwargs)
            for old, new in zip(outputs, tensors_in(result) if outputs else [], strict=True):
                old.copy_(new)


class FakeCapture(Capturable):
    """What torch.cuda.graph does, on a CPU: records. Afterwards nothing has happened, but to Python."""

    def __init__(self, graph: FakeGraph, capture_error_mode: str = "global"):
        super().__init__()
        self.graph, self.before, self.random = graph, [], torch.get_rng_state()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, function._schema
        if function.namespace == "profiler":
            return function(*args, **kwargs)
        given = dict(zip([a.name for a in schema.arguments], args, strict=False)) | kwargs
        written = [given.get(a.name) for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        self.before += [(tensor, tensor.clone()) for tensor in tensors_in(written)]
        places = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(given)}
        result = super().__torch_dispatch__(function, types, args, kwargs)
        outputs = [] if written else tensors_in(result)
        views = outputs and all(t.untyped_storage().data_ptr() in places for t in outputs)
        if not views:
            self.graph.calls.append((function, args, kwargs, outputs))
        return result

    @torch.no_grad()
    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        for tensor, value in reversed(self.before):
            tensor.copy_(value)
        torch.set_rng_state(self.random)


@pytest.fixture
def fake_cuda(monkeypatch):
    """common.capture uses its graphs though there is no GPU; they are those of this class, which counts replays."""
    FakeGraph.replays = 0

    class Stream:
        def wait_stream(self, stream): ...
        def synchronize(self): ...

    fakes = {"CUDAGraph": FakeGraph, "graph": FakeCapture, "Stream": Stream, "current_stream": Stream}
    for name, fake in (fakes | {"stream": contextlib.nullcontext}).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    true_init = capture.Captured.__init__

    def init(captured, function, device, graphs, schedules=None):
        true_init(captured, function, torch.device("cuda"), graphs, schedules)

    monkeypatch.setattr(capture.Captured, "__init__", init)
    return FakeGraph
