"""The memory planner with torchvision's detector of the quickstart, and its search."""

import json
from pathlib import Path

import cv2
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dr2net_d2.commands import load_config
from dr2net_d2.config import coefficient_schedule
from dr2net_d2.config.torchvision import check_config
from dr2net_d2.core import attention_kernels
from dr2net_d2.core.attention_kernels import planned_for
from dr2net_d2.core.memory import count_saved_bytes, peak_tensor_bytes
from dr2net_d2.errors import ConfigError
from dr2net_d2.plan import ARMS, Planner, Prediction, comparison, dry_run, predict
from dr2net_d2.plan import __main__ as plan
from dr2net_d2.plan.dry_run import PARTS
from dr2net_d2.plan.planner import (
    costliest,
    largest_fitting,
    pairs_of_schedule,
    training_side,
)
from dr2net_d2.plan.simulation import CudaAutocast
from dr2net_d2.training.optimizer import build_optimizer
from dr2net_d2.tv.model import build_model

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs/quickstart.yaml")
SMALL = [
    *("MODEL.VIT.DEPTH", "2", "MODEL.VIT.WINDOW_BLOCK_INDEXES", "[0]", "MODEL.WEIGHTS", ""),
    *("MODEL.VIT.USE_REL_POS", "True", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32"),
    *("MODEL.RPN.BATCH_SIZE_PER_IMAGE", "64", "MODEL.ROI_BOX_HEAD.FC_DIM", "64"),
]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def small(*words):
    cfg = load_config(QUICKSTART, [*SMALL, *words], "torchvision")
    check_config(cfg)
    return cfg


def predicted(arm="dr2net", side=128, batch=1, words=(), **options):
    return predict(small(*words), arm, side, batch, engine="torchvision", **options)


def command(*words, options=()):
    argv = ["--config-file", QUICKSTART, "--engine", "torchvision", "--output", "out"]
    return plan.main([*argv, *options, *SMALL, *words])


def test_parameters_gradients_and_state_by_hand():
    for optimizer, copies in (("AdamW", 2), ("SGD", 1)):
        prediction = predicted(words=["SOLVER.OPTIMIZER", optimizer])
        parameters = sum(p.numel() for p in build_model(small()).parameters())
        assert prediction.parts["parameters"] == 4 * parameters
        assert prediction.parts["gradients"] <= 4 * parameters
        assert prediction.parts["optimizer state"] == copies * 4 * parameters
        assert list(prediction.parts) == list(PARTS)
        assert sum(prediction.parts.values()) == prediction.peak
        # During the forward, the old gradients live.
        assert prediction.beyond >= prediction.peak - (2 + copies) * 4 * parameters


def test_a_real_iteration_takes_what_is_predicted():
    # So many anchors and proposals match that sampling is full, as the planner assumes.
    cfg = small(
        *("MODEL.RPN.IOU_THRESHOLDS", "[0.01, 0.02]", "MODEL.RPN.NMS_THRESH", "1.0"),
        *("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[0.05]"),
    )
    torch.manual_seed(0)
    model = build_model(cfg)
    model.backbone.net.coefficients.set(0.5, 0.5)
    optimizer = build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["foreach"] = True
    corners = torch.rand(2, 20, 2) * 64
    targets = [
        {"boxes": torch.cat([low, low + 30], 1), "labels": torch.ones(20, dtype=torch.int64)}
        for low in corners
    ]
    images = list(torch.rand(2, 3, 128, 128) * 255)
    with planned_for("cuda"):
        for _ in range(2):
            optimizer.zero_grad()
            sum(model(images, targets).values()).backward()
            optimizer.step()
        with count_saved_bytes(exclude=model.parameters()) as saved:
            model(images, targets)
        with peak_tensor_bytes(["gradients"]) as live:
            live.assign(images, "images")
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(
                    lambda p: live.assign([p.grad], "gradients")
                )
            total = sum(model(images, targets).values())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    options = {"objects": 20, "coefficients": (0.5, 0.5), "engine": "torchvision"}
    prediction = predict(cfg, "dr2net", 128, 2, **options)
    assert prediction.saved == pytest.approx(saved.total, rel=0.001)
    assert prediction.beyond == pytest.approx(live.beyond, rel=0.05)


def test_it_grows_with_the_side_and_the_batch_and_shrinks_with_the_arm():
    planner = Planner(small(), "stock", engine="torchvision")
    sides = [planner.peak(side) for side in (128, 192)]
    batches = [planner.peak(128, batch) for batch in (1, 2)]
    assert sides[0] < sides[1] and sides[0] == batches[0] < batches[1]
    saved = [predicted(arm, words=["MODEL.VIT.DEPTH", "3"]).saved for arm in ARMS]
    assert saved == sorted(saved, reverse=True)
    assert saved[3] < saved[0] / 2


def test_a_few_chunks_of_attention_stand_for_all(monkeypatch):
    monkeypatch.setattr(attention_kernels, "FUSED_WIDTH", 0)
    monkeypatch.setattr(attention_kernels, "CHUNK_BYTES", 1)
    words = ["MODEL.VIT.WINDOW_BLOCK_INDEXES", "[]", "MODEL.VIT.DEPTH", "1"]
    planner = Planner(small(*words), "our attention + checkpoint", engine="torchvision")
    peaks = []
    for chunks in (dry_run.CHUNKS, 10**6):
        monkeypatch.setattr(dry_run, "CHUNKS", chunks)
        peaks.append(planner.peak(384))
    assert peaks[0] == peaks[1]


def test_arithmetic_by_hand():
    """A block more: 16 x 16 tokens of width 96; one or two forwards, a backward of two each."""
    tokens, width = 16 * 16, 96
    dense = 2 * tokens * 12 * width**2
    attention = 2 * 2 * tokens**2 * width
    positions = 2 * tokens * width * 2 * 16
    for arm, forwards in (("stock", 1), ("stock + checkpoint", 2), ("dr2net", 2)):
        words = [*("MODEL.VIT.WINDOW_BLOCK_INDEXES", "[]"), "MODEL.DR2NET.LEAN", "[]"]
        shallow, deep = (
            Planner(small(*words, "MODEL.VIT.DEPTH", depth), arm, engine="torchvision").flops(128)
            for depth in ("2", "3")
        )
        ideal = (forwards + 2) * (dense + attention + positions)
        if arm == "dr2net":
            # With the fused kernel, queries of width 32 are extended by 16 + 16 positions, and the
            # backward computes the logits again.
            assert ideal < deep - shallow < 2.2 * ideal
        else:
            # A checkpoint stops recomputing before the last product, which no gradient needs.
            last = (forwards - 1) * 2 * tokens * 4 * width**2
            assert deep - shallow == ideal - last


def test_half_precision_halves_what_is_saved():
    single, half = (
        predicted("stock", words=["SOLVER.AMP.ENABLED", enabled]).saved
        for enabled in ("False", "True")
    )
    assert single / 2 < half < 0.9 * single


def test_streams_and_remainder_bits_by_hand():
    # The peak lies in the backward of the first block's wide MLP. There are two states and a
    # gradient, each of 16 x 16 tokens with 96 channels, and the remainder of one last step.
    words = ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "1", "MODEL.VIT.MLP_RATIO", "64.0"]
    elements = 16 * 16 * 96
    for beta, bits in ((1 / 2, 1), (1 / 4, 2), (1 / 16, 4)):
        parts = predicted(words=words, coefficients=(1 - beta, beta)).parts
        assert parts["remainder bits"] == elements * bits // 8
        assert parts["streams"] == pytest.approx(3 * 4 * elements, abs=200)
        assert parts["activations"] > 2 * 4 * 64 * elements


def test_the_pair_of_the_schedule_that_takes_the_most_memory():
    def pairs(*words):
        cfg = small(*words)
        return pairs_of_schedule(cfg), costliest(cfg)

    convex, costly = pairs()
    assert [beta for _, beta in convex] == [i / 16 for i in range(1, 9)]
    assert costly == (15 / 16, 1 / 16)
    assert pairs("MODEL.DR2NET.SCHEDULE.START_BETA", "0.0")[1] == (1.0, 0.0)
    assert pairs("MODEL.DR2NET.SCHEDULE.KIND", "constant") == ([(0.5, 0.5)], (0.5, 0.5))
    cfg = small("MODEL.DR2NET.SCHEDULE.KIND", "alternating", "MODEL.DR2NET.SCHEDULE.UPDATES", "3")
    schedule = coefficient_schedule(cfg)
    passed = [schedule(i / cfg.SOLVER.MAX_ITER) for i in range(cfg.SOLVER.MAX_ITER)]
    assert {beta for _, beta in pairs_of_schedule(cfg)} == {beta for _, beta in passed}
    planner = Planner(cfg, "dr2net", engine="torchvision")
    peaks = [planner.peak(256, 1, pair) for pair in dict.fromkeys(passed)]
    assert planner.peak(256) == max(peaks)


@pytest.mark.parametrize("power", [1, 2, 4])
@pytest.mark.parametrize("first", [1, 16, 100])
@pytest.mark.parametrize("assumed", [1, 2])
def test_the_search_finds_the_edge(power, first, assumed):
    for edge in (0, 1, 2, 15, 16, 17, 63, 99, 100):
        looks = []

        def peak(n, looks=looks):
            looks.append(n)
            return 1000 + 7 * n**power

        budget = 1000 + 7 * edge**power + (3 if edge else -1)
        assert largest_fitting(peak, budget, maximum=100, power=assumed, first=first) == edge
        assert len(looks) == len(set(looks)) <= 15
        if 0 < edge < 100:
            assert {edge, edge + 1} <= set(looks)
        if power == assumed and edge > 1:
            assert len(looks) <= 6


def test_cuda_autocast_in_float32_and_only_within_autocast():
    with FakeTensorMode(), CudaAutocast():
        x = torch.ones(4, 4, dtype=torch.float16, requires_grad=True)
        norm = nn.LayerNorm(4)
        assert (x.softmax(-1).dtype, x.pow(2).dtype) == (torch.float16,) * 2
        with torch.autocast("cpu", torch.float16):
            for y in (x.softmax(-1), x.log_softmax(dim=1), x.pow(2), x.sum(), norm(x)):
                assert y.dtype == torch.float32
            assert (x @ x).dtype == torch.float16


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(plan, "ARMS", ("stock", "dr2net"))
    monkeypatch.setattr(comparison, "LONGEST_SIDE", 192)
    monkeypatch.setattr(comparison, "LARGEST_BATCH", 2)
    words = ["MODEL.DR2NET.SCHEDULE.UPDATES", "2"]
    parameters = sum(p.nbytes for p in build_model(small()).parameters())
    budget = (4 * parameters + 16 * 2**20) / 2**30
    options = ["--image-size", "128", "--budget-gb", str(budget), "--tflops", "0.5"]
    assert command(*words, options=options) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["plan.json", "plan.png"]
    results = json.loads(Path("out/plan.json").read_text())
    stock, dr2net = results["arms"]
    assert (stock["arm"], dr2net["arm"]) == plan.ARMS
    planner = Planner(small(), "stock", engine="torchvision")
    assert stock["tflop"] * 1e12 == planner.flops(128) and stock["seconds"] == 2 * stock["tflop"]
    side = stock["largest_side"]
    assert planner.peak(side) <= budget * 2**30 < planner.peak(side + 64)
    assert side <= dr2net["largest_side"] and stock["largest_batch"] <= dr2net["largest_batch"]
    assert max(row["peak"] for row in results["schedule"]) == dr2net["peak"]
    out = capsys.readouterr().out
    assert f"{budget:g} GB, and the time" in out and "at 0.5 TFLOP/s" in out
    assert "Not included: the CUDA context" in out
    assert cv2.imread("out/plan.png").shape[1] > 1400


@pytest.mark.parametrize(
    ("words", "side"),
    [
        ([], 256),  # of MODEL.VIT
        (["INPUT.TILES.SIZE", "640"], 256),  # not enabled
        (["INPUT.TILES.ENABLED", "True", "INPUT.MIN_SIZE_TRAIN", "(96, 128)"], 128),
        (["INPUT.TILES.ENABLED", "True", "INPUT.MIN_SIZE_TRAIN", "(512,)"], 256),  # MAX_SIZE
        (["INPUT.TILES.ENABLED", "True", "INPUT.MIN_SIZE_TRAIN", "(0,)"], 640),
        (["INPUT.TILES.ENABLED", "True", "INPUT.LSJ.ENABLED", "True"], 1024),
    ],
)
def test_the_side_that_a_training_goes_through(words, side):
    assert training_side(small(*words)) == side


def test_the_command_on_tiles(monkeypatch, capsys):
    class Linear:
        """Stands in for a planner: 4 KB per pixel."""

        stride, side_step = 16, 64

        def __init__(self, cfg, arm, objects, engine):
            self.arm = arm

        def peak(self, side, batch=1, coefficients=None):
            return 4096 * side**2 * batch

        def predict(self, side, batch):
            parts = dict.fromkeys(PARTS, 0) | {"streams": self.peak(side, batch)}
            return Prediction(self.arm, side, batch, 1, 0, parts["streams"], parts, 0, 0)

    monkeypatch.setattr(plan, "Planner", Linear)
    tiles = ["INPUT.TILES.ENABLED", "True", "INPUT.TILES.SIZE", "200"]
    assert command(*tiles, "INPUT.MIN_SIZE_TRAIN", "(60,)") == 0
    results = json.loads(Path("out/plan.json").read_text())
    assert (results["setting"]["tile_size"], results["setting"]["image_size"]) == (200, 64)
    out = capsys.readouterr().out
    assert "200 px tiles, which enter the network at 64 px" in out
    assert "With whole images, dr2net fits 2496 px into 24 GB" in out


@pytest.mark.parametrize(
    ("options", "words", "named"),
    [
        (["--image-size", "100"], [], ["--image-size", "100", "16", "96"]),
        (["--image-size", "0"], [], ["--image-size", "0", "multiple"]),
        (["--batch-size", "0"], [], ["batch size", "0", "at least 1"]),
        (["--objects", "0"], [], ["objects", "0", "at least 1"]),
        (["--budget-gb", "-1"], [], ["--budget-gb", "-1", "above 0"]),
        (["--budget-gb", "nan"], [], ["--budget-gb", "nan"]),
        (["--tflops", "0"], [], ["--tflops", "0", "above 0"]),
        (["--output", "taken/out"], [], ["taken/out", "--output"]),
        ([], ["MODEL.VIT.NUM_HEADS", "5"], ["MODEL.VIT", "num_heads 5"]),
        ([], ["MODEL.NONE", "1"], ["MODEL.NONE"]),
        ([], ["MODEL.MASK_ON", "True"], ["MODEL.MASK_ON", "Detectron2"]),
        ([], ["SOLVER.OPTIMIZER", "Lion"], ["SOLVER.OPTIMIZER", "Lion", "AdamW"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, options, words, named):
    Path("taken").touch()
    assert command(*words, options=options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("dr2net_d2.plan: error: ")
    assert [word for word in named if word not in line] == []
    assert not Path("out").exists() or not list(Path("out").iterdir())


def test_unknown_arms_and_engines_are_refused():
    for words in ({"arm": "ours"}, {"engine": "tensorflow"}):
        with pytest.raises(ConfigError, match=next(iter(words.values()))):
            Planner(small(), **{"arm": "dr2net", "engine": "torchvision", **words})
