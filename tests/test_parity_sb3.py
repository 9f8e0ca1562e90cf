"""The learner beside stable-baselines3's SAC and sb3-contrib's CrossQ; see parity.py."""

import numpy as np
import pytest
import torch
from parity import (
    ALPHA,
    CROSSQ,
    GAMMA,
    LR,
    ROWS,
    SAC,
    TAU,
    UPDATES,
    WARMUP,
    WIDTH,
    Data,
    Ours,
    Space,
    Tensors,
    assert_same,
)
from torch import nn


@pytest.fixture
def data():
    return [Data(seed) for seed in range(UPDATES)]


@pytest.fixture
def ours(make_sac, monkeypatch):
    def make(*overrides: str) -> Ours:
        return Ours(make_sac(*overrides), monkeypatch)

    return make


class SB3:
    """A stable-baselines3 or sb3-contrib model in float64, its `train` fed with given batches."""

    def __init__(self, kind: str, monkeypatch) -> None:
        common = {
            "learning_rate": LR,
            "gamma": GAMMA,
            "ent_coef": f"auto_{ALPHA}",
            "device": "cpu",
            "seed": 0,
            "buffer_size": 10,
        }
        arch = {"net_arch": [WIDTH, WIDTH]}
        if kind == "sac":
            sb3 = pytest.importorskip("stable_baselines3")
            self.model = sb3.SAC("MlpPolicy", Space(), tau=TAU, policy_kwargs=arch, **common)
        else:
            contrib = pytest.importorskip("sb3_contrib")
            arch["renorm_warmup_steps"] = WARMUP
            common["policy_delay"] = 3
            self.model = contrib.CrossQ("MlpPolicy", Space(), policy_kwargs=arch, **common)
        from stable_baselines3.common.logger import Logger

        model = self.model
        model.set_logger(Logger(None, []))
        model.policy.double()
        # its observations would be cast to float32
        monkeypatch.setattr(
            "stable_baselines3.common.policies.preprocess_obs", lambda o, *_, **__: o
        )
        model.actor.action_dist.epsilon = 0.0
        model.log_ent_coef = model.log_ent_coef.detach().double().requires_grad_()
        model.ent_coef_optimizer = torch.optim.Adam([model.log_ent_coef], lr=LR)
        self.has_target = kind == "sac"
        self._grads: Tensors = {}
        for owner in (model.actor, model.critic):
            self._record(owner, monkeypatch)
        self._queue: list[np.ndarray] = []
        monkeypatch.setattr(torch.distributions.Normal, "rsample", self._rsample())
        monkeypatch.setattr(model.replay_buffer, "sample", lambda *_, **__: self._samples)

    def _rsample(self):
        def rsample(normal, sample_shape=()):
            del sample_shape
            return normal.loc + normal.scale * torch.from_numpy(self._queue.pop(0))

        return rsample

    def _record(self, owner, monkeypatch) -> None:
        """Copies the gradients at the moment of the optimiser's step: later losses add to them."""
        step = owner.optimizer.step

        def recording(*args, **kwargs):
            nets = self._nets()
            own = {id(p) for p in owner.parameters()}
            for name, layers in nets.items():
                for i, layer in enumerate(layers):
                    for kind, parts in self._parts(layer).items():
                        if kind in ("weight", "bias") and id(parts[0]) in own:
                            grads = torch.cat([p.grad for p in parts])
                            self._grads[f"{name}.{i}.{kind}"] = grads.numpy().copy()
            return step(*args, **kwargs)

        monkeypatch.setattr(owner.optimizer, "step", recording)

    def _nets(self) -> dict[str, list]:
        actor = self.model.actor
        plain = (nn.ReLU, nn.Flatten)
        nets = {"actor": [m for m in actor.latent_pi if not isinstance(m, plain)]}
        nets["actor"].append((actor.mu, actor.log_std))
        critics = {"q": self.model.critic.q_networks}
        if self.has_target:
            critics["target"] = self.model.critic_target.q_networks
        for prefix, members in critics.items():
            for i, member in enumerate(members):
                nets[f"{prefix}{i}"] = [m for m in member if not isinstance(m, plain)]
        return nets

    @staticmethod
    def _parts(layer) -> dict[str, list[torch.Tensor]]:
        if isinstance(layer, tuple):  # mean and log std, one layer in ours
            return {k: [getattr(m, k) for m in layer] for k in ("weight", "bias")}
        if isinstance(layer, nn.Linear):
            return {"weight": [layer.weight], "bias": [layer.bias]}
        names = {"mean": "ra_mean", "var": "ra_var", "weight": "scale", "bias": "bias"}
        return {kind: [getattr(layer, name)] for kind, name in names.items()}

    def tensors(self) -> Tensors:
        out = {"log_alpha": self.model.log_ent_coef.detach().numpy().reshape(()).copy()}
        for name, layers in self._nets().items():
            for i, layer in enumerate(layers):
                for kind, parts in self._parts(layer).items():
                    out[f"{name}.{i}.{kind}"] = torch.cat([p.detach() for p in parts]).numpy()
        return {k: v.copy() for k, v in out.items()}

    def update(self, data: Data, order: list[np.ndarray]) -> dict[str, float]:
        from stable_baselines3.common.type_aliases import ReplayBufferSamples

        self._queue, self._grads = order, {}
        arrays = (data.obs, data.action, data.next_obs, data.done[:, None], data.reward[:, None])
        self._samples = ReplayBufferSamples(*(torch.from_numpy(a) for a in arrays))
        self.model.logger.name_to_value.clear()
        self.model.train(gradient_steps=1, batch_size=ROWS)
        values = self.model.logger.name_to_value
        names = {"critic_loss": "critic/loss", "actor_loss": "actor/loss"}
        names["ent_coef_loss"] = "temperature/loss"
        return {
            ours: float(values[f"train/{n}"]) for n, ours in names.items() if f"train/{n}" in values
        }


@pytest.mark.unit
@pytest.mark.usefixtures("kept_gradients")
@pytest.mark.parametrize("kind", ["sac", "crossq"])
def test_stable_baselines3(kind, ours, data, monkeypatch):
    crossq = [
        *CROSSQ,
        "critic.batch_renorm.variance=unbiased",
        f"critic.batch_renorm.warmup_steps={WARMUP + 1}",
    ]
    mine = ours(*(SAC if kind == "sac" else crossq))
    peer = SB3(kind, monkeypatch)
    mine.load(peer.tensors())
    assert_same(mine.tensors(), peer.tensors(), "start")
    actor_updates = 0
    for step, item in enumerate(data):
        order = [item.noise, item.next_noise] if kind == "sac" else [item.next_noise, item.noise]
        theirs, got = peer.update(item, order), mine.update(item)
        actor_updates += "actor/loss" in theirs
        assert ("actor/loss" in got) == ("actor/loss" in theirs), f"policy delay at update {step}"
        for name, value in theirs.items():
            assert got[name] == pytest.approx(value, rel=1e-9, abs=1e-9), f"{name} at {step}"
        grads = {k: v for k, v in mine.gradients().items() if k in peer._grads}
        assert_same(grads, peer._grads, f"gradients at update {step}")
        assert_same(mine.tensors(), peer.tensors(), f"after update {step}")
    assert actor_updates == (UPDATES if kind == "sac" else UPDATES // 3)


@pytest.mark.unit
@pytest.mark.usefixtures("kept_gradients")
def test_the_comparison_bites(ours, data, monkeypatch):
    """With the paper's variance instead of sb3-contrib's, the first update already differs."""
    mine = ours(*CROSSQ, f"critic.batch_renorm.warmup_steps={WARMUP + 1}")
    peer = SB3("crossq", monkeypatch)
    mine.load(peer.tensors())
    theirs = peer.update(data[0], [data[0].next_noise, data[0].noise])
    assert mine.update(data[0])["critic/loss"] != pytest.approx(theirs["critic/loss"], rel=1e-6)
