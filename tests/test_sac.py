"""Losses and the order of updates, by hand."""

import copy
import dataclasses
import math

import pytest
import torch

from embodied_rl.builders import build_q_head, build_sac
from embodied_rl.config import OptimConfig
from embodied_rl.distributed import LocalEngine
from embodied_rl.interfaces import aggregate
from embodied_rl.registry import Q_HEADS
from embodied_rl.schedules import learning_rate, linear
from embodied_rl.temperature import Temperature
from embodied_rl.types import Features

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("kept_gradients")]
CPU = torch.device("cpu")
HEADS = Q_HEADS.names


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def moved(before: list[torch.Tensor], module: torch.nn.Module) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


# ---------------------------------------------------------------- TD target

NEXT_Q = torch.tensor([[1.0, 4.0, 2.0], [3.0, 2.0, 2.0]])  # K = 2 critics, B = 3
NEXT_LOG_PROB = torch.tensor([1.0, -2.0, 0.5])
REWARD = torch.tensor([0.5, 0.0, -1.0])
DISCOUNT = torch.tensor([0.9, 0.729, 0.0])  # one step, three steps, cut


@pytest.mark.parametrize(
    ("agg", "entropy", "expected"),
    [
        # alpha = 0.1; min: 1, 2, 2; mean: 2, 3, 2; the last row bootstraps nothing
        ("min", True, [0.5 + 0.9 * (1 - 0.1), 0.729 * (2 + 0.2), -1.0]),
        ("min", False, [0.5 + 0.9 * 1, 0.729 * 2, -1.0]),
        ("mean", True, [0.5 + 0.9 * (2 - 0.1), 0.729 * (3 + 0.2), -1.0]),
        ("mean", False, [0.5 + 0.9 * 2, 0.729 * 3, -1.0]),
    ],
)
def test_td_target(make_sac, make_batch, agg, entropy, expected):
    sac = make_sac(
        f"algorithm.agg_q={agg}",
        f"algorithm.backup_entropy={entropy}",
        "algorithm.entropy_tuning.initial_alpha=0.1",
    )
    batch = dataclasses.replace(make_batch(3), reward=REWARD, discount=DISCOUNT)
    target = sac.td_target(batch, NEXT_Q, NEXT_LOG_PROB)
    torch.testing.assert_close(target, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert not target.requires_grad


def test_aggregate():
    assert aggregate(NEXT_Q, "min").tolist() == [1.0, 2.0, 2.0]
    assert aggregate(NEXT_Q, "mean").tolist() == [2.0, 3.0, 2.0]


@pytest.mark.parametrize("head", HEADS)
def test_critic_loss_by_hand(make_sac, make_batch, head):
    """0.5 * sum over critics of mean_B (Q - y)^2, y from the actor in evaluation mode."""
    overrides = [f"algorithm.q_head_type={head}", "algorithm.critic_warmup_steps=1000"]
    sac, twin, batch = make_sac(*overrides), make_sac(*overrides), make_batch(16)
    torch.manual_seed(5)
    metrics = sac.update(batch, env_steps=0)
    torch.manual_seed(5)
    following = twin.actor.eval()(batch.next_features)
    q, next_q = twin.q_head.td_pair(
        batch.features.vector, batch.action, batch.next_features.vector, following.action
    )
    alpha = twin.temperature().item()
    y = batch.reward + batch.discount * (next_q.min(0).values - alpha * following.log_prob)
    expected = sum((q[k, b] - y[b]) ** 2 for k in range(2) for b in range(16)) / 16 / 2
    torch.testing.assert_close(metrics["critic/loss"], expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["critic/target"], y.mean().detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_critic_learns_a_known_value(make_sac, make_batch, head):
    """Constant reward 1 and discount 0: Q = 1 everywhere."""
    sac = make_sac(
        f"algorithm.q_head_type={head}",
        "algorithm.critic_warmup_steps=100000",
        "critic.optim.lr=0.01",
        "critic.batch_renorm.momentum=0.9",
    )
    batch = make_batch(64)
    batch.reward.fill_(1.0)
    batch.discount.zero_()
    for _ in range(200):
        metrics = sac.update(batch, env_steps=0)
    assert float(metrics["critic/loss"]) < 1e-3
    q = sac.q_head.score(batch.features.vector, batch.action)
    torch.testing.assert_close(q, torch.ones_like(q), rtol=0, atol=0.15)


# ---------------------------------------------------------------- order of updates


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_policy_delay(make_sac, make_batch, delay):
    sac, batch = make_sac(f"algorithm.policy_delay={delay}"), make_batch(16)
    updated = []
    for step in range(1, 8):
        before, alpha = weights(sac.actor), sac.temperature().item()
        metrics = sac.update(batch, env_steps=0)
        changed = moved(before, sac.actor)
        assert changed == ("actor/loss" in metrics) == (sac.temperature().item() != alpha)
        updated += [step] if changed else []
    assert updated == [s for s in range(1, 8) if s % delay == 0]
    assert sac.critic_updates == 7


def test_critic_warmup_leaves_the_actor_alone(make_sac, make_batch):
    sac = make_sac("algorithm.critic_warmup_steps=100", "algorithm.policy_delay=1")
    batch, before, critic = make_batch(16), weights(sac.actor), weights(sac.q_head)
    for env_steps in (0, 50, 99):
        metrics = sac.update(batch, env_steps=env_steps)
        assert not [k for k in metrics if k.startswith(("actor", "anchor", "temperature"))]
    assert not moved(before, sac.actor) and moved(critic, sac.q_head)
    sac.update(batch, env_steps=100)
    assert moved(before, sac.actor)


@pytest.mark.parametrize("head", HEADS)
def test_critic_step_gives_no_gradient_to_the_actor_and_vice_versa(make_sac, make_batch, head):
    sac = make_sac(f"algorithm.q_head_type={head}", "algorithm.policy_delay=1")
    batch = make_batch(16)
    sac._update_critic(batch)
    assert all(p.grad is None for p in sac.actor.parameters())
    critic = {n: p.grad.clone() for n, p in sac.q_head.named_parameters() if p.grad is not None}
    state = {k: v.clone() for k, v in sac.q_head.state_dict().items()}
    sac._update_actor(batch, torch.tensor(1.0))
    assert all(p.grad is not None for p in sac.actor.parameters())
    for name, parameter in sac.q_head.named_parameters():
        assert (parameter.grad is None) == (name not in critic)
        assert parameter.grad is None or torch.equal(parameter.grad, critic[name])
    after = sac.q_head.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in state.items()), "statistics included"


@pytest.mark.parametrize(("actor_agg", "agg"), [("null", "min"), ("null", "mean"), ("mean", "min")])
def test_actor_loss_by_hand(make_sac, make_batch, actor_agg, agg):
    """alpha log pi - agg_j Q_j(s, a), mean over rows; actor_agg_q defaults to agg_q."""
    overrides = [
        f"algorithm.agg_q={agg}",
        f"algorithm.actor_agg_q={actor_agg}",
        "algorithm.anchor.weight=0",
    ]
    sac, twin, batch = make_sac(*overrides), make_sac(*overrides), make_batch(16)
    torch.manual_seed(6)
    metrics = sac._update_actor(batch, torch.tensor(0.0))
    torch.manual_seed(6)
    sample = twin.actor(batch.features)
    q = twin.q_head.score(batch.features.vector, sample.action)
    how = agg if actor_agg == "null" else actor_agg
    value = q.min(0).values if how == "min" else q.mean(0)
    expected = (twin.temperature().item() * sample.log_prob - value).mean()
    torch.testing.assert_close(metrics["actor/loss"], expected.detach(), rtol=1e-5, atol=1e-6)
    assert "anchor/distance" not in metrics


@pytest.mark.parametrize("head", HEADS)
def test_actor_climbs_the_critic(make_sac, make_batch, head, monkeypatch):
    """With Q = -|a - 0.4|^2 in place of the critic's score, the mode goes to 0.4."""
    sac = make_sac(
        f"algorithm.q_head_type={head}",
        "algorithm.anchor.weight=0",
        "algorithm.entropy_tuning.alpha_type=fixed_alpha",
        "algorithm.entropy_tuning.initial_alpha=1e-4",
        "actor.type=gaussian",
        "actor.optim.lr=0.02",
    )
    monkeypatch.setattr(
        sac.q_head, "score", lambda x, a: -(a - 0.4).square().flatten(1).sum(1)[None].repeat(2, 1)
    )
    batch = make_batch(64)
    batch.features.base_action.zero_()
    for _ in range(300):
        sac._update_actor(batch, torch.tensor(0.0))
    mode = sac.actor.eval()(batch.features).mode
    torch.testing.assert_close(mode, torch.full_like(mode, 0.4), rtol=0, atol=0.1)


# ---------------------------------------------------------------- anchor


def test_anchor_pulls_towards_the_base_action(make_sac, make_batch):
    """With a critic that is flat, the anchor alone moves the mode to the base action."""
    sac = make_sac(
        "algorithm.anchor.q_filter=false",
        "algorithm.entropy_tuning.alpha_type=fixed_alpha",
        "algorithm.entropy_tuning.initial_alpha=1e-8",
        "actor.type=gaussian",
        "actor.optim.lr=0.01",
    )
    with torch.no_grad():
        for p in sac.q_head.parameters():
            p.zero_()
        sac.actor.net[-1].bias += 0.5  # away from the base
    batch = make_batch(64)
    first = sac._update_actor(batch, torch.tensor(1.0))
    assert float(first["anchor/kept"]) == 1.0
    for _ in range(200):
        last = sac._update_actor(batch, torch.tensor(1.0))
    assert float(last["anchor/distance"]) < 0.02 * float(first["anchor/distance"])


def test_anchor_distance_and_q_filter_by_construction(make_sac, make_batch, monkeypatch):
    """The critic prefers actions near zero: kept are the rows whose anchor is nearer than the mode.

    The anchor is the base action, and the demonstrated action in rows from demonstrations.
    """
    sac = make_sac("algorithm.anchor.q_filter=true", "actor.type=gaussian")
    batch = make_batch(32)
    batch.is_demo[:8] = True
    mode = (torch.rand(32, 1, 2) * 2 - 1).requires_grad_()
    monkeypatch.setattr(
        sac.q_head, "score", lambda x, a: -a.flatten(1).norm(dim=1)[None].repeat(2, 1)
    )
    distance, kept = sac._anchor(batch, mode)
    base, action = batch.features.base_action, batch.action
    for row in range(32):
        anchor = (action if row < 8 else base)[row].flatten().tolist()
        present = mode[row].flatten().tolist()
        squared = sum((m - a) ** 2 for m, a in zip(present, anchor, strict=True))
        assert distance[row].item() == pytest.approx(squared, rel=1e-4)
        assert bool(kept[row]) == (math.hypot(*anchor) < math.hypot(*present))
    assert 0 < kept[:8].sum() < 8 and 0 < kept[8:].sum() < 24
    (grad,) = torch.autograd.grad((distance * kept).sum(), mode)
    anchor = torch.cat([action[:8], base[8:]])
    torch.testing.assert_close(grad, 2 * (mode - anchor) * kept[:, None, None], rtol=1e-5, atol=0)


def test_anchor_enters_the_loss_with_its_weight(make_sac, make_batch):
    losses = []
    for weight in (0.0, 1.0, 3.0):
        sac = make_sac("algorithm.anchor.q_filter=false", "actor.type=gaussian")
        with torch.no_grad():
            sac.actor.net[-1].bias += 0.5
        torch.manual_seed(1)
        metrics = sac._update_actor(make_batch(16), torch.tensor(weight))
        losses.append(float(metrics["actor/loss"]))
    distance = float(metrics["anchor/distance"])
    assert distance > 0.01
    assert losses[1] - losses[0] == pytest.approx(distance, rel=1e-4)
    assert losses[2] - losses[0] == pytest.approx(3 * distance, rel=1e-4)
    assert float(metrics["anchor/weight"]) == 3.0


def test_anchor_schedule(make_sac):
    sac = make_sac(
        "algorithm.anchor.weight=2",
        "algorithm.anchor.final_weight=0.5",
        "algorithm.anchor.decay_steps=1000",
    )
    assert [sac.anchor_weight(t) for t in (0, 500, 1000, 5000)] == [2.0, 1.25, 0.5, 0.5]


# ---------------------------------------------------------------- temperature


@pytest.mark.parametrize("alpha_type", ["softplus", "exp", "fixed_alpha"])
@pytest.mark.parametrize("initial", [1e-4, 0.01, 1.0, 20.0])
def test_initial_alpha(alpha_type, initial):
    assert Temperature(alpha_type, initial, -2.0)().item() == pytest.approx(initial, rel=1e-5)


@pytest.mark.parametrize("alpha_type", ["softplus", "exp"])
@pytest.mark.parametrize(("log_prob", "direction"), [(5.0, 1), (-5.0, -1)])
def test_alpha_moves_towards_the_target_entropy(alpha_type, log_prob, direction):
    """Target entropy -2: at log pi = 5 the entropy is -5, too low, and alpha must rise."""
    temperature = Temperature(alpha_type, 0.1, -2.0)
    loss = temperature.loss(torch.full((8,), log_prob))
    assert loss.item() == pytest.approx(-0.1 * (log_prob - 2.0), rel=1e-5)
    (grad,) = torch.autograd.grad(loss, [temperature.parameter])
    # d alpha / d p: sigmoid(p) for softplus, alpha for exp
    p = float(temperature.parameter.detach())
    slope = 1 / (1 + math.exp(-p)) if alpha_type == "softplus" else math.exp(p)
    assert float(grad) == pytest.approx(-(log_prob - 2.0) * slope, rel=1e-5)
    optimizer = torch.optim.SGD(temperature.parameters(), lr=0.1)
    temperature.parameter.grad = grad
    optimizer.step()
    assert (temperature().item() - 0.1) * direction > 0


def test_fixed_alpha_is_never_trained(make_sac, make_batch):
    sac = make_sac(
        "algorithm.entropy_tuning.alpha_type=fixed_alpha",
        "algorithm.entropy_tuning.initial_alpha=0.25",
        "algorithm.policy_delay=1",
    )
    for _ in range(3):
        metrics = sac.update(make_batch(16), env_steps=0)
    assert sac.temperature().item() == 0.25 == float(metrics["temperature/alpha"])
    assert "temperature/loss" not in metrics and not sac.temperature.tuned


def test_temperature_loss_gives_no_gradient_to_the_actor():
    log_prob = torch.zeros(4, requires_grad=True)
    loss = Temperature("exp", 0.1, -2.0).loss(log_prob)
    assert torch.autograd.grad(loss, log_prob, allow_unused=True) == (None,)


def test_unknown_alpha_type():
    with pytest.raises(ValueError, match="alpha_type='log'; allowed: softplus, exp, fixed_alpha"):
        Temperature("log", 0.1, -2.0)


def test_default_target_entropy_is_minus_the_action_size(make_config, make_backbone):
    from embodied_rl.policy import Policy
    from embodied_rl.registry import ACTORS

    backbone = make_backbone(chunk=3)
    for override, expected in (("null", -6.0), ("-1.5", -1.5)):
        config = make_config(f"algorithm.entropy_tuning.target_entropy={override}")
        actor = ACTORS.get("gaussian").for_backbone(backbone, config.actor, None)
        policy = Policy(backbone, "state", actor, "gaussian")
        sac = build_sac(config, policy, build_q_head(config, policy, CPU), CPU)
        assert sac.temperature.target_entropy == expected


# ---------------------------------------------------------------- schedules and engine


def test_learning_rate_schedules():
    points = (-1.0, 0.0, 0.25, 0.5, 1.0, 2.0)

    def rates(kind):
        return [learning_rate(kind, 1.0, 0.2, p) for p in points]

    assert rates("torch_constant") == [1.0] * 6
    assert rates("linear") == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.2, 0.2], rel=1e-12)
    quarter = 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2  # cos(pi / 4) = sqrt(1 / 2)
    assert rates("cosine") == pytest.approx([1.0, 1.0, quarter, 0.6, 0.2, 0.2], rel=1e-12)
    with pytest.raises(ValueError, match="lr_scheduler='step'; allowed: torch_constant"):
        learning_rate("step", 1.0, 0.2, 0.5)


def test_linear_schedule():
    assert [linear(1.0, 0.0, 10, t) for t in (0, 5, 10, 99)] == [1.0, 0.5, 0.0, 0.0]
    assert linear(1.0, 0.3, 0, 0) == 0.3


def sgd_like(values: list[float], **settings) -> tuple[LocalEngine, torch.nn.Parameter]:
    engine, parameter = LocalEngine(), torch.nn.Parameter(torch.tensor(values))
    engine.attach("it", [parameter], OptimConfig(lr=0.1, **settings))
    return engine, parameter


def test_engine_sets_the_scheduled_rate():
    """Adam's first step has length lr, whatever the gradient."""
    engine, parameter = sgd_like([0.0], lr_scheduler="linear", final_lr=0.02)
    engine.set_progress(0.5)
    engine.step(engine._trainables["it"], 3 * parameter.sum())
    assert float(parameter.detach()) == pytest.approx(-0.06, rel=1e-5)


@pytest.mark.parametrize(("clip", "factor"), [(None, 1.0), (10.0, 1.0), (1.0, 0.2)])
def test_clipping(clip, factor):
    engine, parameter = sgd_like([0.0, 0.0], clip_grad=clip)
    norm = engine.step(engine._trainables["it"], 3 * parameter[0] + 4 * parameter[1])
    assert float(norm) == pytest.approx(5.0, rel=1e-6), "the norm before clipping"
    # clip_grad_norm_ divides by norm + 1e-6
    expected = torch.tensor([3.0, 4.0]) * factor
    torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=0)


def test_clipping_bounds_only_its_own_module(make_sac, make_batch):
    def norm(module):
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        return float(torch.cat([g.flatten() for g in grads]).norm())

    overrides = ["algorithm.policy_delay=1", "algorithm.anchor.weight=0"]
    batch = make_batch(16)
    batch.reward.mul_(100)
    free, clipped = make_sac(*overrides), make_sac(*overrides, "critic.optim.clip_grad=0.01")
    for sac in (free, clipped):
        torch.manual_seed(3)
        sac._update_critic(batch)
    assert norm(free.q_head) > 1 > 0.011 > norm(clipped.q_head) > 0.009
    clipped.q_head.load_state_dict(free.q_head.state_dict())
    for sac in (free, clipped):
        torch.manual_seed(3)
        sac._update_actor(batch, torch.tensor(0.0))
    assert norm(free.actor) == norm(clipped.actor) > 0


def test_engine_moves_only_its_own_parameters():
    engine = LocalEngine()
    mine, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    trainable = engine.attach("mine", [mine], OptimConfig(lr=0.1))
    engine.attach("other", [other], OptimConfig(lr=0.1))
    engine.step(trainable, (mine * other).sum())
    assert (mine != 1).all() and (other == 1).all() and other.grad is None
    with pytest.raises(ValueError, match="'mine' is attached already"):
        engine.attach("mine", [mine], OptimConfig())


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_by_hand(decay):
    """Two steps of Adam (Kingma & Ba 2015), decoupled weight decay, NumPy-free."""
    b1, b2, lr = 0.5, 0.9, 0.1
    engine, parameter = sgd_like([1.0], betas=[b1, b2], weight_decay=decay)
    x, m, v = 1.0, 0.0, 0.0
    for t in (1, 2):
        g = 2 * x
        engine.step(engine._trainables["it"], parameter.square().sum())
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        x = x * (1 - lr * decay)
        x -= lr * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + 1e-8)
        assert float(parameter.detach()) == pytest.approx(x, rel=1e-5)


# ---------------------------------------------------------------- target network, state


@pytest.mark.parametrize("frequency", [1, 3])
def test_polyak_by_hand(make_sac, frequency):
    sac = make_sac(
        "algorithm.q_head_type=default",
        "algorithm.tau=0.25",
        f"algorithm.target_update_freq={frequency}",
    )
    head = sac.q_head
    target = [p.detach().clone() for p in head.target.parameters()]
    for update in range(1, 8):
        with torch.no_grad():
            for p in head.critics.parameters():
                p += 1.0
        head.after_update()
        if update % frequency == 0:
            online = list(head.critics.parameters())
            target = [0.75 * t + 0.25 * o.detach() for t, o in zip(target, online, strict=True)]
        for mine, expected in zip(head.target.parameters(), target, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("actor", ["gaussian", "residual"])
def test_state_round_trip_continues_identically(make_sac, make_batch, head, actor):
    overrides = [f"algorithm.q_head_type={head}", f"actor.type={actor}", "actor.batch_renorm=true"]
    sac = make_sac(*overrides)
    for seed in range(5):
        sac.update(make_batch(16, seed=seed), env_steps=seed)
    again = make_sac(*overrides)
    again.load_state_dict(copy.deepcopy(sac.state_dict()))
    for step in range(4):
        outcomes = []
        for learner in (sac, again):
            torch.manual_seed(step)
            outcomes.append(learner.update(make_batch(16, seed=50 + step), env_steps=10))
        assert outcomes[0].keys() == outcomes[1].keys()
        assert all(torch.equal(v, outcomes[1][k]) for k, v in outcomes[0].items())


def test_next_actions_are_sampled_in_evaluation_mode(make_sac, make_batch):
    """Batch Renormalisation in the actor: the critic step leaves its statistics alone."""
    sac = make_sac("actor.batch_renorm=true", "algorithm.policy_delay=2")
    before = {k: v.clone() for k, v in sac.actor.state_dict().items()}
    sac.update(make_batch(16), env_steps=0)
    assert all(torch.equal(v, before[k]) for k, v in sac.actor.state_dict().items())
    sac.update(make_batch(16), env_steps=0)
    assert int(sac.actor.state_dict()["net.0.steps"]) == 1


def test_metrics_are_scalars_without_graph(make_sac, make_batch):
    metrics = make_sac("algorithm.policy_delay=1").update(make_batch(16), env_steps=0)
    for name, value in metrics.items():
        assert value.shape == () and not value.requires_grad and value.isfinite(), name


def test_features_detach():
    vector, base = torch.ones(2, 3, requires_grad=True), torch.ones(2, 1, 1, requires_grad=True)
    cut = Features(vector, base).detach()
    assert not cut.vector.requires_grad and not cut.base_action.requires_grad
