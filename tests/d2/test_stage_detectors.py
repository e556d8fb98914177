"""Detectors on Swin and MViTv2 from YAML: built, trained, resumed, evaluated, refused."""

import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model
from detectron2.solver import get_default_optimizer_params
from detectron2.utils.events import EventStorage

from dr2net_d2.commands import load_config
from dr2net_d2.config import add_dr2net_config, backbone_section, coefficient_schedule
from dr2net_d2.core import reversible_stacks
from dr2net_d2.d2 import Dr2NetCheckpointer, build_detector, run
from dr2net_d2.d2.detector import LeanRPN
from dr2net_d2.errors import ConfigError, WeightsError
from dr2net_d2.fidelity import __main__ as fidelity
from dr2net_d2.plan import ARMS, predict
from dr2net_d2.plan.dry_run import DryRun
from dr2net_d2.plan.simulation import parameters_on_meta
from dr2net_d2.training.optimizer import build_optimizer, parameter_groups
from tests.d2 import tiny
from tests.d2.test_plan import FULL, real_iteration
from tests.d2.test_stages import BASE, NETWORKS

ROOT = Path(__file__).parents[2]

BACKBONES = {
    "swin": """
  BACKBONE: {NAME: build_dr2net_swin_fpn_backbone}
  SWIN: {EMBED_DIM: 8, DEPTHS: [2, 3], NUM_HEADS: [2, 4], WINDOW_SIZE: 4, DROP_PATH_RATE: 0.2}
""",
    "mvit": """
  BACKBONE: {NAME: build_dr2net_mvit_fpn_backbone}
  MVIT: {EMBED_DIM: 8, DEPTH: 6, LAST_BLOCK_INDEXES: [1, 4, 5], ADAPTIVE_WINDOW_SIZE: 8,
         IMG_SIZE: 64, DROP_PATH_RATE: 0.2}
""",
}
STAGES = 2
IN_FEATURES = {"swin": ["p0", "p1"], "mvit": ["scale2", "scale3"]}
SECTION = {"swin": "SWIN", "mvit": "MVIT"}
BOTH = list(BACKBONES)
VIT = tiny.YAML[tiny.YAML.index("  BACKBONE:") : tiny.YAML.index("  FPN:")]


def write_yaml(folder, name):
    text = tiny.YAML.replace(VIT, BACKBONES[name].lstrip("\n"))
    text = text.replace("FPN: {", "FPN: {NORM: LN, ").replace("LAYER_DECAY: 0.9, ", "")
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return str(path)


def arguments(folder, name, *opts, resume=False):
    folder.mkdir(exist_ok=True)
    opts = ("MODEL.FPN.IN_FEATURES", IN_FEATURES[name], *opts)
    args = tiny.arguments(folder, *opts, resume=resume)
    args.config_file = write_yaml(folder, name)
    return args


def config(folder, name, *opts):
    args = arguments(folder, name, *opts)
    return load_config(args.config_file, args.opts, "detectron2")


def weights(folder):
    return torch.load(folder / "output" / "model_final.pth")["model"]


@pytest.mark.parametrize("name", BOTH)
def test_a_training_runs_resumes_and_evaluates(tmp_path, name):
    opts = ("SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (3,), "SOLVER.CHECKPOINT_PERIOD", 2,
            "TEST.EVAL_PERIOD", 0)  # fmt: skip
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    results = run(arguments(whole, name, *opts))
    assert math.isfinite(results["bbox"]["AP"])
    trained = weights(whole)
    # In every stage, beta has moved from 1/16 to the value of the last iteration.
    betas = [value.item() for key, value in trained.items() if key.endswith("coefficients.beta")]
    schedule = coefficient_schedule(config(whole, name))
    assert betas == [schedule(3 / 4)[1]] * STAGES
    peaks = [value.item() for key, value in trained.items() if key.endswith("stream_range.peak")]
    assert len(peaks) == STAGES and min(peaks) > 0

    (resumed / "output").mkdir(parents=True)
    shutil.copy(whole / "output" / "model_0000001.pth", resumed / "output")
    (resumed / "output" / "last_checkpoint").write_text("model_0000001.pth")
    run(arguments(resumed, name, *opts, "DATASETS.TEST", (), resume=True))
    continued = weights(resumed)
    for key, tensor in trained.items():
        assert torch.equal(tensor, continued[key]), key


@pytest.mark.parametrize("name", BOTH)
def test_detectors_differ_by_one_word_and_agree(tmp_path, name):
    cfg = config(tmp_path, name, f"MODEL.{SECTION[name]}.DROP_PATH_RATE", 0.0)
    ours = build_model(cfg)
    cfg.MODEL.BACKBONE.NAME = cfg.MODEL.BACKBONE.NAME.replace("dr2net_", "")
    theirs = build_model(cfg)
    assert not reversible_stacks(theirs) and len(reversible_stacks(ours)) == STAGES
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.backbone.output_shape() == theirs.backbone.output_shape()
    losses = []
    for model in (theirs, ours):
        torch.manual_seed(1)
        with EventStorage():
            losses.append(model.train()(tiny.batch((64, 56), (48, 64))))
    for loss, expected in losses[0].items():
        torch.testing.assert_close(losses[1][loss], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BOTH)
def test_heads_are_lean_on_our_backbones_alone(tmp_path, name):
    cfg = config(tmp_path, name)
    assert type(build_detector(cfg).proposal_generator) is LeanRPN
    cfg.MODEL.BACKBONE.NAME = cfg.MODEL.BACKBONE.NAME.replace("dr2net_", "")
    assert type(build_detector(cfg).proposal_generator) is not LeanRPN


@pytest.mark.parametrize("name", BOTH)
def test_a_zoo_file_of_the_whole_detector_is_loaded_completely(tmp_path, name):
    cfg = config(tmp_path, name)
    ours = build_model(cfg)
    cfg.MODEL.BACKBONE.NAME = cfg.MODEL.BACKBONE.NAME.replace("dr2net_", "")
    zoo = build_model(cfg)
    path = tmp_path / "model_final_0a1b2c.pkl"
    state = {key: value.numpy() for key, value in zoo.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": state, "__author__": "Third Party"}))
    Dr2NetCheckpointer(ours).load(str(path))
    assert all(map(torch.equal, ours.parameters(), zoo.parameters()))
    assert all(stack.coefficients.values == (1, 0) for stack in reversible_stacks(ours))


@pytest.mark.parametrize(("name", "overrides"), [
    ("swin", {"relative_position_bias_table": {"weight_decay": 0.0}}),
    ("mvit", {"pos_embed": {"weight_decay": 0.0}}),
])  # fmt: skip
def test_parameter_groups_are_those_of_detectron2s_recipes(tmp_path, name, overrides):
    cfg = config(tmp_path, name, "MODEL.MVIT.USE_ABS_POS", name == "mvit")
    model = build_model(cfg)

    expected = get_default_optimizer_params(
        model, base_lr=0.1, weight_decay=0.05, weight_decay_norm=0.0, overrides=overrides
    )
    pairs = cfg.SOLVER.WEIGHT_DECAY_OVERRIDES
    actual = tiny.rates_and_decays(parameter_groups(model, 0.1, 0.05, 0.0, 1.0, 12, pairs))
    assert actual == tiny.rates_and_decays(expected)
    cfg.SOLVER.LAYER_DECAY = 0.7
    with pytest.raises(ConfigError, match=r"LAYER_DECAY 0.7 \(1 turns it off\) is for plain ViTs"):
        build_optimizer(cfg, model)


REFUSED = {
    "a Swin config, built as a ViT": (
        "swin", ("MODEL.BACKBONE.NAME", "build_dr2net_vitdet_backbone"),
        r"MODEL.SWIN.EMBED_DIM is 8, but MODEL.BACKBONE.NAME build_dr2net_vitdet_backbone is built "
        r"from MODEL.VIT; name a backbone of MODEL.SWIN",
    ),
    "a Swin config, built as Detectron2's ViT": (
        "swin", ("MODEL.BACKBONE.NAME", "build_vitdet_backbone"), r"MODEL.SWIN.EMBED_DIM is 8",
    ),
    "a ViT config, built as Swin": (
        "swin", ("MODEL.VIT.DEPTH", 24), r"MODEL.VIT.DEPTH is 24, .* built from MODEL.SWIN",
    ),
    "a Swin config, built as MViT": (
        "swin", ("MODEL.BACKBONE.NAME", "build_mvit_fpn_backbone"), r"built from MODEL.MVIT",
    ),
    "an MViT config, built as Swin": (
        "mvit", ("MODEL.BACKBONE.NAME", "build_swin_fpn_backbone"), r"built from MODEL.SWIN",
    ),
    "heads of fewer stages": (
        "swin", ("MODEL.SWIN.NUM_HEADS", [2]), r"SWIN.NUM_HEADS is \[2\]; .*widths \[8, 16\]",
    ),
    "heads that do not divide": (
        "mvit", ("MODEL.MVIT.NUM_HEADS", 3), r"MVIT.NUM_HEADS is \[3\]; .*widths \[8\]",
    ),
    "stages beyond the last block": (
        "mvit", ("MODEL.MVIT.DEPTH", 5), r"INDEXES is \[1, 4, 5\]; .*DEPTH - 1, which is 4",
    ),
    "outputs of a ResNet": (
        "swin", ("MODEL.FPN.IN_FEATURES", ["res2"]),
        r"FPN.IN_FEATURES has 'res2'; choose from \['p0', 'p1'\]",
    ),
    "an arithmetic": (
        "mvit", ("MODEL.DR2NET.ARITHMETIC", "decimal"), r"MODEL.DR2NET: arithmetic is 'decimal'",
    ),
    "a square": (
        "swin", ("MODEL.SWIN.SQUARE_PAD", 32), r"MAX_SIZE_TRAIN is 64 .*SWIN.SQUARE_PAD is 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "opts", "message"), REFUSED.values(), ids=REFUSED)
def test_configs_that_do_not_fit_are_config_errors(tmp_path, name, opts, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone(config(tmp_path, name, *opts))


def test_fidelity_is_for_plain_vits(tmp_path, capsys):
    argv = ["--config-file", write_yaml(tmp_path, "swin"), "--output", str(tmp_path / "out")]
    assert fidelity.main(argv) == 2
    assert "fidelity is for plain ViTs, but MODEL.BACKBONE.NAME is" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_images_are_padded_as_configured(tmp_path):
    assert build_backbone(config(tmp_path, "swin")).padding_constraints == {"size_divisibility": 8}
    square = config(tmp_path, "mvit", "MODEL.MVIT.SQUARE_PAD", 100)
    assert build_backbone(square).padding_constraints == {"size_divisibility": 104}


@pytest.mark.parametrize("name", BOTH)
def test_all_outputs_go_into_the_pyramid_unless_some_are_named(tmp_path, name):
    cfg = config(tmp_path, name, "MODEL.FPN.IN_FEATURES", [])
    levels = list(build_backbone(cfg).output_shape())
    assert levels == ["p2", "p3", "p4", "p5"][: len(levels)]
    assert len(levels) == {"swin": 3, "mvit": 4}[name]


def test_defaults_of_one_section_do_not_hinder_another():
    cfg = get_cfg()
    add_dr2net_config(cfg)
    for section in ("VIT", "SWIN", "MVIT"):
        assert backbone_section(cfg, section) is cfg.MODEL[section]


CASCADE = [
    *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
    *("MODEL.ROI_BOX_CASCADE_HEAD.IOUS", (0.05, 0.05, 0.05)),
]


@pytest.mark.parametrize(("name", "heads"), [("swin", CASCADE), ("mvit", [])], ids=BOTH)
def test_a_real_iteration_takes_what_is_predicted(tmp_path, name, heads):
    opts = (*FULL[:-2], f"MODEL.{SECTION[name]}.DROP_PATH_RATE", 0.0, *heads)
    cfg = config(tmp_path, name, *opts)
    beyond, saved = real_iteration(cfg, 128, 2, objects=6)
    found = predict(cfg, "dr2net", 128, 2, objects=6, coefficients=(0.5, 0.5))
    assert found.saved == pytest.approx(saved, rel=0.001)
    assert found.beyond == pytest.approx(beyond, rel=0.01)


def test_checkpoints_are_planned_around_the_blocks_of_every_stage(tmp_path):
    cfg = config(tmp_path, "swin")
    stock, checkpointed = (
        DryRun(cfg, ARMS[arm], "detectron2").saved_bytes(128, 1, objects=6)
        for arm in ("stock", "stock + checkpoint")
    )
    assert checkpointed < 0.7 * stock


@pytest.mark.parametrize(("file", "name"), [
    ("cascade_mask_rcnn_swin_b", "swin"), ("cascade_mask_rcnn_mvitv2_b", "mvit"),
])  # fmt: skip
def test_the_configs_have_the_networks_of_the_recipes(file, name):
    path = ROOT / "configs" / "COCO-InstanceSegmentation" / f"{file}.yaml"
    cfg = load_config(str(path), ["MODEL.DEVICE", "meta"], "detectron2")
    with parameters_on_meta():
        detector = build_detector(cfg)
        stock = NETWORKS[name][0](**BASE[name])
    ours, theirs = (
        {key: parameter.shape for key, parameter in network.named_parameters()}
        for network in (detector.backbone.bottom_up, stock)
    )
    assert ours == theirs
    assert len(detector.roi_heads.box_head) == 3  # a cascade
    assert detector.backbone.padding_constraints == {"size_divisibility": 1024}
    build_optimizer(cfg, detector)


def classifier(backbone, name):
    """A state dict like the authors' ImageNet files: with a head, without norms of outputs."""
    state = {
        key: torch.rand_like(value) if value.is_floating_point() else value
        for key, value in backbone.bottom_up.state_dict().items()
        if not key.startswith(("norm", "scale")) and "coefficients" not in key
        and "stream_range" not in key
    }  # fmt: skip
    extra = {"norm.weight": torch.ones(32), "head.weight": torch.ones(10, 32)}
    if name == "swin":
        extra["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    return state, extra


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("name", BOTH)
def test_an_imagenet_file_goes_into_the_backbone(tmp_path, name, stock, prefix):
    cfg = config(tmp_path, name)
    if stock:
        cfg.MODEL.BACKBONE.NAME = cfg.MODEL.BACKBONE.NAME.replace("dr2net_", "")
    model = build_model(cfg)
    state, extra = classifier(model.backbone, name)
    path = str(tmp_path / "imagenet.pth")
    torch.save({"model": {prefix + key: value for key, value in (state | extra).items()}}, path)
    Dr2NetCheckpointer(model).load(path)
    loaded = model.backbone.bottom_up.state_dict()
    for key, value in state.items():
        assert torch.equal(loaded[key], value), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.popitem(), r"\(a network of stages.*\) do not fit.*missing"),
        (lambda state: state.update({"blocks.99.norm1.weight": torch.ones(8)}), "unexpected"),
        (lambda state: state.clear(), r"there are 0 keys \*patch_embed.proj.weight"),
    ],
    ids=["missing", "unexpected", "empty"],
)
@pytest.mark.parametrize("name", BOTH)
def test_a_file_that_fits_in_part_is_refused(tmp_path, name, change, message):
    model = build_model(config(tmp_path, name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state, extra = classifier(model.backbone, name)
    change(state)
    torch.save(state | extra, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match=message):
        Dr2NetCheckpointer(model).load(str(tmp_path / "part.pth"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", BOTH)
def test_a_detector_that_fits_in_part_is_refused(tmp_path, name):
    model = build_model(config(tmp_path, name))
    state = model.state_dict()
    del state["roi_heads.box_head.fc1.weight"]
    torch.save({"model": state}, tmp_path / "part.pth")
    with pytest.raises(WeightsError, match=r"missing roi_heads.box_head.fc1.weight"):
        Dr2NetCheckpointer(model).load(str(tmp_path / "part.pth"))
