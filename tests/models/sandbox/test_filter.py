"""The filter of system calls as a program, run step by step for both machines, whichever one this is."""

import errno
import re
import struct
from pathlib import Path

import pytest

from models.sandbox import bpf, seccomp
from models.sandbox.kernel import MACHINES
from models.sandbox.numbers import NEWEST, NUMBERS, find, number

PID = 4321
ALLOWED = 0
MACHINE_NAMES = sorted(MACHINES)


def verdict(machine: str, call: int, *arguments: int, network: bool = False, audit: int | None = None) -> int:
    """The error number that the filter answers a call with; 0 where it lets the call pass."""
    here = MACHINES[machine]
    code = bpf.program(
        here,
        seccomp.rules(here, network=network, pid=PID),
        newest=NEWEST,
        foreign=errno.EPERM,
        unknown=errno.ENOSYS,
    )
    padded = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("<IIQ6Q", call, here.audit if audit is None else audit, 0, *padded)
    return run(code, data)


def run(code: bytes, data: bytes) -> int:
    """Linux's classic BPF, as far as the filter uses it."""
    program = [struct.unpack_from("=HBBI", code, at) for at in range(0, len(code), 8)]
    register = at = 0
    while True:
        operation, true, false, constant = program[at]
        at += 1
        if operation == 0x20:  # load a word
            register = struct.unpack_from("<I", data, constant)[0]
        elif operation == 0x54:  # and
            register &= constant
        elif operation in (0x15, 0x35):  # jump if equal, if greater or equal
            holds = register == constant if operation == 0x15 else register >= constant
            at += true if holds else false
        elif operation == 0x06:  # return
            if constant == 0x7FFF0000:
                return ALLOWED
            assert constant >> 16 == 5, "neither allowed nor an error"
            return constant & 0xFFFF
        else:
            raise AssertionError(f"operation {operation:#x}")


@pytest.mark.parametrize("machine", MACHINE_NAMES)
class TestOnBothMachines:
    def test_what_is_denied_is(self, machine: str) -> None:
        for name in seccomp.denied(network=False):
            call = find(name, MACHINES[machine])
            if call is not None:
                assert verdict(machine, call) == errno.EPERM, name

    def test_a_download_needs_sockets_and_rights_and_no_more(self, machine: str) -> None:
        freed = {*seccomp.NETWORK, *seccomp.FILES}
        for name in seccomp.denied(network=False):
            call = find(name, MACHINES[machine])
            if call is not None:
                wanted = ALLOWED if name in freed else errno.EPERM
                assert verdict(machine, call, network=True) == wanted, name

    def test_ordinary_calls_pass(self, machine: str) -> None:
        ordinary = {
            "x86_64": {"read": 0, "write": 1, "openat": 257, "futex": 202, "exit_group": 231, "munmap": 11},
            "aarch64": {"read": 63, "write": 64, "openat": 56, "futex": 98, "exit_group": 94, "munmap": 215},
        }
        assert {verdict(machine, call) for call in ordinary[machine].values()} == {ALLOWED}

    @pytest.mark.parametrize(
        ("name", "arguments", "wanted"),
        [
            ("clone", (0x003D0F00,), ALLOWED),  # as pthread_create asks
            ("clone", (0x01200011,), errno.EPERM),  # as fork asks
            ("clone", (0x00004111,), errno.EPERM),  # as vfork asks
            ("clone", (0x10010F00,), errno.EPERM),  # a thread with a user namespace
            ("clone3", (), errno.ENOSYS),
            ("kill", (PID, 6), ALLOWED),
            ("kill", (1, 9), errno.EPERM),
            ("kill", (2**32 - 1, 9), errno.EPERM),  # -1: everybody
            ("kill", (0, 9), errno.EPERM),  # the group
            ("tgkill", (PID, PID + 1, 6), ALLOWED),
            ("tgkill", (1, 1, 6), errno.EPERM),
            ("prlimit64", (0, 7, 0, 0x7FFF00000000), ALLOWED),
            ("prlimit64", (0, 7, 0x7FFF00000000, 0), errno.EPERM),  # a pointer whose low half is 0
            ("prlimit64", (0, 7, 0x1000, 0), errno.EPERM),
            ("sched_setaffinity", (0, 8, 0x1000), ALLOWED),
            ("sched_setaffinity", (1, 8, 0x1000), errno.EPERM),
            ("mmap", (0, 4096, 3, 0x22), ALLOWED),  # private, anonymous
            ("mmap", (0, 4096, 1, 0x01), ALLOWED),  # shared, a file
            ("mmap", (0, 4096, 3, 0x21), errno.EPERM),
            ("mmap", (0, 4096, 3, 0x23), errno.EPERM),  # MAP_SHARED_VALIDATE
            ("fcntl", (3, 2, 1), ALLOWED),  # F_SETFD
            ("fcntl", (3, 8, 1), errno.EPERM),  # F_SETOWN
            ("ioctl", (1, 0x5401), ALLOWED),  # isatty
            ("ioctl", (1, 0x5412), errno.EPERM),  # TIOCSTI
            ("ioctl", (1, 0x100005412), errno.EPERM),  # the same: the kernel takes the low half
        ],
    )
    def test_by_arguments(self, machine: str, name: str, arguments: tuple[int, ...], wanted: int) -> None:
        assert verdict(machine, number(name, MACHINES[machine]), *arguments) == wanted

    def test_numbers_of_another_machine_are_none_of_this_one(self, machine: str) -> None:
        for other in (0x40000003, *(MACHINES[name].audit for name in MACHINES if name != machine)):
            assert verdict(machine, 0, audit=other) == errno.EPERM

    def test_what_is_newer_than_the_list(self, machine: str) -> None:
        assert verdict(machine, NEWEST) != errno.ENOSYS
        assert verdict(machine, NEWEST + 1) == errno.ENOSYS


def test_the_short_pointers_of_x86_are_another_convention() -> None:
    for call in (0x40000000, 0x40000000 + 41, 2**32 - 1):
        assert verdict("x86_64", call) == errno.EPERM


@pytest.mark.parametrize(
    ("column", "header", "pattern"),
    [
        (0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", r"#define __NR_(\w+)\s+(\d+)"),
        (1, "/usr/include/asm-generic/unistd.h", r"#define __NR(?:3264)?_(\w+)\s+(\d+)"),
    ],
)
def test_the_table_agrees_with_the_systems_headers(column: int, header: str, pattern: str) -> None:
    if not Path(header).is_file():
        pytest.skip(f"no {header}")
    known = {name: int(value) for name, value in re.findall(pattern, Path(header).read_text())}
    newest = max(known.values())
    for name, columns in NUMBERS.items():
        found = columns[column]
        if found is None:
            assert name not in known
        elif found <= newest:
            assert known.get(name) == found, name
