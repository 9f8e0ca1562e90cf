"""The running average of the actor's weights, by hand and inside the learner."""

import copy

import pytest
import torch
from torch import nn

from embodied_rl.averaging import WeightAverage
from embodied_rl.config import BatchRenormConfig
from embodied_rl.nn import mlp

pytestmark = pytest.mark.unit


def test_by_hand():
    """0.9 * 1 + 0.1 * 2 = 1.1, then 0.9 * 1.1 + 0.1 * 4 = 1.39."""
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        average = WeightAverage(layer, 0.9)
        for value, expected in ((2.0, 1.1), (4.0, 1.39)):
            layer.weight.fill_(value)
            average.update()
            assert average.module.weight.item() == pytest.approx(expected, abs=1e-6)
    assert layer.weight.item() == 4.0


def test_decay_zero_is_the_present():
    layer = nn.Linear(3, 2)
    average = WeightAverage(layer, 0.0)
    with torch.no_grad():
        layer.weight.add_(1.0)
    average.update()
    assert torch.equal(average.module.weight, layer.weight)


def test_statistics_are_copied_not_averaged():
    net = mlp(3, [4], 1, renorm=BatchRenormConfig())
    average = WeightAverage(net, 0.99)
    net.train()(torch.randn(8, 3) + 5)
    average.update()
    for mine, theirs in zip(average.module.buffers(), net.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert not average.module.training


def test_learner_averages_over_actor_updates(make_sac, make_batch):
    """Replays the learner's own weights through the recursion, over 6 actor updates."""
    sac, batch = make_sac("algorithm.policy_delay=2", "actor.average_decay=0.8"), make_batch(16)
    expected = copy.deepcopy(list(sac.actor.parameters()))
    for _ in range(12):
        before = sac.critic_updates
        sac.update(batch, env_steps=10_000)
        if (before + 1) % 2 == 0:
            with torch.no_grad():
                for mean, now in zip(expected, sac.actor.parameters(), strict=True):
                    mean.mul_(0.8).add_(now, alpha=0.2)
    moved = 0.0
    for mean, got, now in zip(
        expected, sac.average.module.parameters(), sac.actor.parameters(), strict=True
    ):
        torch.testing.assert_close(got, mean, rtol=1e-5, atol=1e-7)
        moved += float((got - now).detach().abs().max())
    assert moved > 0


def test_round_trip(make_sac, make_batch):
    decay = "actor.average_decay=0.9"
    sac, other, batch = make_sac(decay), make_sac(decay), make_batch(16)
    for _ in range(4):
        sac.update(batch, env_steps=10_000)
    other.load_state_dict(sac.state_dict())
    for a, b in zip(
        sac.average.module.parameters(), other.average.module.parameters(), strict=True
    ):
        assert torch.equal(a, b)
