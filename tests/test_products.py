"""Products of a lower precision, and the float32 ones of a compiled update."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embodied_rl import products
from embodied_rl.batch_renorm import BatchRenorm
from embodied_rl.compiling import Compiled
from embodied_rl.config import BatchRenormConfig
from embodied_rl.nn import Linear, mlp
from embodied_rl.registry import Q_HEADS

pytestmark = pytest.mark.unit
LOW = torch.bfloat16


def rounded(left: Tensor, right: Tensor) -> Tensor:
    """The product as the docstrings promise it; the sum inside is in float32."""
    return (left.to(LOW).double() @ right.to(LOW).double()).to(LOW).float()


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Linear(48, 32, "bfloat16")


def test_factors_and_results_are_rounded_once_forward_and_backward(layer):
    """One unit in bfloat16's last place (2^-8 relative): sums of another order may round up."""
    x, gradient = torch.randn(64, 48, requires_grad=True), torch.randn(64, 32)
    out = layer(x)
    assert out.dtype == layer.weight.dtype == torch.float32
    exact = {"rtol": 2**-7, "atol": 1e-6}
    torch.testing.assert_close(out - layer.bias, rounded(x, layer.weight.t()), **exact)
    out.backward(gradient)
    torch.testing.assert_close(x.grad, rounded(gradient, layer.weight), **exact)
    torch.testing.assert_close(layer.weight.grad, rounded(gradient.t(), x), **exact)
    torch.testing.assert_close(layer.bias.grad, gradient.sum(0))
    full = F.linear(x, layer.weight, layer.bias)
    assert (out - full).abs().max() > 1e-4  # it is not simply the exact product
    torch.testing.assert_close(out, full, rtol=0, atol=0.03)


def test_float32_is_torchs_own_layer(layer):
    exact = Linear(48, 32)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(5, 48)
    assert torch.equal(exact(x), F.linear(x, layer.weight, layer.bias))


def test_hidden_layers_are_rounded_and_the_value_is_not():
    net = mlp(8, [32, 32], 1, renorm=BatchRenormConfig(), matmul_dtype="bfloat16")
    *hidden, last = [m for m in net if isinstance(m, nn.Linear)]
    assert [m.low for m in hidden] == [LOW, LOW] and last.low is None
    seen = []
    for module in net:
        if isinstance(module, BatchRenorm):
            module.register_forward_hook(lambda _m, i, o: seen.append((i[0].dtype, o.dtype)))
    out = net(torch.randn(16, 8))
    assert seen == [(torch.float32, torch.float32)] * 3 and out.dtype == torch.float32
    assert all(b.dtype != LOW for b in net.buffers())


def test_rounding_has_the_layout_that_the_compiler_is_told():
    x = torch.randn(6, 4).t()
    low = torch.ops.embodied_rl.round.default(x, LOW)
    assert not x.is_contiguous() and low.is_contiguous()
    assert torch.equal(low, x.to(LOW))


@pytest.mark.parametrize("head", Q_HEADS.names)
def test_critics_score_alike_in_bfloat16(make_sac, make_batch, head):
    """Same weights for the same seed; Q differs, by less than 3 % of its spread."""
    words = (f"algorithm.q_head_type={head}", "critic.hidden=[64,64]")
    full, low = make_sac(*words), make_sac(*words, "critic.matmul_dtype=bfloat16")
    batch = make_batch(256)
    x, action = batch.features.vector, batch.action
    a, b = full.q_head.score(x, action), low.q_head.score(x, action)
    assert 0 < (a - b).abs().max() < 0.03 * (a.max() - a.min())
    for sac in (full, low):
        sac.update(batch, env_steps=0)
    for ours, theirs in zip(low.q_head.parameters(), full.q_head.parameters(), strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
    assert any(
        not torch.equal(a, b)
        for a, b in zip(low.q_head.parameters(), full.q_head.parameters(), strict=True)
    )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.mean, self.value = nn.Linear(48, 64), nn.Linear(64, 1), nn.Linear(1, 32)

    def step(self, x: Tensor) -> list[Tensor]:
        loss = self.value(F.relu(self.mean(F.relu(self.wide(x))))).square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(self.parameters()))]


@pytest.mark.skipif(not products._onednn_helps(), reason="needs AVX-512 without AMX")
@pytest.mark.parametrize("inner", [17, 23, 256, 1024])
@pytest.mark.parametrize("rows", [256, 512])
@pytest.mark.parametrize("turned", ["neither", "left", "right"])
def test_onednn_does_not_round_the_factors(rows, inner, turned):
    """21 bits of each number: rounded to bfloat16 they would be ones. Exact, as are the sums."""
    torch.manual_seed(0)
    long = torch.full((rows, inner), 1 + 2.0**-20)
    choice = torch.nn.functional.one_hot(torch.randint(inner, (256,)), inner).float().t()
    if turned == "left":
        long = long.t().contiguous().t()
    elif turned == "right":
        choice = choice.t().contiguous().t()
    before = torch.backends.mkldnn.matmul.fp32_precision
    with products.by_onednn():
        assert torch.backends.mkldnn.matmul.fp32_precision != before
        product = long @ choice
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert torch.equal(product, torch.full((rows, 256), 1 + 2.0**-20))


@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_products_with_vectors_become_passes_over_elements(capfd):
    """Of eight products six have a side of 1; the others are oneDNN's where that helps."""
    torch.manual_seed(0)
    net = Net()
    step = Compiled(net.step, print)
    step(torch.randn(40, 48))
    x = torch.randn(40, 48)
    with torch.profiler.profile() as profile:
        result = step(x)
    names = [event.name for event in profile.events()]
    assert names.count("aten::mm") + names.count("aten::addmm") == 2
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        step(x)
    done = capfd.readouterr().out.count("exec,cpu,matmul")
    assert done == (2 if products._onednn_helps() else 0)
    for ours, theirs in zip(result, net.step(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
