"""mara-build before and around NVIDIA's builder, which a stand-in replaces. test_refusals.py has its options.

With the builder of TensorRT for RTX itself: tests/tensorrt/test_build.py.
"""

import enum
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mara_deploy.commands.build import main
from mara_export.options import BuildOptions
from mara_export.progress import Progress
from mara_export.targets import MOST_AGENTS, SHARED_ROWS
from mara_export.tensorrt import build as building
from mara_export.tensorrt import network as parts
from mara_export.tensorrt.build import build, why_cannot_build
from mara_runtime.bundle import Bundle
from mara_runtime.engines import cuda, trt_file
from mara_runtime.errors import EngineError, MaraError, OptionError
from mara_runtime.tensors import DRAFT_ROWS, spare_slots
from tests.double.cuda import CudaDouble
from tests.double.trt_context import ILogger
from tests.unit import helpers
from tests.unit.test_timings import Config

CONTEXT, CANDIDATES = 300, 8


class Names(enum.Enum):
    NONE, AMPERE_PLUS, WORKSPACE, WEIGHT_STREAMING, VERSION_COMPATIBLE = range(5)


class TensorRT(types.ModuleType):
    """What is asked for around the builder."""

    HardwareCompatibilityLevel = MemoryPoolType = BuilderFlag = Names

    def __init__(self, version: str) -> None:
        super().__init__("tensorrt")
        self.__version__ = version


class Recorded(Config):
    """A builder's configuration: what was set."""

    def __init__(self, profiles: Any) -> None:
        super().__init__()
        self.profiles, self.flags, self.limit = profiles, set[Names](), (Names.NONE, 0)
        self.builder_optimization_level: int | None = None
        self.hardware_compatibility_level = Names.NONE

    def set_flag(self, flag: Names) -> None:
        self.flags.add(flag)

    def set_memory_pool_limit(self, pool: Names, size: int) -> None:
        self.limit = pool, size


class Network:
    """Stands for `parts.Network`; the plan of an engine has `plan_bytes`."""

    weight_bytes, wide_weight_bytes, plan_bytes = 100, 200, 150
    made: list["Network"]

    def __init__(self, trt: Any, path: Path, fixed: dict[str, int]) -> None:
        self.fixed = fixed
        self.made.append(self)

    def check_in_place(self, num_caches: int) -> None:
        assert num_caches == 1

    def kinds(self) -> dict[str, int]:
        return {}

    def config(self, profiles: Any) -> Recorded:
        self.configuration = Recorded(profiles)
        return self.configuration

    def build(self, config: Recorded, tell: Any, note: Any) -> tuple[bytes, list[str]]:
        return bytes(self.plan_bytes), []


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> CudaDouble:
    """One GPU with the TensorRT that `tensorrt` installs."""
    double = CudaDouble()
    monkeypatch.setattr(cuda, "load", lambda: double)
    monkeypatch.setattr(parts, "Network", type("Network", (Network,), {"made": []}))
    install(monkeypatch, "10.16.1")
    return double


def install(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(trt_file, "load", lambda target: TensorRT(version))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle for TensorRT whose cache is updated in place."""
    made = helpers.make_bundle(tmp_path / "bundle", max_context=CONTEXT, max_candidates=CANDIDATES)
    return lowered(made, "portable")


def lowered(folder: Path, lowering: str) -> Path:
    manifest = helpers.read_manifest(folder)
    manifest["step"]["lowering"], manifest["targets"] = lowering, ["tensorrt"]
    helpers.write_manifest(folder, manifest)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(folder: Path, target: str = "tensorrt", **options: Any) -> str:
    """The one line with which a build is refused; the bundle is as it was."""
    before = files(folder)
    with pytest.raises(MaraError) as caught:
        build(Bundle.open(folder), target, BuildOptions(**options))
    assert files(folder) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ── what is built ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_slots_hold_the_context_and_a_decision(folder: Path) -> None:
    manifest = Bundle.open(folder).manifest
    small, middle, largest = BuildOptions(capacities=(100, 20)).slots(manifest)
    for slots, tokens in ((small, 20), (middle, 100), (largest, CONTEXT)):
        assert 0 <= slots - tokens - spare_slots(CANDIDATES) < 16
        assert slots % 16 == 0
    assert BuildOptions().slots(manifest) == BuildOptions(capacities=(CONTEXT, CONTEXT)).slots(manifest) == (largest,)
    with pytest.raises(OptionError, match=r"--capacity is 301.*300"):
        BuildOptions(capacities=(CONTEXT + 1,)).slots(manifest)


def test_profiles_cover_what_decoding_asks_for(folder: Path, machine: CudaDouble) -> None:
    bundle = build(Bundle.open(folder), "tensorrt", BuildOptions(capacities=(20,), places=3))
    assert Bundle.open(folder) == bundle
    rows, heads = spare_slots(CANDIDATES) + 1, DRAFT_ROWS + 1  # one row may be recomputed in front of a decision
    for network, engine, prefill_rows in zip(parts.Network.made, bundle.manifest.engines, (48, 256), strict=True):
        assert (engine.in_place, engine.head_rows, engine.agents) == (True, heads, MOST_AGENTS)
        assert network.fixed == dict(zip(("C", "W1", "W2"), (engine.slots, *engine.agent_widths), strict=True))
        assert (engine.decode_rows, engine.prefill_rows) == (rows, prefill_rows)
        assert (engine.places, engine.shared_rows) == (3, SHARED_ROWS)
        profiles = network.configuration.profiles
        for profile, width in zip(profiles, (rows, prefill_rows), strict=False):
            assert {size: (least, most) for size, (least, _, most) in profile.items()} == {
                "B": (1, 1), "H0": (1, heads), "A": (1, MOST_AGENTS), **dict.fromkeys("MSNQ", (1, width)),
            }  # fmt: skip
        assert {size: (least, most) for size, (least, _, most) in profiles[2].items()} == {
            "B": (2, 3), "M": (1, SHARED_ROWS), "S": (2, SHARED_ROWS + rows), "H0": (1, 3 * heads),
            "N": (1, SHARED_ROWS + rows), "Q": (1, 1), "A": (1, MOST_AGENTS),
        }  # fmt: skip
        for least, best, most in (sizes for profile in profiles for sizes in profile.values()):
            assert least <= best <= most


def test_an_engine_for_one_conversation_has_no_profile_for_several(folder: Path, machine: CudaDouble) -> None:
    (engine,) = build(Bundle.open(folder), "tensorrt", BuildOptions(places=1)).manifest.engines
    assert (engine.places, len(parts.Network.made[0].configuration.profiles)) == (1, 2)


def test_options_reach_the_builder_and_the_manifest(folder: Path, machine: CudaDouble) -> None:
    def built(**options: Any) -> tuple[Recorded, Any]:
        (engine,) = build(Bundle.open(folder), "tensorrt", BuildOptions(**options)).manifest.engines
        return parts.Network.made[-1].configuration, engine

    config, engine = built()
    assert (config.flags, config.limit[1], config.builder_optimization_level) == (set(), 0, None)
    assert (config.hardware_compatibility_level, engine.compute_capability) == (Names.NONE, "8.7")
    assert engine.version == "10.16.1"
    config, engine = built(hardware="ampere-plus", workspace_mib=(1 << 43) - 1, optimisation_level=5)
    assert config.limit == (Names.WORKSPACE, (1 << 63) - (1 << 20))  # the most, which TensorRT takes in 64 bits
    assert (config.hardware_compatibility_level, engine.compute_capability) == (Names.AMPERE_PLUS, "8.0+")
    assert config.builder_optimization_level == engine.options["optimisation_level"] == 5
    config, engine = built(weight_streaming=True, version_compatible=True)
    assert config.flags == {Names.WEIGHT_STREAMING, Names.VERSION_COMPATIBLE}
    assert engine.options["weight_streaming"]
    assert engine.options["version_compatible"]


@pytest.mark.parametrize(
    ("plan_bytes", "wide_bytes", "told"), [(200, 200, True), (199, 200, False), (200, 100, False)], ids=str
)
def test_weights_that_the_builder_widened_are_reported(
    folder: Path, machine: CudaDouble, monkeypatch: pytest.MonkeyPatch, plan_bytes: int, wide_bytes: int, told: bool
) -> None:
    monkeypatch.setattr(parts.Network, "plan_bytes", plan_bytes)
    monkeypatch.setattr(parts.Network, "wide_weight_bytes", wide_bytes)
    for kernel_bytes, notes in ((building.KERNEL_BYTES, 0), (0, int(told))):  # too small a model to tell, and not
        monkeypatch.setattr(building, "KERNEL_BYTES", kernel_bytes)
        told: list[str] = []
        progress = Progress(quiet=True)
        monkeypatch.setattr(progress, "note", told.append)
        build(Bundle.open(folder), "tensorrt", None, progress)
        assert len(told) == notes


def test_when_the_second_of_two_fails_nothing_is_kept(
    folder: Path, machine: CudaDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Network, *_: Any) -> tuple[bytes, list[str]]:
        if len(self.made) == 2:
            raise EngineError("no memory left")
        return b"plan", []

    monkeypatch.setattr(parts.Network, "build", fails)
    assert refused(folder, capacities=(32,)) == "no memory left"
    assert len(parts.Network.made) == 2


def test_repeated_options_add_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[BuildOptions] = []

    def note(bundle: Bundle, target: str, options: BuildOptions, progress: Progress) -> Bundle:
        asked.append(options)
        return bundle

    monkeypatch.setattr(building, "build", note)
    lists = ["--capacity", "64,32", "--compute-capability", "8.9", "--capacity", "48", "--compute-capability", "12.0"]
    assert main([str(folder), "--target", "tensorrt-rtx", "--quiet", *lists]) == 0
    assert main([str(folder), "--target", "tensorrt-rtx", "--quiet"]) == 0
    assert [(o.capacities, o.compute_capabilities) for o in asked] == [((64, 32, 48), ("8.9", "12.0")), ((), ())]


# ── what is refused before the builder starts ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("version", "lowering", "options", "named"),
    [
        ("8.6.1", "decomposed", {}, ("TensorRT 8.6.1", "10.3")),
        ("10.3.0", "portable", {}, ("TensorRT 10.3.0", "10.15 or later", "--lowering decomposed")),  # JetPack 6
        ("10.16.1", "ort", {}, ("lowering ort", "--target tensorrt")),
        ("10.16.1", "portable", {"hardware": "same-compute-capability"}, ("--hardware", "TensorRT 10.16.1")),
        ("10.16.1", "portable", {"compute_capabilities": ("8.9",)}, ("--compute-capability", "tensorrt-rtx")),
        ("10.16.1", "portable", {"timing_cache": Path("nowhere/a.timings")}, ("--timing-cache is nowhere/a.timings",)),
    ],
    ids=str,
)
def test_what_tensorrt_cannot_build_is_refused_in_advance(
    folder: Path,
    machine: CudaDouble,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    lowering: str,
    options: dict[str, Any],
    named: tuple[str, ...],
) -> None:
    install(monkeypatch, version)
    message = refused(lowered(folder, lowering), **options)
    assert all(each in message for each in named), message
    assert parts.Network.made == []


def test_where_no_engine_can_go_none_is_built(folder: Path, machine: CudaDouble) -> None:
    (folder / "engines").touch()
    assert refused(folder).startswith(f"cannot write {folder}: ")
    assert parts.Network.made == []


def test_without_a_gpu_the_reason_is_given(machine: CudaDouble, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(status: int, driver: bool) -> str:
        def library(name: str) -> None:
            if not driver:
                raise OSError(name)

        monkeypatch.setattr(machine, "cudaGetDeviceCount", lambda: (machine.cudaError_t(status), 0))
        monkeypatch.setattr(cuda.ctypes, "CDLL", library)
        return why_cannot_build("tensorrt") or ""

    assert why_cannot_build("tensorrt") is None
    assert "no NVIDIA GPU can be used (cudaErrorNoDevice (100))" in reason(100, driver=True)
    assert "no driver is installed" in reason(35, driver=False)
    assert "cudaErrorInsufficientDriver (35)" in reason(35, driver=True)
    assert cuda.FOR_CUDA_12 in reason(35, driver=True)


@pytest.mark.parametrize(
    ("target", "missing", "remedies"),
    [
        ("tensorrt", ("tensorrt",), ("pip install 'mara-deploy[tensorrt]'", cuda.FOR_CUDA_12, "JetPack")),
        ("tensorrt-rtx", ("tensorrt_rtx", "tensorrt_rtx_bindings"), ("pip install tensorrt-rtx-cu13-libs",)),
        ("tensorrt-rtx", ("onnx",), ("pip install onnx",)),
    ],
)
def test_without_a_package_the_command_that_installs_it_is_named(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    missing: tuple[str, ...],
    remedies: tuple[str, ...],
) -> None:
    if "onnx" in missing:  # the module holds onnx, if it was imported before
        monkeypatch.delattr("mara_export.tensorrt.network")
        monkeypatch.delitem(sys.modules, "mara_export.tensorrt.network")
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    assert main([str(folder), "--target", target]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count(os.linesep)) == ("", 1)
    assert all(remedy in err for remedy in remedies), err
    assert "tensorrt, tensorrt-rtx" in (why_cannot_build("cuda") or "")


@pytest.mark.parametrize("says", ["CUDA initialization failure with error: 35", ""])
def test_a_builder_that_does_not_start_is_one_line(folder: Path, says: str) -> None:
    def builder(logger: Any) -> None:  # the bindings turn a null builder into a TypeError
        if says:
            logger.log(ILogger.Severity.ERROR, f"{says}\n")
        raise TypeError("factory function returned nullptr")

    trt = TensorRT("10.16.1")
    trt.__dict__.update(ILogger=ILogger, Builder=builder)
    with pytest.raises(EngineError) as caught:
        parts.Network(trt, folder / "step.onnx", 64)
    reason = says or "factory function returned nullptr"
    assert str(caught.value) == f"TensorRT 10.16.1 does not start here: {reason}"
