"""Environments: bit-identity with Meta-World, seeding, exact resume, episode ends, actions, names, rendering."""

import ctypes
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import metaworld.env_dict
import metaworld.policies
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metaworld.sawyer_xyz_env import SawyerXYZEnv

from common import envs
from common.cli import SIGNALS, ArgumentError, NotFiniteError, RunError
from common.envs import CW10, MT10, MT50, TASK_DESCRIPTIONS, TASK_SEQUENCES, make_env

FAMILIES = ["push-v3", "dmc/ball_in_cup-catch", "HalfCheetah-v5"]


def library_env(task: str, seed: int, reward_version: str) -> gym.Env:
    """Meta-World's own class set up as in Continual World's random_init_all."""
    env = metaworld.env_dict.ALL_V3_ENVIRONMENTS[task](reward_function_version=reward_version)
    env._partially_observable = False
    del env.sawyer_observation_space
    env.observation_space = env.sawyer_observation_space
    env._freeze_rand_vec = False
    env._set_task_called = True
    env.seeded_rand_vec = True
    env.seed(seed)
    return env


def episodes(env: gym.Env, count: int, actions=None) -> list[np.ndarray]:
    """One row per step of ``count`` episodes: observation, reward, ends. Actions sampled from the environment's space
    where no generator is given."""
    rows = []
    for _ in range(count):
        obs, _ = env.reset()
        rows.append(obs)
        done = False
        while not done:
            action = env.action_space.sample() if actions is None else actions.uniform(-1, 1, env.action_space.shape)
            obs, reward, terminated, truncated, _ = env.step(action)
            rows.append(np.concatenate([obs, [reward, terminated, truncated]]))
            done = terminated or truncated
    return rows


def identical(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return [(x.dtype, x.tobytes()) for x in a] == [(x.dtype, x.tobytes()) for x in b]


def received_action(env: gym.Env, action) -> np.ndarray:
    """What the innermost environment is given when ``env`` is stepped with ``action``."""
    received = []
    inner, step = env.unwrapped, env.unwrapped.step
    inner.step = lambda a: received.append(np.array(a)) or step(a)
    env.reset()
    env.step(np.asarray(action, dtype=np.float32))
    return received[0]


# Meta-World


@pytest.mark.parametrize("task", MT50)
def test_meta_world_is_bit_identical_to_the_library(task):
    reference = library_env(task, 3, "v2")
    env = make_env(task, seed=3)
    fast = env.unwrapped
    expert = metaworld.policies.ENV_POLICY_MAP[task]()
    rng = np.random.default_rng(0)
    for reward_version, steps in (("v2", 60), ("v1", 15)):
        reference.reward_function_version = fast.reward_function_version = reward_version
        obs, _ = reference.reset()
        assert obs.tobytes() == fast.reset()[0].tobytes()
        for step in range(steps):
            action = rng.uniform(-1.2, 1.2, 4) if step < 5 else np.clip(expert.get_action(obs), -1, 1)
            action = action.astype(np.float32)
            obs, reward, terminated, truncated, info = reference.step(action)
            fast_obs, fast_reward, *fast_ends, fast_info = fast.step(action)
            assert obs.tobytes() == fast_obs.tobytes() and reward == fast_reward
            assert [terminated, truncated] == fast_ends
            assert list(info) == list(fast_info)
            assert np.array_equal(list(info.values()), list(fast_info.values()), equal_nan=True)
    reference.reward_function_version = fast.reward_function_version = "v2"  # v1 asserts that the goal stays
    reference._target_pos = fast._target_pos = np.full(3, 9.0)  # outside the bounds to which the library clips
    assert reference.step(action)[0].tobytes() == fast.step(action)[0].tobytes()
    env.close()
    reference.close()


def test_touching_object_is_the_library_loop():
    fast = make_env("pick-place", seed=3).unwrapped
    pads = {fast.data.geom("leftpad_geom").id, fast.data.geom("rightpad_geom").id}
    puck = fast.data.geom("objGeom").id
    expert = metaworld.policies.ENV_POLICY_MAP["pick-place-v3"]()
    obs, _ = fast.reset()
    seen = set()
    for _ in range(80):
        obs, *_ = fast.step(np.clip(expert.get_action(obs), -1, 1).astype(np.float32))
        pairs = [{contact.geom1, contact.geom2} for contact in fast.data.contact]
        for geom in range(fast.model.ngeom):
            touching = fast.touching_object(geom)
            assert touching == SawyerXYZEnv.touching_object(fast, geom)
            if geom == puck:
                seen.add((touching, sum({puck, pad} in pairs for pad in pads)))
    assert {(False, 0), (False, 1), (True, 2)} <= seen  # no pad, one pad and both pads on the puck


def test_meta_world_reward_version_and_float32_observation():
    reference, env = library_env("push-v3", 0, "v1"), make_env("push", seed=0, reward_version="v1")
    assert env.reset()[0].tobytes() == reference.reset()[0].astype(np.float32).tobytes()
    action = np.array([0.3, 0.5, -1, 0], dtype=np.float32)
    v1 = reference.step(action)
    obs, reward, _, _, info = env.step(action)
    assert (reward, info["success"]) == (v1[1], v1[4]["success"])
    assert obs.tobytes() == v1[0].astype(np.float32).tobytes()
    v2 = make_env("push", seed=0)
    v2.reset()
    assert v2.step(action)[1] != reward


def test_meta_world_goal_is_visible_and_fresh_at_each_reset():
    env = make_env("push", seed=0)
    goals = [env.reset()[0][36:] for _ in range(3)]
    assert np.array_equal(goals[2], env.unwrapped._target_pos.astype(np.float32))
    assert not np.array_equal(goals[0], goals[1]) and not np.array_equal(goals[1], goals[2])


def test_closed_meta_world_frees_its_memory():
    def resident_mb() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    closed = []
    for count in range(7):
        closed.append(make_env("hammer", seed=0))
        closed[-1].reset()
        closed[-1].close()
        closed[-1].close()
        if count == 0:
            before = resident_mb()
    assert resident_mb() - before < 80  # about 180 where the simulations are kept


# The common interface


@pytest.mark.parametrize("env_id", [*FAMILIES, "dmc/finger-turn_easy", "Pendulum-v1"])
def test_spaces_and_types(env_id):
    env = make_env(env_id, seed=0)
    shape = env.observation_space.shape
    assert env.observation_space == gym.spaces.Box(-np.inf, np.inf, shape, np.float32)
    assert env.action_space == gym.spaces.Box(-1, 1, env.action_space.shape, np.float32)
    first, info = env.reset()
    obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
    for array in (first, obs):
        assert array.dtype == np.float32 and array.shape == shape and len(shape) == 1
    assert not np.shares_memory(first, obs)
    assert type(reward) is float and type(terminated) is bool and type(truncated) is bool
    assert ("success" in info) == (env_id == "push-v3")
    if "success" in info:
        assert type(info["success"]) is float


@pytest.mark.parametrize("env_id", FAMILIES)
def test_seeding(env_id):
    def rollout(env, count):
        return episodes(env, count, np.random.default_rng(5))

    env = make_env(env_id, seed=1, max_episode_steps=8)
    two = rollout(env, 2)
    assert not identical(two[:9], two[9:])  # without a seed the stream goes on
    assert identical(two, rollout(make_env(env_id, seed=1, max_episode_steps=8), 2))
    other = make_env(env_id, seed=2, max_episode_steps=8)
    assert not identical(two, rollout(other, 2))
    first, _ = other.reset(seed=1)
    assert first.tobytes() == two[0].tobytes()
    assert other.reset()[0].tobytes() == two[9].tobytes()


@pytest.mark.parametrize("env_id", FAMILIES)
def test_the_seed_of_an_episode_decides_all_of_it_whatever_came_before(env_id):
    def episode(env, seed):
        actions, rows = np.random.default_rng(seed), [env.reset(seed=seed)[0]]
        for _ in range(12):
            obs, reward, *_ = env.step(actions.uniform(-1, 1, env.action_space.shape))
            rows.append(np.append(obs, reward))
        return rows

    fresh, used = make_env(env_id, max_episode_steps=12), make_env(env_id, seed=5, max_episode_steps=12)
    episodes(used, 2)
    first = episode(used, 3)
    assert identical(first, episode(fresh, 3)) and not identical(first, episode(fresh, 4))
    assert identical(first, episode(used, 3))


class GlobalDraws(gym.Env):
    """Draws its noise from the global generators, as many environments do."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (2,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        return self.noise(), {}

    def step(self, action):
        return self.noise(), 0.0, False, False, {}

    def noise(self):
        return np.array([np.random.normal(), random.random()])


def registered(monkeypatch, entry_point, name="Own-v0", **options) -> str:
    monkeypatch.setitem(gym.registry, name, gym.envs.registration.EnvSpec(name, entry_point=entry_point, **options))
    return name


def test_environments_that_draw_from_the_global_generators_are_seeded_too(monkeypatch):
    env = make_env(registered(monkeypatch, GlobalDraws))
    torch.manual_seed(0)
    first = [env.reset(seed=7)[0], env.step(np.zeros(1))[0]]
    drawn = torch.rand(())
    assert identical([env.reset(seed=7)[0], env.step(np.zeros(1))[0]], first)
    torch.manual_seed(0)
    assert torch.rand(()) == drawn, "the training's own draws are PyTorch's, and stay apart"


@pytest.mark.parametrize(
    ("env_id", "max_episode_steps", "length"),
    [
        ("reach", None, 200),
        ("reach", 7, 7),
        ("dmc/cartpole-swingup", None, 1000),
        ("dmc/cartpole-swingup", 5, 5),
        ("dmc/cartpole-swingup", 1003, 1003),
        ("Pendulum-v1", None, 200),
        ("Pendulum-v1", 5, 5),
    ],
)
def test_truncation(env_id, max_episode_steps, length):
    env = make_env(env_id, seed=0, max_episode_steps=max_episode_steps)
    for _ in range(2):
        env.reset()
        ends = [env.step(env.action_space.sample())[2:4] for _ in range(length)]
        assert ends == [(False, False)] * (length - 1) + [(False, True)]
    if env_id == "reach":
        with pytest.raises(ValueError, match="reset"):
            env.step(env.action_space.sample())


def test_termination():
    hopper = make_env("Hopper-v5", seed=0)
    *_, last = episodes(hopper, 1)
    assert tuple(last[-2:]) == (True, False)

    env = make_env("dmc/cartpole-swingup", seed=0)
    env.reset()
    env.unwrapped.dm_env.task.get_termination = lambda physics: 0.0  # the discount of dm_control's terminal states
    assert env.step([0.0])[2:4] == (True, False)


def test_actions_within_unit_bounds_pass_bit_for_bit():
    action = np.array([-0.0, 1e-42, -1, 1, 0.1, -0.7], dtype=np.float32)
    assert received_action(make_env("HalfCheetah-v5", seed=0), action).tobytes() == action.tobytes()
    assert received_action(make_env("push", seed=0), action[:4]).tobytes() == action[:4].tobytes()
    assert received_action(make_env("dmc/cheetah-run", seed=0), action).tobytes() == action.tobytes()


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Humanoid-v5", "dmc/quadruped-walk"])
def test_other_action_bounds_are_rescaled(env_id):
    env = make_env(env_id, seed=0)
    inner = env.unwrapped.action_space
    for action, expected in ((-1, inner.low), (1, inner.high), (0.5, inner.low + 0.75 * (inner.high - inner.low))):
        received = received_action(env, np.full(inner.shape, action))
        np.testing.assert_allclose(received, expected, rtol=0, atol=1e-6)


def test_action_repeat_sums_rewards_and_stops_at_the_episode_end():
    once = make_env("HalfCheetah-v5", seed=0, max_episode_steps=4)
    thrice = make_env("HalfCheetah-v5", seed=0, max_episode_steps=4, action_repeat=3)
    action = np.full(6, 0.5, dtype=np.float32)
    once.reset(), thrice.reset()
    single = [once.step(action) for _ in range(4)]
    first, second = thrice.step(action), thrice.step(action)
    assert first[1] == sum(step[1] for step in single[:3]) and first[0].tobytes() == single[2][0].tobytes()
    assert second[1] == single[3][1] and second[0].tobytes() == single[3][0].tobytes()
    assert first[2:4] == (False, False) and second[2:4] == (False, True)
    assert thrice.metadata["render_fps"] == round(once.metadata["render_fps"] / 3)


def test_a_video_has_at_least_a_frame_a_second():
    assert [make_env("HalfCheetah-v5", seed=0, action_repeat=n).metadata["render_fps"] for n in (1, 4, 50)] == [
        20,
        5,
        1,
    ]


def test_action_repeat_keeps_a_success_between_two_decisions():
    env = make_env("reach", seed=0, action_repeat=3)
    env.reset()
    success = iter([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    env.unwrapped.evaluate_state = lambda obs, action: (1.0, {"success": next(success)})
    assert env.step(np.zeros(4))[4]["success"] == 1.0
    assert env.step(np.zeros(4))[4]["success"] == 0.0


@pytest.mark.parametrize(
    ("env_id", "arguments", "message"),
    [
        ("hamer", {}, "'hamer'.*hammer-v3"),
        ("push-v2", {}, "'push-v2'.*push-v3"),
        ("dmc/cheeta-run", {}, "'dmc/cheeta-run'.*dmc/cheetah-run"),
        ("HalfCheetah-v9", {}, "'HalfCheetah-v9'.*HalfCheetah-v5"),
        ("no such thing", {}, "'no such thing'.*nearest known"),
        ("cheetah-run", {}, "'cheetah-run'.*dmc/cheetah-run"),
        ("dmc/lqr-lqr_2_1", {}, "unknown dm_control task 'dmc/lqr-lqr_2_1'"),
        ("HalfCheetah-v3", {}, "'HalfCheetah-v3' cannot be made"),
        ("CartPole-v1", {}, "action space Discrete.*Box"),
        ("FrozenLake-v1", {}, "observation space Discrete.*Box"),
        ("push", {"reward_version": "v3"}, "reward_version 'v3'.*'v1' or 'v2'"),
        ("push", {"render_mode": "human"}, "render_mode 'human'.*rgb_array"),
        ("push", {"action_repeat": 0}, "action_repeat 0.*at least 1"),
        ("push", {"max_episode_steps": 0}, "max_episode_steps 0.*at least 1"),
    ],
)
def test_bad_arguments_give_one_line(env_id, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        make_env(env_id, seed=0, **arguments)
    assert "\n" not in str(error.value)


class Own(gym.Env):
    """Knows nothing of rendering; records the actions that it gets."""

    def __init__(self, action_space, observation_space=None, reward=1.0, obs=None):
        self.action_space = action_space
        self.observation_space = observation_space or gym.spaces.Box(-1, 1, (2,))
        self.reward, self.obs, self.actions = reward, obs, []

    def observation(self):
        return self.observation_space.sample() if self.obs is None else self.obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.actions.append(action)
        return self.observation(), self.reward, False, False, {}


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_action_lies_in_the_environments_own_space(data):
    dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64]))
    shape = data.draw(st.sampled_from([(1,), (3,), (2, 2)]))
    span = {np.float16: 6e4, np.float32: 2.0**100, np.float64: 2.0**1000}[dtype]
    bound = st.floats(-span, span, width=np.dtype(dtype).itemsize * 8)
    pairs = [sorted(data.draw(st.tuples(bound, bound))) for _ in range(int(np.prod(shape)))]
    low, high = (np.array(side, dtype).reshape(shape) for side in zip(*pairs, strict=True))
    inner = Own(gym.spaces.Box(low, high, shape, dtype))
    env = envs._CommonInterface(inner, "own", 1)
    env.reset(seed=0)
    numbers = st.floats(-1, 1, width=32) | st.sampled_from([-1.0, 1.0, -1.5, 7.0])
    action = np.array(data.draw(st.lists(numbers, min_size=low.size, max_size=low.size)), np.float32)
    env.step(action)
    share = (np.clip(action, -1, 1).astype(np.float64).reshape(shape) + 1) / 2
    with np.errstate(over="ignore"):
        expected = (low * (1 - share) + high * share).astype(dtype)
    assert np.array_equal(inner.actions[0], np.clip(expected, low, high))
    for end, corner in ((-1, low), (1, high)):
        env.step(np.full(low.size, end))
        assert np.array_equal(inner.actions[-1], corner), "the bounds themselves can be reached"


BOX, SMALL = gym.spaces.Box, gym.spaces.Box(-1, 1, (2,))


@pytest.mark.parametrize(
    ("action", "observation", "message"),
    [
        (gym.spaces.Discrete(3), SMALL, r"action space Discrete\(3\): expected a Box of floats"),
        (BOX(0, 5, (2,), np.int64), SMALL, "expected a Box of floats"),
        (BOX(-np.inf, np.inf, (2,)), SMALL, "unbounded actions.*TransformAction"),
        (BOX(np.array([-1.0, -np.inf]), np.array([1.0, 1.0]), dtype=np.float64), SMALL, "unbounded actions"),
        (BOX(-1.7e308, 1.7e308, (2,), np.float64), SMALL, "unbounded actions"),
        (BOX(-1, 1, (0,)), SMALL, "vectors of at least one number"),
        (BOX(-1, 1, ()), SMALL, "vectors of at least one number"),
        (gym.spaces.Tuple([SMALL]), SMALL, "expected a Box of floats"),
        (SMALL, gym.spaces.Dict(a=SMALL), "observation space Dict.*FlattenObservation"),
        (SMALL, gym.spaces.Tuple([SMALL]), "observation space Tuple.*FlattenObservation"),
        (SMALL, BOX(0, 255, (8, 8, 3), np.uint8), "images as observations.*FlattenObservation"),
        (SMALL, gym.spaces.MultiBinary(3), "observation space MultiBinary"),
    ],
)
def test_spaces_that_do_not_fit_are_refused_with_what_would_work(monkeypatch, action, observation, message):
    env_id = registered(monkeypatch, lambda: Own(action, observation))
    with pytest.raises(ValueError, match=message) as error:
        make_env(env_id)
    assert "\n" not in str(error.value)
    with pytest.raises(ArgumentError, match=r"^--env-id Own-v0: 'Own-v0' has"):
        envs.env_sizes(env_id)


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint8, bool])
def test_observations_of_any_shape_and_type_become_vectors(monkeypatch, dtype):
    shape = (5,) if dtype in (np.uint8,) else (2, 3)
    env = make_env(registered(monkeypatch, lambda: Own(SMALL, BOX(0, 1, shape, dtype), reward=np.array([2.5]))))
    obs, _ = env.reset(seed=0)
    assert obs.shape == (int(np.prod(shape)),) and obs.dtype == np.float32
    assert env.step(np.zeros(2))[1] == 2.5, "a reward may be an array of one element"


def test_an_environment_is_made_as_gymnasium_writes_it(monkeypatch, tmp_path):
    (tmp_path / "their_module.py").write_text(
        "import gymnasium as gym\n"
        "from gymnasium.envs.classic_control import PendulumEnv\n"
        "class Bare(PendulumEnv):\n"
        "    metadata = {'render_modes': []}\n"
        "    def __init__(self, gravity=10.0): super().__init__(g=gravity)\n"
        "gym.register('Their-v0', entry_point=Bare)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    env = make_env("their_module:Their-v0", env_kwargs={"gravity": 3.0})
    assert env.unwrapped.g == 3.0 and env.metadata["render_fps"] == 30
    for env_id, options, message in [
        ("no_module:Their-v0", {}, "cannot be made: ModuleNotFoundError: No module named 'no_module'"),
        ("Their-v0", {"env_kwargs": {"gravty": 1}}, "cannot be made: TypeError: .*gravty"),
        ("Their-v1", {}, "unknown environment 'Their-v1'; nearest known: Their-v0"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            make_env(env_id, **options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"reward": np.ones(2)}, r"the reward has shape \(2,\): expected one number"),
        ({"obs": np.zeros((3, 2))}, "an observation has 6 numbers: expected 2, as in its space"),
        ({"reset": lambda self, **_: np.zeros(2)}, "an observation has 1 numbers: expected 2, as in its space"),
        ({"reset": lambda self, **_: np.zeros(3)}, r"cannot be played \(ValueError: too many values to unpack"),
        ({"step": lambda self, action: (np.zeros(2), 0.0, False, {})}, r"cannot be played \(ValueError: not enough"),
        ({"reset": lambda self: (np.zeros(2), {})}, r"cannot be played \(TypeError: .*unexpected keyword argument"),
        ({"obs": "a word"}, r"cannot be played \(ValueError: could not convert"),
    ],
)
def test_an_environment_that_cannot_be_played_is_refused_before_training(monkeypatch, broken, message):
    own = Own(SMALL, **{name: broken.pop(name) for name in ("reward", "obs") if name in broken})
    for name, function in broken.items():
        monkeypatch.setattr(Own, name, function)
    env_id = registered(monkeypatch, lambda: own)
    with pytest.raises(ArgumentError, match=rf"^--env-id {env_id}: {message}[^\n]*$"):
        envs.env_sizes(env_id)


def test_a_first_step_that_is_not_finite_ends_as_any_other(monkeypatch):
    with pytest.raises(NotFiniteError, match="the reward is nan in step 1"):
        envs.env_sizes(registered(monkeypatch, lambda: Own(SMALL, reward=np.nan)))


@dataclass
class Script:
    """Arguments of a script."""

    env_kwargs: str = ""
    max_episode_steps: int | None = None
    capture_video: bool = False
    quiet: bool = False


def test_constructor_arguments_come_from_json():
    options = envs.env_options(Script(env_kwargs='{"g": 3.5}', max_episode_steps=7))
    assert options == {"env_kwargs": {"g": 3.5}, "max_episode_steps": 7}
    env = make_env("Pendulum-v1", **options)
    env.reset(seed=0)
    assert env.unwrapped.g == 3.5 and [env.step(np.zeros(1))[3] for _ in range(7)] == [False] * 6 + [True]
    assert envs.env_options(Script()) == {"env_kwargs": {}, "max_episode_steps": None}
    assert envs.env_sizes("Ant-v5", Script(env_kwargs='{"include_cfrc_ext_in_observation": false}')) == (27, 8)


@pytest.mark.parametrize("text", ["{", "[1]", "5", "gravity=3", "null", '"a"', "[" * 100_000, "{'g': 3}"])
def test_constructor_arguments_that_are_no_json_object_are_refused(text):
    with pytest.raises(
        ArgumentError, match=r"^--env-kwargs [^\n]{,100}: must be a JSON object, \{name: value\} \([^\n]+\)$"
    ):
        envs.env_sizes("Pendulum-v1", Script(env_kwargs=text))


@pytest.mark.parametrize(
    ("env_id", "text", "message"),
    [
        ("Pendulum-v1", '{"gravty": 3}', "TypeError: .*gravty"),
        ("Pendulum-v1", '{"max_episode_steps": 3}', "TypeError: .*multiple values"),
        ("HalfCheetah-v5", '{"xml_file": "/no/such.xml"}', r"'HalfCheetah-v5' cannot be made: .*such\.xml"),
        ("Push", '{"seed": 3}', "'push-v3' takes none, only Gymnasium's environments do"),
        ("dmc/cheetah-run", '{"seed": 3}', "'dmc/cheetah-run' takes none"),
    ],
)
def test_constructor_arguments_that_do_not_fit_are_one_line(env_id, text, message):
    with pytest.raises(ArgumentError, match=rf"^--env-id {env_id}: [^\n]*{message}[^\n]*$"):
        envs.env_sizes(env_id, Script(env_kwargs=text))


def test_an_environment_without_a_limit_is_told(monkeypatch, capsys):
    env_id = registered(monkeypatch, lambda: Own(SMALL))
    assert envs.env_sizes(env_id, Script()) == (2, 2)
    line = "Own-v0 has no limit of its own: episodes are cut after 10,000 steps (--max-episode-steps)\n"
    assert capsys.readouterr().out == line
    for args in (Script(quiet=True), Script(max_episode_steps=50), None):
        envs.env_sizes(env_id, args)
    envs.env_sizes(registered(monkeypatch, lambda: Own(SMALL), max_episode_steps=3), Script())
    envs.env_sizes("Pendulum-v1", Script())
    assert capsys.readouterr().out == ""


class Drawn(gym.Env):
    """Gives `frame`, or raises it."""

    metadata: ClassVar = {"render_modes": ["rgb_array"]}
    observation_space = action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, frame, render_mode=None):
        self.frame, self.render_mode = frame, render_mode

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, False, False, {}

    def render(self):
        if isinstance(self.frame, Exception):
            raise self.frame
        return self.frame


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (gym.error.DependencyNotInstalled("pygame is not installed, run `pip install pygame`"), "pip install pygame"),
        (ImportError("Cannot initialize a headless\nEGL display."), "ImportError: Cannot initialize a headless EGL"),
        (ctypes.ArgumentError("no context"), "no context"),
        (None, "gives no picture"),
        ("+---+", "gives no picture"),
        (np.zeros((8, 8)), "gives no picture"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_training(monkeypatch, frame, message):
    env_id = registered(monkeypatch, lambda render_mode=None: Drawn(frame, render_mode))
    envs.env_sizes(env_id, Script())
    with pytest.raises(
        ArgumentError, match=rf"^--capture-video: {env_id} cannot be drawn \(\w*[^\n]*{message}"
    ) as error:
        envs.env_sizes(env_id, Script(capture_video=True))
    assert "\n" not in str(error.value) and "MUJOCO_GL=egl" in str(error.value)


@pytest.mark.parametrize("options", [{}, {"metadata": {"render_modes": ["ansi"]}}])
def test_an_environment_that_draws_in_no_way_or_another_is_refused(monkeypatch, options):
    for name, value in options.items():
        monkeypatch.setattr(Own, name, value)
    env_id = registered(monkeypatch, lambda: Own(SMALL), max_episode_steps=9)
    with pytest.raises(ArgumentError, match=rf"^--capture-video: {env_id} cannot be drawn \([^\n]*$"):
        envs.env_sizes(env_id, Script(capture_video=True))


def test_what_can_be_drawn_is_not_refused(monkeypatch):
    frame = np.zeros((8, 8, 3), np.uint8)
    env_id = registered(monkeypatch, lambda render_mode=None: Drawn(frame, render_mode))
    assert envs.env_sizes(env_id, Script(capture_video=True)) == (1, 1)


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        ("neuroplastic_expansion", {"DISPLAY": ":99"}, r"--capture-video: Hopper-v5 cannot be drawn .*MUJOCO_GL=egl"),
        ("nbsp", {"DISPLAY": ":99"}, r"--capture-video: window-open-v3 cannot be drawn .*MUJOCO_GL=egl"),
        ("mst_rigl", {"MUJOCO_GL": "disable"}, r"--capture-video: Hopper-v5 cannot be drawn .*MUJOCO_GL=egl"),
        ("ssde", {"MUJOCO_GL": "none"}, r"MUJOCO_GL=none: MuJoCo cannot be imported .*none\); unset it"),
    ],
)
def test_a_display_that_is_gone_is_one_line_and_leaves_no_folder(script, settings, message, tmp_path):
    environment = os.environ | settings
    if "MUJOCO_GL" not in settings:
        environment.pop("MUJOCO_GL", None)  # GLFW is MuJoCo's choice where there is a display
    words = ["--capture-video", "--run-dir", str(tmp_path / "run")]
    words += ["--env-id", "Hopper-v5"] if script in ("neuroplastic_expansion", "mst_rigl") else []
    command = [sys.executable, str(Path(__file__).parents[1] / f"{script}.py"), *words]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == "", run.stderr
    assert re.fullmatch(rf"error: {message}.*\n", run.stderr), run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_that_is_not_finite_enters(monkeypatch, bad):
    env = make_env(registered(monkeypatch, lambda: Own(SMALL, reward=bad)), action_repeat=2)
    env.reset(seed=0)
    with pytest.raises(NotFiniteError, match=rf"^Own-v0: the reward is {bad} in step 2 of an episode$"):
        env.step(np.zeros(2))
    broken = Own(SMALL)
    env = envs._CommonInterface(broken, "own", 1)
    env.reset(seed=0)
    env.step(np.zeros(2))
    broken.obs = np.array([0.0, bad])
    with pytest.raises(NotFiniteError, match=rf"^own: an observation holds {bad} in step 2 of an episode$"):
        env.step(np.zeros(2))
    with pytest.raises(NotFiniteError, match="in step 0 of an episode"):
        env.reset(seed=0)


def test_an_endless_episode_is_cut_as_a_truncation(monkeypatch):
    env = make_env(registered(monkeypatch, lambda: Own(SMALL)))
    env.reset(seed=0)
    ends = [env.step(np.zeros(2))[2:4] for _ in range(envs.ENDLESS)]
    assert ends == [(False, False)] * (envs.ENDLESS - 1) + [(False, True)]
    own_limit = make_env(registered(monkeypatch, lambda: Own(SMALL), max_episode_steps=3))
    own_limit.reset(seed=0)
    assert [own_limit.step(np.zeros(2))[3] for _ in range(3)] == [False, False, True]


# Task names


def test_names_are_the_benchmarks():
    assert tuple(metaworld.env_dict.MT50_V3) == MT50 and tuple(metaworld.env_dict.MT10_V3) == MT10
    assert len(set(CW10)) == 10 and set(CW10) <= set(MT50)
    assert envs.task_sequence("cw20") == list(CW10 + CW10)
    assert {key: len(tasks) for key, tasks in TASK_SEQUENCES.items()} == {
        "cw10": 10,
        "cw20": 20,
        "cw3": 3,
        "mt10": 10,
        "mt50": 50,
        "window": 2,
        "drawer": 2,
        "button": 2,
        "cycle4": 4,
    }


def test_descriptions_are_complete_and_distinct():
    assert tuple(TASK_DESCRIPTIONS) == MT50
    texts = list(TASK_DESCRIPTIONS.values())
    assert len({text.lower() for text in texts}) == 50
    assert all(text[0].isupper() and text.endswith(".") and text.strip() == text for text in texts)
    assert [TASK_DESCRIPTIONS[task] for task in CW10] == [
        "Hammer a screw on the wall.",
        "Bypass a wall and push a puck to a goal.",
        "Rotate the faucet clockwise.",
        "Pull a puck to a goal.",
        "Grasp a stick and pull a box with the stick.",
        "Press a handle down sideways.",
        "Push the puck to a goal.",
        "Pick and place a puck onto a shelf.",
        "Push and close a window.",
        "Unplug a peg sideways.",
    ]


@given(st.lists(st.tuples(st.sampled_from(MT50), st.booleans(), st.sampled_from(["", " "])), min_size=1))
def test_task_sequence_of_a_list(entries):
    spec = ",".join(space + (task if full else task.removesuffix("-v3")) + space for task, full, space in entries)
    assert envs.task_sequence(spec.upper()) == envs.task_sequence(spec.title())
    assert envs.task_sequence(spec) == [task for task, _, _ in entries]


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        (" Reach-WALL ", "reach-wall-v3"),
        ("button-press-V3", "button-press-v3"),
        (" halfcheetah-V5", "HalfCheetah-v5"),
        ("DMC/Humanoid_cmu-run ", "dmc/humanoid_CMU-run"),
        ("dmc/humanoid_CMU-run", "dmc/humanoid_CMU-run"),
        ("no_module:Their-v0", "no_module:Their-v0"),
        ("dmc/Cheetah-rum", "dmc/Cheetah-rum"),
    ],
)
def test_an_environments_name_in_any_case_with_spaces(typed, name):
    assert envs.canonical(typed) == name


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [("HALFCHEETA-V5", "HalfCheetah-v5"), ("DMC/CHEETAH-RUM", "dmc/cheetah-run"), ("HAMER", "hammer-v3")],
)
def test_a_name_that_is_nearly_right_names_the_nearest_whatever_its_case(typed, nearest):
    with pytest.raises(ArgumentError, match=f"--env-id {typed}: .*nearest known: {nearest}"):
        envs.env_sizes(typed)


@given(st.lists(st.sampled_from([*TASK_SEQUENCES, "reach", "push-v3"]), min_size=1, max_size=4))
def test_task_sequence_of_sequences_is_their_concatenation(names):
    assert envs.task_sequence(",".join(names)) == [task for name in names for task in envs.task_sequence(name)]


@settings(max_examples=50)
@given(st.text(max_size=30))
def test_task_sequence_of_any_text_is_known_tasks_or_one_line(text):
    try:
        assert set(envs.task_sequence(text)) <= set(MT50)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hamer", "'hamer'.*hammer-v3"),
        ("cw11", "'cw11'.*cw10"),
        ("CW11, Reach", "'CW11'.*cw10"),
        ("DRAWER-OPNE", "'DRAWER-OPNE'.*drawer-open-v3"),
        ("push,windo-close", "'windo-close'.*window-close-v3"),
        ("hammer-v2", "'hammer-v2'.*hammer-v3"),
        ("", "empty"),
        ("push,,reach", "empty"),
    ],
)
def test_task_sequence_names_what_is_wrong(spec, message):
    with pytest.raises(ValueError, match=message):
        envs.task_sequence(spec)


# Rendering

needs_rendering = pytest.mark.skipif(os.environ.get("MUJOCO_GL") == "disable", reason="no EGL library here")


@needs_rendering
def test_meta_world_frame_is_upright_and_not_mirrored(tmp_path):
    env = make_env("push", seed=0, max_episode_steps=2, render_mode="rgb_array")
    env = gym.wrappers.RecordVideo(env, str(tmp_path / "videos"), episode_trigger=lambda episode: True)
    env.reset()
    frame = env.render()
    assert frame.shape == (480, 480, 3) and frame.dtype == np.uint8
    assert np.ptp(frame[:40].reshape(-1, 3), axis=0).max() < 10  # plain background above, floor and table below
    assert np.ptp(frame[-40:].reshape(-1, 3), axis=0).min() > 50
    red = (frame[..., 0] > 100) & (frame[..., 1:].max(axis=-1) < 60)
    assert red[:, :240].sum() > 4 * red[:, 240:].sum()  # the arm stands at y=0, to the left of the table at y=0.6
    while not any(env.step(np.zeros(4))[2:4]):
        pass
    env.close()
    assert len(list(tmp_path.glob("videos/*.mp4"))) == 1 and env.metadata["render_fps"] == 80


@needs_rendering
@pytest.mark.parametrize("env_id", ["dmc/cartpole-swingup", "HalfCheetah-v5"])
def test_other_frames(env_id):
    make_env(env_id, seed=0).reset()  # the training environment, made without rendering, comes first
    env = make_env(env_id, seed=0, render_mode="rgb_array")
    env.reset()
    frame = env.render()
    assert frame.shape == (480, 480, 3) and frame.dtype == np.uint8 and np.ptp(frame) > 50
    env.close()


def test_record_video_writes_the_first_episode(tmp_path):
    env = make_env("reach", seed=0, render_mode="rgb_array", max_episode_steps=3)
    env = envs.record_video(env, tmp_path / "reach")
    for _ in range(2):
        env.reset()
        while not env.step(np.zeros(4, np.float32))[3]:
            pass
    env.close()
    assert [path.name for path in (tmp_path / "reach").iterdir()] == ["reach-episode-0.mp4"]


# ---------------------------------------------------------------------------------------------------- worker processes


@pytest.fixture
def workers():
    started = envs.WorkerEnvs(["reach-v3", "push-v3"], [0, 0], 20, "v2", 2)
    started.reset([1, 2])
    yield started
    for process in started.processes:
        process.kill()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_ends_the_run_with_one_line(workers, monkeypatch, signum):
    workers.patience = 1.0
    os.kill(workers.processes[1].pid, signum)
    begun = time.monotonic()
    with pytest.raises(RunError, match=r"^the worker process of push-v3 has (ended|not answered for 1 s)$"):
        for _ in range(20):
            workers.step(np.zeros((2, 4), np.float32))
    assert time.monotonic() - begun < 5
    workers.close()
    assert not any(process.is_alive() for process in workers.processes)


def test_workers_do_not_hear_the_signals_of_a_run(workers):
    for signum in SIGNALS:
        os.kill(workers.processes[0].pid, signum)
    for _ in range(3):
        workers.step(np.zeros((2, 4), np.float32))
    workers.close()


def test_workers_end_with_the_process_that_started_them():
    code = "from common import envs; w = envs.WorkerEnvs(['reach-v3'], [0], 20, 'v2', 1); w.reset([1]); "
    code += "print(w.processes[0].pid, flush=True); import time; time.sleep(100)"
    main = ["import sys; sys.path.insert(0, '.')", "if __name__ == '__main__':", f"    {code}"]
    root = Path(__file__).parent.parent
    with tempfile.NamedTemporaryFile("w", suffix=".py", dir=root, prefix=".test_workers_") as file:
        file.write("\n".join(main))
        file.flush()
        with subprocess.Popen([sys.executable, file.name], stdout=-1, cwd=root) as process:
            pid = int(process.stdout.readline())
            process.kill()
    for _ in range(100):
        time.sleep(0.1)
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            state = "gone"
        if state in ("gone", "Z"):
            break
    assert state in ("gone", "Z")


def test_a_value_that_is_not_finite_comes_out_of_a_worker(monkeypatch):
    class Pipe:
        sent, calls = [], iter([("step", ()), None])

        def recv(self):
            call = next(self.calls)
            if call is None:
                raise EOFError
            return call

        def send(self, result):
            self.sent.append(result)

    class Broken:
        def __init__(self, *arguments):
            pass

        def step(self):
            raise NotFiniteError("reach-v3: the reward is nan")

        def close(self):
            pass

    monkeypatch.setattr(envs, "TaskEnvs", Broken)
    envs.serve_envs(Pipe())
    [error] = Pipe.sent
    assert isinstance(error, NotFiniteError)
    ours = envs.WorkerEnvs.__new__(envs.WorkerEnvs)
    pipe = types.SimpleNamespace(send=lambda _: None, poll=lambda _: True, recv=lambda: error)
    ours.patience, ours.pipes = 1.0, [pipe]
    with pytest.raises(NotFiniteError, match="the reward is nan"):
        ours._call("step", [()])


def test_an_environment_that_fills_one_array_again_and_again_gives_observations_of_their_own(monkeypatch):
    buffer = np.zeros(2, np.float32)
    env = make_env(registered(monkeypatch, lambda: Own(SMALL, obs=buffer)))
    first, _ = env.reset(seed=0)
    buffer += 0.5
    second = env.step(np.zeros(2))[0]
    assert first.tolist() == [0, 0] and second.tolist() == [0.5, 0.5]


def test_the_seed_is_that_of_the_action_space_too():
    one, two = (make_env("Pendulum-v1", seed=4).action_space for _ in range(2))
    assert one.sample() == two.sample()


@pytest.mark.parametrize("task", ["hand-insert-v3", "peg-insert-side-v3", "stick-push-v3"])
def test_what_version_1_never_calls_a_success_is_refused_with_it(task):
    with pytest.raises(ArgumentError, match=f"{task} never reports a success with --reward-version v1"):
        envs.task_sequence(task, reward_version="v1")
    assert envs.task_sequence(task) == [task]


def test_what_is_drawn_has_the_arguments_of_the_environment(monkeypatch):
    def build(frame, render_mode=None):
        return Drawn(np.full((8, 8, 3), frame, np.uint8), render_mode)

    env_id = registered(monkeypatch, build)
    assert envs.env_sizes(env_id, Script(env_kwargs='{"frame": 1}', capture_video=True)) == (1, 1)


def test_workers_have_long_for_their_imports_only(workers):
    assert workers.patience == envs.WORKER_SECONDS  # after the first answer
    workers.close()
