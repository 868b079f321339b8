"""What processes that work together tell each other; how they train: tests/train/parallel."""

import os

import pytest
import ranks
from launching import run_ranks

from granvit import world

RECORDER = ("TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")


def test_the_rank_that_others_wait_for_is_named_once(tmp_path):
    run_ranks(ranks.dally, 3, tmp_path)
    said = [(tmp_path / f"log-{rank}").read_text().splitlines() for rank in range(3)]
    assert said[1:] == [[], []] and len(said[0]) == 1
    assert said[0][0].startswith("rank 1: waited for by 2 others")


def test_nccl_records_its_collectives_before_its_group_is_made_unless_the_user_says_otherwise(monkeypatch):
    def environment(**given: str) -> list[str | None]:
        for name in RECORDER:
            monkeypatch.delenv(name, raising=False)
        for name, value in {"WORLD_SIZE": "2", "RANK": "0", **given}.items():
            monkeypatch.setenv(name, value)
        seen = []

        def make(backend: str) -> None:
            seen.extend(os.environ.get(name) for name in RECORDER)
            raise InterruptedError

        monkeypatch.setattr(world.dist, "init_process_group", make)
        with pytest.raises(InterruptedError):
            world.start("cpu")
        return seen

    assert environment() == ["1", "2000", None]
    assert environment(TORCH_FR_BUFFER_SIZE="9") == ["1", "9", None]
    assert environment(TORCH_NCCL_TRACE_BUFFER_SIZE="0", TORCH_NCCL_DUMP_ON_TIMEOUT="0") == ["0", None, "0"]
