"""Learning rates, weight decays and clipping against Detectron2's own functions."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import build_lr_scheduler, get_default_optimizer_params
from torch import nn

from dr2net_d2.errors import ConfigError
from dr2net_d2.training.optimizer import build_optimizer, layer_decay_factor, parameter_groups
from dr2net_d2.tv.lr_schedule import lr_multiplier
from tests.d2.tiny import rates_and_decays, tiny_cfg


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    cfg = tiny_cfg(tmp_path_factory.mktemp("yaml"), "MODEL.VIT.USE_REL_POS", True)
    return build_model(cfg)


def test_layer_decay_is_detectron2s_for_every_parameter(model):
    names = [name for name, _ in model.named_parameters()]
    factors = [layer_decay_factor(name, 2, 0.7) for name in names]
    assert factors == [get_vit_lr_decay_rate(name, 0.7, 2) for name in names]
    assert set(factors) == {0.7**3, 0.7**2, 0.7, 1.0}


def test_parameter_groups_are_detectron2s(model):
    expected = get_default_optimizer_params(
        model,
        base_lr=0.1,
        weight_decay=0.05,
        weight_decay_norm=0.0,
        lr_factor_func=lambda name: get_vit_lr_decay_rate(name, 0.7, 2),
        overrides={"pos_embed": {"weight_decay": 0.0}},
    )
    actual = rates_and_decays(
        parameter_groups(model, 0.1, 0.05, 0.0, 0.7, 2, [("*pos_embed", 0.0)])
    )
    assert actual == rates_and_decays(expected)
    assert actual.keys() == set(model.parameters())


def test_the_last_override_that_fits_a_name_counts(tmp_path, model):
    overrides = [["*", 0.3], ["*rel_pos_?", 0.2], ["backbone.*rel_pos_h", 0.0], ["bias", 0.7]]
    cfg = tiny_cfg(tmp_path, "SOLVER.WEIGHT_DECAY_OVERRIDES", overrides)
    optimizer = build_optimizer(cfg, model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decays = {
        names[parameter]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert {decay for name, decay in decays.items() if name.endswith("rel_pos_h")} == {0.0}
    assert {decay for name, decay in decays.items() if name.endswith("rel_pos_w")} == {0.2}
    assert {decay for name, decay in decays.items() if "rel_pos" not in name} == {0.3}


@pytest.mark.parametrize("pair", [["*"], ["*", -1.0], [0.0, "*"], "pos_embed"])
def test_an_override_that_is_not_a_pair_is_refused(tmp_path, model, pair):
    cfg = tiny_cfg(tmp_path, "SOLVER.WEIGHT_DECAY_OVERRIDES", [pair])
    with pytest.raises(ConfigError, match=r"WEIGHT_DECAY_OVERRIDES has .*'\*pos_embed', 0.0"):
        build_optimizer(cfg, model)


@pytest.mark.parametrize(
    "opts",
    [
        (),
        ("SOLVER.STEPS", (10, 15), "SOLVER.WARMUP_FACTOR", 0.25),
        ("SOLVER.STEPS", (10, 50), "SOLVER.WARMUP_METHOD", "constant"),
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR_END", 1e-4),
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.WARMUP_ITERS", 100),
        ("SOLVER.WARMUP_ITERS", 0),
    ],
)
def test_the_other_engines_schedule_is_detectron2s(tmp_path, opts):
    cfg = tiny_cfg(tmp_path, "SOLVER.MAX_ITER", 20, *opts)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    multiplier = lr_multiplier(cfg)
    for iteration in range(20):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(multiplier(iteration / 20))
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("value", [3.0, 3.0, 3.0]),
        ("norm", [3.0, 3.0, 3.0]),
        # The norm of all gradients together is 13.
        ("full_model", [9 / 13, 12 / 13, 36 / 13]),
    ],
)
def test_gradients_are_clipped_at_every_step(tmp_path, kind, expected):
    clip = "SOLVER.CLIP_GRADIENTS"
    opts = [f"{clip}.ENABLED", True, f"{clip}.CLIP_TYPE", kind, f"{clip}.CLIP_VALUE", 3.0]
    opts += ["SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 1.0, "SOLVER.MOMENTUM", 0.0]
    cfg = tiny_cfg(tmp_path, *opts, "SOLVER.WEIGHT_DECAY", 0.0)
    model = nn.ParameterList(torch.zeros(1) for _ in range(3))
    optimizer = build_optimizer(cfg, model)
    for parameter, gradient in zip(model, [3.0, 4.0, 12.0], strict=True):
        parameter.grad = torch.tensor([gradient])
    optimizer.step()
    assert [-parameter.item() for parameter in model] == pytest.approx(expected)
