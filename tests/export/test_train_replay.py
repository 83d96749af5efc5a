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


def filled(folder, lengths, capacity=16):
    replay = ReplayBuffer(folder, capacity, D)
    episodes, first = [], 0
    for length in lengths:
        replay.add(trajectory(length, first), score=100.0 + first)
        episodes.append(range(first, first + length))
        first += length
    return replay, episodes


def saved(replay: ReplayBuffer) -> dict:
    """What a checkpoint keeps of it."""
    state = replay.state()
    replay.flush()
    replay.saved(state)
    return state


def on_disk(folder) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_bytes_per_transition(tmp_path) -> None:
    """Each state is stored once, as float16; a full buffer takes an eighth more than its capacity at most."""
    replay, _ = filled(tmp_path, [4], capacity=64)
    assert on_disk(tmp_path) == 4 * 2 * D
    assert ReplayBuffer.bytes_per_transition(D) == 2 * D + 13 == 2 * D + len(replay.state()["rows"]) / 4
    for number in range(100):
        replay.add(trajectory(4, 4 * number), score=0.0)
        saved(replay)
    assert 64 * 2 * D <= on_disk(tmp_path) <= (64 + 8 + 4) * 2 * D


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


def test_a_round_larger_than_the_buffer_leaves_its_last_transitions(tmp_path) -> None:
    replay, _ = filled(tmp_path, [10, 20, 7])
    batch = replay.sample(np.random.default_rng(0), 500, 1)
    assert set(batch.states[:, 0].tolist()) == set(range(37 - 16, 37))


def test_transitions_of_a_checkpoint_survive_what_follows_it(tmp_path) -> None:
    """A run that is killed resumes with the contents of its checkpoint."""
    replay, _ = filled(tmp_path, [8, 8])
    state = saved(replay)
    before = replay.sample(np.random.default_rng(1), 64, 4)
    for number in range(9):  # nothing is removed before the next checkpoint
        replay.add(trajectory(3, 16 + 3 * number), score=0.0)
    with replay._files[-1].path.open("ab") as file:
        file.write(b"cut o")
    again = ReplayBuffer(tmp_path, 16, D, state)
    after = again.sample(np.random.default_rng(1), 64, 4)
    for name, was in vars(before).items():
        assert np.array_equal(was, getattr(after, name)), name
    assert on_disk(tmp_path) == 16 * 2 * D
    again.add(trajectory(3, 16), score=0.0)
    assert len(again) == 16


def test_the_capacity_may_change_from_checkpoint_to_checkpoint(tmp_path) -> None:
    replay, _ = filled(tmp_path, [8, 8, 8])
    for capacity, add, numbers in ((8, 0, range(16, 24)), (100, 9, range(16, 33)), (4, 1, range(30, 34))):
        replay = ReplayBuffer(tmp_path, capacity, D, saved(replay))
        if add:
            replay.add(trajectory(add, replay.added), score=0.0)
        batch = replay.sample(np.random.default_rng(0), 1000, 2)
        assert set(batch.states[:, 0].tolist()) == set(numbers)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "folder"])
def test_a_damaged_file_is_named_and_left_alone(tmp_path, damage) -> None:
    replay, _ = filled(tmp_path, [8, 8])
    state = saved(replay)
    file = sorted(tmp_path.iterdir())[1]
    content = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "gone":
        changed = content[:-2] if damage == "cut" else content[:5] + bytes([content[5] ^ 16]) + content[6:]
        file.write_bytes(changed)
    with pytest.raises(MaraError, match=rf"{file.name} is damaged .*--init-agent"):
        ReplayBuffer(tmp_path, 16, D, state)
    if damage in ("flip", "cut"):
        assert file.read_bytes() == changed
