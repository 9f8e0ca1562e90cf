"""Threads where the user leaves them to the machine."""

import os

import pytest

from embodied_rl import cores
from embodied_rl.config import Config
from embodied_rl.cores import settle, usable_cores
from embodied_rl.load_config import load_config

pytestmark = pytest.mark.unit


def threads(*overrides: str, device: str = "cpu", processes: int = 1, cores: int = 2):
    config = load_config(Config, list(overrides))[0]
    return settle(config, device, processes, cores).train.threads


@pytest.mark.parametrize(
    ("count", "envs", "expected"),
    [(1, 1, 1), (2, 1, 2), (64, 1, 4), (2, 4, 1), (6, 4, 2), (8, 4, 4), (64, 4, 4), (64, 61, 3)],
)
def test_updates_get_what_simulators_leave(count, envs, expected):
    assert threads(f"env.num_envs={envs}", cores=count) == expected


def test_what_the_user_says_stays():
    assert threads("train.threads=3", "env.num_envs=1", cores=1) == 3


def test_on_a_gpu_the_processor_has_little_to_compute():
    assert threads("env.num_envs=1", device="cuda", cores=64) == 1


def test_processes_share_cores_and_simulators():
    assert threads("env.num_envs=4", processes=4, cores=2) == 1
    assert threads("env.num_envs=4", processes=2, cores=10) == 3
    assert threads("env.num_envs=2", processes=2, cores=6) == 3  # a simulator each


def test_a_collecting_process_needs_a_core():
    assert threads("env.num_envs=1", "rollout.asynchronous=true", cores=2) == 1


def overlap(*overrides: str, device: str = "cpu", cores: int = 2):
    config = load_config(Config, ["env.num_envs=4", "rollout.steps=16", *overrides])[0]
    config = settle(config, device, 1, cores)
    return config.rollout.overlap, config.train.threads


def test_with_an_update_for_each_step_few_cores_are_shared_by_turns():
    """An update a step is 64 of them in an iteration; simulators need four cores."""
    assert overlap("algorithm.update_epoch=64") == (False, 2)
    assert overlap("algorithm.update_epoch=64", cores=4) == (False, 4)
    assert overlap("algorithm.update_epoch=63") == (True, 1)
    assert overlap("algorithm.update_epoch=64", cores=5) == (True, 1)
    assert overlap("algorithm.update_epoch=64", cores=1) == (True, 1)
    assert overlap("algorithm.update_epoch=64", device="cuda") == (True, 1)
    assert overlap("algorithm.update_epoch=64", "rollout.asynchronous=true") == (True, 1)
    assert overlap("algorithm.update_epoch=16", "env.num_envs=1") == (True, 2)


def test_what_the_user_says_about_overlap_stays():
    assert overlap("algorithm.update_epoch=64", "rollout.overlap=true") == (True, 1)
    assert overlap("algorithm.update_epoch=64", "train.threads=1") == (True, 1)
    assert overlap("rollout.overlap=false") == (False, 2)
    assert overlap("rollout.overlap=false", "train.threads=1") == (False, 1)


def test_the_config_itself_is_left_alone():
    config = Config()
    settle(config, "cpu", cores=2)
    assert config.train.threads is None and config.rollout.overlap is None


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux")
def test_usable_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5, 6})
    monkeypatch.setattr(cores, "QUOTA", tmp_path / "cpu.max")
    for text, expected in (
        (None, 4),
        ("max 100000\n", 4),
        ("150000 100000\n", 2),
        ("50000 100000\n", 1),
        ("900000 100000\n", 4),
    ):
        if text is not None:
            (tmp_path / "cpu.max").write_text(text)
        assert usable_cores() == expected, text
