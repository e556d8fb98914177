"""What PyTorch puts around a network: precisions, compilation, checkpoints, hooks on saved tensors,
fake tensors. The truth is the same network under plain autograd."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from dr2net_d2.core import Coefficients, ReversibleSequence
from dr2net_d2.core.memory import count_saved_bytes
from dr2net_d2.core.streams import FixedPointStream
from tests.core.stacks import mlp, relative_error, run, stack, tokens
from tests.core.test_vit import small_vit

BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler"),
    ),
]


def small_blocks(**options):
    """The two blocks of a small ViT, four steps, and their tokens."""
    vit = small_vit(depth=2, **options)
    vit.coefficients.set(0.5, 0.5)
    return vit.blocks, tokens(1, 8, 8, 32)


def assert_equals_oracle(sequence, x, tolerance=1e-6):
    """The gradients are those of the same modules with everything stored."""
    out, gradients = run(sequence, x)
    sequence.reversible = False
    expected, reference = run(sequence, x)
    sequence.reversible = True
    assert torch.equal(out, expected)
    assert relative_error(gradients, reference) <= tolerance


def amp_gradients(vit, x, dtype):
    vit.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, enabled=dtype is torch.float16)
    with torch.autocast("cpu", dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
        out = vit(x)["last_feat"]
    scaler.scale((out * tokens(*out.shape, seed=4)).mean()).backward()
    scaler.unscale_(torch.optim.SGD(vit.parameters()))
    return {name: parameter.grad.clone() for name, parameter in vit.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_amp_gradients_are_as_good_as_those_of_plain_amp(dtype):
    """RevLib is broken under AMP, memcnn forces float32, minREV crashes under bfloat16."""
    ours = plain = 0.0
    for seed in range(4):
        vit = small_vit(seed, use_rel_pos=True)
        vit.coefficients.set(0.5, 0.5)
        x = tokens(1, 3, 64, 64, seed=seed)
        truth = amp_gradients(copy.deepcopy(vit).double(), x.double(), torch.float64)
        ours += relative_error(amp_gradients(vit, x, dtype), truth) ** 2
        vit.reversible, vit.arithmetic = False, "float"
        plain += relative_error(amp_gradients(vit, x, dtype), truth) ** 2
    assert 0 < plain < 4 * 0.01**2
    assert ours <= 1.1**2 * plain


def test_the_scaler_skips_a_step_whose_gradients_overflow_and_trains_on():
    sequence = stack(4)
    optimizer = torch.optim.SGD(sequence.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(sequence.state_dict())
    moved = []
    for _ in range(2):
        with torch.autocast("cpu", torch.float16):
            loss = sequence(tokens(2, 5, 8)).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update(2.0**10)
        moved.append(not torch.equal(sequence[0][1].weight, before["0.1.weight"]))
    assert moved == [False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_and_inputs_of_another_dtype(dtype):
    for sequence, x in [(stack(6), tokens(2, 5, 8)), small_blocks(use_rel_pos=True)]:
        assert sequence.to(dtype)(x.to(dtype)).dtype == dtype
        assert_equals_oracle(sequence, x.to(dtype))
        assert sequence.coefficients.alpha.dtype == torch.float64
        assert sequence.coefficients.values == (0.5, 0.5)


@pytest.fixture
def dynamo():
    """An empty cache of compiled code, and an error where code would run uncompiled instead."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_functions(dynamo, backend):
    functions = [nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3)) for _ in range(2)]
    sequence = ReversibleSequence(functions, Coefficients(0.5, 0.5))
    sequence.stream_range.widen(16.0)  # else the measuring pass is compiled, too
    for index in range(len(sequence)):
        sequence[index].compile(backend=backend)
    assert_equals_oracle(sequence, tokens(2, 5, 8))
    assert torch._dynamo.utils.counters["frames"]["ok"]


def test_compiled_modules_as_functions(dynamo):
    members = [torch.compile(mlp(), backend="aot_eager") for _ in range(2)]
    assert_equals_oracle(ReversibleSequence(members, Coefficients(0.5, 0.5)), tokens(2, 5, 8))
    assert torch._dynamo.utils.counters["frames"]["ok"]


def test_compiled_blocks(dynamo):
    blocks, x = small_blocks(use_rel_pos=True)
    for index in range(len(blocks)):
        blocks[index].compile(backend="aot_eager")
    assert len(blocks.steps()) == 4
    assert_equals_oracle(blocks, x)
    assert torch._dynamo.utils.counters["frames"]["ok"]


def test_a_compiled_whole_model(dynamo):
    """Tracing the recomputation itself took a minute, and mixed up the saved tensors of a block."""
    vit = small_vit(depth=2)
    vit.coefficients.set(0.5, 0.5)
    compiled = torch.compile(vit, backend="aot_eager")
    x = tokens(1, 3, 64, 64)

    def gradients(model):
        vit.zero_grad()
        model(x)["last_feat"].square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in vit.named_parameters()}

    found = [gradients(compiled), gradients(compiled)]
    vit.reversible = False
    reference = gradients(vit)
    assert all(relative_error(each, reference) < 1e-6 for each in found)


@pytest.mark.parametrize("grad", [True, False])
def test_without_reversibility_or_gradients_the_model_is_one_graph(dynamo, grad):
    vit = small_vit(depth=1, reversible=False, arithmetic="float")
    compiled = torch.compile(vit, backend="aot_eager", fullgraph=True)
    x = tokens(1, 3, 64, 64)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x)["last_feat"], vit(x)["last_feat"])


class Checkpointed(nn.Module):
    def __init__(self, module, use_reentrant=False):
        super().__init__()
        self.module, self.use_reentrant = module, use_reentrant

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=self.use_reentrant)


def test_a_checkpoint_inside_a_function():
    sequence = ReversibleSequence(
        [nn.Sequential(nn.Linear(8, 8), Checkpointed(mlp(dropout=0.2))) for _ in range(4)],
        Coefficients(0.5, 0.5),
    )
    assert_equals_oracle(sequence, tokens(2, 5, 8))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_stack_inside_a_checkpoint(use_reentrant):
    sequence = stack(6, dropout=0.2)
    _, reference = run(sequence, tokens(2, 5, 8))
    _, gradients = run(Checkpointed(sequence, use_reentrant), tokens(2, 5, 8))
    gradients = {name.removeprefix("module."): g for name, g in gradients.items()}
    assert relative_error(gradients, reference) == 0


def test_a_stack_inside_a_checkpoint_whose_range_widens_in_between():
    """The forward and the checkpoint's recomputation of it must agree on the fractional bits."""
    sequence = stack(6)
    run(sequence, tokens(2, 5, 8))
    model = Checkpointed(sequence)
    x = 4 * tokens(2, 5, 8)
    bits = sequence.fraction_bits
    _, gradients = run(model, x)
    assert sequence.fraction_bits < bits and not sequence.overflows
    _, reference = run(model, x)
    assert relative_error(gradients, reference) < 1e-5


def test_saved_tensors_kept_by_the_user():
    sequence = stack(6, 3 / 16, dropout=0.2)
    _, reference = run(sequence, tokens(2, 5, 8))
    with torch.autograd.graph.save_on_cpu():
        assert relative_error(run(sequence, tokens(2, 5, 8))[1], reference) == 0
    packed = []

    def pack(tensor):
        packed.append(tensor.nbytes)
        return tensor.numpy().tobytes(), tensor.dtype, tensor.shape

    def unpack(saved):
        data, dtype, shape = saved
        return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        assert relative_error(run(sequence, tokens(2, 5, 8))[1], reference) == 0
    assert packed


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("autocast", [False, True])
def test_fake_tensors(monkeypatch, arithmetic, autocast):
    # torch's own trunc_normal_ looks at values.
    monkeypatch.setattr(nn.init, "trunc_normal_", nn.init.normal_)
    with FakeTensorMode():
        sequence = stack(3, 1.0, arithmetic=arithmetic)
        vit = small_vit(depth=1, arithmetic=arithmetic)
        for model, x in [(sequence, torch.ones(2, 5, 8)), (vit, torch.ones(1, 3, 64, 64))]:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = model(x)
            (out if model is sequence else out["last_feat"]).sum().backward()
            assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_meta_tensors(arithmetic):
    vit = small_vit(arithmetic=arithmetic, use_rel_pos=True, drop_path_rate=0.2).to("meta")
    vit.coefficients.set(0.0, 1.0)
    vit(torch.ones(1, 3, 64, 64, device="meta"))["last_feat"].sum().backward()
    sequence = stack(3, 1.0, arithmetic=arithmetic).to("meta")
    sequence(torch.ones(2, 5, 8, device="meta")).sum().backward()
    assert all(p.grad.shape == p.shape for p in [*vit.parameters(), *sequence.parameters()])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_keeps_nothing_and_uses_no_integers(monkeypatch, mode):
    sequence = stack(6)
    run(sequence, tokens(2, 5, 8))
    monkeypatch.setattr(FixedPointStream, "step", None)
    monkeypatch.setattr(FixedPointStream, "encode", None)
    with mode(), count_saved_bytes() as saved:
        out = sequence(tokens(2, 5, 8))
    assert saved.total == 0 and not out.requires_grad


def test_nothing_is_kept_where_nothing_needs_a_gradient():
    sequence = stack(6).requires_grad_(False)
    with count_saved_bytes() as saved:
        out = sequence(tokens(2, 5, 8))
    assert saved.total == 0 and not out.requires_grad


def test_gradients_in_evaluation():
    sequence = stack(6, dropout=0.5).eval()
    assert_equals_oracle(sequence, tokens(2, 5, 8))
    assert torch.equal(sequence(tokens(2, 5, 8)), sequence(tokens(2, 5, 8)))
