"""The similarity that projects/small_objects/assignment.py compares with IoU."""

import math

import torch

from tests import projects


def test_nwd_by_hand(monkeypatch):
    (assignment,) = projects.load(monkeypatch, "small_objects", "assignment")
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
