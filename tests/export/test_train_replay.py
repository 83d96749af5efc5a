"""The replay memory: what it keeps, what it hands out, what it survives."""

from __future__ import annotations

import numpy as np
import pytest

from mara_deploy.train.environment import Chain
from mara_deploy.train.replay import Replay
from mara_runtime.errors import MaraError

D = 3


def chain(length: int, first: int) -> Chain:
    """Links that can be told apart: link i has the number first + i in its state and its margin."""
    number = np.arange(first, first + length)
    return Chain(
        np.repeat(number[:, None], D, 1).astype(np.float16),
        number % 2 == 0,
        number.astype(np.float32),
        -number.astype(np.float32),
        number % 3 == 0,
    )


def filled(folder, lengths, capacity=16, checkpoint=True):
    replay = Replay(folder, capacity, D)
    episodes, first = [], 0
    for length in lengths:
        replay.add(chain(length, first), score=100.0 + first)
        episodes.append(range(first, first + length))
        first += length
        if checkpoint:
            replay.saved()
    return replay, episodes


@pytest.mark.parametrize("hidden_size", [128, 1024, 4096])
def test_bytes_of_a_transition(tmp_path, hidden_size) -> None:
    """Each state is stored once: at most 1.2 times its own size and 64 bytes, the reserve included; on the disk too."""
    capacity = 1000
    Replay(tmp_path, capacity, hidden_size)
    stored = sum(file.stat().st_size for file in tmp_path.iterdir()) - 5 * 128  # the headers of five .npy files
    assert stored == Replay.row_bytes(hidden_size) * (capacity + capacity // 8)
    assert stored / capacity <= 1.2 * hidden_size * 2 + 64


@pytest.mark.parametrize("n_step", [1, 3, 8])
@pytest.mark.parametrize("lengths", [[5], [4, 1, 6], [*[6] * 15, 3, 1]], ids=["one", "three", "more than it holds"])
def test_batches_are_links_of_the_chains(tmp_path, lengths, n_step) -> None:
    replay, episodes = filled(tmp_path, lengths, capacity=64)
    total = sum(lengths)
    kept = range(max(0, total - replay.capacity), total)
    episode_of = {link: episode for episode in episodes for link in episode}
    batch = replay.sample(np.random.default_rng(0), 1000, n_step)
    seen = set()
    for i in range(1000):
        start = int(batch.states[i, 0])
        seen.add(start)
        links = [link for link in range(start, start + n_step) if link in episode_of[start]]
        last = episode_of[start][-1]
        assert batch.inside[i].tolist() == [k < len(links) for k in range(n_step)]
        inside = batch.inside[i]
        assert batch.margins[i][inside].tolist() == links
        assert batch.reference[i][inside].tolist() == [-link for link in links]
        assert batch.accepted[i] == (start % 2 == 0)
        assert batch.forced[i][inside].tolist() == [link % 3 == 0 for link in links]
        score = 100.0 + episode_of[start][0]
        assert batch.scores[i][inside].tolist() == [score * (link == last) for link in links]
        assert batch.ended[i] == (last in links)
        if not batch.ended[i]:
            assert batch.next_states[i].tolist() == [start + n_step] * D
            assert batch.next_reference[i] == -(start + n_step)
            assert batch.next_forced[i] == ((start + n_step) % 3 == 0)
    assert seen == set(kept)


def test_states_are_kept_as_float16(tmp_path) -> None:
    replay, _ = filled(tmp_path, [4])
    assert replay.sample(np.random.default_rng(0), 4, 1).states.dtype == np.float32
    assert np.load(tmp_path / "states.npy", mmap_mode="r").dtype == np.float16


def test_what_a_checkpoint_counts_on_is_not_written_over(tmp_path) -> None:
    """A run that is killed goes on from its checkpoint: the ring's contents are then as they were."""
    replay, _ = filled(tmp_path, [8, 8])  # full, and saved
    replay.flush()
    before = replay.sample(np.random.default_rng(1), 64, 4)
    assert replay.room == 2
    replay.add(chain(2, 16), score=0.0)
    with pytest.raises(MaraError, match="1 transitions are more than the 0 that"):
        replay.add(chain(1, 18), score=0.0)

    again = Replay(tmp_path, 16, D, added=16)
    after = again.sample(np.random.default_rng(1), 64, 4)
    for name, was in vars(before).items():
        now = getattr(after, name)
        if was.ndim == 2 and was.shape == before.inside.shape:  # behind an episode's end there may be anything
            was, now = was[before.inside], now[after.inside]
        assert np.array_equal(was, now), name

    replay.saved()  # a checkpoint makes room
    assert replay.room == 2


def test_before_the_first_checkpoint_everything_may_be_used(tmp_path) -> None:
    replay, _ = filled(tmp_path, [10, 8], checkpoint=False)
    assert len(replay) == 16
    assert replay.room == 0


def test_files_of_another_run_are_refused(tmp_path) -> None:
    filled(tmp_path, [4])
    with pytest.raises(MaraError, match="not this run's replay memory"):
        Replay(tmp_path, 32, D, added=4)
    (tmp_path / "flags.npy").write_bytes(b"no array")
    with pytest.raises(MaraError, match="cannot be opened"):
        Replay(tmp_path, 16, D, added=4)
