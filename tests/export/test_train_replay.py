"""The replay buffer: what it stores, what it samples, and that a checkpoint's transitions survive."""

from __future__ import annotations

import numpy as np
import pytest

from mara_deploy.train.environment import Trajectory
from mara_deploy.train.replay import ReplayBuffer
from mara_runtime.errors import MaraError

D = 3


def trajectory(length: int, first: int) -> Trajectory:
    """Transition i has the number first + i as its state and its margin."""
    number = np.arange(first, first + length)
    return Trajectory(
        np.repeat(number[:, None], D, 1).astype(np.float16),
        number % 2 == 0,
        number.astype(np.float32),
        -number.astype(np.float32),
        number % 3 == 0,
    )


def filled(folder, lengths, capacity=16, checkpoint=True):
    replay = ReplayBuffer(folder, capacity, D)
    episodes, first = [], 0
    for length in lengths:
        replay.add(trajectory(length, first), score=100.0 + first)
        episodes.append(range(first, first + length))
        first += length
        if checkpoint:
            replay.saved()
    return replay, episodes


def test_bytes_per_transition(tmp_path) -> None:
    """Each state is stored once, as float16: on the disk, with the reserve, at most 1.2 times its size and 64 bytes."""
    capacity = 1000
    for hidden_size in (128, 4096):
        folder = tmp_path / str(hidden_size)
        ReplayBuffer(folder, capacity, hidden_size)
        stored = sum(file.stat().st_size for file in folder.iterdir()) - 5 * 128  # the headers of five .npy files
        assert stored == ReplayBuffer.bytes_per_transition(hidden_size) * (capacity + capacity // 8)
        assert stored / capacity <= 1.2 * hidden_size * 2 + 64


@pytest.mark.parametrize(
    ("lengths", "n_step"),
    [([5], 8), ([4, 1, 6], 3), ([*[6] * 15, 3, 1], 1), ([*[6] * 15, 3, 1], 3)],
    ids=["one episode", "three", "one step", "more than fit"],
)
def test_batches_follow_the_trajectories(tmp_path, lengths, n_step) -> None:
    replay, episodes = filled(tmp_path, lengths, capacity=64)
    total = sum(lengths)
    episode_of = {number: episode for episode in episodes for number in episode}
    batch = replay.sample(np.random.default_rng(0), 1000, n_step)
    seen = set()
    for i in range(1000):
        start = int(batch.states[i, 0])
        seen.add(start)
        numbers = [number for number in range(start, start + n_step) if number in episode_of[start]]
        last = episode_of[start][-1]
        inside = batch.inside[i]
        assert inside.tolist() == [k < len(numbers) for k in range(n_step)]
        assert batch.margins[i][inside].tolist() == numbers
        assert batch.reference[i][inside].tolist() == [-number for number in numbers]
        assert batch.accepted[i] == (start % 2 == 0)
        assert batch.forced[i][inside].tolist() == [number % 3 == 0 for number in numbers]
        score = 100.0 + episode_of[start][0]
        assert batch.scores[i][inside].tolist() == [score * (number == last) for number in numbers]
        assert batch.ended[i] == (last in numbers)
        if not batch.ended[i]:
            assert batch.next_states[i].tolist() == [start + n_step] * D
            assert batch.next_reference[i] == -(start + n_step)
            assert batch.next_forced[i] == ((start + n_step) % 3 == 0)
    assert seen == set(range(max(0, total - replay.capacity), total))


def test_transitions_of_a_checkpoint_are_not_overwritten(tmp_path) -> None:
    """A run that is killed resumes with the contents of its checkpoint."""
    unsaved, _ = filled(tmp_path / "unsaved", [10, 8], checkpoint=False)
    assert (len(unsaved), unsaved.room) == (16, 0)  # before the first checkpoint everything may be used
    replay, _ = filled(tmp_path, [8, 8])  # full, and saved
    replay.flush()
    before = replay.sample(np.random.default_rng(1), 64, 4)
    assert replay.room == 2
    replay.add(trajectory(2, 16), score=0.0)
    with pytest.raises(MaraError, match="1 transitions exceed the 0 "):
        replay.add(trajectory(1, 18), score=0.0)

    after = ReplayBuffer(tmp_path, 16, D, added=16).sample(np.random.default_rng(1), 64, 4)
    for name, was in vars(before).items():
        now = getattr(after, name)
        if was.shape == before.inside.shape:  # anything may follow the end of an episode
            was, now = was[before.inside], now[after.inside]
        assert np.array_equal(was, now), name

    replay.saved()  # a checkpoint makes room
    assert replay.room == 2


def test_files_of_another_run_are_refused(tmp_path) -> None:
    filled(tmp_path, [4])
    with pytest.raises(MaraError, match=r"states\.npy is not the replay buffer of this run"):
        ReplayBuffer(tmp_path, 32, D, added=4)
    (tmp_path / "flags.npy").write_bytes(b"no array")
    with pytest.raises(MaraError, match="cannot be opened"):
        ReplayBuffer(tmp_path, 16, D, added=4)
