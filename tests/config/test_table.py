"""The table of keys: ranges by hand, and every row."""

import pytest

from dr2net_d2.config.detectron2_keys import HONOURED
from dr2net_d2.config.detectron2_only_keys import DETECTRON2_ONLY
from dr2net_d2.config.keys import DR2NET_KEYS
from dr2net_d2.config.table import (
    Key,
    above,
    anything,
    at_least,
    at_most,
    below,
    between,
    check_value,
    check_value_for_torchvision,
    list_of,
    nothing,
    numbers,
    one_of,
)
from dr2net_d2.config.torchvision import check_config, get_cfg
from dr2net_d2.errors import ConfigError

NAN = float("nan")


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (anything, [0, None, "a"], []),
        (nothing, [], [0, None, ()]),
        (at_least(1), [1, 1.5], [0, 0.99, NAN, None, "1"]),
        (at_most(1), [1, -5], [1.01, NAN]),
        (above(0), [1e-9], [0, -1, NAN]),
        (below(1), [0.99], [1, NAN]),
        (between(0, 1), [0, 1, 0.5], [-0.1, 1.1, NAN]),
        (above(0) & at_most(1), [0.1, 1], [0, 1.1]),
        (one_of("a", "b"), ["a"], ["c", ""]),
        (one_of([0, 1]), [[0, 1], (0, 1)], [[1, 0], 0]),
        (numbers(2), [[0, 1.5], (1, 2)], [[1], [1, "2"], 2]),
        (list_of(at_least(0)), [[], (0, 3)], [[1, -1], ["a"], 3]),
        (list_of(one_of("a", "b"), minimum=1), [["b"], ["a", "a"]], [[], ["c"]]),
    ],
)
def test_ranges(allowed, inside, outside):
    assert [value for value in inside if value not in allowed] == []
    assert [value for value in outside if value in allowed] == []


@pytest.mark.parametrize(
    ("allowed", "text"),
    [
        (at_least(0) & below(1), "at least 0 and below 1"),
        (between(0, 1), "from 0 to 1"),
        (one_of(False), "False"),
        (one_of("SGD", "AdamW", ""), "'SGD', 'AdamW' or ''"),
        (numbers(1), "a list of 1 number"),
        (numbers(4), "a list of 4 numbers"),
        (list_of(one_of(-1), minimum=1), "a list of 1 or more values, each -1"),
        (list_of(at_least(0)), "a list of values, each at least 0"),
    ],
)
def test_a_range_in_words(allowed, text):
    with pytest.raises(ConfigError) as caught:
        check_value("SOLVER.KEY", None, Key(0, "", allowed))
    assert str(caught.value) == f"SOLVER.KEY is None; it must be {text}"


def test_detectron2_is_named_only_where_it_would_help():
    key = Key(1, "", at_least(1), torchvision=one_of(1))
    check_value_for_torchvision("KEY", 1, key)
    check_value("KEY", 2, key)
    with pytest.raises(ConfigError, match=r"KEY is 2; the torchvision engine takes 1\. .*--engine"):
        check_value_for_torchvision("KEY", 2, key)
    with pytest.raises(ConfigError, match=r"KEY is 0; it must be at least 1$"):
        check_value_for_torchvision("KEY", 0, key)


@pytest.mark.parametrize("name", [*HONOURED, *DR2NET_KEYS])
def test_a_row_has_a_meaning_and_a_default_in_its_range(name):
    key = (HONOURED | DR2NET_KEYS)[name]
    assert key.default in key.allowed
    assert key.meaning.endswith(".")


def test_no_key_has_two_rows():
    tables = (HONOURED, DR2NET_KEYS, DETECTRON2_ONLY)
    assert len(HONOURED | DR2NET_KEYS | DETECTRON2_ONLY) == sum(map(len, tables))


def test_a_section_that_is_off_is_not_checked():
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_dr2net_vitdet_backbone"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.INPUT.TILES.SIZE = 0
    check_config(cfg.clone())
    cfg.INPUT.TILES.ENABLED = True
    with pytest.raises(ConfigError, match=r"INPUT\.TILES\.SIZE is 0; it must be at least 1"):
        check_config(cfg)


def test_defaults_are_copies():
    cfg = get_cfg()
    cfg.MODEL.DR2NET.LEAN.clear()
    assert get_cfg().MODEL.DR2NET.LEAN == DR2NET_KEYS["MODEL.DR2NET.LEAN"].default != []
