"""What processes that work together tell each other; how they train: tests/train/parallel."""

import ranks
from launching import run_ranks


def test_the_rank_that_others_wait_for_is_named_once(tmp_path):
    run_ranks(ranks.dally, 3, tmp_path)
    said = [(tmp_path / f"log-{rank}").read_text().splitlines() for rank in range(3)]
    assert said[1:] == [[], []] and len(said[0]) == 1
    assert said[0][0].startswith("rank 1: waited for by 2 others")
