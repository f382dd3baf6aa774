"""What devices can do: peaks, memory, links. The one table; metrics, planner and presets read it.

Everything is per jax device: a whole chip from TPU v4 to v6e and for GPUs, one of a chip's two cores for v2, v3 and 7x.
Peaks are dense, NVIDIA's with sparsity are halved. Links are bytes per second in one direction.

Sources, by the letters in `Device.source`:
    G  Google's pages cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}: peak, HBM, interconnect (Gbit/s per chip over its
       links), hosts and their network cards
    C  "available HBM" that libtpu 0.0.42's compiler names when it refuses a program (measured for every one of them)
    N  NVIDIA's data sheets; memory as nvidia-smi prints it
    D  DeepEP's README: H800's NVLink gives about 160 GB/s; the data sheet's 400 GB/s are both directions
    ?  from memory, to be checked before money depends on it; so are all TPUs' links to their hosts
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

GB, GIB, MIB = 1e9, 2**30, 2**20


@dataclass(frozen=True, kw_only=True)
class Device:
    """One jax device. Figures that are None are not known here: such a device has a peak, and cannot be planned for."""

    name: str
    """As topologies name it: "v5p", "h100"."""
    kinds: tuple[str, ...]
    """Words that `device_kind` holds."""
    bf16: float | None
    """FLOP/s of matrix products."""
    fp8: float | None = None
    fp16: float | None = None
    hbm: int | None = None
    """Bytes that a program may use."""
    hbm_bandwidth: float | None = None
    torus: int = 0
    """Dims of the torus that chips lie in; 0: all devices of a host meet in a switch."""
    link: float | None = None
    """Bytes/s, one direction, of one link of the torus, or of the way into the switch."""
    network: float | None = None
    """Bytes/s, one direction, a device's share of its host's data-centre network."""
    host_link: float | None = None
    """Bytes/s, one direction, between a device and its host's memory."""
    per_host: int = 4
    """Devices of a host."""
    host_memory: float | None = None
    """Bytes of a host."""
    per_chip: int = 1
    """Devices of a chip, which is what is rented."""
    named_cores: int = 1
    """What a slice's name counts a chip as: v5p-1024 has 512 chips."""
    source: str = ""

    @property
    def plannable(self) -> bool:
        """Whether all that a plan needs is known."""
        needed = (self.bf16, self.hbm, self.hbm_bandwidth, self.link, self.network, self.host_link, self.host_memory)
        return None not in needed


def _tpu(name: str, kinds: tuple[str, ...], teraflops: float, **fields) -> Device:
    return Device(name=name, kinds=kinds, bf16=teraflops * 1e12, **fields)


def _gpu(name: str, kinds: tuple[str, ...], teraflops: float, fp8: float | None = None, **fields) -> Device:
    defaults = dict(per_host=8, source="N")
    peaks = dict(bf16=teraflops * 1e12, fp16=teraflops * 1e12, fp8=None if fp8 is None else fp8 * 1e12)
    return Device(name=name, kinds=kinds, **peaks, **{**defaults, **fields})  # type: ignore[arg-type]


DEVICES: tuple[Device, ...] = (
    _tpu("v2", ("TPU v2",), 22.5, source="G"),
    _tpu("v3", ("TPU v3",), 61.5, source="G"),
    _tpu(
        "v4", ("TPU v4",), 275, hbm=int(30.5 * GIB), hbm_bandwidth=1228 * GB, torus=3, link=50 * GB,
        network=6.25 * GB, host_link=16 * GB, host_memory=407 * GB, named_cores=2, source="G, C (two cores of 15.25), network ?",
    ),
    _tpu(
        "v5e", ("TPU v5 lite", "TPU v5e"), 197, hbm=int(15.75 * GIB), hbm_bandwidth=819 * GB, torus=2, link=50 * GB,
        network=3.125 * GB, host_link=16 * GB, host_memory=192 * GB, source="G, C, host ?",
    ),
    _tpu(
        "v5p", ("TPU v5p", "TPU v5"), 459, hbm=int(95.74 * GIB), hbm_bandwidth=2765 * GB, torus=3, link=100 * GB,
        network=6.25 * GB, host_link=16 * GB, host_memory=448 * GB, named_cores=2, source="G, C, network ?",
    ),
    _tpu(
        "v6e", ("TPU v6 lite", "TPU v6e"), 918, hbm=int(31.25 * GIB), hbm_bandwidth=1640 * GB, torus=2, link=112 * GB,
        network=12.5 * GB, host_link=32 * GB, host_memory=720 * GB, source="G, C, network ?",
    ),
    _tpu(
        "tpu7x", ("TPU7x", "TPU v7x"), 1153.5, fp8=2307e12, hbm=int(94.75 * GIB), hbm_bandwidth=3690 * GB, torus=3,
        link=50 * GB, network=6.25 * GB, per_host=8, host_link=16 * GB, host_memory=960 * GB, per_chip=2, named_cores=2,
        source="G, C; half of the chip's links (1.2 TB/s in all) a core; network and host ?",
    ),
    _gpu(
        "a100-40", ("A100",), 312, hbm=40536 * MIB, hbm_bandwidth=1555 * GB, link=300 * GB, network=25 * GB,
        host_link=32 * GB, host_memory=1024 * GB,
    ),
    _gpu(
        "a100-80", ("A100", "A800"), 312, hbm=81920 * MIB, hbm_bandwidth=2039 * GB, link=300 * GB, network=25 * GB,
        host_link=32 * GB, host_memory=2048 * GB,
    ),
    _gpu("h100-pcie", ("H100 PCIe", "H800 PCIe"), 756.5, 1513),
    _gpu("h100-nvl", ("H100 NVL", "H200 NVL"), 835.5, 1671),
    _gpu(
        "h100", ("H100",), 989.5, 1979, hbm=81559 * MIB, hbm_bandwidth=3350 * GB, link=450 * GB, network=50 * GB,
        host_link=64 * GB, host_memory=2048 * GB,
    ),
    _gpu(
        "h800", ("H800",), 989.5, 1979, hbm=81559 * MIB, hbm_bandwidth=3350 * GB, link=160 * GB, network=50 * GB,
        host_link=64 * GB, host_memory=2048 * GB, source="N, D",
    ),
    _gpu(
        "h200", ("H200",), 989.5, 1979, hbm=143771 * MIB, hbm_bandwidth=4800 * GB, link=450 * GB, network=50 * GB,
        host_link=64 * GB, host_memory=2048 * GB,
    ),
    _gpu("gh200", ("GH200",), 989.5, 1979),
    _gpu("h20", ("H20",), 148, 296),
    _gpu(
        "b200", ("B200",), 2250, 4500, hbm=183359 * MIB, hbm_bandwidth=8000 * GB, link=900 * GB, network=50 * GB,
        host_link=64 * GB, host_memory=2048 * GB,
    ),
    _gpu("gb200", ("GB200",), 2500, 5000),
    _gpu("b300", ("B300",), 2250),
    _gpu("gb300", ("GB300",), 2500),
    _gpu("a30", ("A30",), 165),
    _gpu("l40s", ("L40S",), 362),
    _gpu("l40", ("L40",), 181),
    _gpu("l4", ("L4",), 121),
    Device(name="v100", kinds=("V100",), bf16=None, fp16=125e12, source="N"),
    Device(name="t4", kinds=("T4",), bf16=None, fp16=65e12, source="N"),
)  # fmt: skip

_BY_NAME = {device.name: device for device in DEVICES}
# Longer words first: "TPU v5 lite" is no "TPU v5".
_BY_KIND = sorted(((kind, device) for device in DEVICES for kind in device.kinds), key=lambda pair: -len(pair[0]))


def by_kind(device_kind: str) -> Device | None:
    """The device that `jax.devices()[0].device_kind` names, such as "NVIDIA H100 80GB HBM3"; None where it is not known."""
    plain = " ".join(word.split("-")[0] for word in device_kind.split())  # A100-SXM4-80GB
    return next((device for kind, device in _BY_KIND if f" {kind} " in f" {plain} "), None)


def by_name(name: str) -> Device:
    """The device that a topology names, such as "v5p" or "h100".

    Raises:
        ValueError: no such device, or one of which too little is known to plan for it; the closest names are given.
    """
    device = _BY_NAME.get(name)
    if device is not None and device.plannable:
        return device
    known = [device.name for device in DEVICES if device.plannable]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    wrong = f"no device is named {name!r}" if device is None else f"too little is known of {name!r} to plan for it"
    raise ValueError(f"{wrong}: {'did you mean ' + ' or '.join(close) if close else 'known are ' + ', '.join(known)}")
