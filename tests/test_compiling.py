"""A compiled step computes what the plain one does, noise included."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from embodied_rl.compiling import Compiled
from embodied_rl.nests import tensors_of
from embodied_rl.registry import Q_HEADS

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.mark.e2e
@needs_compiler
@pytest.mark.parametrize("head", Q_HEADS.names)
def test_compiled_updates_equal_plain_ones(make_sac, make_batch, head):
    """Everything that has a branch is on: demonstrations' anchor, clipping, averaging, delay.

    Float64 and 12 updates: 1e-9 relative is rounding in another order; the parameters move 1e-2.
    """
    words = [
        f"algorithm.q_head_type={head}",
        "algorithm.anchor.q_filter=true",
        "algorithm.target_update_freq=2",
        "actor.average_decay=0.9",
        "actor.hidden=[8]",
        "critic.hidden=[8]",
        "critic.batch_renorm.warmup_steps=6",
        "critic.optim.clip_grad=0.5",
        "critic.optim.weight_decay=0.1",
        "critic.optim.lr_scheduler=linear",
    ]
    plain, said = make_sac(*words), []
    compiled = make_sac(*words)
    for step in ("_critic_step", "_actor_step"):
        setattr(compiled, step, Compiled(getattr(compiled, step), said.append))
    before = plain.actor.net[0].weight.detach().clone()
    for sac in (plain, compiled):
        torch.manual_seed(1)
        for i in range(12):
            sac.engine.set_progress(i / 12)
            metrics = sac.update(make_batch(16, seed=i), env_steps=i)
            sac.last = metrics
    assert len(said) == 2 and all(line.startswith("compiling") for line in said)
    assert (plain.actor.net[0].weight - before).abs().max() > 1e-3
    assert plain.last.keys() == compiled.last.keys()
    for name, value in plain.last.items():
        torch.testing.assert_close(compiled.last[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for ours, theirs in zip(leaves(compiled.state_dict()), leaves(plain.state_dict()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.e2e
@needs_compiler
def test_what_is_kept_is_told_apart_by_its_backward_pass(tmp_path):
    """Two steps that differ in the backward pass of a `Function` alone; a process each.

    The third process finds on disk what the first one left there.
    """
    found = []
    for slope in (2, 3, 2):
        done = subprocess.run(
            [sys.executable, "-c", DOUBLED.format(slope=slope)],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
    gradients, hits = zip(*found, strict=True)
    assert gradients == (2, 3, 2)
    assert hits == (0, 0, 1)


DOUBLED = """
import json, torch
from torch._dynamo.utils import counters
from embodied_rl.compiling import Compiled

class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * {slope}

def step(x):
    y = x.detach().requires_grad_()
    return torch.autograd.grad(Same.apply(y).sum(), y)[0]

gradient = Compiled(step, print)(torch.ones(4))
print(json.dumps([gradient[0].item(), counters["aot_autograd"]["autograd_cache_hit"]]))
"""


@pytest.mark.e2e
@needs_compiler
def test_a_compiled_step_goes_straight_to_its_program():
    """Not through torch's wrapper, which looks for every tensor anew."""

    class Learner:
        def __init__(self):
            self.weight = torch.ones(3)

        def step(self, pair, scale):
            self.weight.add_(pair["x"].sum(0) * scale)
            return {"norm": self.weight.norm(), "scale": scale, "pair": [self.weight * 2]}

    def run(change):
        learner = Learner()
        step, out = change(learner.step), []
        for rows in (4, 4, 4, 2, 4):  # another size in between: that call runs as it is written
            x = torch.arange(3.0 * rows).reshape(3, rows).t() / 7  # not contiguous
            out.append(step({"x": x}, torch.tensor(rows + len(out) / 3)))
        return learner.weight, out, step

    weight, out, step = run(lambda f: Compiled(f, lambda text: None))
    expected, plain, _ = run(lambda f: f)
    assert "_recorded" in step._call.__qualname__
    torch.testing.assert_close(weight, expected)
    for a, b in zip(tensors_of(out), tensors_of(plain), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.e2e
@needs_compiler
def test_what_is_not_changed_in_place_is_left_to_torch():
    class Learner:
        def __init__(self):
            self.weight = torch.ones(3)

        def step(self, x):
            self.weight = self.weight + x  # another tensor from now on
            return self.weight.sum()

    learner = Learner()
    step = Compiled(learner.step, lambda text: None)
    sums = [step(torch.ones(3)).item() for _ in range(4)]
    assert sums == [6, 9, 12, 15] and learner.weight.tolist() == [5, 5, 5]
    assert "_recorded" not in step._call.__qualname__


@pytest.mark.e2e
@needs_compiler
def test_one_tensor_given_twice_is_two_arguments_later():
    step = Compiled(_difference, lambda text: None)
    x, y = torch.ones(3), torch.arange(3.0)
    assert step(x, x).tolist() == [0, 0, 0] == step(y, y).tolist()
    step = Compiled(_difference, lambda text: None)
    assert [step(a, b).tolist() for a, b in ((x, y), (y, x))] == [[1, 0, -1], [-1, 0, 1]]


def _difference(a, b):
    return a - b


@pytest.mark.e2e
@needs_compiler
def test_a_compiled_learner_goes_on_from_what_is_loaded(make_sac, make_batch):
    """Checkpoints are written into the tensors that the program knows."""
    compiled, other = make_sac("critic.hidden=[8]"), make_sac("critic.hidden=[8]")
    for step in ("_critic_step", "_actor_step"):
        setattr(compiled, step, Compiled(getattr(compiled, step), lambda text: None))
    for i in range(3):
        compiled.update(make_batch(16, seed=i), env_steps=i)
        other.update(make_batch(16, seed=20 + i), env_steps=i)
    compiled.load_state_dict(copy.deepcopy(other.state_dict()))
    for sac in (compiled, other):
        torch.manual_seed(1)
        sac.update(make_batch(16, seed=9), env_steps=9)
    for a, b in zip(leaves(compiled.state_dict()), leaves(other.state_dict()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def leaves(state):
    if isinstance(state, dict):
        return [leaf for value in state.values() for leaf in leaves(value)]
    return [state] if isinstance(state, torch.Tensor) else []


@pytest.mark.unit
def test_a_torch_without_what_it_takes_compiles_nothing(monkeypatch):
    monkeypatch.delattr(torch.compiler, "skip_all_guards_unsafe")
    said = []
    call = Compiled(torch.Tensor.double, said.append)
    assert call(torch.ones(2)).dtype == torch.float64 == call(torch.ones(3)).dtype
    assert len(said) == 2 and "AttributeError" in said[1] and "runs as it is" in said[1]


@pytest.mark.unit
def test_what_cannot_be_compiled_runs_as_it_is():
    def _counting(x):
        return x * float(x.sum().item() > -1e9) + len(str(hash(object())))  # no graph holds a hash

    said = []
    call = Compiled(_counting, said.append)
    assert call(torch.ones(2)).shape == (2,) and call(torch.ones(2)).shape == (2,)
    assert said[0].startswith("compiling: counting")
    assert len(said) == 2 and "runs as it is" in said[1] and "train.compile=never" in said[1]
