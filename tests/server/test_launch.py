from drafters.proposal import Budget
from server.launch import slot_capacity


def test_a_slot_holds_the_largest_tree_below_the_last_position() -> None:
    assert slot_capacity(100, [Budget(rows=16, top_k=2, depth=5)]) == 116
    assert slot_capacity(100, [Budget(rows=8, top_k=10, depth=7)]) == 170, "the drafter keeps every row it expanded"
