"""A schedule of one's own in MODEL.DR2NET.SCHEDULE.KIND, in the config of either engine."""

import importlib.util
import logging

import pytest

from dr2net_d2.config import add_dr2net_config, coefficient_schedule
from dr2net_d2.config import torchvision as torchvision_config
from dr2net_d2.errors import ConfigError
from tests.own_schedules import write_module

SECTION = "MODEL.DR2NET.SCHEDULE"
ENGINES = ["torchvision"]
if importlib.util.find_spec("detectron2"):
    ENGINES.append("detectron2")


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch)


@pytest.fixture(params=ENGINES)
def build(request):
    """``build("KIND", "...", ...)``: a config with keys of the section changed, from YAML."""

    def build(*words):
        if request.param == "torchvision":
            cfg = torchvision_config.get_cfg()
        else:
            from detectron2.config import get_cfg

            cfg = get_cfg()
            add_dr2net_config(cfg)
        cfg.merge_from_list([f"{SECTION}.{word}" if word.isupper() else word for word in words])
        return cfg

    return build


def test_a_class_takes_the_keys_that_it_has_parameters_for(build):
    cfg = build("KIND", "my_schedules.Cosine", "END_BETA", "0.25", "DURATION", "0.8")
    schedule = coefficient_schedule(cfg)
    assert (schedule.end_beta, schedule.duration) == (0.25, 0.8)
    # 1/8 (1 - cos(pi / 4)) = 0.037 -> 1/16; the half; the end, which holds.
    expected = [(1.0, 0.0), (15 / 16, 1 / 16), (7 / 8, 1 / 8), (3 / 4, 1 / 4), (3 / 4, 1 / 4)]
    assert [schedule(p) for p in (0.0, 0.2, 0.4, 0.8, 1.0)] == expected


def test_its_duration_is_a_fraction_whatever_the_unit(build):
    cfg = build("KIND", "my_schedules.Cosine", "UNIT", "iterations", "DURATION", "30.0")
    cfg.SOLVER.MAX_ITER = 120
    assert coefficient_schedule(cfg).duration == 0.25


def test_a_function_is_the_schedule_itself(build):
    schedule = coefficient_schedule(build("KIND", "my_schedules.late_blocks_first"))
    assert schedule(0.0) == ([1.0, 1.0], [0.0, 0.0])
    assert schedule(0.5) == ([1.0, 0.5], [0.0, 0.5])
    assert schedule(1.0) == ([0.5, 0.5], [0.5, 0.5])


def test_only_a_beta_that_the_class_takes_is_said_to_be_snapped(build, caplog):
    with caplog.at_level(logging.INFO):
        keys = ("START_BETA", "0.1", "END_BETA", "0.3")
        coefficient_schedule(build("KIND", "my_schedules.Cosine", *keys))
        coefficient_schedule(build("KIND", "my_schedules.late_blocks_first", *keys))
    assert [text for text in caplog.messages if "snapped" in text] == [
        f"{SECTION}.END_BETA 0.3 is snapped to 0.3125: exact arithmetic takes multiples of 1/16"
    ]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no_such_module.Cosine", ["'no_such_module' cannot be imported", "PYTHONPATH"]),
        (".Cosine", ["module '' cannot be imported"]),
        ("my_schedules.Sine", ["'my_schedules' has no 'Sine'", "function or a class"]),
        ("my_schedules.NUMBER", ["no schedule", "progress -> (alpha, beta)"]),
        ("my_schedules.NotCallable", ["no schedule"]),
        ("my_schedules.NeedsPeriod", ["no schedule", "'period'", "start_beta, end_beta"]),
        ("my_schedules.one_number", ["returned 0.5 at progress 0", "a pair (alpha, beta)"]),
        ("my_schedules.too_large", ["too_large returned", "progress 1", "1.5", "[0, 1]"]),
        ("my_schedules", ["'my_schedules'", "convex", "package.module.Name"]),
    ],
)
def test_what_is_no_schedule_is_a_config_error(build, kind, words):
    with pytest.raises(ConfigError) as error:
        coefficient_schedule(build("KIND", kind))
    assert all(word in str(error.value) for word in [SECTION, "KIND", repr(kind), *words])
