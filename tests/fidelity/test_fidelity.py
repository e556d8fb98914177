"""The fidelity command and its functions, on small images with the quickstart's ViT."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dr2net_d2.commands import load_config
from dr2net_d2.core import CoefficientSchedule, Dr2NetViT
from dr2net_d2.fidelity import __main__ as fidelity
from dr2net_d2.fidelity import gradients

ROOT = Path(__file__).parents[2]
QUICKSTART = ["--config-file", str(ROOT / "configs/quickstart.yaml")]
ONE_PAIR = ["MODEL.DR2NET.SCHEDULE.KIND", "constant"]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def without_detectron2(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)


def command(*words, size=64):
    return fidelity.main([*QUICKSTART, "--image-size", str(size), "--output", "out", *words])


def results():
    written = json.loads(Path("out/fidelity.json").read_text())
    arms = {}
    for row in written["rows"]:
        arms.setdefault(row["arm"], []).append(row)
    return written["setting"], arms


def small_vit(**options):
    torch.manual_seed(0)
    options = {"embed_dim": 24, "depth": 3, "num_heads": 2, "use_rel_pos": True, **options}
    return Dr2NetViT(img_size=32, patch_size=8, pretrain_img_size=32, **options).eval()


def test_over_the_schedule_exact_is_as_good_as_plain_and_float_is_not(capsys):
    assert command("MODEL.DR2NET.SCHEDULE.UPDATES", "3") == 0
    assert sorted(p.name for p in Path("out").iterdir()) == ["fidelity.json", "fidelity.png"]
    setting, arms = results()
    assert setting["weights"] == "dr2net_d2://micro_vit"
    assert (setting["image_size"], setting["reference"]) == (64, "float64")
    assert list(arms) == list(gradients.ARMS)
    betas = [row["beta"] for row in arms["exact"]]
    assert betas == [1 / 16, 3 / 16, 6 / 16, 8 / 16]
    assert max(row["gradient_error"] for row in arms["exact"]) < 1e-5
    for floating, exact in zip(arms["float reversible"][:2], arms["exact"], strict=False):
        assert floating["gradient_error"] is None or floating["gradient_error"] > 0.1
        assert exact["saved_bytes"] < 1.6 * floating["saved_bytes"]
    for checkpointed, plain in zip(arms["checkpointing"], arms["plain"], strict=True):
        assert checkpointed["gradient_error"] == pytest.approx(plain["gradient_error"], rel=0.1)
        assert checkpointed["saved_bytes"] < plain["saved_bytes"] / 4
        assert plain["saved_bytes"] < plain["peak_bytes"]
    lines = capsys.readouterr().out.splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) == 2 * (2 + len(betas))
    assert len({len(line) for line in tables[:6]}) == 1
    assert cv2.imread("out/fidelity.png").shape[1] > 1400


@pytest.mark.usefixtures("without_detectron2")
def test_without_detectron2_and_with_an_image_of_ones_own():
    cv2.imwrite("photo.png", np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8))
    assert command("--image", "photo.png", *ONE_PAIR) == 0
    setting, arms = results()
    assert setting["image"] == "photo.png"
    ((exact,), (plain,)) = arms["exact"], arms["plain"]
    assert (exact["alpha"], exact["beta"]) == (0.5, 0.5)
    assert exact["gradient_error"] == pytest.approx(plain["gradient_error"], rel=0.5)


@pytest.mark.usefixtures("without_detectron2")
def test_images_are_normalised_in_the_channel_order_of_the_config():
    pixels = np.full((10, 10, 3), (10, 20, 30), np.uint8)
    cv2.imwrite("photo.png", pixels)
    means = ["MODEL.PIXEL_MEAN", "[10.0, 0.0, 0.0]", "MODEL.PIXEL_STD", "[1.0, 1.0, 2.0]"]
    for order, expected in (("BGR", [0, 20, 15]), ("RGB", [20, 20, 5])):
        cfg = load_config(QUICKSTART[1], [*means, "INPUT.FORMAT", order], "torchvision")
        image = fidelity.load_image(cfg, 16, "photo.png", 0)
        assert image.shape == (1, 3, 16, 16)
        assert image.amin(dim=(0, 2, 3)).tolist() == image.amax(dim=(0, 2, 3)).tolist() == expected


@pytest.mark.usefixtures("without_detectron2")
def test_random_weights_are_said_to_be_random(caplog):
    caplog.set_level("INFO")
    cfg = load_config(QUICKSTART[1], ["MODEL.WEIGHTS", ""], "torchvision")
    first, second = (fidelity.build_vit(cfg, 3).state_dict() for _ in range(2))
    assert "random initialisation, seed 3" in caplog.text
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state}])
@pytest.mark.parametrize("detectron2", [False, True])
def test_the_vit_of_a_whole_detector_is_taken(monkeypatch, detectron2, wrap):
    if detectron2:
        pytest.importorskip("detectron2")
    else:
        monkeypatch.setitem(sys.modules, "detectron2", None)
    cfg = load_config(QUICKSTART[1], [], "torchvision")
    plain = fidelity.build_vit(cfg, 0).state_dict()
    detector = {f"backbone.net.{name}": tensor for name, tensor in plain.items()}
    detector |= {"backbone.simfp_2.0.weight": torch.ones(2), "roi_heads.x": torch.ones(2)}
    torch.save(wrap(detector), "detector.pth")
    cfg.MODEL.WEIGHTS = "detector.pth"
    loaded = fidelity.build_vit(cfg, 1).state_dict()
    assert all(torch.equal(loaded[name], plain[name]) for name in plain)


@pytest.mark.usefixtures("without_detectron2")
@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--image-size", "60"], ["60", "MODEL.VIT.PATCH_SIZE", "8", "64"]),
        (["--image-size", "0"], ["0", "multiple"]),
        (["--image", "none.png"], ["none.png", "No such file"]),
        (["--output", "taken/out"], ["taken/out", "--output"]),
        (["MODEL.WEIGHTS", "none.pth"], ["none.pth", "MODEL.WEIGHTS"]),
        (["MODEL.WEIGHTS", "resnet.pth"], ["no plain ViT", "stem.conv1.weight"]),
        (["MODEL.VIT.DEPTH", "7"], ["unexpected blocks.7.", "MODEL.VIT"]),
        (["MODEL.VIT.NUM_HEADS", "5"], ["MODEL.VIT", "embed_dim 96", "num_heads 5"]),
        (["MODEL.DEVICE", "tpu"], ["MODEL.DEVICE", "tpu", "cpu"]),
        (["MODEL.DEVICE", "meta"], ["MODEL.DEVICE", "meta", "cpu"]),
        (["MODEL.NONE", "1"], ["MODEL.NONE"]),
        (["--image", "photo.png", "INPUT.FORMAT", "YUV-BT.601"], ["INPUT.FORMAT", "YUV-BT.601"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, words, named):
    cv2.imwrite("photo.png", np.zeros((8, 8, 3), np.uint8))
    torch.save({"stem.conv1.weight": torch.ones(3)}, "resnet.pth")
    Path("taken").touch()
    assert command(*words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("dr2net_d2.fidelity: error: ")
    assert [word for word in named if word not in line] == []
    assert {path.name for path in Path().iterdir()} == {"photo.png", "resnet.pth", "taken"}


@pytest.mark.usefixtures("without_detectron2")
@pytest.mark.parametrize("share", [0.8, 0.1])
def test_where_float64_does_not_fit(monkeypatch, caplog, capsys, share):
    caplog.set_level("INFO")
    cfg = load_config(QUICKSTART[1], [], "torchvision")
    vit, image = fidelity.build_vit(cfg, 0), fidelity.load_image(cfg, 64, None, 0)
    weights = sum(parameter.nbytes for parameter in vit.parameters())
    double = 2 * (2 * weights + gradients.plain_peak_bytes(vit, image)) + weights
    monkeypatch.setattr(gradients, "available_memory_bytes", lambda device: share * double)
    assert command(*ONE_PAIR) == (0 if share == 0.8 else 2)
    if share == 0.8:
        setting, arms = results()
        assert setting["reference"] == "float32"
        assert "stored float32, as float64 would take" in caplog.text
        assert arms["plain"][0]["gradient_error"] == 0
        assert 0 < arms["exact"][0]["gradient_error"] < 1e-5
    else:
        assert "--image-size is 64 px" in capsys.readouterr().err
        assert not list(Path("out").iterdir())


def test_the_coefficients_that_a_training_passes_through():
    convex = CoefficientSchedule()
    assert gradients.schedule_pairs(convex, 1000)[0] == (15 / 16, 1 / 16)
    assert gradients.schedule_pairs(convex, 1000)[-1] == (1 / 2, 1 / 2)
    thinned = gradients.schedule_pairs(convex, 1000, maximum=4)
    assert [beta for _, beta in thinned] == [1 / 16, 3 / 16, 6 / 16, 8 / 16]
    assert gradients.schedule_pairs(CoefficientSchedule("constant"), 10) == [(0.5, 0.5)]
    alternating = CoefficientSchedule("alternating", updates=10)
    assert gradients.schedule_pairs(alternating, 100)[:2] == [(1.0, 0.125), (0.8, 0.125)]
    assert len(gradients.schedule_pairs(alternating, 100)) == 9


@pytest.mark.parametrize("beta", [0, 0.5])
@pytest.mark.parametrize("options", [{}, {"first_state": "zero", "output": "mean"}], ids=str)
def test_checkpointing_is_the_plain_network(beta, options):
    vit, image = small_vit(**options), torch.randn(2, 3, 32, 32)
    projection = torch.randn(2, 24, 4, 4)
    results = {
        arm: gradients.differentiate(vit, image, projection, arm, 1 - beta, beta)
        for arm in ("plain", "checkpointing")
    }
    pairs = zip(results["plain"].gradients, results["checkpointing"].gradients, strict=True)
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in pairs)
    # The image, and one stream for each block, or two if the older stream counts.
    stream, blocks = 4 * 2 * 16 * 24, 3
    states = blocks if beta == 0 else 2 * blocks
    states -= beta > 0 and not options  # the copied first state is the input itself
    assert results["checkpointing"].saved_bytes == image.nbytes + stream * states


def test_the_peak_is_known_without_computing():
    vit, image = small_vit(), torch.randn(1, 3, 32, 32)
    (row,) = gradients.measure(vit, image, 0.5, 0.5, arms=["plain"])
    assert gradients.plain_peak_bytes(vit, image) == row["peak_bytes"]
    assert all(type(p) is nn.Parameter for p in vit.parameters())


def test_measuring_repeats_whatever_came_before():
    vit, image = small_vit(), torch.randn(1, 3, 32, 32)
    first = gradients.measure(vit, image, 0.75, 0.25)
    gradients.measure(vit, 100 * image, 1.0, 0.125)
    assert gradients.measure(vit, image, 0.75, 0.25) == first


def test_relative_error_over_all_gradients():
    reference = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]
    wrong = [torch.tensor([3.0]), torch.tensor([[1.0, 4.0]])]
    assert gradients.relative_error(wrong, reference) == pytest.approx(1 / 5)


def test_the_packaged_weights_are_what_is_loaded():
    cfg = load_config(QUICKSTART[1], [], "torchvision")
    packaged = load_file(ROOT / "dr2net_d2/weights/pretrained/micro_vit.safetensors")
    loaded = fidelity.build_vit(cfg, 0).state_dict()
    name = "blocks.3.mlp.fc1.weight"
    assert torch.equal(loaded[name], packaged[name].float())
