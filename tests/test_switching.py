"""Changing `q_head_type` changes the head and nothing else."""

import pytest
import torch
from safetensors.torch import load_file

from embodied_rl.batch_renorm import BatchRenorm
from embodied_rl.builders import build_env, build_policy
from embodied_rl.evaluator import Evaluator
from embodied_rl.registry import Q_HEADS
from embodied_rl.stopping import StopRequest
from embodied_rl.trainer import Trainer

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")


@pytest.fixture
def make_trainer(make_config, tmp_path):
    def make(head: str, *overrides: str) -> Trainer:
        config = make_config(f"algorithm.q_head_type={head}", *overrides)
        folder = tmp_path / head
        folder.mkdir()
        torch.manual_seed(config.seed)  # as train.py does
        env = build_env(config.env, config.env.num_envs, CPU)
        policy = build_policy(config, env.spec, CPU)
        return Trainer(config, folder, env, policy, CPU, StopRequest())

    return make


def collect(trainer: Trainer, steps: int) -> None:
    trainer.collector.start()
    for _ in range(steps):
        trainer.collector.begin()
        trainer.collector.end()


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_everything_else_is_the_same(make_trainer):
    """Same seed: same actor, temperature, episodes, actions and batches, up to the first update."""
    trainers = []
    for head in ("default", "crossq"):
        trainers.append(make_trainer(head))
        collect(trainers[-1], 45)
    one, other = trainers
    assert equal(one.policy.state_dict(), other.policy.state_dict())
    assert equal(one.sac.temperature.state_dict(), other.sac.temperature.state_dict())
    assert equal(one.sac.average.state_dict(), other.sac.average.state_dict())
    batches = [t.replay.sample(32) for t in (one, other)]
    for name in ("action", "reward", "discount", "is_demo"):
        assert torch.equal(getattr(batches[0], name), getattr(batches[1], name))
    assert torch.equal(batches[0].features.vector, batches[1].features.vector)


@pytest.mark.parametrize("head", Q_HEADS.names)
def test_target_network_in_memory_and_in_the_checkpoint(make_trainer, head):
    """Two critics of three matrices; `default` keeps a second set, `crossq` none."""
    trainer = make_trainer(head)
    matrices = [m for m in trainer.sac.q_head.modules() if isinstance(m, torch.nn.Linear)]
    trainer.logger.open(0)
    folder = trainer.checkpoints.save(0, trainer.averaged, best=True)
    trainer.logger.close()
    saved = load_file(folder / "state.safetensors")
    names = [n for n, t in saved.items() if "/sac/q_head/" in n and t.ndim == 2]
    expected = 2 * 3 * (2 if head == "default" else 1)
    assert len(matrices) == len(names) == expected


def test_statistics_move_only_in_their_own_training_pass(make_trainer):
    """Acting, evaluating and the actor loss leave the critic's statistics, and acting the actor's.

    The critic's loss moves the critic's; the actor's loss moves the actor's.
    """
    trainer = make_trainer("crossq", "actor.batch_renorm=true", "algorithm.policy_delay=1")
    sac = trainer.sac

    def statistics(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        layers = [m for m in module.modules() if isinstance(m, BatchRenorm)]
        assert layers
        return {f"{i}.{k}": v.clone() for i, m in enumerate(layers) for k, v in m.named_buffers()}

    head, actor = statistics(sac.q_head), statistics(sac.actor)
    collect(trainer, 45)
    Evaluator(trainer.env, 4, CPU).run(trainer.policy, 0)
    Evaluator(trainer.env, 4, CPU).run(trainer.policy, 0, deterministic=False)
    assert equal(statistics(sac.q_head), head) and equal(statistics(sac.actor), actor)
    batch = trainer.replay.sample(16)
    sac._update_critic(batch)
    moved = statistics(sac.q_head)
    assert not equal(moved, head) and equal(statistics(sac.actor), actor)
    sac._update_actor(batch, torch.tensor(1.0))
    assert equal(statistics(sac.q_head), moved) and not equal(statistics(sac.actor), actor)
