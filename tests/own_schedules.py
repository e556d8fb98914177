"""A user's module with schedules, for configs that name one."""

import sys
import textwrap

MODULE = """
    import math

    from dr2net_d2.core.schedule import snap_to_grid


    class Cosine:
        def __init__(self, end_beta, duration):
            self.end_beta, self.duration = end_beta, duration

        def __call__(self, progress):
            moved = min(progress / self.duration, 1)
            beta = snap_to_grid(self.end_beta * (1 - math.cos(math.pi * moved)) / 2)
            return 1 - beta, beta


    BLOCKS = 2


    def late_blocks_first(progress):
        betas = []
        for block in range(BLOCKS):
            waits = (BLOCKS - 1 - block) / BLOCKS
            betas.append(snap_to_grid(min(max(progress - waits, 0) * BLOCKS, 1) / 2))
        return [1 - beta for beta in betas], betas


    def too_large(progress):
        return 1 - progress, 1.5 * progress


    def too_large_between(progress):
        return 0.5, 0.5 + 4 * progress * (1 - progress)


    def one_number(progress):
        return 0.5


    def three_blocks(progress):
        return [0.5] * 3, [0.5] * 3


    class NeedsPeriod:
        def __init__(self, period):
            self.period = period


    class NotCallable:
        pass


    NUMBER = 0.5
"""


def write_module(folder, monkeypatch, name="my_schedules"):
    """Make ``MODULE`` importable as ``name`` until the end of the test."""
    (folder / f"{name}.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
