"""The learner beside sbx's SAC and CrossQ (JAX); see parity.py."""

import numpy as np
import pytest
from parity import (
    ACT,
    ALPHA,
    CROSSQ,
    GAMMA,
    LR,
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

# compiling takes most of its half minute
pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("kept_gradients")]
jax = pytest.importorskip("jax")
sbx = pytest.importorskip("sbx")


class SBX:
    """An sbx model's states in float64, taken through its own jitted update functions."""

    def __init__(self, kind: str) -> None:
        model = {"sac": sbx.SAC, "crossq": sbx.CrossQ}[kind]
        arch = {"net_arch": [WIDTH, WIDTH]}
        settings = {"tau": TAU} if kind == "sac" else {}
        if kind == "crossq":
            arch["renorm_warmup_steps"] = WARMUP
        self.model = model(
            "MlpPolicy",
            Space(),
            learning_rate=LR,
            qf_learning_rate=LR,
            gamma=GAMMA,
            ent_coef=f"auto_{ALPHA}",
            policy_delay=1 if kind == "sac" else 3,
            policy_kwargs=arch,
            buffer_size=10,
            seed=0,
            **settings,
        )
        self.kind, self.updates = kind, 0
        self.q, self.actor, self.alpha = (
            jax.tree.map(_double, state)
            for state in (
                self.model.policy.qf_state,
                self.model.policy.actor_state,
                self.model.ent_coef_state,
            )
        )
        self.key = jax.random.PRNGKey(0)
        for state in (self.q, self.actor):
            injected = getattr(state.opt_state, "hyperparams", {})  # rounded to float32 by optax
            for name, exact in {"learning_rate": LR, "b1": 0.9, "b2": 0.999, "eps": 1e-8}.items():
                if name in injected:
                    assert float(injected[name]) == pytest.approx(exact, rel=1e-6)
                    injected[name] = jax.numpy.asarray(exact, jax.numpy.float64)

    def _distribution(self, obs: np.ndarray, train: bool):
        """The peer's action distribution, as its own losses build it."""
        if self.kind == "sac":
            return self.actor.apply_fn(self.actor.params, obs)
        variables = {"params": self.actor.params, "batch_stats": self.actor.batch_stats}
        if not train:
            return self.actor.apply_fn(variables, obs, train=False)
        return self.actor.apply_fn(variables, obs, train=True, mutable=["batch_stats"])[0]

    def _noise(self, obs: np.ndarray, key, train: bool) -> np.ndarray:
        """Standard normal noise behind the sample that `key` gives."""
        squashed = self._distribution(obs, train)
        normal = squashed.distribution
        pre_tanh = np.asarray(normal.sample(seed=key))  # inverting tanh would lose digits
        np.testing.assert_allclose(np.tanh(pre_tanh), squashed.sample(seed=key), rtol=0, atol=1e-12)
        return (pre_tanh - np.asarray(normal.mean())) / np.asarray(normal.stddev())

    def update(self, data: Data) -> dict[str, float]:
        """One update in the order of the peer's `_train`; writes the noise it drew into `data`."""
        self.updates += 1
        cls, values = type(self.model), {}
        # as in update_critic
        next_key = jax.random.split(self.key, 4 if self.kind == "sac" else 3)[1]
        data.next_noise = self._noise(data.next_obs, next_key, train=False)
        self.q, (loss, _), self.key = cls.update_critic(
            self.actor,
            self.q,
            self.alpha,
            data.obs,
            data.action,
            data.next_obs,
            data.reward,
            data.done,
            np.full(len(data.reward), GAMMA),
            self.key,
        )
        values["critic/loss"] = float(loss)
        if self.kind == "sac":
            self.q = cls.soft_update(TAU, self.q)
        if self.updates % self.model.policy_delay == 0:
            key = jax.random.split(self.key, 3)[2]  # as in update_actor
            data.noise = self._noise(data.obs, key, train=True)
            self.actor, self.q, self.alpha, actor_loss, alpha_loss, self.key = (
                cls.update_actor_and_temperature(
                    self.actor, self.q, self.alpha, data.obs, -float(ACT), self.key
                )
            )
            values["actor/loss"], values["temperature/loss"] = float(actor_loss), float(alpha_loss)
        return values

    def tensors(self) -> Tensors:
        """The peer's weights under our names."""
        out = {"log_alpha": np.asarray(self.alpha.params["log_ent_coef"]).reshape(())}
        actor = self.actor.params["params"] if self.kind == "sac" else self.actor.params
        layers = _layers(actor, getattr(self.actor, "batch_stats", {}))
        *hidden, mean, log_std = layers
        both = {k: np.concatenate([mean[k], log_std[k]]) for k in ("weight", "bias")}
        nets = {"actor": [*hidden, both]}
        trees = {"q": self.q.params}
        if self.kind == "sac":
            trees["target"] = self.q.target_params
        for name, tree in trees.items():
            tree = tree["params"] if self.kind == "sac" else tree
            (member,) = tree.values()  # the vmapped critic, critics along axis 0
            stats = next(iter(self.q.batch_stats.values())) if self.kind == "crossq" else {}
            for k in range(2):
                nets[f"{name}{k}"] = _layers(_member(member, k), _member(stats, k))
        for name, parts in nets.items():
            for i, part in enumerate(parts):
                out |= {f"{name}.{i}.{kind}": value for kind, value in part.items()}
        return out


def _double(x):
    floating = hasattr(x, "dtype") and jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
    return jax.numpy.asarray(x, jax.numpy.float64) if floating else x


def _member(tree, k: int):
    return jax.tree.map(lambda x: x[k], tree)


def _layers(params, stats) -> list[Tensors]:
    """Dense and BatchRenorm parameters in the order in which the network applies them."""
    dense = sorted((n for n in params if n.startswith("Dense")), key=_number)
    norms = sorted((n for n in params if n.startswith("BatchRenorm")), key=_number)
    out = []
    for i, name in enumerate(dense):
        if i < len(norms):
            scale = {"weight": params[norms[i]]["scale"], "bias": params[norms[i]]["bias"]}
            out.append(scale | {k: stats[norms[i]][k] for k in ("mean", "var")})
        out.append({"weight": params[name]["kernel"].T, "bias": params[name]["bias"]})
    return [{k: np.array(v) for k, v in layer.items()} for layer in out]


def _number(name: str) -> int:
    return int(name.rsplit("_", 1)[1])


def compare(kind: str, mine: Ours, updates: int) -> int:
    """Runs both side by side; returns the number of actor updates."""
    actor_updates = 0
    with jax.enable_x64(True):
        peer = SBX(kind)
        mine.load(peer.tensors())
        for step in range(updates):
            data = Data(step)
            theirs = peer.update(data)
            got = mine.update(data)
            actor_updates += "actor/loss" in theirs
            assert ("actor/loss" in got) == ("actor/loss" in theirs), f"delay at update {step}"
            for name, value in theirs.items():
                assert got[name] == pytest.approx(value, rel=1e-9, abs=1e-9), f"{name} at {step}"
            assert_same(mine.tensors(), peer.tensors(), f"after update {step}")
    return actor_updates


def test_sac(make_sac, monkeypatch):
    assert compare("sac", Ours(make_sac(*SAC), monkeypatch), UPDATES) == UPDATES


def test_crossq(make_sac, monkeypatch):
    warmup = f"critic.batch_renorm.warmup_steps={WARMUP}"
    mine = Ours(make_sac(*CROSSQ, warmup), monkeypatch)
    assert compare("crossq", mine, UPDATES) == UPDATES // 3


def test_default_form_in_the_warmup(make_sac, monkeypatch):
    """With r = 1 and d = 0 the peer's folded form is the paper's: our default layer, as it runs."""
    warmup = f"critic.batch_renorm.warmup_steps={WARMUP}"
    form = "critic.batch_renorm.form=unfolded"
    assert compare("crossq", Ours(make_sac(*CROSSQ, form, warmup), monkeypatch), WARMUP) == 3
