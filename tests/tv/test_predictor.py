"""torchvision's detectors in use: the predictor, large images, ``demo.py``."""

import logging

import cv2
import numpy as np
import pytest
import torch

import demo
from dr2net_d2.data import load_coco, resolve_dataset
from dr2net_d2.errors import WeightsError
from dr2net_d2.inference.torchvision import TorchvisionPredictor
from dr2net_d2.tv.model import build_model
from dr2net_d2.weights.plain_vit import plain_vit_state_dict


@pytest.fixture
def trained(tiny_cfg, tmp_path):
    """A detector at beta 1/2 and the overrides that lead to it."""
    torch.manual_seed(0)
    model = build_model(tiny_cfg()).eval()
    model.backbone.net.coefficients.set(0.5, 0.5)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    return model, ("MODEL.WEIGHTS", str(tmp_path / "model.pth"), "INPUT.FORMAT", "RGB")


@pytest.fixture(scope="module")
def images():
    """Two BGR images of SmallDigits, 80 x 120 px, by their files."""
    json_file, root = resolve_dataset("small_digits_val_n2_s80x120_d4")
    return [record.file_name for record in load_coco(json_file, root).records]


def test_the_predictor_gives_what_the_model_does(tiny_cfg, trained, images):
    model, opts = trained
    predictor = TorchvisionPredictor(tiny_cfg(*opts))
    assert predictor.class_names == tuple("0123456789")
    assert predictor.model.backbone.net.coefficients.values == (0.5, 0.5)
    image = cv2.imread(images[0])
    rgb = torch.as_tensor(image[..., ::-1].transpose(2, 0, 1).copy())
    with torch.no_grad():
        (expected,) = model([rgb.float()])
    found = predictor.detect(image)
    assert len(found.boxes) > 3
    np.testing.assert_allclose(found.boxes, expected["boxes"], rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(found.scores, expected["scores"], rtol=1e-5)
    assert found.labels.tolist() == [label - 1 for label in expected["labels"].tolist()]
    assert set(found.labels) <= set(range(10)) and found.masks is None


def test_categories_have_numbers_where_no_dataset_tells_their_names(tiny_cfg, trained):
    opts = ("DATASETS.TEST", "('absent',)", "DATASETS.TRAIN", "()")
    assert TorchvisionPredictor(tiny_cfg(*trained[1], *opts)).class_names == tuple(
        map(str, range(10))
    )


def test_a_plain_vit_is_no_detector(tiny_cfg, trained, tmp_path):
    torch.save(plain_vit_state_dict(trained[0].backbone.net), tmp_path / "vit.pth")
    with pytest.raises(WeightsError, match=r"a backbone or another model; .*trained detector"):
        TorchvisionPredictor(tiny_cfg("MODEL.WEIGHTS", str(tmp_path / "vit.pth")))


@pytest.mark.parametrize("size", [(60, 150), (150, 60)])
def test_an_image_beyond_the_square_counts_to_its_last_pixel(tiny_cfg, size):
    torch.manual_seed(0)
    model = build_model(
        tiny_cfg(
            "MODEL.VIT.SQUARE_PAD", "64", "INPUT.MIN_SIZE_TEST", "0", "MODEL.DR2NET.LEAN", "()"
        )
    )
    target = {"boxes": torch.tensor([[4.0, 4, 24, 24]]), "labels": torch.tensor([1])}
    for training in (False, True):
        image = torch.rand(3, *size).mul_(255).requires_grad_()
        out = model.train(training)([image], [target] if training else None)
        total = sum(out.values()) if training else out[0]["scores"].sum()
        (gradient,) = torch.autograd.grad(total, image)
        assert gradient[:, -1, -1].abs().max() > 0


def test_the_demo_from_images_to_pictures(trained, config_file, images, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    words = ["--config-file", str(config_file), "--engine", "torchvision", "--input", *images]
    options = ["--output", str(tmp_path / "drawn"), "--confidence", "0"]
    assert demo.main([*words, *options, *trained[1]]) == 0
    for file in images:
        image = cv2.imread(file)
        drawn = cv2.imread(str(tmp_path / "drawn" / file.rpartition("/")[2]))
        assert drawn.shape == (80 * 9, 120 * 9, 3)
        assert (drawn != image.repeat(9, 0).repeat(9, 1)).any(axis=2).mean() > 0.05
    assert sum(" objects, " in line for line in caplog.messages) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "absent.png"], "'absent.png' is no file"),
        (["--webcam", "1", "--confidence", "2"], "--confidence-threshold is 2"),
        (["--webcam"], "MODEL.WEIGHTS is empty; add the weights of a trained detector"),
        (["--webcam", "0", "MODEL.WEIGHTS", "absent.pth"], "'absent.pth' do not exist"),
    ],
)
def test_the_demo_says_what_is_wrong_in_one_line(config_file, tmp_path, capsys, options, message):
    words = ["--config-file", str(config_file), "--engine", "torchvision"]
    assert demo.main([*words, "--output", str(tmp_path / "new"), *options]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("demo.py: error: ") and message in last
    assert not (tmp_path / "new").exists()
