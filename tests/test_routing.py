"""Who teaches whom: rows of weights, who is asked about which samples, and a loop that only knows alpha."""

import torch

from opd import routing
from opd.data import MicroBatch
from opd.teachers import ask, mean_velocity, teacher_queries
from opd.trajectory import State


def test_rows_and_anchored_by_hand():
    routed = routing.rows(["b", "a", "b"], ["a", "b", "c"])
    assert routed.tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0]]
    assert routing.anchored(routed, 1, 0.5).tolist() == [[0, 1.5, 0], [1, 0.5, 0], [0, 1.5, 0]]
    assert routed.tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0]]  # the routing itself is left alone


def state_of(x):
    batch = len(x)
    return State(0, x, torch.full((batch,), 0.5), None, 0, torch.arange(batch))


FACTORS = {"a": 2.0, "b": 3.0, "c": 5.0}


def asked_about(alpha, batch, x, prompts):
    """(what each of three teachers says, whom each was asked about, the queries)."""
    asked = []

    def teacher(name):
        def velocity(x, sigma_B, prompts):
            asked.append((name, prompts))
            assert len(x) == len(sigma_B) == len(prompts)
            return FACTORS[name] * x

        return velocity

    queries = teacher_queries(torch.tensor(alpha), batch, torch.device("cpu"))
    return ask([teacher(name) for name in FACTORS], queries, state_of(x), prompts), asked, queries


def test_a_teacher_sees_the_samples_whose_alpha_is_not_0():
    alpha = [[1.0, 0.1, 0.0], [0.0, 1.1, 0.0], [0.5, 0.6, 0.0]]
    x = torch.arange(1.0, 7.0).view(3, 2)
    batch = MicroBatch([0, 1, 2], [1, 1, 1], [0, 1, 2])
    (a, b, c), asked, queries = asked_about(alpha, batch, x, ["r", "s", "t"])
    assert asked == [("a", ["r", "t"]), ("b", ["r", "s", "t"])] and c is None
    assert a.tolist() == [[2, 4], [0, 0], [10, 12]] and torch.equal(b, 3 * x)
    assert torch.equal(queries.alpha_BK, torch.tensor(alpha))


def test_a_teacher_of_other_ranks_samples_runs_here_too_and_counts_for_nothing():
    alpha = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    (a, b, c), asked, queries = asked_about(alpha, MicroBatch([0], [1], [0, 1]), torch.ones(1, 2), ["r"])
    assert asked == [("a", ["r"]), ("b", ["r"])]
    assert a.tolist() == [[2, 2]] and b.tolist() == [[0, 0]] and c is None
    assert queries.alpha_BK.tolist() == [[1, 0, 0]]


def test_padding_has_no_teacher():
    batch = MicroBatch([0], [0], [0, 0])
    targets, asked, queries = asked_about([[1.0, 0.5, 0.0]], batch, torch.ones(1, 2), ["r"])
    assert queries.alpha_BK.tolist() == [[0, 0, 0]]
    assert len(asked) == 2 and [t is None for t in targets] == [False, False, True]


def test_teachers_together_take_the_mean_step():
    targets = [torch.full((2, 3), 4.0), None, torch.full((2, 3), 1.0)]
    alpha_BK = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]])
    assert mean_velocity(targets, alpha_BK).tolist() == [[2.0] * 3, [1.0] * 3]
