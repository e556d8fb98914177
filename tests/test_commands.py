"""The commands as users start them, as processes of their own, and what they share."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from dr2net_d2.commands import choose_engine
from dr2net_d2.errors import ConfigError

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs/quickstart.yaml")
COMMANDS = {
    "train_net.py": [str(ROOT / "train_net.py")],
    "dr2net_d2.anchors": ["-m", "dr2net_d2.anchors"],
    "dr2net_d2.plan": ["-m", "dr2net_d2.plan"],
    "dr2net_d2.fidelity": ["-m", "dr2net_d2.fidelity"],
    "dr2net_d2.export": ["-m", "dr2net_d2.export", "--output", "b.pt2"],
    "demo.py": [str(ROOT / "demo.py"), "--webcam", "--output", "drawn"],
    "dr2net_d2.convert": ["-m", "dr2net_d2.convert"],
}

sys.path.insert(0, str(ROOT))
import train_net  # noqa: E402


def python(*words, cwd):
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "DR2NET_CACHE": str(cwd), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "words", "named"),
    [
        *(
            (name, ["--config-file", "missing.yaml"], ["does not exist"])
            for name in COMMANDS
            if name != "dr2net_d2.convert"
        ),
        ("dr2net_d2.convert", ["none.pth", "out.pth"], ["none.pth", "do not exist"]),
        (
            "train_net.py",
            ["--engine", "torchvision", "--config-file", QUICKSTART, "MODEL.MASK_ON", "True"],
            ["MODEL.MASK_ON", "True", "--engine detectron2"],
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, name, words, named):
    done = python(*COMMANDS[name], *words, cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{name}: error: ")
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
    assert choose_engine("auto") == "detectron2"
    assert choose_engine("torchvision") == "torchvision"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_engine("auto") == "torchvision"


def test_without_detectron2_its_guide_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(ConfigError, match=r"detectron2\.readthedocs\.io"):
        choose_engine("detectron2")


@pytest.mark.parametrize("name", ["torchvision", "detectron2"])
def test_both_engines_run_the_arguments_of_train_net(name):
    pytest.importorskip(name)
    run = train_net.load_engine(name).run
    assert list(inspect.signature(run).parameters) == ["args"]


def test_planning_imports_no_detector_framework_before_it_is_chosen(tmp_path):
    script = (
        "import sys, dr2net_d2.plan.planner, dr2net_d2.commands; "
        "sys.exit(bool({'detectron2', 'torchvision'} & set(sys.modules)))"
    )
    assert python("-c", script, cwd=tmp_path).returncode == 0
