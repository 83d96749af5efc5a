"""benchmarks/board.py: facts, power and energy, from a stand-in for nvidia-smi and from the files of a Jetson."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import board
from benchmarks.board import Meter, NoBoard, Sample, find, joules, total

ROOT = Path(__file__).resolve().parents[2]
FACTS = "RTX 6000 Ada, 580.65.06, 8.9, 49140, P8, 300.00, [N/A], Off, Disabled, 34, 210, 3105, 405, 10001\n"


def nothing(command):
    raise FileNotFoundError(command[0])


def failing(command):
    raise subprocess.CalledProcessError(9, command, "NVIDIA-SMI has failed.\nMake sure that …\n", "")


def smi(command):
    text = " ".join(command)
    if "power.limit" in text:
        return FACTS
    return "RTX 6000 Ada\n" if "query-gpu=name" in text else "| Driver Version: 580.65.06  CUDA Version: 13.0  |\n"


def put(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n" if name.startswith("sys") else str(text), encoding="utf-8")
    return root


def monitor(number: int, rails: list[tuple[str, int, int]]) -> dict[str, object]:
    """Files of an ina3221: (rail, mV, mA) of its channels; the last is the sum of shunts, which has no current."""
    chip = f"sys/class/hwmon/hwmon{number}"
    files: dict[str, object] = {f"{chip}/name": "ina3221", f"{chip}/in7_label": "sum of shunt voltages"}
    for i, (name, millivolts, milliamperes) in enumerate(rails, 1):
        files[f"{chip}/in{i}_label"] = name
        files[f"{chip}/in{i}_input"], files[f"{chip}/curr{i}_input"] = millivolts, milliamperes
    return files


ORIN_NANO = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit Super\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, DATE: Wed Jan  8 2025\n",
    "proc/meminfo": "MemTotal:        7802996 kB\nMemFree:  1 kB\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": 1020000000,
    "sys/class/devfreq/17000000.gpu/min_freq": 306000000,
    "sys/class/devfreq/17000000.gpu/max_freq": 1020000000,
    "sys/class/devfreq/15480000.nvdec/cur_freq": 1,
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": 1728000,
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": 1728000,
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil",
    "sys/class/hwmon/hwmon0/name": "cpu_thermal",
    **monitor(1, [("VDD_IN", 5000, 1500), ("VDD_CPU_GPU_CV", 5000, 400), ("VDD_SOC", 5000, 300)]),
}
AGX_ORIN = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    **monitor(3, [("VDD_GPU_SOC", 19000, 300), ("VDD_CPU_CV", 19000, 100), ("VIN_SYS_5V0", 5000, 800)]),
    **monitor(4, [("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 5000, 200), ("NC", 0, 0)]),
}


@pytest.mark.parametrize(
    ("run", "named"),
    [(nothing, "no nvidia-smi"), (failing, "NVIDIA-SMI has failed."), (lambda _: "\n", "lists no GPU")],
)
def test_without_a_board_the_reason_is_given(tmp_path, run, named):
    with pytest.raises(NoBoard, match=named):
        find(tmp_path, run)


def test_the_command_without_a_gpu_is_one_line():
    """As gpu.sh calls it."""
    try:
        find()
    except NoBoard:
        command = [sys.executable, str(ROOT / "benchmarks" / "board.py")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    else:
        pytest.skip("this machine has a GPU")


def test_facts_of_nvidia_smi(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    facts = find(tmp_path, lambda command: commands.append(command) or smi(command)).facts()
    assert any("--id=3" in command for command in commands)  # the GPU that CUDA takes
    expected = {
        "kind": "gpu", "name": "RTX 6000 Ada", "driver": "580.65.06", "compute_capability": "8.9", "memory_mib": 49140,
        "driver_cuda": "13.0", "power_limit_w": 300, "sm_mhz": 210, "sm_max_mhz": 3105, "persistence_mode": None,
    }  # fmt: skip
    assert {name: facts[name] for name in expected} == expected
    assert list(facts["unread"]) == ["persistence_mode"]


def test_facts_of_a_jetson(tmp_path):
    for name in ("proc/device-tree/model", "etc/nv_tegra_release"):  # either file tells; Thor has nvidia-smi, too
        assert find(put(tmp_path / name.replace("/", "-"), {name: ORIN_NANO[name]}), smi).facts()["kind"] == "jetson"
    facts = find(put(tmp_path, ORIN_NANO), lambda _: "NV Power Mode: MAXN_SUPER\n2\n").facts()
    expected = {
        "kind": "jetson", "name": "NVIDIA Jetson Orin Nano Developer Kit Super", "l4t": "36.4.3", "memory_mib": 7620,
        "power_mode": "MAXN_SUPER (2)", "gpu_mhz": 1020, "gpu_min_mhz": 306, "gpu_max_mhz": 1020, "cpu_mhz": 1728,
        "rails_w": {"VDD_IN": 7.5, "VDD_CPU_GPU_CV": 2.0, "VDD_SOC": 1.5},
    }  # fmt: skip
    assert {name: facts[name] for name in expected} == expected
    assert list(facts["unread"]) == ["memory_mhz"]
    for run in (nothing, failing, lambda _: "\n"):
        facts = find(tmp_path, run).facts()
        assert facts["power_mode"] is None
        assert "nvpmodel" in facts["unread"]["power_mode"]


def test_power_of_a_module(tmp_path):
    assert total({"VDD_IN": 7.5, "VDD_SOC": 1.5}) == 7.5
    assert total({"VIN": 40.0, "VDD_GPU": 20.0}) == 40.0
    assert total({"VDD_GPU": 20.0}) is None  # of an unknown module: a part is not the whole
    jetson = find(put(tmp_path, AGX_ORIN), nothing)
    assert total(jetson.rails()) == pytest.approx(5.7 + 1.9 + 4.0)  # VDDQ hangs on VIN_SYS_5V0


@pytest.mark.parametrize(
    ("readings", "energy"),
    [
        ([(0.0, 10.0), (10.0, 20.0)], 150.0),
        ([(1.0, 10.0), (9.0, 10.0)], 100.0),
        ([(1.0, 10.0)], None),
        ([(8.0, 10.0), (9.0, 10.0)], None),  # a tenth of the time is no evidence of the rest
    ],
)
def test_energy_is_the_area_under_the_readings(readings, energy):
    assert joules(readings, 0.0, 10.0) == energy


def test_the_meter_reads_in_the_background_and_stops():
    class Steady:
        closed = False

        def samples(self):
            try:
                while True:
                    yield Sample(time.monotonic(), 50.0, 1000.0)
                    time.sleep(0.001)
            finally:
                self.closed = True

    steady = Steady()
    with Meter(steady) as meter:
        time.sleep(0.03)
        started = time.monotonic()
        time.sleep(0.2)
        ended = time.monotonic()
        time.sleep(0.03)
    found = meter.between(started, ended)
    assert found["samples"] > 2
    assert (found["median_mhz"], found["joules"]) == (1000, pytest.approx(50 * (ended - started)))
    assert steady.closed


def test_a_jetson_is_read_again_for_each_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(board, "PERIOD_S", 0.001)
    samples = find(put(tmp_path, ORIN_NANO), nothing).samples()
    first = next(samples)
    put(tmp_path, {"sys/class/hwmon/hwmon1/curr1_input": 3000})
    assert (first.watts, next(samples).watts, first.mhz) == (7.5, 15.0, 1020)
