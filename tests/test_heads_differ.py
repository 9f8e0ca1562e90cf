"""`default` and `crossq` must never come to compute the same thing."""

import pytest
import torch

from embodied_rl.batch_renorm import BatchRenorm
from embodied_rl.builders import build_q_head, build_sac
from embodied_rl.registry import Q_HEADS
from embodied_rl.train import without_effect

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
STATISTICS = ("running_mean", "running_var", "steps")


@pytest.fixture
def heads(make_config):
    """Both heads from the same seed and the same config."""
    made = {}
    for name in ("default", "crossq"):
        torch.manual_seed(0)
        config = make_config(f"algorithm.q_head_type={name}")
        made[name] = Q_HEADS.get(name)(4, 2, config.critic, config.algorithm)
    return made


@pytest.fixture
def pairs(make_batch):
    batch = make_batch(16)
    return [
        batch.features.vector,
        batch.action,
        batch.next_features.vector,
        batch.next_features.base_action,
    ]


def test_only_default_has_a_target_network(heads):
    crossq, default = heads["crossq"], heads["default"]
    assert not [k for k in crossq.state_dict() if "target" in k]
    linears = {
        name: sum(isinstance(m, torch.nn.Linear) for m in head.modules())
        for name, head in heads.items()
    }
    assert linears["default"] == 2 * linears["crossq"] > 0
    target = {k: v for k, v in default.state_dict().items() if k.startswith("target.")}
    online = {k: v for k, v in default.state_dict().items() if k.startswith("critics.")}
    assert len(target) == len(online) > 0
    assert not any(p.requires_grad for n, p in default.named_parameters() if "target" in n)


def test_only_crossq_normalises(heads):
    assert any(isinstance(m, BatchRenorm) for m in heads["crossq"].modules())
    assert not any(isinstance(m, BatchRenorm) for m in heads["default"].modules())


def test_joint_statistics(heads, pairs):
    """Changing the next state changes CrossQ's Q of the present pair, and not the default's."""
    elsewhere = [pairs[0], pairs[1], pairs[2] * 5 + 3, pairs[3]]
    q = {name: (h.td_pair(*pairs)[0], h.td_pair(*elsewhere)[0]) for name, h in heads.items()}
    assert torch.equal(*q["default"])
    assert (q["crossq"][0] - q["crossq"][1]).abs().min() > 1e-3


def test_crossq_pair_is_one_joint_forward(heads, pairs):
    """By hand: concatenate, one training-mode forward, split."""
    head = heads["crossq"]
    state = {k: v.clone() for k, v in head.state_dict().items()}
    q, next_q = head.td_pair(*pairs)
    head.load_state_dict(state)
    inputs = torch.cat(
        [
            torch.cat([pairs[0], pairs[1].flatten(1)], 1),
            torch.cat([pairs[2], pairs[3].flatten(1)], 1),
        ]
    )
    for k, member in enumerate(head.critics.members):
        joint = member.train()(inputs)[:, 0]
        torch.testing.assert_close(torch.cat([q[k], next_q[k]]), joint, rtol=0, atol=1e-6)


def test_default_pair_uses_online_and_target(heads, pairs):
    head = heads["default"]
    with torch.no_grad():
        for p in head.critics.parameters():
            p.add_(0.1)
    q, next_q = head.td_pair(*pairs)
    assert torch.equal(q, head.critics(*pairs[:2]))
    assert torch.equal(next_q, head.target(*pairs[2:]))
    assert not torch.equal(next_q, head.critics(*pairs[2:]))


def test_statistics_move_in_td_pair_and_not_in_score(heads, pairs):
    head = heads["crossq"]
    layers = [m for m in head.modules() if isinstance(m, BatchRenorm)]
    assert len(layers) == 2 * 3  # per critic: input and two hidden layers

    def statistics():
        return [getattr(layer, name).clone() for layer in layers for name in STATISTICS]

    before = statistics()
    head.score(*pairs[:2])
    head.after_update()
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(), strict=True))
    head.td_pair(*pairs)
    assert not any(torch.equal(a, b) for a, b in zip(before, statistics(), strict=True))
    assert [int(layer.steps) for layer in layers] == [1] * 6


def test_after_update_moves_only_the_default_target(heads):
    for name, head in heads.items():
        with torch.no_grad():
            for p in head.critic_parameters():
                p.add_(1.0)
        before = {k: v.clone() for k, v in head.state_dict().items()}
        head.after_update()
        moved = {k for k, v in head.state_dict().items() if not torch.equal(v, before[k])}
        if name == "crossq":
            assert not moved
        else:
            assert {k for k in moved if k.startswith("target.")} == {
                k for k in before if k.startswith("target.")
            }
            assert not [k for k in moved if k.startswith("critics.")]


def test_updates_diverge_from_the_same_start(make_config, make_policy, make_batch):
    """The same linear weights at the start, the same batch: one update later they differ."""
    weights = {}
    for name in ("default", "crossq"):
        config = make_config(f"algorithm.q_head_type={name}")
        torch.manual_seed(0)
        policy = make_policy(f"algorithm.q_head_type={name}")
        torch.manual_seed(1)
        head = build_q_head(config, policy, CPU)
        linears = [m for m in head.critics.modules() if isinstance(m, torch.nn.Linear)]
        start = [m.weight.clone() for m in linears]
        torch.manual_seed(2)
        build_sac(config, policy, head, CPU).update(make_batch(16), env_steps=0)
        weights[name] = (start, [m.weight.clone() for m in linears])
    for a, b in zip(*(w[0] for w in weights.values()), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(*(w[1] for w in weights.values()), strict=True):
        assert not torch.equal(a, b)


def test_keys_without_effect(make_config):
    """The default head ignores renormalisation keys, unless the actor has such layers."""
    given = {"algorithm.tau", "critic.batch_renorm.momentum", "critic.hidden"}
    crossq, default = "q_head_type=crossq", "q_head_type=default"
    for overrides, expected in (
        ((f"algorithm.{crossq}",), {"algorithm.tau": crossq}),
        ((f"algorithm.{default}",), {"critic.batch_renorm.momentum": default}),
        ((f"algorithm.{default}", "actor.batch_renorm=true"), {}),
    ):
        assert without_effect(make_config(*overrides), given) == expected


@pytest.mark.parametrize(
    ("actor", "unused"),
    [
        ("gaussian", ["candidates", "noise_bound"]),
        ("residual", ["noise_bound"]),
        ("noise", ["candidates", "initial_std"]),
    ],
)
def test_keys_of_other_actors_without_effect(make_config, actor, unused):
    names = ("candidates", "hidden", "initial_std", "noise_bound")
    config = make_config("algorithm.q_head_type=crossq", f"actor.type={actor}")
    found = without_effect(config, {f"actor.{name}" for name in names})
    assert found == {f"actor.{name}": f"actor.type={actor}" for name in unused}
