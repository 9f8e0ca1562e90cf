"""Adapters over a policy that samples: noise steering and candidates."""

import json

import pytest
import torch
from tiny_flow import TinyFlow

from embodied_rl.builders import build_env, build_policy, build_q_head, build_sac
from embodied_rl.demonstrations import demo_folder
from embodied_rl.errors import UserError
from embodied_rl.policy import Policy
from embodied_rl.registry import ACTORS
from embodied_rl.stopping import StopRequest
from embodied_rl.trainer import Trainer
from embodied_rl.types import Features

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
B, D, H, A = 64, 4, 3, 2


@pytest.fixture
def flow():
    torch.manual_seed(4)
    return TinyFlow(D, A, H).requires_grad_(False).eval()


@pytest.fixture
def obs():
    return {"state": torch.randn(B, D, generator=torch.Generator().manual_seed(1))}


@pytest.fixture
def folder(flow_folder):
    return flow_folder


# ---------------------------------------------------------------- the backbone's contract


def test_samples_share_one_encoding(flow, obs):
    generator = torch.Generator().manual_seed(7)
    features = flow(obs, 3, generator)
    assert flow.encoded == B and flow.denoised == 3 * B
    assert features.base_action.shape == (B, H, A) and features.candidates.shape == (B, 2, H, A)
    noise = torch.randn(3 * B, H, A, generator=torch.Generator().manual_seed(7)).view(B, 3, H, A)
    for k, chunk in enumerate([features.base_action, *features.candidates.unbind(1)]):
        alone = flow.denoise(features.context, noise[:, k]).clamp(-1, 1)
        torch.testing.assert_close(chunk, alone, rtol=0, atol=1e-6)


def test_no_samples_cost_nothing(flow, obs):
    features = flow(obs, 0)
    assert flow.denoised == 0 and features.context is not None
    assert features.base_action.abs().max() == 0 and features.candidates is None


def test_context_is_never_stored(flow, obs):
    features = flow(obs, 2)
    assert set(features.tensors()) == {
        "features.vector",
        "features.base_action",
        "features.candidates",
    }
    assert features.detach().context is None
    again = Features.from_fields(features.tensors())
    assert torch.equal(again.candidates, features.candidates)
    assert Features.from_fields({"obs.state": obs["state"]}) is None


# ---------------------------------------------------------------- noise


def test_noise_is_what_the_flow_starts_from(flow, obs, make_config):
    config = make_config("actor.type=noise", "actor.noise_bound=1.5")
    policy = Policy(flow, "tiny_flow", ACTORS.get("noise").for_backbone(flow, config.actor, None))
    features = policy.encode(obs)
    assert flow.denoised == 0, "the base action is not computed"
    sample = policy.actor(features)
    assert sample.action.shape == (B, 1, A)
    executed = policy.decode(features, sample.action)
    noise = (1.5 * sample.action).repeat(1, H, 1)
    torch.testing.assert_close(executed, flow.denoise(features.context, noise).clamp(-1, 1))
    assert policy.act(obs).shape == (B, H, A)
    two = Policy(flow, "tiny_flow", policy.actor, "noise", execute_steps=2)
    torch.testing.assert_close(two.act(obs), policy.act(obs)[:, :2])
    assert torch.equal(policy.act(obs), policy.act(obs)), "its mode is deterministic"


def test_noise_spread_at_the_start(flow, make_config):
    """About N(0, 1) squashed: tanh of a standard normal has variance 0.394 (quadrature)."""
    actor = ACTORS.get("noise").for_backbone(flow, make_config().actor, None)
    n = 40_000
    action = actor(Features(torch.randn(n, D), torch.zeros(n, H, A))).action.detach()
    grid = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    density = torch.exp(-(grid**2) / 2)
    variance = float((density * torch.tanh(grid) ** 2).sum() / density.sum())
    # sampling error of a variance over 80,000 draws: 0.4 %
    assert float(action.var()) == pytest.approx(variance, rel=0.02)
    assert float(action.mean()) == pytest.approx(0, abs=0.01)
    assert actor.target_entropy == -A / 2


def test_noise_needs_a_flow(make_backbone, make_config):
    with pytest.raises(UserError, match=r"actor\.type=noise .* StateBackbone draws none"):
        ACTORS.get("noise").for_backbone(make_backbone(), make_config().actor, None)


def test_demonstrations_show_no_noise(make_config, fake_demos):
    why = "judges noise, which demonstrations do not show"
    named = make_config(
        "actor.type=noise", f"algorithm.demo.path={fake_demos}", "algorithm.demo.fraction=0.5"
    )
    with pytest.raises(UserError, match=why):
        demo_folder(named)
    path, note = demo_folder(make_config("actor.type=noise", "algorithm.demo.fraction=0.5"))
    assert path is None and why in note


# ---------------------------------------------------------------- candidates


@pytest.fixture
def choosing(flow, make_config):
    """A residual actor over four candidates that a known function judges."""

    def make(judge, count=4):
        config = make_config("actor.type=residual", f"actor.candidates={count}")
        actor = ACTORS.get("residual").for_backbone(flow, config.actor, None).eval()
        with torch.no_grad():
            actor.net[-1].bias[: H * A] = 0.5  # corrections that differ from none
        actor.judge = judge
        return actor

    return make


def total(x, action):
    return action.flatten(1).sum(1)


def options(actor, features):
    """All base actions, and the modal corrections of all, [B, 2 N, H, A]."""
    bases = torch.cat([features.base_action[:, None], features.candidates], 1)
    edited = [
        actor._corrected(one, torch.tanh(actor.distribution(one)[0]))
        for one in (Features(features.vector, base) for base in bases.unbind(1))
    ]
    return torch.cat([bases, torch.stack(edited, 1)], 1)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_best_candidate_is_taken(choosing, flow, obs, sign):
    actor = choosing(lambda x, a: sign * total(x, a))
    features = flow(obs, actor.base_samples)
    every = options(actor, features)
    scores = sign * every.flatten(2).sum(2)
    best = every[torch.arange(B), scores.argmax(1)]
    torch.testing.assert_close(actor.mode(features), best, rtol=0, atol=1e-6)
    chosen = scores.argmax(1)
    # corrections point upwards: they win where more is better, and base actions where less is
    assert (chosen >= 4).all() if sign == 1 else (chosen < 4).all()


def test_backup_counts_no_entropy_for_base_actions(choosing, flow, obs):
    features = flow(obs, 4)
    sample = choosing(lambda x, a: -total(x, a)).backup(features)
    assert (sample.log_prob == 0).float().mean() > 0.5
    sample = choosing(total).backup(features)
    assert (sample.log_prob != 0).float().mean() > 0.5


def test_ramp_begins_with_the_base_action(choosing, flow, obs):
    features = flow(obs, 4)
    assert torch.equal(choosing(total).explore(features, 0), features.base_action)


def test_candidates_need_a_policy_that_samples(make_backbone, make_config):
    config = make_config("actor.candidates=4")
    with pytest.raises(UserError, match=r"actor\.candidates=4, but StateBackbone has one action"):
        ACTORS.get("residual").for_backbone(make_backbone(), config.actor, None)


def test_judge_is_no_part_of_the_actor(folder, make_config, spec, tmp_path):
    config = make_config("actor.type=residual", "actor.candidates=3", f"policy.path={folder}")
    policy = build_policy(config, spec, CPU)
    names = set(policy.actor.state_dict())
    sac = build_sac(config, policy, build_q_head(config, policy, CPU), CPU)
    assert set(policy.actor.state_dict()) == names == set(sac.average.module.state_dict())
    acting = policy.with_actor(sac.average.module)
    acting.save_pretrained(tmp_path / "saved")
    again = Policy.from_pretrained(tmp_path / "saved")
    obs = {"state": torch.randn(16, D)}
    mine = acting.act(obs, generator=torch.Generator().manual_seed(2))
    theirs = again.act(obs, generator=torch.Generator().manual_seed(2))
    assert torch.equal(mine, theirs)
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert stored["judge"]["type"] == config.algorithm.q_head_type


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("head", ["crossq", "default"])
@pytest.mark.parametrize(
    "actor", [("noise",), ("residual",), ("residual", "actor.candidates=3"), ("gaussian",)]
)
def test_every_adapter_trains_on_a_flow_policy(head, actor, folder, make_config, tmp_path):
    config = make_config(
        f"policy.path={folder}",
        f"algorithm.q_head_type={head}",
        f"actor.type={actor[0]}",
        *actor[1:],
        "algorithm.critic_warmup_steps=32",
        "algorithm.demo.fraction=0",
        "rollout.execute_steps=2",
        "train.total_steps=160",
        "eval.interval=0",
    )
    env = build_env(config.env, config.env.num_envs, CPU)
    try:
        with StopRequest() as stop:
            policy = build_policy(config, env.spec, CPU)
            before = {k: v.clone() for k, v in policy.actor.state_dict().items()}
            (tmp_path / "run").mkdir()
            trainer = Trainer(config, tmp_path / "run", env, policy, CPU, stop)
            encoded = []
            update = trainer._update

            def counted():
                rows = policy.backbone.encoded + policy.backbone.denoised
                update()
                encoded.append(policy.backbone.encoded + policy.backbone.denoised - rows)

            trainer._update = counted
            results = trainer.run(resume=False)
    finally:
        env.close()
    assert results["updates"] > 0 and set(encoded) == {0}, "no update runs the policy"
    assert any(not torch.equal(v, policy.actor.state_dict()[k]) for k, v in before.items())
    assert trainer._batch.action.shape[1:] == policy.actor.action_shape
    assert policy.actor.action_shape == ((1, A) if actor[0] == "noise" else (2, A)), "as executed"
    saved = Policy.from_pretrained(tmp_path / "run")
    assert saved.act({"state": torch.randn(5, D)}).shape == (5, 2, A)
