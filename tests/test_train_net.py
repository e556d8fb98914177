import subprocess
import sys
from pathlib import Path

import pytest

from dr2net_d2.errors import ConfigError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import train_net  # noqa: E402


def command(*words, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "train_net.py"), *words],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "DR2NET_CACHE": str(cwd), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--config-file", "missing.yaml"], ["missing.yaml", "does not exist"]),
        (
            ["--config-file", str(ROOT / "configs/quickstart.yaml"), "MODEL.MASK_ON", "True"],
            ["MODEL.MASK_ON", "True", "--engine detectron2"],
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, words, named):
    done = command("--engine", "torchvision", *words, cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("train_net.py: error: ")
    assert [word for word in named if word not in last] == []
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_config_file_is_required(capsys):
    with pytest.raises(SystemExit) as caught:
        train_net.main([])
    assert caught.value.code == 2
    assert "--config-file" in capsys.readouterr().err


def test_overrides_come_last():
    args = train_net.parse_arguments(["--config-file", "a.yaml", "--resume", "SEED", "-1"])
    assert args.opts == ["SEED", "-1"]
    assert args.resume
    assert not args.eval_only


def test_auto_takes_detectron2_where_it_is_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert train_net.choose_engine("auto") == "detectron2"
    assert train_net.choose_engine("torchvision") == "torchvision"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert train_net.choose_engine("auto") == "torchvision"


def test_without_detectron2_its_guide_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(ConfigError, match=r"detectron2\.readthedocs\.io"):
        train_net.choose_engine("detectron2")
