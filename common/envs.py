"""Environments of the five scripts: Meta-World, dm_control and Gymnasium behind one factory.

``make_env`` gives every environment the same interface: flat float32 observations, float32 actions in [-1, 1],
``reset(seed=...)`` that decides all of the episode, and termination told from truncation. ``task_sequence`` names
Meta-World's tasks. ``TaskEnvs`` and ``WorkerEnvs`` step several of them at once, in this process or in others.
"""

import contextlib
import ctypes.util
import functools
import importlib.util
import io
import math
import multiprocessing
import multiprocessing.resource_tracker
import os
import random
import signal
import sys
import types
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import gymnasium as gym
import numpy as np

from common.cli import SIGNALS, ArgumentError, NotFiniteError, RunError, read_json, say, words_of
from common.descriptions import TASK_DESCRIPTIONS, nearest, task_name

if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
    # Left to themselves MuJoCo, Gymnasium and dm_control choose GLFW, which cannot draw without a display. dm_control
    # does not even import with "egl" where that library is missing, hence "disable" (no rendering) there.
    os.environ.setdefault("MUJOCO_GL", "egl" if ctypes.util.find_library("EGL") else "disable")

if importlib.util.find_spec("triton"):
    # PyTorch's CUDA build imports it when it needs it. Its LLVM has to be there before that of Mesa, which draws where
    # there is no GPU: the other way round the process dies.
    importlib.import_module("triton")

try:
    import mujoco
except Exception as error:  # it looks for what it draws with when it is imported
    choice = os.environ.get("MUJOCO_GL")
    print(f"error: MUJOCO_GL={choice}: MuJoCo cannot be imported ({words_of(error)}); unset it", file=sys.stderr)
    raise SystemExit(2) from None

# NumPy measures its float types once. The scripts flush denormal numbers, and measured after that it would warn.
np.finfo(np.float32), np.finfo(np.float64)

WORKER_SECONDS = 30.0  # without an answer, before a worker process is given up
ENDLESS = 10_000  # steps after which an episode is cut where neither the environment nor the user has a limit
MT50 = tuple(TASK_DESCRIPTIONS)
MT10 = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
)
CW10 = (  # Continual World, arXiv 2105.10919
    "hammer-v3",
    "push-wall-v3",
    "faucet-close-v3",
    "push-back-v3",
    "stick-pull-v3",
    "handle-press-side-v3",
    "push-v3",
    "shelf-place-v3",
    "window-close-v3",
    "peg-unplug-side-v3",
)
TASK_SEQUENCES: dict[str, tuple[str, ...]] = {
    "cw10": CW10,
    "cw20": CW10 + CW10,
    "cw3": ("push-back-v3", "shelf-place-v3", "stick-pull-v3"),
    "mt10": MT10,
    "mt50": MT50,
    "window": ("window-open-v3", "window-close-v3"),
    "drawer": ("drawer-open-v3", "drawer-close-v3"),
    "button": ("button-press-topdown-v3", "button-press-topdown-wall-v3"),
    "cycle4": ("window-open-v3", "window-close-v3", "drawer-open-v3", "drawer-close-v3"),
}


def seed_of(*words: int) -> int:
    """One seed from several numbers, e.g. (run seed, stream, task): independent streams for all that is random."""
    return int(np.random.SeedSequence([int(word) for word in words]).generate_state(1)[0])


def canonical(env_id: str) -> str:
    """An environment's own name where `env_id` has spaces around it, another case or, in Meta-World, no "-v3"."""
    env_id, known = task_name(env_id), gym.registry
    if env_id.lower().startswith("dmc/"):
        with contextlib.suppress(ValueError):  # `make_env` says it
            known = _dm_control_tasks()
    exact = env_id in known or env_id in TASK_DESCRIPTIONS
    return env_id if exact else next((name for name in known if name.lower() == env_id.lower()), env_id)


def env_options(args) -> dict:
    """What `make_env` takes from the arguments of a script, where it has them. Raises ArgumentError for bad JSON."""
    text = getattr(args, "env_kwargs", "")
    try:
        env_kwargs = read_json(text) if text else {}
    except ValueError as error:
        raise ArgumentError(f"--env-kwargs {text:.100}: must be a JSON object, {{name: value}} ({error})") from None
    return {"env_kwargs": env_kwargs, "max_episode_steps": getattr(args, "max_episode_steps", None)}


def env_sizes(env_id: str, args=None, flag: str = "--env-id") -> tuple[int, int]:
    """Observation and action dimension of an environment.

    It is reset and played for a step, and with --capture-video a frame is drawn, before a run depends on it. args: of
    the script, for the environment's options. flag: the argument that named it. Raises ArgumentError for what
    `make_env` refuses or what cannot be played, NotFiniteError for a reward or observation that is not finite.
    """
    options = env_options(args)
    try:
        env = make_env(env_id, seed=0, **options)
    except ValueError as error:
        raise ArgumentError(f"{flag} {env_id}: {error}") from None
    with contextlib.closing(env):
        try:
            env.reset(seed=0)
            env.step(np.zeros(env.action_space.shape, np.float32))
        except NotFiniteError:
            raise
        except RunError as error:
            raise ArgumentError(f"{flag} {error}") from None
        except Exception as error:  # other people's code
            raise ArgumentError(f"{flag} {env_id}: cannot be played ({words_of(error)})") from None
    limits = [getattr(layer, "_max_episode_steps", None) for layer in layers_of(env)]
    if ENDLESS in limits and options["max_episode_steps"] is None and not getattr(args, "quiet", True):
        say(f"{env_id} has no limit of its own: episodes are cut after {ENDLESS:,} steps (--max-episode-steps)")
    if getattr(args, "capture_video", False):
        check_drawing(env_id, functools.partial(make_env, **options))
    return env.observation_space.shape[0], env.action_space.shape[0]


def check_drawing(env_id: str, make: Callable) -> None:
    """Draw a frame of an environment that `make` makes. Raises ArgumentError, with what to set, where that fails."""
    failure = None
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):  # one line is enough
        try:
            with contextlib.closing(make(env_id, seed=0, render_mode="rgb_array")) as env:
                env.reset(seed=0)
                if np.ndim(env.render()) != 3:
                    raise ValueError("it gives no picture")
        except Exception as error:  # of any kind: by a driver, a missing package, the environment
            failure = words_of(error)
    if failure:
        way = "set MUJOCO_GL=egl, or DISPLAY to a screen that is there, or leave it out"
        raise ArgumentError(f"--capture-video: {env_id} cannot be drawn ({failure}): {way}")


# Version 1 of Meta-World's reward comes with a success test of its own, which these can never pass.
WITHOUT_SUCCESS_V1 = {"hand-insert-v3", "peg-insert-side-v3", "stick-push-v3"}


def task_sequence(spec: str, flag: str = "--task-seq", reward_version: str = "v2") -> list[str]:
    """Meta-World task names of a sequence, in order.

    Args:
        spec: a key of ``TASK_SEQUENCES`` ("cw10") or a comma list of tasks with or without "-v3" ("hammer,push-v3"),
            in any case; a list may also hold sequences ("cw3, reach").

    Raises:
        ArgumentError: an empty list or entry, an unknown name (with the nearest known ones), or a task that cannot
            report success with this version of the reward.
    """
    tasks: list[str] = []
    for name in (part.strip() for part in spec.split(",")):
        if not name:
            raise ArgumentError(f"{flag} {spec}: empty task name: expected for example 'cw10' or 'hammer,push-wall'")
        if name.lower() in TASK_SEQUENCES:
            tasks += TASK_SEQUENCES[name.lower()]
        elif task_name(name) in TASK_DESCRIPTIONS:
            tasks.append(task_name(name))
        else:
            near = nearest(name, [*TASK_SEQUENCES, *MT50])
            raise ArgumentError(f"{flag} {spec}: unknown Meta-World task or sequence {name!r}; nearest known: {near}")
    never = sorted(WITHOUT_SUCCESS_V1 & set(tasks))
    if reward_version == "v1" and never:
        raise ArgumentError(f"{flag} {spec}: {', '.join(never)} never reports a success with --reward-version v1")
    return tasks


class _FastMetaWorld:
    """Mixin that makes a Meta-World 3.1.1 task about twice as fast, bit-identical in observation, reward and info.

    It replaces Python loops and repeated checks around the physics of ``metaworld.SawyerXYZEnv``; the tests compare
    all 50 tasks with the library.
    """

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """As the library's, which ignores ``seed``. Observation (39,) float64."""
        if seed is not None:
            self.seed(seed)
        self._first_pass = True
        return super().reset(options=options)

    def _reset_hand(self, steps: int = 50) -> None:
        # The library's reset runs reset_model twice and keeps of the first pass only the random numbers it consumed:
        # there the 50 simulated steps that bring the hand to its place can go.
        super()._reset_hand(0 if self._first_pass else steps)
        self._first_pass = False

    def step(self, action: np.ndarray):
        """One step of 12.5 ms. ``action`` (4,) in [-1, 1]: hand displacement in cm and gripper effort."""
        if self.curr_path_length >= self.max_path_length:
            raise ValueError("the episode is over: call reset()")
        model, data = self.model, self.data
        hand = data.mocap_pos + action[:3].clip(-1, 1) * self.action_scale
        data.mocap_pos = hand.clip(self.mocap_low, self.mocap_high)
        data.ctrl[:] = action[3], -action[3]
        mujoco.mj_step(model, data, nstep=self.frame_skip)
        mujoco.mj_forward(model, data)  # positions and contact forces of the new state
        self.curr_path_length += 1
        bounds = self.sawyer_observation_space
        obs = self._get_obs().clip(bounds.low, bounds.high)
        reward, info = self.evaluate_state(obs, action)
        return obs, reward, False, self.curr_path_length == self.max_path_length, info

    def _get_curr_obs_combined_no_goal(self) -> np.ndarray:
        """Hand xyz, gripper opening, then position and quaternion of up to two objects: (18,) float64."""
        fingers = self.get_body_com("rightclaw") - self.get_body_com("leftclaw")
        positions = self._get_pos_objects().reshape(-1, 3)
        obs = np.zeros(18)
        obs[:3] = self.get_endeff_pos()
        obs[3] = min(max(np.linalg.norm(fingers) / 0.1, 0.0), 1.0)
        objects = obs[4 : 4 + 7 * len(positions)].reshape(-1, 7)
        objects[:, :3] = positions
        objects[:, 3:] = self._get_quat_objects().reshape(-1, 4)
        return obs

    def touching_object(self, object_geom_id: int) -> bool:
        """Whether both finger pads press on the object; the library loops over all contacts in Python."""
        contact = self.data.contact
        geom1, geom2 = contact.geom1, contact.geom2
        on_object = (geom1 == object_geom_id) | (geom2 == object_geom_id)
        if not on_object.any():
            return False
        for pad in ("leftpad_geom", "rightpad_geom"):
            pad_id = self.data.geom(pad).id
            rows = contact.efc_address[on_object & ((geom1 == pad_id) | (geom2 == pad_id))]
            if not sum(self.data.efc_force[rows]) > 0:  # not np.sum, which adds in another order
                return False
        return True

    def render(self) -> np.ndarray | None:
        """The camera's frame, upright: Meta-World's corner2 stands on its head."""
        frame = super().render()
        return None if frame is None else np.ascontiguousarray(frame[::-1, ::-1])

    def close(self) -> None:
        """Free the simulation (30 MB) even where the closed environment is still referenced."""
        super().close()
        vars(self).clear()  # views into the simulation, which keep it alive, lie in many attributes
        self.mujoco_renderer = None  # so that closing twice is allowed


@functools.cache
def _fast_class(task: str) -> type:
    """The Meta-World class of ``task`` with ``_FastMetaWorld`` mixed in."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from scipy.spatial.transform import Rotation

    base = ALL_V3_ENVIRONMENTS[task]
    # MuJoCo's rotation matrices are valid; scipy's check of that takes 37 of its 49 µs. The task's own method, with a
    # Rotation that leaves it out, is bound to our subclass alone.
    unchecked = types.SimpleNamespace(from_matrix=functools.partial(Rotation.from_matrix, assume_valid=True))
    method = base._get_quat_objects
    method = types.FunctionType(method.__code__, {**method.__globals__, "Rotation": unchecked}, method.__name__)
    return type(f"Fast{base.__name__}", (_FastMetaWorld, base), {"_get_quat_objects": method})


def _make_meta_world(
    task: str, seed: int | None, reward_version: str, max_episode_steps: int | None, render_mode: str | None
) -> gym.Env:
    """Continual World's ``random_init_all``: goal in the observation, new object and goal positions at each reset."""
    env = _fast_class(task)(reward_function_version=reward_version, render_mode=render_mode, camera_name="corner2")
    env._partially_observable = False
    del env.sawyer_observation_space  # cached with the goal hidden
    env.observation_space = env.sawyer_observation_space
    env._freeze_rand_vec = False
    env._set_task_called = True
    env.seeded_rand_vec = True  # else positions come from NumPy's global generator
    env.max_path_length = 200 if max_episode_steps is None else max_episode_steps
    env.seed(seed or 0)
    return env


def _dm_control_tasks() -> dict[str, tuple[str, str]]:
    """Our ids of dm_control's suite -> (domain, task). Without lqr, whose episodes have no end."""
    try:
        from dm_control import suite
    except Exception as error:  # it prepares to draw when it is imported
        words = f"dm_control cannot be imported ({words_of(error)}): MUJOCO_GL=disable leaves drawing out"
        raise ValueError(words) from None
    return {f"dmc/{domain}-{task}": (domain, task) for domain, task in suite.ALL_TASKS if domain != "lqr"}


class DMControlEnv(gym.Env):
    """A task of dm_control's suite as a Gymnasium environment; observation entries are concatenated in their order."""

    def __init__(self, domain: str, task: str, seed: int, limit_time: bool, render_mode: str | None):
        from dm_control import suite

        task_kwargs = {"random": seed} if limit_time else {"random": seed, "time_limit": float("inf")}
        self.dm_env = suite.load(domain, task, task_kwargs=task_kwargs)
        size = sum(int(np.prod(entry.shape)) for entry in self.dm_env.observation_spec().values())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float64)
        bounds = self.dm_env.action_spec()
        self.action_space = gym.spaces.Box(bounds.minimum.astype(np.float32), bounds.maximum.astype(np.float32))
        self.render_mode = render_mode
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / self.dm_env.control_timestep())}

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if seed is not None:
            self.dm_env.task.random.seed(seed)
        return self._observation(self.dm_env.reset()), {}

    def step(self, action: np.ndarray):
        time_step = self.dm_env.step(action)
        terminated = time_step.last() and time_step.discount == 0.0
        truncated = time_step.last() and not terminated
        return self._observation(time_step), time_step.reward, terminated, truncated, {}

    def _observation(self, time_step) -> np.ndarray:
        return np.concatenate([np.ravel(entry) for entry in time_step.observation.values()])

    def render(self) -> np.ndarray:
        return self.dm_env.physics.render(height=480, width=480, camera_id=0)

    def close(self) -> None:
        self.dm_env.close()


class _CommonInterface(gym.Wrapper):
    """Flat float32 observations, actions in [-1, 1] for a Box of any bounds, float rewards, action repeat.

    Raises NotFiniteError where the environment gives a reward or an observation that is not finite, RunError where it
    gives one of another shape.
    """

    def __init__(self, env: gym.Env, env_id: str, action_repeat: int, seed: int | None = None):
        super().__init__(env)
        self.env_id, self.action_repeat, self.seed, self.episode_step = env_id, action_repeat, seed, 0
        self.inner_space = env.action_space
        self.low, self.high = (np.asarray(side, np.float64) for side in (self.inner_space.low, self.inner_space.high))
        self.unit_bounds = bool(np.all(self.low == -1) and np.all(self.high == 1))
        size = int(np.prod(env.observation_space.shape))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (self.low.size,), np.float32)
        fps = round(env.metadata.get("render_fps") or 30) / action_repeat
        self.metadata = {**env.metadata, "render_fps": max(1, round(fps))}

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Begin an episode. A seed decides all of it, also where an environment draws from the global generators."""
        seed, self.seed = self.seed if seed is None else seed, None  # that of `make_env` begins the first episode
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
        self.episode_step = 0
        obs, info = self.env.reset(seed=seed, options=options)
        return self._observation(obs), info

    def step(self, action: np.ndarray):
        action = self._inner_action(action)
        total_reward = success = 0.0
        for _ in range(self.action_repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            self.episode_step += 1
            if np.size(reward) != 1:
                raise RunError(f"{self.env_id}: the reward has shape {np.shape(reward)}: expected one number")
            total_reward += np.asarray(reward, dtype=np.float64).item()
            if "success" in info:  # a success in a repeated step must not be lost
                info["success"] = success = max(success, float(info["success"]))
            if terminated or truncated:
                break
        if not math.isfinite(total_reward):
            raise NotFiniteError(
                f"{self.env_id}: the reward is {total_reward} in step {self.episode_step} of an episode"
            )
        return self._observation(obs), total_reward, bool(terminated), bool(truncated), info

    def _inner_action(self, action: np.ndarray) -> np.ndarray:
        """From [-1, 1] to the environment's own bounds, in its shape and type, never outside."""
        action = np.asarray(action, dtype=np.float32).reshape(self.low.shape)
        if not self.unit_bounds:  # in float64: rounded in float32 an action may lie outside
            share = (action.astype(np.float64) + 1) / 2
            action = self.low * (1 - share) + self.high * share
        return np.clip(action, self.low, self.high).astype(self.inner_space.dtype)

    def _observation(self, obs: np.ndarray) -> np.ndarray:
        obs = np.array(obs, dtype=np.float32).ravel()
        if obs.shape != self.observation_space.shape:
            expected = self.observation_space.shape[0]
            raise RunError(
                f"{self.env_id}: an observation has {obs.size} numbers: expected {expected}, as in its space"
            )
        if not np.isfinite(obs).all():
            bad = obs[~np.isfinite(obs)][0]
            raise NotFiniteError(f"{self.env_id}: an observation holds {bad} in step {self.episode_step} of an episode")
        return obs


def check_spaces(env_id: str, env: gym.Env) -> None:
    """Raise ValueError, with what would work, unless observations and actions are vectors of numbers."""
    observation, action = env.observation_space, env.action_space
    wrappers = "gymnasium.wrappers"
    if not isinstance(observation, gym.spaces.Box):
        raise ValueError(
            f"{env_id!r} has observation space {observation}: expected a Box; {wrappers}.FlattenObservation helps"
        )
    if len(observation.shape) > 1 and observation.dtype == np.uint8:
        raise ValueError(
            f"{env_id!r} has images as observations: expected vectors; {wrappers}.FlattenObservation helps"
        )
    if not isinstance(action, gym.spaces.Box) or not np.issubdtype(action.dtype, np.floating):
        raise ValueError(f"{env_id!r} has action space {action}: expected a Box of floats")
    if not action.shape or 0 in (*observation.shape, *action.shape):
        raise ValueError(f"{env_id!r} has spaces {observation}, {action}: expected vectors of at least one number")
    with np.errstate(all="ignore"):
        spans = np.asarray(action.high, np.float64) - np.asarray(action.low, np.float64)
    if not np.isfinite(spans).all():
        helps = f"{wrappers}.TransformAction with a bounded Box helps"
        raise ValueError(f"{env_id!r} has unbounded actions: expected finite bounds; {helps}")


def make_env(
    env_id: str,
    *,
    seed: int | None = None,
    reward_version: str = "v2",
    max_episode_steps: int | None = None,
    action_repeat: int = 1,
    render_mode: str | None = None,
    env_kwargs: dict | None = None,
) -> gym.Env:
    """Build an environment with observations Box(-inf, inf, (n,), float32) and actions Box(-1, 1, (m,), float32).

    An episode that is begun by ``reset(seed=...)`` depends on that seed alone. Actions are mapped to the environment's
    own bounds, shape and type. A reward or an observation that is not finite raises NotFiniteError.

    Args:
        env_id: Meta-World task ("hammer" or "hammer-v3"), "dmc/<domain>-<task>" ("dmc/cheetah-run"), or any Gymnasium
            id with Box spaces, as Gymnasium writes it ("HalfCheetah-v5", "module:Name-v0").
        seed: of the first episode, if it is begun without one, and of ``action_space``.
        reward_version: Meta-World's reward function, "v2" (0 to 10 a step) or "v1".
        max_episode_steps: truncate after so many steps of the environment itself, before action repeat. None: 200 in
            Meta-World (as Continual World), else the environment's own limit, or `ENDLESS` where it has none.
        action_repeat: apply each action so many times and sum the rewards, up to the episode's end.
        render_mode: None or "rgb_array" ((480, 480, 3) uint8 in Meta-World and dm_control).
        env_kwargs: further arguments of a Gymnasium environment's constructor.

    Raises:
        ValueError: unknown ``env_id`` (with the nearest known ones), one whose simulator is not installed, spaces that
            do not fit (see `check_spaces`), or an argument outside what is allowed.
    """
    if reward_version not in ("v1", "v2"):
        raise ValueError(f"reward_version {reward_version!r}: expected 'v1' or 'v2'")
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode {render_mode!r}: expected None or 'rgb_array'")
    if action_repeat < 1:
        raise ValueError(f"action_repeat {action_repeat}: expected at least 1")
    if max_episode_steps is not None and max_episode_steps < 1:
        raise ValueError(f"max_episode_steps {max_episode_steps}: expected at least 1")
    env_id = canonical(env_id)
    if env_kwargs and (env_id in TASK_DESCRIPTIONS or env_id.startswith("dmc/")):
        raise ValueError(f"env_kwargs {env_kwargs}: {env_id!r} takes none, only Gymnasium's environments do")
    if env_id in TASK_DESCRIPTIONS:
        env = _make_meta_world(env_id, seed, reward_version, max_episode_steps, render_mode)
    elif env_id.startswith("dmc/"):
        known = _dm_control_tasks()
        if env_id not in known:
            raise ValueError(f"unknown dm_control task {env_id!r}; nearest known: {nearest(env_id, known)}")
        env = DMControlEnv(*known[env_id], seed, max_episode_steps is None, render_mode)
        if max_episode_steps is not None:
            env = gym.wrappers.TimeLimit(env, max_episode_steps)
    else:
        env = _make_gymnasium(env_id, max_episode_steps, render_mode, env_kwargs or {})
    check_spaces(env_id, env)
    env = _CommonInterface(env, env_id, action_repeat, seed)
    env.action_space.seed(seed)
    return env


def _make_gymnasium(env_id: str, max_episode_steps: int | None, render_mode: str | None, env_kwargs: dict) -> gym.Env:
    """Any registered environment. Render mode and limits are asked for only where they are wanted."""
    options = {name: value for name, value in (("render_mode", render_mode),) if value is not None}
    try:
        env = gym.make(env_id, max_episode_steps=max_episode_steps, disable_env_checker=True, **options, **env_kwargs)
    except Exception as error:  # its module or simulator is missing, its constructor refuses: anything can be raised
        if ":" not in env_id and env_id not in gym.registry:
            near = nearest(env_id, [*MT50, *gym.registry, *_dm_control_tasks()])
            raise ValueError(f"unknown environment {env_id!r}; nearest known: {near}") from None
        raise ValueError(f"{env_id!r} cannot be made: {words_of(error)}") from None
    limited = any(isinstance(layer, gym.wrappers.TimeLimit) for layer in layers_of(env))
    return env if limited else gym.wrappers.TimeLimit(env, ENDLESS)


def layers_of(env: gym.Env) -> Iterable[gym.Env]:
    """An environment's wrappers from the outside in, and itself."""
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env
    yield env


def record_video(env: gym.Env, folder: Path) -> gym.Env:
    """Write the first episode of `env`, made with render_mode="rgb_array", to a new `folder` as mp4."""
    first = {"episode_trigger": lambda episode: episode == 0}
    return gym.wrappers.RecordVideo(env, str(folder), name_prefix=folder.name, disable_logger=True, **first)


# ------------------------------------------------------------------------------------------------ several tasks at once


class TaskEnvs:
    """Environments of some Meta-World tasks, stepped in turn. All episodes have the same length.

    Args:
        tasks: Meta-World names.
        seeds: of their goals, one per task.
        max_episode_steps, reward_version: see ``make_env``.
    """

    def __init__(self, tasks: list[str], seeds: list[int], max_episode_steps: int, reward_version: str):
        make = functools.partial(make_env, max_episode_steps=max_episode_steps, reward_version=reward_version)
        self.envs = [make(task, seed=seed) for task, seed in zip(tasks, seeds, strict=True)]

    def reset(self, seeds: list[int]) -> np.ndarray:
        """Begin an episode in every environment, with a seed for each: observations (tasks, obs_dim)."""
        return np.stack([env.reset(seed=seed)[0] for env, seed in zip(self.envs, seeds, strict=True)])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tasks, act_dim) -> next observations (tasks, obs_dim), rewards (tasks,), successes (tasks,)."""
        steps = [env.step(action) for env, action in zip(self.envs, actions, strict=True)]
        obs, rewards, _, _, infos = zip(*steps, strict=True)
        successes = np.array([info["success"] for info in infos], dtype=np.float32)
        return np.stack(obs), np.array(rewards, dtype=np.float32), successes

    def close(self) -> None:
        for env in self.envs:
            env.close()


class WorkerEnvs:
    """`TaskEnvs`, spread over `workers` processes: the same results, where PyTorch flushes denormal numbers.

    The processes do not see a run's signals, which come to a whole group: they end when this one closes them or ends.
    """

    def __init__(self, tasks: list[str], seeds: list[int], max_episode_steps: int, reward_version: str, workers: int):
        context = multiprocessing.get_context("spawn")  # a fork would inherit PyTorch's threads
        self.parts = [slice(part[0], part[-1] + 1) for part in np.array_split(np.arange(len(tasks)), workers)]
        self.tasks, self.pipes, self.processes = tasks, [], []
        self.patience = 10 * WORKER_SECONDS  # for the imports, on a busy machine
        multiprocessing.resource_tracker.ensure_running()  # comes with the first process and unblocks the signals
        # a child inherits what is blocked; set in the child, it would come after the imports, which take seconds
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for part in self.parts:
                pipe, other = context.Pipe()
                arguments = (other, tasks[part], seeds[part], max_episode_steps, reward_version)
                process = context.Process(target=serve_envs, args=arguments, daemon=True)
                process.start()
                other.close()  # so that the end of the process ends the pipe
                self.pipes.append(pipe)
                self.processes.append(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _call(self, method: str, arguments: list[tuple]) -> list:
        """Call a method of TaskEnvs in every process; their results in the order of the tasks.

        Raises RunError if a process has ended or does not answer: nothing may wait for it for ever.
        """
        results = []
        for i, (pipe, argument) in enumerate(zip(self.pipes, arguments, strict=True)):
            try:
                pipe.send((method, argument))
            except ConnectionError:
                self._give_up(i, "has ended")
        for i, pipe in enumerate(self.pipes):
            if not pipe.poll(self.patience):  # a process that ends closes its pipe, which wakes this up at once
                self._give_up(i, f"has not answered for {self.patience:.0f} s")
            try:
                result = pipe.recv()
            except (EOFError, ConnectionError):
                self._give_up(i, "has ended")
            if isinstance(result, NotFiniteError):
                raise result
            results.append(result)
        self.patience = WORKER_SECONDS
        return results

    def _give_up(self, i: int, what: str) -> None:
        for process in self.processes:
            process.kill()
        raise RunError(f"the worker process of {', '.join(self.tasks[self.parts[i]])} {what}")

    def reset(self, seeds: list[int]) -> np.ndarray:
        return np.concatenate(self._call("reset", [(seeds[part],) for part in self.parts]))

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        results = self._call("step", [(actions[part],) for part in self.parts])
        return tuple(np.concatenate(column) for column in zip(*results, strict=True))

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join()


def serve_envs(pipe, *arguments) -> None:
    """Body of a worker process: answer calls until the other end is gone."""
    import torch

    torch.set_flush_denormal(True)  # as the scripts do: it is the processor's setting, for MuJoCo and NumPy too
    envs = TaskEnvs(*arguments)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            method, values = pipe.recv()
            try:
                result = getattr(envs, method)(*values)
            except NotFiniteError as error:  # the run ends with it, in the main process
                result = error
            pipe.send(result)
    envs.close()
