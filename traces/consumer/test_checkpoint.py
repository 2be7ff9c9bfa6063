import os

import pytest
from isoshard_pytest import assert_digest, assert_equal, assert_simulates, assert_whole, digest, run

HERE = os.path.dirname(os.path.abspath(__file__))
CHECKPOINT = os.path.join(HERE, os.environ["CHECKPOINT"])


def test_a_checkpoint_is_whole():
    assert_whole(CHECKPOINT)


def test_four_ranks_hold_the_state_of_two(tmp_path):
    run("reshard", CHECKPOINT, tmp_path / "four", "--to", "dp=4,stage=3")
    assert_equal(CHECKPOINT, tmp_path / "four")
    assert_digest(tmp_path / "four", digest(CHECKPOINT))


def test_another_state_is_told_apart():
    with pytest.raises(AssertionError, match="differ"):
        assert_equal(CHECKPOINT, os.path.join(HERE, "../deepspeed/z1_fp32_dp3/ckpt"))
    with pytest.raises(RuntimeError, match="safe now"):
        assert_whole(os.path.join(HERE, "nowhere"))


def test_training_does_not_know_its_ranks():
    assert_simulates("world<=4", cases=5, faults="death")
