#!/usr/bin/env python
"""Run a trained detector on images, videos or a webcam, and draw its detections.

    python demo.py --config-file configs/quickstart.yaml --input photos --output drawn \\
        MODEL.WEIGHTS output/quickstart/model_final.pth
    python demo.py --config-file F --input street.mp4 --output street_drawn.mp4 KEY VALUE ...
    python demo.py --config-file F --webcam --confidence-threshold 0.7 KEY VALUE ...

Without --output a window opens: any key shows the next image, Esc or q quits.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dr2net_d2.errors import run_command
from dr2net_d2.inference.demo import parse_arguments, run


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("demo.py", run, parse_arguments(__doc__, argv))


if __name__ == "__main__":
    sys.exit(main())
