import os

import pytest
from isoshard_pytest import (assert_digest, assert_equal, assert_golden, assert_simulates,
                             assert_whole, digest, run)

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


def test_a_golden_folder_is_what_its_description_makes(tmp_path):
    golden = tmp_path / "golden"
    run("golden", "--topology", "dp=2,stage=1", "--model", "tiny", "--steps", 1, "--out", golden)
    assert_golden(golden)
    with open(golden / "golden.h5", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(AssertionError, match="golden.h5"):
        assert_golden(golden)


def test_a_run_that_differs_says_how_to_have_it_again():
    with pytest.raises(AssertionError, match="isoshard replay --seed 3"):
        run("simulate", "--topologies", "dense.dp2", "--cases", 12, "--seed", 3, "--steps", 8,
            "--faults", "death", "--mutant", "ColdMoments", "--no-progress")
