"""Fixtures that the tests share: tiny configs, a batch maker, trajectories, a small policy."""

import copy
import dataclasses
import functools
import pickle

import pytest
import torch
from tiny_flow import TinyFlow

from embodied_rl.backbones.state import StateBackbone
from embodied_rl.builders import build_env, build_policy, build_q_head, build_sac
from embodied_rl.config import Config
from embodied_rl.distributed import LocalTrainable
from embodied_rl.interfaces import Backbone
from embodied_rl.load_config import load_config
from embodied_rl.policy import Policy
from embodied_rl.registry import BACKBONES
from embodied_rl.replay.store import TrajectoryStore
from embodied_rl.sac import SAC
from embodied_rl.types import ArraySpec, Batch, EnvSpec, Features, Trajectory

CPU = torch.device("cpu")
# Pins whatever a test computes with, so that tuning the defaults breaks no test.
TINY = (
    "env.type=fake",
    "env.task=reach",
    "env.num_envs=2",
    "env.max_episode_steps=null",
    "policy.path=null",
    "policy.cache_features=true",
    "algorithm.demo.fraction=0",
    "train.compile=never",
    "train.threads=1",
    "algorithm.batch_size=16",
    "algorithm.gamma=0.8",
    "algorithm.n_step=1",
    "algorithm.agg_q=min",
    "algorithm.actor_agg_q=null",
    "algorithm.backup_entropy=true",
    "algorithm.bootstrap_type=standard",
    "algorithm.policy_delay=2",
    "algorithm.critic_warmup_steps=0",
    "algorithm.anchor.weight=1",
    "algorithm.anchor.q_filter=true",
    "algorithm.entropy_tuning.alpha_type=softplus",
    "algorithm.entropy_tuning.initial_alpha=0.01",
    "algorithm.entropy_tuning.target_entropy=null",
    "algorithm.replay_buffer.enable_cache=true",
    "algorithm.replay_buffer.cache_size=1000",
    "algorithm.replay_buffer.sample_window_size=1000",
    "algorithm.replay_buffer.min_buffer_size=2",
    "algorithm.replay_buffer.segment_size=4",
    "critic.num_critics=2",
    "critic.hidden=[16,16]",
    "critic.optim.lr=1e-3",
    "critic.optim.betas=[0.9,0.999]",
    "critic.optim.clip_grad=null",
    "critic.batch_renorm.momentum=0.99",
    "critic.batch_renorm.warmup_steps=100000",
    "actor.type=gaussian",
    "actor.hidden=[16]",
    "actor.initial_std=0.15",
    "actor.batch_renorm=false",
    "actor.average_decay=0",
    "actor.optim.lr=3e-4",
    "actor.optim.betas=[0.9,0.999]",
    "actor.optim.clip_grad=null",
    "rollout.steps=8",
    "rollout.random_steps=0",
    "rollout.execute_steps=null",
    "eval.episodes=4",
    "eval.num_envs=2",
    "eval.video=false",
    "eval.metric=success_once",
    "train.stop_at=null",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first: short ones then fill the end of both processes."""
    long = {
        item.path
        for item in items
        if item.get_closest_marker("e2e") or item.get_closest_marker("dist")
    }
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def kept_gradients(monkeypatch):
    """Leaves in `parameter.grad` what an engine handed to its last optimiser step."""
    apply = LocalTrainable.apply

    def keeping(trainable, gradients):
        for parameter, gradient in zip(trainable.parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        apply(trainable, gradients)

    monkeypatch.setattr(LocalTrainable, "apply", keeping)


@pytest.fixture(scope="session")
def make_config():
    """`make_config("algorithm.gamma=0.5", ...)`: a small config on the fake environment."""

    @functools.cache
    def load(*overrides: str) -> Config:
        return load_config(Config, [*TINY, *overrides])[0]

    def make(*overrides: str) -> Config:
        return copy.deepcopy(load(*overrides))

    return make


@pytest.fixture(scope="session")
def spec():
    return EnvSpec({"state": ArraySpec((4,), torch.float32)}, 2, 20, "fake reach")


@pytest.fixture
def make_env(make_config):
    """`make_env("reach", 3, 5)`: three fake environments with five steps per episode."""

    def make(task: str = "reach", num_envs: int = 2, limit: int | None = None):
        env = dataclasses.replace(make_config().env, task=task, max_episode_steps=limit)
        return build_env(env, num_envs, CPU)

    return make


@pytest.fixture
def make_backbone():
    """A random policy for the fake environment, with chunks of `chunk` actions."""

    def make(chunk: int = 1, seed: int = 0, state_dim: int = 4, action_dim: int = 2):
        torch.manual_seed(seed)
        backbone = StateBackbone(state_dim, action_dim, chunk, [8])
        backbone.std.copy_(torch.tensor([1.0, 1.0, 5000.0, 10.0])[:state_dim])
        return backbone.requires_grad_(False)

    return make


@pytest.fixture
def make_policy(make_config, spec):
    """The policy of a run from scratch on the fake environment, actor included."""

    def make(*overrides: str):
        return build_policy(make_config(*overrides), spec, CPU)

    return make


@pytest.fixture
def make_sac(make_config, make_policy):
    """The learner around `make_policy`; equal overrides give equal weights."""

    def make(*overrides: str, device: torch.device = CPU) -> SAC:
        config = make_config(*overrides)
        torch.manual_seed(0)
        policy = make_policy(*overrides).to(device)
        return build_sac(config, policy, build_q_head(config, policy, device), device)

    return make


@pytest.fixture(scope="session")
def make_batch():
    """`make_batch(n)`: n random transitions; D features, chunks [H, A]."""

    def make(n: int = 16, dim: int = 4, chunk: int = 1, action_dim: int = 2, seed: int = 0):
        rng = torch.Generator().manual_seed(seed)

        def features():
            base = torch.rand(n, chunk, action_dim, generator=rng) * 1.6 - 0.8
            return Features(torch.randn(n, dim, generator=rng), base)

        return Batch(
            features(),
            features(),
            torch.rand(n, chunk, action_dim, generator=rng) * 2 - 1,
            torch.randn(n, generator=rng),
            torch.full((n,), 0.8),
            torch.zeros(n, dtype=torch.bool),
        )

    return make


@pytest.fixture(scope="session")
def make_trajectory():
    """`make_trajectory(episode, T)`: row t observes [episode, t]; reward 100 * episode + t.

    With `chunk` > 1 every decision executes `chunk` steps, whose rewards are that number plus
    0, 0.25, 0.5, ...; the last decision may execute fewer (`last_steps`).
    """

    def make(
        episode: int,
        length: int,
        *,
        terminated: bool = False,
        truncated: bool = False,
        chunk: int = 1,
        last_steps: int | None = None,
    ) -> Trajectory:
        t = torch.arange(length + 1, dtype=torch.float32)
        obs = torch.stack([torch.full_like(t, episode), t], 1)
        reward = (100 * episode + t)[:, None] + 0.25 * torch.arange(chunk)
        steps = torch.full((length + 1,), chunk, dtype=torch.int64)
        if last_steps is not None:
            steps[length - 1] = last_steps
            reward[length - 1, last_steps:] = 0
        reward[length], steps[length] = 0, 0
        flags = {name: torch.zeros(length + 1, dtype=torch.bool) for name in ("terminated", "trun")}
        flags["terminated"][length - 1] = terminated
        flags["trun"][length - 1] = truncated
        return Trajectory(
            {
                "obs.state": obs,
                "action": obs[:, None, :].repeat(1, chunk, 1) / 1000,
                "reward": reward,
                "steps": steps,
                "terminated": flags["terminated"],
                "truncated": flags["trun"],
                "success": torch.zeros(length + 1, dtype=torch.bool),
            }
        )

    return make


@pytest.fixture
def fake_demos(make_env, tmp_path):
    """A demonstration folder of the fake environment: six episodes straight to the origin."""
    folder, limit = tmp_path / "fake_demos", 12
    store = TrajectoryStore(folder, 6, {"task": "reach"})
    env = make_env("reach", 1, limit)
    for seed in range(6):
        obs = env.reset([seed])["state"]
        rows = {"obs.state": [], "action": [], "reward": [], "success": []}
        for _ in range(limit):
            action = (-obs[:, :2] / 0.2).clamp(-1, 1)
            env.send(action, [seed])
            result = env.recv()
            values = (obs[0], action, result.reward, result.success[0])
            for name, value in zip(rows, values, strict=True):
                rows[name].append(value)
            obs = result.final_obs["state"]
        for name, last in rows.items():
            last.append(obs[0] if name == "obs.state" else torch.zeros_like(last[0]))
        fields = {name: torch.stack(values) for name, values in rows.items()}
        fields["steps"] = torch.tensor([1] * limit + [0])
        fields["terminated"] = torch.zeros(limit + 1, dtype=torch.bool)
        fields["truncated"] = fields["terminated"].clone()
        fields["truncated"][limit - 1] = True
        store.append(Trajectory(fields))
    store.flush()
    return folder


class Touch:
    """Unpickling one makes a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def planted(path) -> bytes:
    """A pickle that makes the file `path` when it is loaded; tests see whether it was."""
    return pickle.dumps(Touch(path))


class Scripted(Backbone):
    """A policy that is a function: state [B, 4] -> action chunk [B, H, 2]."""

    feature_dim, action_dim = 4, 2

    def __init__(self, script, chunk_size: int) -> None:
        super().__init__()
        self.script, self.chunk_size = script, chunk_size
        self.asked: list[torch.Tensor] = []  # states that a decision was asked for

    def forward(self, obs, samples=1, generator=None):
        self.asked += list(obs["state"])
        return Features(obs["state"] / 2, self.script(obs["state"]))

    def check_env(self, spec):
        pass

    def fingerprint(self):
        return "scripted"

    def config_dict(self):
        return {}

    @classmethod
    def from_config(cls, config):
        raise NotImplementedError

    @classmethod
    def for_env(cls, spec):
        raise NotImplementedError


@pytest.fixture
def flow_folder(monkeypatch, tmp_path):
    """The folder of a small flow policy with chunks of three, whose type is registered."""
    table = {**BACKBONES._table, "tiny_flow": "tiny_flow:TinyFlow"}
    monkeypatch.setattr(BACKBONES, "_table", table)
    torch.manual_seed(4)
    Policy(TinyFlow(4, 2, 3), "tiny_flow").save_pretrained(tmp_path / "flow")
    return tmp_path / "flow"


@pytest.fixture
def scripted():
    """`scripted(function, chunk, execute)`: a policy without weights for the fake environment."""

    def make(script, chunk: int = 1, execute: int | None = None) -> Policy:
        return Policy(Scripted(script, chunk), "scripted", execute_steps=execute)

    return make


@pytest.fixture
def to_origin():
    """Straight to the origin, where the fake environment's goal is."""
    return lambda state: (-state[:, None, :2] / 0.2).clamp(-1, 1)


@pytest.fixture
def through_origin():
    """To the origin within ten steps, then away from it for good."""

    def script(state):
        towards = (-state[:, :2] / 0.2).clamp(-1, 1)
        return torch.where(state[:, 3:] < 10, towards, torch.ones(2))[:, None]

    return script
