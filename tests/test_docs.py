"""The pages of docs/ against the repository: their commands, code, configs, keys and messages.

What a block cannot be tried without, the line before it says: "*Needs COCO and a GPU.*".
"""

import ast
import importlib
import pkgutil
import re
import shlex
import sys
from functools import partial, reduce
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from dr2net_d2 import anchors, convert, export
from dr2net_d2.commands import choose_engine, load_config
from dr2net_d2.core import reversible_stacks
from dr2net_d2.data import commands as data_commands
from dr2net_d2.data import small_digits_from_name
from dr2net_d2.data.formats import FORMATS
from dr2net_d2.fidelity import __main__ as fidelity
from dr2net_d2.inference import demo
from dr2net_d2.plan import __main__ as plan
from dr2net_d2.report import __main__ as report

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXT = "\n\n".join(page.read_text() for page in PAGES)
ENGINE = choose_engine("auto")
needs_detectron2 = pytest.mark.skipif(ENGINE != "detectron2", reason="no Detectron2 here")

sys.path.insert(0, str(ROOT))
import train_net  # noqa: E402

PARSERS = {
    "train_net.py": train_net.parse_arguments,
    "demo.py": partial(demo.parse_arguments, None),
    "dr2net_d2.anchors": anchors.parse_arguments,
    "dr2net_d2.convert": convert.parse_arguments,
    "dr2net_d2.data": data_commands.parse_arguments,
    "dr2net_d2.export": export.parse_arguments,
    "dr2net_d2.fidelity": fidelity.parse_arguments,
    "dr2net_d2.plan": plan.parse_arguments,
    "dr2net_d2.report": report.parse_arguments,
}
DATA_COMMANDS = ("inspect", "convert", "draw", "sample")
UNTRAINED = ["DATASETS.TRAIN", "()", "DATASETS.TEST", "('small_digits_val_n2_s64_d3',)"]
SMALLER = {
    "demo.py": UNTRAINED,
    "train_net.py": [
        *("DATASETS.TRAIN", "('small_digits_train_n4_s64_d3',)", *UNTRAINED[2:]),
        *("SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0"),
    ],
    "dr2net_d2.anchors": ["DATASETS.TRAIN", "('small_digits_train_n4_s64_d3',)"],
    "dr2net_d2.plan": [
        *("MODEL.VIT.EMBED_DIM", "32", "MODEL.VIT.DEPTH", "2", "MODEL.VIT.NUM_HEADS", "2"),
        *("MODEL.VIT.WINDOW_BLOCK_INDEXES", "[0]"),
    ],
}
"""Overrides that make a command a test's size; the others run as they are."""


def blocks(language, text=TEXT):
    """(whether it needs something, content) of every fenced block."""
    pattern = rf"^(\*Needs [^*]+\.\*\n\n)?```{language}\n(.*?)^```$"
    return [(bool(n), code) for n, code in re.findall(pattern, text, re.DOTALL | re.MULTILINE)]


def commands():
    """(whether it needs something, the program, its arguments) of every command."""
    for needs, code in blocks("bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            names = [word for word in words if word in PARSERS]
            yield needs, *((names[0], words[words.index(names[0]) + 1 :]) if names else (line, []))


def python_pages():
    """Name of a page -> its Python blocks that need nothing."""
    pages = {page.name: blocks("python", page.read_text()) for page in (ROOT / "docs").glob("*.md")}
    codes = {name: [code for needs, code in pages[name] if not needs] for name in sorted(pages)}
    return {name: code for name, code in codes.items() if code}


def spans():
    """Everything set as code within the prose."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", TEXT, flags=re.S | re.M))


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """The quickstart's detector, as its training would leave it."""
    cfg = load_config(str(ROOT / "configs/quickstart.yaml"), [], ENGINE)
    if ENGINE == "detectron2":
        from dr2net_d2.d2 import build_detector as build
    else:
        from dr2net_d2.tv.model import build_model as build
    torch.manual_seed(0)
    model = build(cfg)
    for stack in reversible_stacks(model):
        stack.coefficients.set(0.5, 0.5)
    path = tmp_path_factory.mktemp("detector") / "model_final.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture
def clone(tmp_path, monkeypatch, detector, tmp_path_factory):
    """A folder like that of a user after the quickstart, with a photograph and datasets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    for name, folder in (("visdrone", "datasets/VisDrone"), ("yolo", "my_yolo"), ("voc", "my_voc")):
        Path(folder).mkdir(parents=True)
        FORMATS[name].write_sample(Path(folder))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DR2NET_CACHE", str(tmp_path_factory.getbasetemp() / "docs"))
    if ENGINE == "detectron2":
        from detectron2.data import DatasetCatalog, MetadataCatalog

        for catalog in (DatasetCatalog, MetadataCatalog):
            monkeypatch.setattr(catalog, "data", dict(catalog.data))
    Path("configs").symlink_to(ROOT / "configs")
    canvases = f".cache/dr2net_d2/{small_digits_from_name('small_digits_val').name}/images"
    for folder in ("output/quickstart", "photos", canvases):
        Path(folder).mkdir(parents=True)
    Path("output/quickstart/model_final.pth").symlink_to(detector)
    Path("output/quickstart/inference").mkdir()
    Path("output/quickstart/inference/coco_instances_results.json").write_text("[]")
    Path("output/quickstart/config.yaml").write_text(f"DATASETS: {{TEST: [{UNTRAINED[3][1:-2]}]}}")
    picture = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    for path in ("photo.jpg", "photos/photo.jpg", f"{canvases}/0.png"):
        cv2.imwrite(path, picture)


def test_every_page_is_in_the_navigation():
    def files(entry):
        if isinstance(entry, str):
            return [entry]
        return [file for part in entry for file in files(next(iter(part.values())))]

    listed = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES}
    assert pages == {file for file in listed if not file.startswith("projects/")}
    assert {file for file in listed if file.startswith("projects/")} == {
        page.relative_to(ROOT).as_posix() for page in ROOT.glob("projects/*/README.md")
    }


@pytest.mark.parametrize(("needs", "program", "words"), [*commands()])
def test_commands_are_understood(needs, program, words, clone):
    if program == ". .venv/bin/activate":
        return
    if program.startswith("make "):
        assert program in (ROOT / ".ci/run").read_text()
        return
    args = PARSERS[program](words)
    if program in ("dr2net_d2.data", "dr2net_d2.report"):  # without a config
        return
    if args.config_file is not None and args.config_file.endswith(".py"):
        pytest.importorskip("detectron2")
        from dr2net_d2.d2.lazy_experiment import load_lazy_config

        load_lazy_config(args.config_file, args.opts)
    else:
        load_config(args.config_file, args.opts, ENGINE)


@pytest.mark.parametrize(
    ("program", "words"),
    [(program, words) for needs, program, words in commands() if program in PARSERS and not needs],
)
def test_commands_run(program, words, clone):
    if {"detectron2", "configs/COCO-InstanceSegmentation/mask_rcnn_vitdet_l.yaml"} & {*words}:
        pytest.importorskip("detectron2")
    before = {path for path in Path().rglob("*") if path.is_file()}
    run = {"demo.py": demo, "dr2net_d2.data": data_commands, "train_net.py": train_net}
    wings = {"plan": plan, "fidelity": fidelity, "report": report}
    run |= {f"dr2net_d2.{name}": command for name, command in wings.items()}
    run = run.get(program) or importlib.import_module(program)
    args = PARSERS[program]([*words, *SMALLER.get(program, ())])
    if program in ("dr2net_d2.fidelity", "dr2net_d2.plan"):
        args.image_size = 64
        args.budget_gb = 0.2  # so that plan's search for the largest image ends early
    run.run(args)
    made = {path for path in Path().rglob("*") if path.is_file()} - before
    assert made or "inspect" in words
    if program == "demo.py":
        (drawn,) = Path("drawn").iterdir()
        assert cv2.imread(str(drawn)) is not None
    for folder in ("drawn", "fidelity", "plan", "output/conventional"):
        assert (folder in words) == any(path.is_relative_to(folder) for path in made)


@needs_detectron2
@pytest.mark.parametrize("page", python_pages())
def test_python_blocks_run(page, clone):
    """The blocks of a page one after the other, as a reader would try them."""
    from detectron2.config import LazyCall, instantiate
    from detectron2.modeling.backbone.swin import SwinTransformer

    from dr2net_d2.d2.data import register_dataset
    from dr2net_d2.d2.zoo import zoo_config
    from tests.d2.tiny import YAML

    Path("my_vitdet.yaml").write_text(YAML)
    model = zoo_config("common/models/mask_rcnn_vitdet.py").model
    model.backbone.bottom_up = LazyCall(SwinTransformer)()
    scope = {"model": model, "__name__": "docs"}
    for code in python_pages()[page]:
        exec(code, scope)

    if page == "own_network.md":
        logits = scope["network"](torch.zeros(1, 3, 64, 64))
        assert logits.shape == (1, 1000) and len(reversible_stacks(scope["network"])) == 4
    elif page == "config.md":
        model.backbone.net.update(embed_dim=32, depth=1, num_heads=2, window_block_indexes=[])
        for part in (model.backbone.net, model.backbone.bottom_up):
            assert reversible_stacks(instantiate(part))
        assert instantiate(scope["dr2net"]["schedule"])(1) == (0.75, 0.25)
        cfg = scope["cfg"]
        cfg.merge_from_list(["SOLVER.MAX_ITER", 2, "OUTPUT_DIR", "output", "DATASETS.TEST", ()])
        register_dataset(cfg.DATASETS.TRAIN[0])
        trainer = scope["Trainer"](cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        (stack,) = reversible_stacks(trainer.model)
        assert stack.coefficients.values == (0.5, 0.5)
        assert {type(trainer.optimizer)} == {torch.optim.AdamW}
    elif page == "inference.md":
        assert len(scope["detections"].boxes) == len(scope["detections"].scores)
        assert scope["result"].image_width == 128


@pytest.mark.parametrize(("needs", "text"), blocks("yaml"))
def test_yaml_blocks_are_configs(needs, text, clone):
    """Every key exists and has a value of its type."""
    Path("own.yaml").write_text(text)
    load_config("own.yaml", [], ENGINE)


def test_options_in_the_text_exist(capsys):
    helps = [(parse, ["--help"]) for parse in PARSERS.values()]
    helps += [(data_commands.parse_arguments, [name, "--help"]) for name in DATA_COMMANDS]
    for parse, words in helps:
        with pytest.raises(SystemExit):
            parse(words)
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    named = {option for span in spans() for option in re.findall(r"--[a-z][a-z-]+", span)}
    assert len(named) > 10 and named <= known


@needs_detectron2
def test_keys_in_the_text_exist():
    from dr2net_d2.d2.lazy_experiment import OPTIONAL, load_lazy_config

    cfg = load_config(None, [], "detectron2")
    named = {key for span in spans() for key in re.findall(r"[A-Z]\w*(?:\.[A-Z_0-9]+)+", span)}
    assert len(named) > 30
    for key in named:
        reduce(lambda node, part: node[part], key.split("."), cfg)

    path = "configs/COCO-InstanceSegmentation/mask_rcnn_vitdet_b.py"
    lazy = load_lazy_config(str(ROOT / path), [])
    for span in spans():
        if re.fullmatch(r"(train|dr2net)(\.\w+)+", span):
            parent, _, name = span.rpartition(".")
            node = reduce(lambda node, part: node[part], parent.split("."), lazy)
            assert name in node or name in OPTIONAL[parent], span


@needs_detectron2
def test_names_and_files_in_the_text_exist():
    for span in spans():
        if re.fullmatch(r"dr2net_d2(\.\w+)+", span):
            pkgutil.resolve_name(span)
        elif match := re.match(r"(?:tests|configs|dr2net_d2|projects)/[\w/.-]+\*?", span):
            assert [*ROOT.glob(f"{match[0].rstrip('*')}*")], span


def test_every_shipped_config_is_in_the_table():
    table = (ROOT / "docs/config.md").read_text()
    for path in ROOT.glob("configs/[A-Z]*/*.*"):
        stem, size = path.stem.rsplit("_", 1)
        assert path.stem in table or (f"/{stem}_*" in table and size.lower() in table.lower()), path


UNFORESEEN = (
    "RuntimeError", "FloatingPointError", "OverflowError", "logger.warning", "warnings.warn",
)  # fmt: skip


def messages():
    """(what is called with it, text) of every message in the package; "…" stands for values."""
    for path in (ROOT / "dr2net_d2").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(args=[ast.JoinedStr(values=parts), *_]):
                    values = ("…" if isinstance(p, ast.FormattedValue) else p.value for p in parts)
                    yield ast.unparse(node.func), "".join(values)
                case ast.Call(args=[ast.Constant(value=str(text)), *_]):
                    yield ast.unparse(node.func), re.sub(r"%[dsg]", "…", text)


def test_messages_are_those_of_the_package():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"^- `([^`]+)`", page, re.MULTILINE)
    patterns = {text: ".*?".join(map(re.escape, text.split("…"))) for text in quoted}
    known = [*messages()]
    for text, pattern in patterns.items():
        assert any(re.search(pattern, message) for _, message in known), text
    for function, message in known:
        if function in UNFORESEEN:
            assert any(re.search(pattern, message) for pattern in patterns.values()), message
