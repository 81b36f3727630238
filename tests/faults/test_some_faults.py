"""A few of the faults of `test_faults.py`, for the ordinary suite: on S3, for about three minutes."""

import pytest
from blows import KILLS, STORAGE, Blow
from runs import Moment

pytestmark = pytest.mark.timeout(900)


@pytest.mark.faults  # PPO's, below, kills a rank and ends the flow too
def test_sft_ends_with_the_same_bits_after_a_rank_and_the_flow_were_killed(chain):
    chain("sft").strike(
        [
            Blow(KILLS["kill -9 of rank 1"], Moment("train", 12, 0.1)),
            Blow(KILLS["kill -9 of the flow"], Moment("train", 20, 0.3)),
        ]
    )


def test_ppo_ends_with_the_same_bits_after_kills_in_its_phases_and_of_the_server(chain):
    chain("ppo").strike(
        [
            Blow(KILLS["kill -9 of rank 0"], Moment("score", 4)),
            Blow(KILLS["SIGTERM to the flow"], Moment("update", 4, 0.1)),
            Blow(STORAGE["kill -9 of the server"], Moment("rollout", 4, 0.2)),
        ]
    )
