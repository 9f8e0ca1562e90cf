"""Diagnostics by hand, and that they leave the run as it was."""

import math

import pytest
import torch

from embodied_rl.batch_renorm import BatchRenorm
from embodied_rl.diagnostics import Diagnostics
from embodied_rl.types import Features

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")


def encode(obs):
    state = torch.cat([obs["state"], torch.zeros(len(obs["state"]), 2)], 1)
    return Features(state, torch.zeros(len(state), 1, 2))


@pytest.fixture
def make(make_sac, make_config):
    def build(*overrides: str) -> Diagnostics:
        sac = make_sac(*overrides)
        return Diagnostics(sac, make_config(*overrides).algorithm, encode, CPU)

    return build


@pytest.mark.parametrize("head", ["default", "crossq"])
@pytest.mark.parametrize(
    ("terminated", "rule"), [(True, "standard"), (True, "always"), (False, "standard")]
)
def test_q_bias_by_hand(make, make_trajectory, head, terminated, rule):
    """Rewards 100, 101, 102 at gamma 0.8; the tail is Q of the present policy, or nothing."""
    looks = make(
        f"algorithm.q_head_type={head}",
        "algorithm.backup_entropy=false",
        f"algorithm.bootstrap_type={rule}",
    )
    trajectory = make_trajectory(1, 3, terminated=terminated, truncated=not terminated)
    features = encode({"state": trajectory.fields["obs.state"]})
    torch.manual_seed(3)
    with torch.no_grad():
        action = looks.sac.actor.eval()(features).action
        tail = looks.sac.q_head.score(features.vector[3:], action[3:]).mean().item()
        q = looks.sac.q_head.score(features.vector[:3], trajectory.fields["action"][:3]).mean(0)
    tail = 0.0 if terminated and rule == "standard" else tail
    r2 = 102 + 0.8 * tail
    r1 = 101 + 0.8 * r2
    returns = torch.tensor([100 + 0.8 * r1, r1, r2])
    torch.manual_seed(3)
    values = looks._q_bias([trajectory])
    scale = returns.mean().abs()
    expected = {
        "q_bias": ((q - returns).mean() / scale).item(),
        "q_bias_std": ((q - returns).std(correction=0) / scale).item(),
        "q": q.mean().item(),
        "return_to_go": returns.mean().item(),
    }
    assert values == pytest.approx(expected, rel=1e-5)


def test_soft_return_counts_the_entropy(make, make_trajectory):
    """With alpha fixed, every later state adds -gamma^k alpha log pi of its own action."""
    looks = make(
        "algorithm.entropy_tuning.alpha_type=fixed_alpha",
        "algorithm.entropy_tuning.initial_alpha=0.5",
    )
    trajectory = make_trajectory(0, 2, terminated=True)
    features = encode({"state": trajectory.fields["obs.state"]})
    torch.manual_seed(5)
    log_prob = looks.sac.actor.eval()(features).log_prob.tolist()
    returns = [0 + 0.8 * (1 - 0.5 * log_prob[1]), 1.0]  # rewards 0 and 1
    torch.manual_seed(5)
    _, got = looks._q_and_return(trajectory)
    assert got.tolist() == pytest.approx(returns, rel=1e-5)


def test_chunk_rewards_and_discounts(make, make_trajectory):
    """Two decisions of two steps: R1 = r10 + g r11, R0 = r00 + g r01 + g^2 R1."""
    looks = make("algorithm.backup_entropy=false")
    trajectory = make_trajectory(0, 2, terminated=True, chunk=2)
    fields = {k: v for k, v in trajectory.fields.items() if not k.startswith("obs.")}
    fields |= {"features.vector": torch.zeros(3, 4), "features.base_action": torch.zeros(3, 1, 2)}
    fields["action"] = torch.zeros(3, 1, 2)  # the critic of this test knows single actions
    trajectory.fields = fields
    _, got = looks._q_and_return(trajectory)
    r1 = 1 + 0.8 * 1.25
    assert got.tolist() == pytest.approx([0 + 0.8 * 0.25 + 0.64 * r1, r1], rel=1e-6)


def test_nothing_is_disturbed(make, make_batch, make_trajectory):
    looks = make("algorithm.q_head_type=crossq", "actor.batch_renorm=true")
    random = torch.get_rng_state()
    before = {
        name: {k: v.clone() for k, v in part.state_dict().items()}
        for name, part in (("head", looks.sac.q_head), ("actor", looks.sac.actor))
    }
    values = looks.measure(make_batch(16), [make_trajectory(1, 5)])
    assert torch.equal(torch.get_rng_state(), random)
    for name, part in (("head", looks.sac.q_head), ("actor", looks.sac.actor)):
        for k, v in part.state_dict().items():
            assert torch.equal(v, before[name][k]), (name, k)
    assert all(math.isfinite(v) for v in values.values())
    assert looks.measure(make_batch(16), [make_trajectory(1, 5)]).keys() == values.keys()


def test_dormant_units(make, make_batch):
    """Four of 16 units of one of each critic's two layers never fire: 4 / 32."""
    looks = make("algorithm.q_head_type=default")
    with torch.no_grad():
        for member in looks.sac.q_head.critics.members:
            member[0].weight.abs_()
            member[0].bias.fill_(100.0)
            member[0].bias[:4] = -1e6
            member[2].weight.zero_()
            member[2].bias.fill_(1.0)
    values = looks.measure(make_batch(64), [])
    assert values["diagnostics/critic/dormant"] == pytest.approx(4 / 32)


def test_weight_norm_and_effective_rate(make, make_batch):
    looks = make("critic.optim.lr=0.01", "critic.num_critics=1", "critic.hidden=[4]")
    with torch.no_grad():
        for module in looks.sac.q_head.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.fill_(0.5)  # 4 x 6 and 1 x 4 entries
    values = looks.measure(make_batch(8), [])
    norm = 0.5 * math.sqrt(28)
    assert values["diagnostics/critic/weight_norm"] == pytest.approx(norm, rel=1e-6)
    assert values["diagnostics/critic/effective_lr"] == pytest.approx(0.01 / norm**2, rel=1e-6)


def test_renorm_clipping_and_warmup(make, make_batch):
    looks = make("algorithm.q_head_type=crossq", "critic.batch_renorm.warmup_steps=2")
    layers = [m for m in looks.sac.q_head.modules() if isinstance(m, BatchRenorm)]
    for layer in layers:
        layer.running_mean.fill_(1e4)  # far off: d < -d_max everywhere
        layer.running_var.fill_(1e6)  # and r < 1 / r_max
    values = looks.measure(make_batch(16), [])
    assert values["diagnostics/batch_renorm/d_clipped"] == 1.0
    assert values["diagnostics/batch_renorm/r_clipped"] == 1.0
    assert values["diagnostics/batch_renorm/warm"] == 0.0
    for layer in layers:
        layer.steps.fill_(2)
        layer.running_mean.zero_()
        layer.running_var.fill_(1.0)
    values = looks.measure(make_batch(16), [])
    assert values["diagnostics/batch_renorm/d_clipped"] == 0.0
    assert values["diagnostics/batch_renorm/warm"] == 1.0
    plain = make("algorithm.q_head_type=default").measure(make_batch(16), [])
    assert not [name for name in plain if "batch_renorm" in name]


def test_runaway_temperature_is_reported_once(make):
    looks = make("algorithm.entropy_tuning.initial_alpha=0.01")
    assert looks.warning({"temperature/alpha": 0.9, "actor/entropy": -3.0}) is None
    assert looks.warning({}) is None
    message = looks.warning({"temperature/alpha": 1.1, "actor/entropy": -9.0})
    assert message is not None and "0.01 to 1.1" in message and "-9.00" in message
    assert looks.warning({"temperature/alpha": 5.0}) is None
