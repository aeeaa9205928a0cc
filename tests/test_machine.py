"""What is asked of Linux has another way where it is missing, as on macOS."""

import os
import sys
from types import SimpleNamespace

import pytest

import bundle
from speed_core import machine


def test_without_proc_the_processor_is_named_by_sysctl_and_else_by_its_architecture(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    (tmp_path / "sysctl").write_text('#!/bin/sh\n[ "$*" = "-n machdep.cpu.brand_string" ] && echo Apple M3\n')
    (tmp_path / "sysctl").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert machine.cpu() == "Apple M3"
    (tmp_path / "sysctl").write_text("#!/bin/sh\nexit 1\n")
    assert machine.cpu() == machine.platform.machine()
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("processor : 0\nCPU part : 0xd0c\n")  # Linux on an Arm processor names no model
    assert machine.cpu() == machine.platform.machine()


def test_without_affinity_and_control_groups_cores_and_memory_are_the_machines(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "none")
    assert machine.cores() == os.cpu_count()
    assert machine.memory_gb() == pytest.approx(machine.psutil.virtual_memory().available / 2**30, rel=0.2)


def test_peak_memory_is_in_megabytes_whether_the_system_counts_bytes_or_kibibytes(monkeypatch):
    monkeypatch.setattr(machine.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**20))
    monkeypatch.setattr(sys, "platform", "linux")
    assert machine.peak_mb() == 3 * 2**10
    monkeypatch.setattr(sys, "platform", "darwin")
    assert machine.peak_mb() == 3


def test_a_bundle_takes_the_wheels_of_this_platforms_lock(monkeypatch):
    monkeypatch.delenv("SPEED_LOCK", raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    found = bundle.requirements(True)
    assert "torch==2.13.0" in found and not any(r.startswith("vllm") for r in found)
