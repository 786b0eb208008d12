import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgrad._drawing.layered import _apart, layout
from jaxgrad._drawing.nodes import Diagram, Edge, Node

floats = st.floats(-100, 100)


def chain(*pairs, leaves=()):
    keys = dict.fromkeys(k for pair in pairs for k in pair)
    nodes = {k: Node(k, "param" if k in leaves else "op", k) for k in keys}
    return Diagram(nodes, [Edge(a, b, "", False, False) for a, b in pairs])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(floats, st.floats(1, 20), st.floats(0.5, 4)), min_size=1, max_size=6))
def test_places_keep_their_gaps_and_are_the_nearest(items):
    wanted, gaps, weights = (list(column) for column in zip(*items, strict=True))
    gaps = gaps[1:]
    places = _apart(wanted, gaps, weights)
    assert (np.diff(places) >= np.array(gaps) - 1e-9).all()

    def distance(xs):
        return float((np.array(weights) * (np.array(xs) - wanted) ** 2).sum())

    for shift in (-0.1, 0.1):  # moving the end of the row further along is no better
        for i in range(len(places)):
            moved = [x + shift * (j >= i if shift > 0 else j <= i) for j, x in enumerate(places)]
            assert distance(moved) >= distance(places) - 1e-6


def test_a_chain_is_straight_and_its_leaves_are_at_the_left():
    diagram = chain(("a", "b"), ("w", "b"), ("b", "c"), ("a", "c"), leaves=("w",))
    placed = layout(diagram)
    np.testing.assert_allclose([placed.boxes[k].x for k in "abc"], 0, atol=0.01)
    assert placed.boxes["a"].y < placed.boxes["b"].y < placed.boxes["c"].y
    leaf, reader = placed.boxes["w"], placed.boxes["b"]
    assert leaf.x + leaf.width / 2 < reader.x - reader.width / 2 and leaf.y == reader.y
    detour = placed.routes[3].points  # a to c goes around b, at the right
    assert max(x for x, _ in detour) > reader.x + reader.width / 2
    assert [r.sideways for r in placed.routes] == [False, True, False, False]
