"""Contracts that every registered Q head, actor and backbone keeps (environments: test_envs)."""

import json

import pytest
import tiny_act
import tiny_pi0
import tiny_rgb
import tiny_smolvla
import tiny_vla
import torch
from tiny_flow import TinyFlow

from embodied_rl.config import Config
from embodied_rl.errors import UserError
from embodied_rl.interfaces import ActorAdapter, QHead
from embodied_rl.load_config import schema_keys
from embodied_rl.registry import ACTORS, BACKBONES, ENVS, EXPERTS, Q_HEADS
from embodied_rl.types import ArraySpec, EnvSpec, Features

pytestmark = pytest.mark.unit
D, H, A, B, K = 4, 3, 2, 8, 3


@pytest.mark.parametrize(
    "registry", [Q_HEADS, BACKBONES, ACTORS, ENVS, EXPERTS], ids=lambda r: r.kind
)
def test_unknown_name_lists_the_choices(registry):
    wrong = registry.names[0] + "x"
    with pytest.raises(UserError) as caught:
        registry.get(wrong)
    message = str(caught.value)
    assert registry.key in message and repr(wrong) in message
    assert all(name in message for name in registry.names)
    assert f"Did you mean '{registry.names[0]}'?" in message


# ---------------------------------------------------------------- Q heads


@pytest.fixture
def make_head(make_config):
    def make(name: str, seed: int = 0) -> QHead:
        torch.manual_seed(seed)
        config = make_config(f"critic.num_critics={K}", "critic.batch_renorm.warmup_steps=1")
        return Q_HEADS.get(name)(D, H * A, config.critic, config.algorithm)

    return make


@pytest.fixture
def pairs(make_batch):
    batch = make_batch(B, D, H, A)
    return (
        batch.features.vector,
        batch.action,
        batch.next_features.vector,
        batch.next_features.base_action,
    )


def same_state(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def snapshot(module: torch.nn.Module) -> dict:
    return {k: v.clone() for k, v in module.state_dict().items()}


@pytest.mark.parametrize("name", Q_HEADS.names)
class TestQHead:
    def test_td_pair(self, name, make_head, pairs):
        q, next_q = make_head(name).td_pair(*pairs)
        assert q.shape == next_q.shape == (K, B)
        assert q.requires_grad and not next_q.requires_grad
        assert not torch.equal(q[0], q[1]), "critics must start apart"

    def test_score_leaves_every_buffer(self, name, make_head, pairs):
        head = make_head(name)
        for training in (True, False):
            head.train(training)
            head.td_pair(*pairs)
            head.after_update()
            before = snapshot(head)
            q = head.score(*pairs[:2])
            assert q.shape == (K, B)
            assert same_state(before, head.state_dict())

    def test_score_is_row_wise_and_repeatable(self, name, make_head, pairs):
        head = make_head(name)
        head.td_pair(*pairs)
        x, a = pairs[:2]
        q = head.score(x, a)
        assert torch.equal(q, head.score(x, a))
        torch.testing.assert_close(head.score(x[:1], a[:1]), q[:, :1], rtol=1e-5, atol=1e-6)

    def test_score_gives_gradient_to_every_action_entry(self, name, make_head, pairs):
        action = pairs[1].clone().requires_grad_()
        make_head(name).score(pairs[0], action).sum().backward()
        assert action.grad is not None and action.grad.shape == (B, H, A)
        assert (action.grad != 0).all()

    def test_critic_parameters_are_what_the_loss_reaches(self, name, make_head, pairs):
        head = make_head(name)
        owned = list(head.critic_parameters())
        assert owned and all(p.requires_grad for p in owned)
        q, next_q = head.td_pair(*pairs)
        (q - next_q).square().mean().backward()
        reached = {n for n, p in head.named_parameters() if p.grad is not None}
        ids = {id(p) for p in owned}
        assert reached == {n for n, p in head.named_parameters() if id(p) in ids}
        assert all(id(p) in ids for p in head.parameters() if p.requires_grad)

    def test_state_round_trip(self, name, make_head, pairs):
        head, other = make_head(name), make_head(name, seed=1)
        for _ in range(3):
            head.td_pair(*pairs)
            head.after_update()
        assert not torch.equal(head.score(*pairs[:2]), other.score(*pairs[:2]))
        other.load_state_dict(snapshot(head))
        assert torch.equal(head.score(*pairs[:2]), other.score(*pairs[:2]))
        for mine, theirs in zip(head.td_pair(*pairs), other.td_pair(*pairs), strict=True):
            assert torch.equal(mine, theirs)
        head.after_update()
        other.after_update()
        assert same_state(head.state_dict(), other.state_dict())

    def test_unused_keys_exist(self, name, make_head):
        assert set(Q_HEADS.get(name).unused_keys) <= set(schema_keys(Config()))


# ---------------------------------------------------------------- actors

BASE_LIMIT = {"gaussian": 0.97}  # the mode reproduces |base| up to here; 1 where not listed


@pytest.fixture(params=[False, True], ids=["plain", "renorm"])
def make_actor(request, make_config, make_backbone):
    def make(name: str) -> ActorAdapter:
        config = make_config("actor.residual_ramp_steps=100", "actor.residual_scale=0.2")
        renorm = config.critic.batch_renorm if request.param else None
        torch.manual_seed(3)
        backbone = TinyFlow(D, A, H) if name == "noise" else make_backbone(H)
        return ACTORS.get(name).for_backbone(backbone, config.actor, renorm)

    return make


@pytest.fixture
def features(make_batch):
    """Random features whose base actions reach -1 and 1."""
    made = make_batch(B, D, H, A).features
    base = made.base_action.clone()
    base[0], base[1] = 1, -1
    base[2, 0, 0] = 0.97
    return Features(made.vector, base)


def perturb(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))


@pytest.mark.parametrize("name", ACTORS.names)
class TestActor:
    def test_initial_mode_is_the_anchor(self, name, make_actor, features):
        limit = BASE_LIMIT.get(name, 1.0)
        for training in (False, True):
            actor = make_actor(name).train(training)
            expected = actor.anchor(features).clamp(-limit, limit)
            mode = actor(features).mode
            torch.testing.assert_close(mode, expected, rtol=0, atol=1e-6)

    def test_sample(self, name, make_actor, features):
        actor = make_actor(name).train()
        perturb(actor)
        sample = actor(features)
        assert sample.action.shape == sample.mode.shape == (B, *actor.action_shape)
        assert sample.log_prob.shape == (B,)
        for action in (sample.action, sample.mode):
            assert action.abs().max() <= 1
        assert not torch.equal(sample.action, actor(features).action), "samples are noisy"
        actor.eval()
        assert torch.equal(actor(features).mode, actor(features).mode)

    def test_mode_is_the_same_alone_and_draws_nothing(self, name, make_actor, features):
        actor = make_actor(name).eval()
        perturb(actor)
        expected, generator = actor(features).mode, torch.get_rng_state()
        assert torch.equal(actor.mode(features), expected)
        assert torch.equal(torch.get_rng_state(), generator)

    def test_log_prob_and_gradients_are_finite_when_saturated(self, name, make_actor, features):
        actor = make_actor(name).train()
        with torch.no_grad():
            actor.net[-1].bias.add_(30.0)  # location 30, standard deviation at its bound
        sample = actor(features)
        assert sample.log_prob.isfinite().all()
        (sample.log_prob.sum() + sample.action.sum()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in actor.parameters())

    def test_initial_gradient_reaches_the_last_layer(self, name, make_actor, features):
        actor = make_actor(name).train()
        inner = Features(features.vector[3:], features.base_action[3:])
        actor(inner).action.sum().backward()
        assert (actor.net[-1].weight.grad != 0).any()

    def test_config_round_trip(self, name, make_actor, features):
        actor = make_actor(name)
        perturb(actor)
        stored = json.loads(json.dumps(actor.config_dict()))
        again = ACTORS.get(name).from_config(stored)
        again.load_state_dict(actor.state_dict())
        assert again.config_dict() == actor.config_dict()
        actor.eval(), again.eval()
        assert torch.equal(actor(features).mode, again(features).mode)

    def test_explore(self, name, make_actor, features):
        actor = make_actor(name).eval()
        for env_steps in (0, 50, 10**6):
            action = actor.explore(features, env_steps)
            assert action.shape == (B, *actor.action_shape) and action.abs().max() <= 1
        torch.manual_seed(5)
        late = actor.explore(features, 10**6)
        torch.manual_seed(5)
        assert torch.equal(late, actor(features).action)

    def test_initial_std(self, name, make_actor):
        """The spread around a base action of zero is actor.initial_std, in action units."""
        actor = make_actor(name).eval()
        n = 20_000
        still = Features(torch.zeros(n, D), torch.zeros(n, H, A))
        wanted = actor.config_dict()["initial_std"]
        # tanh shrinks: Var tanh(sx) = s^2 - 2 s^4 + O(s^6), under 3 % of the std at 0.15;
        # sampling error of a std over 120,000 draws: 0.2 %. The residual's is xi tanh(sx).
        scale = actor.config_dict().get("scale", 1.0)
        s = min(wanted / scale, 1.0)
        draws = torch.tanh(s * torch.randn(10**6, dtype=torch.float64))
        assert float(actor(still).action.detach().std()) == pytest.approx(
            scale * float(draws.std()), rel=0.02
        )


@pytest.mark.parametrize("std", [0.05, 0.7])
def test_gaussian_log_prob_equals_torch_distributions(std):
    actor = ACTORS.get("gaussian")(D, H, A, [8], initial_std=std).double()
    perturb(actor)
    rng = torch.Generator().manual_seed(1)
    base = torch.rand(B, H, A, generator=rng, dtype=torch.float64) * 1.8 - 0.9
    features = Features(torch.randn(B, D, generator=rng, dtype=torch.float64), base)
    sample = actor(features)
    mean, log_std = actor.distribution(features)
    tanh = torch.distributions.transforms.TanhTransform(cache_size=0)
    peer = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()), [tanh]
    )
    expected = peer.log_prob(sample.action).sum((1, 2))
    # the peer recovers tanh^-1(a), which loses digits where |a| -> 1
    torch.testing.assert_close(sample.log_prob, expected, rtol=1e-7, atol=1e-7)


def test_residual_ramp_and_bound(make_backbone, make_config):
    config = make_config("actor.residual_ramp_steps=1000", "actor.residual_scale=0.1")
    actor = ACTORS.get("residual").for_backbone(make_backbone(1), config.actor, None)
    n = 4000
    features = Features(torch.randn(n, D), torch.rand(n, 1, A) * 2 - 1)
    assert torch.equal(actor.explore(features, 0), features.base_action)
    changed = (actor.explore(features, 250) != features.base_action).any((1, 2))
    # binomial with p = 1/4: standard deviation 0.0068, bound at five of them
    assert float(changed.float().mean()) == pytest.approx(0.25, abs=0.034)
    perturb(actor)
    moved = (actor(features).action - features.base_action).abs()
    assert moved.max() <= 0.1 + 1e-6
    assert moved.max() > 0.05


# ---------------------------------------------------------------- backbones


@pytest.fixture
def observations(spec):
    rng = torch.Generator().manual_seed(2)
    return {k: torch.randn(B, *s.shape, generator=rng) for k, s in spec.obs.items()}


@pytest.fixture
def made(name, spec, observations, tmp_path):
    """A backbone, an environment that it fits, and observations of it."""
    if name == "small_vla":  # as pi0
        return tiny_vla.backbone(tmp_path), tiny_vla.SPEC, tiny_vla.observations(count=B)
    if name == "pi0":  # cannot be built from scratch, and reads images
        return tiny_pi0.backbone(), tiny_pi0.SPEC, tiny_pi0.observations(count=B)
    if name == "act":
        return tiny_act.backbone(), tiny_rgb.SPEC, tiny_rgb.observations(count=B)
    if name == "smolvla":
        return tiny_smolvla.backbone(), tiny_rgb.SPEC, tiny_rgb.observations(count=B)
    return BACKBONES.get(name).for_env(spec).eval(), spec, observations


@pytest.mark.parametrize("name", BACKBONES.names)
class TestBackbone:
    def test_forward(self, name, made):
        backbone, spec, observations = made
        features = backbone(observations)
        chunk, dim = backbone.chunk_size, backbone.action_dim
        assert features.vector.shape == (B, backbone.feature_dim)
        assert features.vector.dtype == features.base_action.dtype == torch.float32
        assert features.base_action.shape == (B, chunk, dim) and dim == spec.action_dim
        assert features.base_action.abs().max() <= 1

    def test_round_trip_and_fingerprint(self, name, made):
        backbone, _, observations = made
        tensors = list(backbone.state_dict().values())
        with torch.no_grad():
            for tensor in tensors:
                tensor.add_(0.1)
        mark = backbone.fingerprint()
        again = BACKBONES.get(name).from_config(json.loads(json.dumps(backbone.config_dict())))
        assert again.fingerprint() != mark
        again.load_state_dict(backbone.state_dict())
        again.eval()
        assert again.fingerprint() == mark
        # a policy that samples draws equal noise
        with torch.no_grad():
            mine, theirs = (
                b(observations, 1, torch.Generator().manual_seed(0)) for b in (backbone, again)
            )
        # equal weights elsewhere in memory: matrix products may add in another order (seen: 5e-7)
        torch.testing.assert_close(mine.vector, theirs.vector, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine.base_action, theirs.base_action, rtol=1e-5, atol=1e-6)
        assert backbone.fingerprint() == mark, "a forward pass changes nothing"
        for tensor in tensors:
            with torch.no_grad():
                tensor.view(-1)[0] += 1e-3
            assert backbone.fingerprint() != mark
            mark = backbone.fingerprint()

    def test_check_env(self, name, made):
        backbone, spec, _ = made
        backbone.check_env(spec)
        more_actions = EnvSpec(spec.obs, spec.action_dim + 1, 20, "other")
        with pytest.raises(UserError, match=r"2 action entries, but other has 3\."):
            backbone.check_env(more_actions)
        with pytest.raises(UserError, match="other"):
            backbone.check_env(EnvSpec({}, spec.action_dim, 20, "other"))


def test_state_backbone_normalises(make_backbone):
    backbone = make_backbone()
    states = torch.tensor([[0.0, 5.0, 1.0, 3.0], [2.0, 5.0, -1.0, 7.0]])
    backbone.set_statistics(states)
    assert backbone.mean.tolist() == [1.0, 5.0, 0.0, 5.0]
    # standard deviations 1, 0, 1, 2; the constant entry is raised to 1 % of the largest
    torch.testing.assert_close(backbone.std, torch.tensor([1.0, 0.02, 1.0, 2.0]), rtol=1e-6, atol=0)
    vector = backbone({"state": torch.tensor([[3.0, 5.0, 0.5, 1e6]])}).vector
    torch.testing.assert_close(vector, torch.tensor([[2.0, 0.0, 0.5, 10.0]]), rtol=1e-6, atol=1e-6)


def test_state_backbone_names_the_observation_mismatch(make_backbone, spec):
    with pytest.raises(UserError, match=r"4 observation entries, but cube has 9\."):
        make_backbone().check_env(EnvSpec({"state": ArraySpec((9,), torch.float32)}, 2, 20, "cube"))
    with pytest.raises(UserError, match=r"'state' observation, but cube gives rgb\. .*obs_mode"):
        make_backbone().check_env(EnvSpec({"rgb": ArraySpec((9,), torch.uint8)}, 2, 20, "cube"))
