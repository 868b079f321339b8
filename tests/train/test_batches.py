from granvit.train.batches import Order
from granvit.train.stages import Stage


def stage(name: str = "pretrain", size: int = 4) -> Stage:
    return Stage(name, train=("llm",), tasks=("bbox2caption",), steps=100, batch_images=size)


def test_every_row_comes_once_an_epoch_also_where_batches_cross_epochs():
    order = Order(10, stage(size=4), seed=0)
    rows = [row for step in range(1, 16) for row in order.rows(step)]
    for epoch in range(6):
        assert sorted(rows[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert rows[:10] != rows[10:20]


def test_the_order_is_a_function_of_seed_stage_and_step():
    first = [Order(50, stage(), seed=3).rows(step) for step in range(1, 40)]
    later = Order(50, stage(), seed=3)
    assert later.rows(30) == first[29] and later.rows(2) == first[1]
    assert Order(50, stage(), seed=4).rows(1) != first[0]
    assert Order(50, stage("adapt"), seed=3).rows(1) != first[0]


def test_a_batch_larger_than_the_data_repeats_it():
    assert sorted(Order(3, stage(size=7), seed=0).rows(1)) in ([0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 2, 2],
        [0, 0, 1, 1, 2, 2, 2])  # fmt: skip
