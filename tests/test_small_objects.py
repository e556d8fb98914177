"""projects/small_objects: the similarity that is compared with IoU, and the tables of its pages."""

import json
import math
from pathlib import Path

import torch

from dr2net_d2.commands import load_config
from dr2net_d2.plan.planner import training_side
from projects import plans
from projects.small_objects import assignment, report

ENGINE = "torchvision"
PROJECTS = Path(__file__).parents[1] / "projects"


def test_nwd_by_hand():
    a = torch.tensor([[0.0, 0, 10, 20], [5, 5, 9, 9]])
    # The same; 3 px and 4 px away; 8 px wider and 12 px taller around the same centre.
    b = torch.tensor([[0.0, 0, 10, 20], [3, 4, 13, 24], [-4, -6, 14, 26]])
    nwd = assignment.normalized_wasserstein_distance(a, b, constant=10.0)
    assert nwd.shape == (2, 3)
    expected = [1, math.exp(-5 / 10), math.exp(-math.hypot(4, 6) / 10)]
    torch.testing.assert_close(nwd[0], torch.tensor(expected))
    # Centres (7, 7) and (5, 10), half sides 2, 2 and 5, 10.
    far = math.exp(-math.sqrt(2**2 + 3**2 + 3**2 + 8**2) / 10)
    torch.testing.assert_close(nwd[1, 0], torch.tensor(far))


def test_tables_are_those_of_the_raw_results():
    page = (PROJECTS / "small_objects" / "README.md").read_text()
    for name, table in report.TABLES.items():
        assert f"<!-- {name} -->\n{table()}\n<!-- /{name} -->" in page
    assert report.headline() in (PROJECTS.parent / "docs/small_objects.md").read_text()


def test_plans_are_those_of_the_configs():
    for project in plans.OBJECTS:
        folder = PROJECTS / project
        rows = json.loads((folder / "plans.json").read_text())
        assert plans.table(rows) in (folder / "README.md").read_text()
        assert [row["config"] for row in rows] == sorted(
            path.stem for path in (folder / "configs").iterdir()
        )
        for row in rows:
            cfg = load_config(str(folder / "configs" / f"{row['config']}.yaml"), [], ENGINE)
            assert row["iterations"] == cfg.SOLVER.MAX_ITER
            assert row["batch_size"] == cfg.SOLVER.IMS_PER_BATCH
            assert row["image_size"] == training_side(cfg) == cfg.INPUT.LSJ.IMAGE_SIZE
            assert row["peak"]["dr2net"] < 0.9 * row["card"]["gigabytes"] * 2**30
