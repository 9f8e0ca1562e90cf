"""Training the backbone through the critic's features."""

import copy

import pytest
import torch
from tiny_flow import TinyFlow

from embodied_rl.builders import build_env, build_policy, build_q_head, build_sac
from embodied_rl.config import PolicyConfig
from embodied_rl.errors import UserError
from embodied_rl.policy import Policy
from embodied_rl.stopping import StopRequest
from embodied_rl.trainer import Trainer
from embodied_rl.types import Batch
from embodied_rl.unfreeze import unfreeze

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
B, D, H, A = 32, 4, 3, 2
TRAIN = ("policy.cache_features=false", "algorithm.demo.fraction=0", "actor.type=gaussian")


@pytest.fixture(autouse=True)
def folder(flow_folder):
    return flow_folder


def make_batch(policy: Policy, dtype: torch.dtype) -> Batch:
    rng = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=dtype)

    obs, following = {"state": draw(B, D)}, {"state": draw(B, D)}
    return Batch(
        policy.encode(obs),
        policy.encode(following),
        torch.tanh(draw(B, H, A)),
        draw(B),
        torch.full((B,), 0.9, dtype=dtype),
        torch.zeros(B, dtype=torch.bool),
        obs,
    )


def learner(folder, make_config, spec, *overrides):
    config = make_config(f"policy.path={folder}", *TRAIN, *overrides)
    torch.manual_seed(0)
    policy = build_policy(config, spec, CPU)
    policy.double()
    q_head = build_q_head(config, policy, CPU).double()
    sac = build_sac(config, policy, q_head, CPU)
    return policy, sac


@pytest.mark.usefixtures("kept_gradients")
@pytest.mark.parametrize("head", ["crossq", "default"])
@pytest.mark.parametrize("how", ["full", "lora", "last"])
def test_pieces_give_the_gradient_of_the_whole(folder, make_config, spec, head, how):
    """One pass with a graph through backbone and critic, against eight pieces; float64, 1e-10."""
    overrides = [f"algorithm.q_head_type={head}", f"policy.trainable={how}"]
    overrides += ["algorithm.critic_warmup_steps=100", "policy.optim.clip_grad=null"]
    found = {}
    for rows in (None, 4):
        policy, sac = learner(
            folder, make_config, spec, *overrides, f"policy.micro_batch={rows or 'null'}"
        )
        batch = make_batch(policy, torch.float64)
        seen = {}
        step = sac.engine.step

        def spy(trainable, loss, inputs=(), seen=seen, step=step):
            norm = step(trainable, loss, inputs)
            seen[trainable.name] = [p.grad.clone() for p in trainable.parameters]
            return norm

        sac.engine.step = spy
        twin = copy.deepcopy((policy.backbone, sac.q_head, policy.actor))
        torch.manual_seed(5)
        sac.update(batch, env_steps=0)
        found[rows] = seen["backbone"]
        # by hand: the same loss with one graph
        backbone, q_head, actor = twin
        torch.manual_seed(5)
        with torch.no_grad():
            following = actor.eval()(batch.next_features)
        x = backbone(batch.obs, 0).vector
        q, next_q = q_head.td_pair(x, batch.action, batch.next_features.vector, following.action)
        loss = 0.5 * (q - sac.td_target(batch, next_q, following.log_prob)).square().mean(1).sum()
        trained = [p for p in backbone.parameters() if p.requires_grad]
        for mine, theirs in zip(found[rows], torch.autograd.grad(loss, trained), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    for one, eight in zip(found[None], found[4], strict=True):
        torch.testing.assert_close(one, eight, rtol=1e-10, atol=1e-12)
    assert any(g.abs().max() > 1e-6 for g in found[None])


@pytest.mark.parametrize(("how", "moving"), [("full", 4), ("last", 2), ("lora", 4)])
def test_what_moves(folder, how, moving):
    backbone = Policy.from_pretrained(folder).backbone
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    trained = unfreeze(backbone, PolicyConfig(trainable=how, lora_rank=2))
    assert len(trained) == moving and not backbone.frozen
    obs = {"state": torch.randn(5, D)}
    whole = TinyFlow(D, A, H)
    whole.load_state_dict(before)
    torch.testing.assert_close(backbone(obs, 0).vector, whole(obs, 0).vector)
    if how == "lora":
        assert all(p.shape[0] == 2 or p.shape[1] == 2 for p in trained)
    else:
        blocks = backbone.blocks()[-1:] if how == "last" else backbone.blocks()
        assert {id(p) for p in trained} == {id(p) for b in blocks for p in b.parameters()}


def test_refusals(folder, make_backbone, make_config):
    with pytest.raises(
        UserError, match=r"policy\.trainable=full: StateBackbone has no such weights"
    ):
        unfreeze(make_backbone(), PolicyConfig(trainable="full"))
    half = TinyFlow(D, A, H).to(torch.bfloat16)
    with pytest.raises(UserError, match=r"would train torch\.bfloat16 weights in place"):
        unfreeze(half, PolicyConfig(trainable="full"))
    lora = unfreeze(TinyFlow(D, A, H).to(torch.bfloat16), PolicyConfig(trainable="lora"))
    assert {p.dtype for p in lora} == {torch.float32}
    with pytest.raises(UserError, match=r"gradient_checkpointing=true: TinyFlow has no such mode"):
        unfreeze(TinyFlow(D, A, H), PolicyConfig(trainable="full", gradient_checkpointing=True))
    with pytest.raises(UserError, match=r"policy\.trainable=lora with policy\.cache_features=true"):
        make_config("policy.trainable=lora")


@pytest.mark.parametrize("how", ["full", "lora"])
def test_a_run_trains_saves_and_resumes(folder, make_config, tmp_path, spec, how):
    config = make_config(
        f"policy.path={folder}",
        *TRAIN,
        f"policy.trainable={how}",
        "policy.micro_batch=5",
        "policy.optim.lr=0.01",
        "algorithm.critic_warmup_steps=32",
        "train.total_steps=160",
        "train.checkpoint_interval=80",
        "eval.interval=0",
    )

    class Stop(StopRequest):
        at, trainer = 10**9, None

        @property
        def requested(self):
            return self.trainer.step >= self.at

    def run(folder, *, at=10**9, resume=False):
        torch.manual_seed(9 if resume else 1)
        env = build_env(config.env, config.env.num_envs, CPU)
        try:
            policy = build_policy(config, env.spec, CPU)
            folder.mkdir(exist_ok=True)
            stop = Stop()
            stop.at = at
            stop.trainer = Trainer(config, folder, env, policy, CPU, stop)
            stop.trainer.run(resume=resume)
        finally:
            env.close()
        return policy

    straight = run(tmp_path / "straight")
    run(tmp_path / "cut", at=80)
    resumed = run(tmp_path / "cut", resume=True)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    start = Policy.from_pretrained(folder).backbone
    obs = {"state": torch.randn(7, D)}
    assert not torch.equal(start(obs, 0).vector, straight.backbone(obs, 0).vector)
    saved = Policy.from_pretrained(tmp_path / "straight" / "checkpoints" / "last")
    assert torch.equal(saved.backbone(obs, 0).vector, straight.backbone(obs, 0).vector)
    other = make_config(f"policy.path={tmp_path / 'straight'}", *TRAIN)
    with pytest.raises(UserError, match=f"was trained already. .*policy.trainable={how}"):
        build_policy(other, spec, CPU)
