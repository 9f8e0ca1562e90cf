"""Batch Renormalisation against a NumPy reference written from the formula of the paper."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from embodied_rl.batch_renorm import BatchRenorm
from embodied_rl.config import BatchRenormConfig
from embodied_rl.nn import mlp

pytestmark = pytest.mark.unit
F64 = {"rtol": 1e-12, "atol": 1e-12}
EPS, R_MAX, D_MAX, MOMENTUM = 1e-3, 3.0, 5.0, 0.99


class Reference:
    """Ioffe 2017, algorithm 1, with CrossQ's warm-up; NumPy, float64."""

    def __init__(self, features, momentum=MOMENTUM, eps=EPS, r_max=R_MAX, d_max=D_MAX, warmup=0):
        self.momentum, self.eps, self.r_max, self.d_max = momentum, eps, r_max, d_max
        self.warmup, self.steps = warmup, 0
        self.mean, self.var = np.zeros(features), np.ones(features)

    def corrections(self, x):
        mu, var = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
        std, running = np.sqrt(var + self.eps), np.sqrt(self.var + self.eps)
        r = np.minimum(np.maximum(std / running, 1 / self.r_max), self.r_max)
        d = np.minimum(np.maximum((mu - self.mean) / running, -self.d_max), self.d_max)
        if self.steps < self.warmup:
            r, d = np.ones_like(r), np.zeros_like(d)
        return mu, var, r, d

    def train(self, x, gamma, beta):
        mu, var, r, d = self.corrections(x)
        y = gamma * ((x - mu) / np.sqrt(var + self.eps) * r + d) + beta
        self.mean = self.momentum * self.mean + (1 - self.momentum) * mu
        self.var = self.momentum * self.var + (1 - self.momentum) * var
        self.steps += 1
        return y

    def evaluate(self, x, gamma, beta):
        return gamma * (x - self.mean) / np.sqrt(self.var + self.eps) + beta


def layer(features: int, **settings) -> BatchRenorm:
    """A float64 layer with a random affine map."""
    torch.manual_seed(0)
    made = BatchRenorm(features, **{"warmup_steps": 0, **settings}).double()
    with torch.no_grad():
        made.weight.uniform_(0.5, 2)
        made.bias.normal_()
    return made


def extremes(rng, rows: int = 12) -> np.ndarray:
    """Columns: ordinary, wide (r > 3), constant (r < 1/3), far up (d > 5), far down (d < -5)."""
    x = rng.standard_normal((rows, 5))
    x[:, 1] *= 50
    x[:, 2] = 0.3
    x[:, 3] += 40
    x[:, 4] -= 40
    return x


@pytest.mark.parametrize("warmup", [0, 3])
def test_equals_the_reference_through_warmup_and_clipping(warmup):
    rng = np.random.default_rng(0)
    ours, reference = layer(5, warmup_steps=warmup), Reference(5, warmup=warmup)
    gamma, beta = ours.weight.detach().numpy(), ours.bias.detach().numpy()
    for step in range(7):
        x = extremes(rng)
        _, _, r, d = reference.corrections(x)
        if step < warmup:
            assert (r == 1).all() and (d == 0).all()
        else:
            assert 1 / R_MAX < r[0] < R_MAX and -D_MAX < d[0] < D_MAX and d[0] != 0
            assert r[1] == R_MAX and r[2] == 1 / R_MAX
            assert d[3] == D_MAX and d[4] == -D_MAX
        y = ours.train()(torch.from_numpy(x))
        np.testing.assert_allclose(y.detach().numpy(), reference.train(x, gamma, beta), **F64)
        np.testing.assert_allclose(ours.running_mean.numpy(), reference.mean, **F64)
        np.testing.assert_allclose(ours.running_var.numpy(), reference.var, **F64)
        assert int(ours.steps) == step + 1
        probe = rng.standard_normal((3, 5))
        expected = reference.evaluate(probe, gamma, beta)
        y = ours.eval()(torch.from_numpy(probe))
        np.testing.assert_allclose(y.detach().numpy(), expected, **F64)


def test_settings_are_used():
    """Each setting by hand on one column: batch [0, 2] has mean 1 and variance 1."""
    x = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    made = BatchRenorm(1, momentum=0.5, eps=0.25, r_max=1.0, d_max=0.1, warmup_steps=0).double()
    y = made(x)
    # std 1.25^.5 both: r = 1; d = 1 / 1.25^.5 clipped to 0.1
    expected = torch.tensor([[-1 / 1.25**0.5 + 0.1], [1 / 1.25**0.5 + 0.1]], dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=0)
    assert float(made.running_mean) == 0.5
    assert float(made.running_var) == pytest.approx(1.0, rel=1e-12)
    made.running_var.fill_(15.75)  # running std 4, batch std 1.25^.5: r clipped to 1 / r_max = 1
    made.running_mean.fill_(1.0)
    expected = torch.tensor([[-1 / 1.25**0.5], [1 / 1.25**0.5]], dtype=torch.float64)
    torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=0)
    made.r_max = 2.0
    made.running_var.fill_(15.75)
    made.running_mean.fill_(1.0)
    torch.testing.assert_close(made(x), expected * 0.5, rtol=1e-12, atol=0)


@pytest.mark.parametrize("warmup", [0, 2])
def test_equals_sb3_contrib(warmup):
    """The peer's unbiased, folded form, values and gradients, through warm-up and clipping.

    Its gate is `steps > warmup_steps`, one forward later than the authors' `>=`.
    """
    layers = pytest.importorskip("sb3_contrib.common.torch_layers")
    rng = np.random.default_rng(0)
    peer = layers.BatchRenorm1d(5, warmup_steps=warmup).double()
    ours = layer(5, warmup_steps=warmup + 1, variance="unbiased", form="folded")
    with torch.no_grad():
        peer.scale.copy_(ours.weight)
        peer.bias.copy_(ours.bias)
    for _ in range(6):
        values = extremes(rng)
        values[:, 2] += rng.standard_normal(len(values)) * 1e-3  # constant: NaN gradients there
        upstream = torch.from_numpy(rng.standard_normal(values.shape))
        results = []
        for made in (ours.train(), peer.train()):
            x = torch.from_numpy(values.copy()).requires_grad_()
            y = made(x)
            y.backward(upstream)
            results.append((y.detach(), x.grad))
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours.running_mean, peer.ra_mean, **F64)
        torch.testing.assert_close(ours.running_var, peer.ra_var, **F64)
        probe = torch.from_numpy(rng.standard_normal((3, 5)))
        torch.testing.assert_close(ours.eval()(probe), peer.eval()(probe), **F64)
    torch.testing.assert_close(ours.weight.grad, peer.scale.grad, rtol=1e-10, atol=1e-10)


def test_unbiased_unfolded_by_hand():
    """Batch [0, 2]: mean 1, unbiased variance 2; running moments 1 and 1, no clipping."""
    x = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    made = BatchRenorm(1, momentum=0.5, eps=0.25, warmup_steps=0, variance="unbiased").double()
    made.running_mean.fill_(0.5)
    # x_hat = -+1 / 2.25^.5; r = (2.25 / 1.25)^.5; d = 0.5 / 1.25^.5
    expected = [[(side + 0.5) / 1.25**0.5] for side in (-1.0, 1.0)]
    torch.testing.assert_close(
        made(x).detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert float(made.running_var) == 1.5


def test_linear_ramp_of_the_bounds():
    """SLM-Lab: after 2 warm-up forwards, bounds grow over 4: r_max 1 ... 3, d_max 0 ... 5."""
    made = BatchRenorm(1, warmup_steps=2, ramp_steps=4)
    seen = []
    for _ in range(8):
        seen.append([float(b) for b in made.bounds()])
        made(torch.randn(4, 1))
    assert seen == [
        [1.0, 0.0],
        [1.0, 0.0],
        [1.0, 0.0],
        [1.5, 1.25],
        [2.0, 2.5],
        [2.5, 3.75],
        [3.0, 5.0],
        [3.0, 5.0],
    ]


def run(made: BatchRenorm, x: torch.Tensor, mean, var, weight, bias) -> torch.Tensor:
    """One training-mode forward from given running moments: a pure function for gradcheck."""
    state = {
        "weight": weight,
        "bias": bias,
        "running_mean": mean.clone(),
        "running_var": var.clone(),
        "steps": torch.zeros((), dtype=torch.int64),
    }
    return torch.func.functional_call(made.train(), state, (x,))


@pytest.mark.parametrize("case", ["warm-up", "clipped"])
def test_gradcheck(case):
    """Where r and d are constant near x, finite differences see what autograd should give."""
    torch.manual_seed(1)
    x = torch.randn(6, 3, dtype=torch.float64)
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    if case == "clipped":
        x = x * torch.tensor([20.0, 0.01, 20.0]) + torch.tensor([200.0, -40.0, -200.0])
        std = (x.var(0, correction=0) + EPS).sqrt()
        assert ((std > 4) | (std < 0.3)).all() and (x.mean(0).abs() > 6).all()
    made = layer(3, warmup_steps=1 if case == "warm-up" else 0)
    weight = made.weight.detach().clone().requires_grad_()
    bias = made.bias.detach().clone().requires_grad_()

    def function(x, weight, bias):
        return run(made, x, mean, var, weight, bias)

    assert torch.autograd.gradcheck(function, (x.requires_grad_(), weight, bias))


def test_gradient_treats_r_and_d_as_constants():
    torch.manual_seed(2)
    x = (torch.randn(8, 4, dtype=torch.float64) * 1.3 + 0.4).requires_grad_()
    made = layer(4)
    mean, var = torch.full((4,), 0.1, dtype=torch.float64), torch.full((4,), 2.0).double()
    upstream = torch.randn(8, 4, dtype=torch.float64)
    y = run(made, x, mean, var, made.weight, made.bias)
    (grad,) = torch.autograd.grad((y * upstream).sum(), x)
    mu, v = x.mean(0), x.var(0, correction=0)
    r = ((v + EPS).sqrt() / (var + EPS).sqrt()).detach()
    d = ((mu - mean) / (var + EPS).sqrt()).detach()
    assert (r < 3).all() and (r > 1 / 3).all() and (d.abs() < 5).all()
    by_hand = made.weight * ((x - mu) / (v + EPS).sqrt() * r + d) + made.bias
    (expected,) = torch.autograd.grad((by_hand * upstream).sum(), x)
    torch.testing.assert_close(y, by_hand, **F64)
    torch.testing.assert_close(grad, expected, **F64)


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_feature_has_finite_gradients(warmup, dtype):
    """A padding or language feature is constant over the batch: zero variance."""
    x = torch.randn(16, 3, dtype=dtype)
    x[:, 1], x[:, 2] = 0.0, 1e4
    x.requires_grad_()
    made = BatchRenorm(3, warmup_steps=warmup).to(dtype)
    y = made(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert y.isfinite().all() and grad.isfinite().all()
    assert (y[:, 1] == 0).all()


def test_evaluation_mode_changes_nothing():
    made = layer(3).eval()
    made.running_mean.normal_()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    x = torch.randn(5, 3, dtype=torch.float64)
    whole = made(x)
    rows = torch.cat([made(row[None]) for row in x])  # a batch of one is fine here
    torch.testing.assert_close(whole, rows, **F64)
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())


@pytest.mark.parametrize("hidden", [[], [16, 8]])
@pytest.mark.parametrize("order", ["before", "after"])
def test_the_inputs_scale_and_shift_may_go_into_the_first_weights(hidden, order):
    """Float64: the network as it is against the same layers one after the other; 1e-12."""
    torch.manual_seed(0)
    config = BatchRenormConfig(warmup_steps=0, order=order)
    net = mlp(5, hidden, 3, renorm=config).double()
    for p in net.parameters():
        torch.nn.init.normal_(p)
    layers = nn.Sequential(*copy.deepcopy(net))
    x = 3 * torch.randn(32, 5, dtype=torch.float64) + 1
    for _ in range(3):
        ours, theirs = net(x), layers(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        weight = torch.randn(32, 3, dtype=torch.float64)
        (ours * weight).sum().backward()
        (theirs * weight).sum().backward()
    for a, b in zip(net.parameters(), layers.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-10)
    assert layers[0].weight.grad.abs().max() > 0.1
    for a, b in zip(net.buffers(), layers.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_inputs_gradient_is_there_where_it_is_wanted():
    net, x = mlp(5, [8], 1, renorm=BatchRenormConfig()), torch.randn(16, 5, requires_grad=True)
    net(x).square().sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


def test_state_round_trip():
    made, other = layer(3, warmup_steps=2), layer(3, warmup_steps=2)
    rng = np.random.default_rng(3)
    for _ in range(3):
        made(torch.from_numpy(rng.standard_normal((6, 3)) * 2 + 1))
    assert set(made.state_dict()) == {"weight", "bias", "running_mean", "running_var", "steps"}
    other.load_state_dict(made.state_dict())
    x = torch.from_numpy(rng.standard_normal((6, 3)))
    assert torch.equal(made(x), other(x)), "the step count came along, so the warm-up is over"


def test_bfloat16_input_keeps_float32_statistics():
    made, exact = BatchRenorm(4, warmup_steps=0), BatchRenorm(4, warmup_steps=0)
    for _ in range(3):
        x = (torch.randn(64, 4) * 2 + 1).to(torch.bfloat16)
        y, expected = made(x), exact(x.float())
        assert y.dtype == torch.bfloat16
        # one rounding of the output: half a unit in the last of 8 bits
        torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=1e-6)
    for name in ("running_mean", "running_var"):
        assert getattr(made, name).dtype == torch.float32
        assert torch.equal(getattr(made, name), getattr(exact, name))


@pytest.mark.parametrize("training", [True, False])
def test_more_axes_are_batch(training):
    made, flat = layer(3), layer(3)
    x = torch.randn(4, 5, 2, 3, dtype=torch.float64)
    y = made.train(training)(x)
    assert y.shape == x.shape
    assert torch.equal(y.view(-1, 3), flat.train(training)(x.view(-1, 3)))
    assert torch.equal(made.running_var, flat.running_var)


def test_refusals():
    made = layer(3)
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        made(torch.zeros(1, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"expected last axis 3, got shape \(4, 2\)"):
        made(torch.zeros(4, 2, dtype=torch.float64))
    assert int(made.steps) == 0 and (made.running_mean == 0).all()


def test_layer_order_of_the_critic():
    kinds = [type(m).__name__ for m in mlp(4, [8, 8], 1, renorm=BatchRenormConfig())]
    assert kinds == ["BatchRenorm", *["Linear", "ReLU", "BatchRenorm"] * 2, "Linear"]
    assert [type(m).__name__ for m in mlp(4, [8], 1)] == ["Linear", "ReLU", "Linear"]
    other = BatchRenormConfig(order="before", on_input=False)
    kinds = [type(m).__name__ for m in mlp(4, [8, 8], 1, renorm=other)]
    assert kinds == [*["Linear", "BatchRenorm", "ReLU"] * 2, "Linear"]


def test_config_reaches_the_layer():
    config = BatchRenormConfig(
        momentum=0.9,
        eps=0.1,
        r_max=2.0,
        d_max=4.0,
        warmup_steps=7,
        ramp_steps=3,
        variance="unbiased",
        form="folded",
    )
    made = mlp(4, [8], 1, renorm=config)[0]
    wanted = {k: v for k, v in vars(config).items() if k not in ("order", "on_input")}
    assert {k: getattr(made, k) for k in wanted} == wanted
