"""Who teaches whom: rows of weights, who is asked about which samples, and a loop that only knows alpha."""

import pytest
import torch

from opd import routing
from opd.conditioning import TextBatch
from opd.data import MicroBatch
from opd.teachers import Panel
from opd.trajectory import State


def test_rows_and_anchored_by_hand():
    routed = routing.rows(["b", "a", "b"], ["a", "b", "c"])
    assert routed.tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0]]
    assert routing.anchored(routed, 1, 0.5).tolist() == [[0, 1.5, 0], [1, 0.5, 0], [0, 1.5, 0]]
    assert routed.tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0]]  # the routing itself is left alone


def state_of(x):
    batch = len(x)
    return State(0, x, torch.full((batch,), 0.5), None, 0, torch.arange(batch))


def teacher_of(name, asked):
    """A teacher whose velocity is its own factor times the state, and that notes whom it was asked about."""

    def velocity(x, sigma_B, texts):
        asked.append((name, texts.prompts))
        assert len(x) == len(sigma_B) == len(texts)
        return {"a": 2.0, "b": 3.0, "c": 5.0}[name] * x

    return velocity


def panel_of(alpha, batch, asked, prompts):
    teachers = {name: teacher_of(name, asked) for name in "abc"}
    return Panel(teachers, torch.tensor(alpha), batch, TextBatch(prompts), torch.device("cpu"))


def test_a_teacher_sees_the_samples_whose_alpha_is_not_0():
    asked = []
    alpha = [[1.0, 0.1, 0.0], [0.0, 1.1, 0.0], [0.5, 0.6, 0.0]]
    panel = panel_of(alpha, MicroBatch([0, 1, 2], [1, 1, 1], [0, 1, 2]), asked, ["r", "s", "t"])
    x = torch.arange(1.0, 7.0).view(3, 2)
    a, b, c = panel.targets(state_of(x))
    assert asked == [("a", ["r", "t"]), ("b", ["r", "s", "t"])] and c is None
    assert a.tolist() == [[2, 4], [0, 0], [10, 12]] and torch.equal(b, 3 * x)
    assert torch.equal(panel.alpha_BK, torch.tensor(alpha))


def test_a_teacher_of_other_ranks_samples_runs_here_too_and_counts_for_nothing():
    asked = []
    alpha = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    panel = panel_of(alpha, MicroBatch([0], [1], [0, 1]), asked, ["r"])
    a, b, c = panel.targets(state_of(torch.ones(1, 2)))
    assert asked == [("a", ["r"]), ("b", ["r"])]
    assert a.tolist() == [[2, 2]] and b.tolist() == [[0, 0]] and c is None
    assert panel.alpha_BK.tolist() == [[1, 0, 0]]


def test_padding_has_no_teacher():
    asked = []
    panel = panel_of([[1.0, 0.5, 0.0]], MicroBatch([0], [0], [0, 0]), asked, ["r"])
    assert panel.alpha_BK.tolist() == [[0, 0, 0]]
    targets = panel.targets(state_of(torch.ones(1, 2)))
    assert len(asked) == 2 and [t is None for t in targets] == [False, False, True]


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_ranks_ask_in_the_same_order_whatever_they_hold(order):
    alpha = [[1.0, 0.0, 0.2], [0.0, 1.0, 0.2]]
    calls = []
    for sample in order:
        asked = []
        panel = panel_of(alpha, MicroBatch([sample], [1], order), asked, ["r"])
        panel.targets(state_of(torch.ones(1, 2)))
        calls.append([name for name, _ in asked])
    assert calls[0] == calls[1] == ["a", "b", "c"]
