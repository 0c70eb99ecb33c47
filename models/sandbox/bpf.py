"""A filter of system calls as a program of the classic Berkeley packet filter (Linux's seccomp_filter.rst)."""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from models.sandbox.kernel import Machine

# linux/bpf_common.h
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
# linux/seccomp.h
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
# struct seccomp_data: the call's number, the architecture, the instruction pointer, six arguments of 64 bits
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16

_MOST_INSTRUCTIONS = 4096

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


@dataclass(frozen=True)
class Word:
    """Bits of an argument: of its low half, which is all of it where the kernel takes an int."""

    argument: int
    mask: int = 0xFFFFFFFF
    high: bool = False

    def load(self) -> list[Instruction]:
        at = _ARGUMENTS_AT + 8 * self.argument + (4 if self.high else 0)  # both machines are little-endian
        masked = [] if self.mask == 0xFFFFFFFF else [(_AND, 0, 0, self.mask)]
        return [(_LOAD, 0, 0, at), *masked]


@dataclass(frozen=True)
class Rule:
    """What becomes of a system call: denied with `errno`, or only unless all (or: if any) of the tests hold."""

    number: int
    errno: int
    unless: tuple[tuple[Word, int], ...] = ()
    when: tuple[tuple[Word, int], ...] = ()

    def instructions(self) -> list[Instruction]:
        deny, allow = _answer(_ERRNO | self.errno), _answer(_ALLOW)
        body: list[Instruction] = []
        for word, value in self.unless:  # one that does not hold denies
            body += [*word.load(), (_JUMP_EQUAL, 1, 0, value), deny]
        for word, value in self.when:  # one that holds denies
            body += [*word.load(), (_JUMP_EQUAL, 0, 1, value), deny]
        body.append(allow if self.unless or self.when else deny)
        return [(_JUMP_EQUAL, 0, len(body), self.number), *body]


def program(machine: Machine, rules: Iterable[Rule], *, newest: int, foreign: int, unknown: int) -> bytes:
    """The filter: what no rule names is allowed, up to the number `newest`.

    Calls by another architecture's numbers fail with the error number `foreign`, newer ones with `unknown`.
    """
    start = [(_LOAD, 0, 0, _ARCH_AT), (_JUMP_EQUAL, 1, 0, machine.audit), _answer(_ERRNO | foreign)]
    start.append((_LOAD, 0, 0, _NUMBER_AT))
    if machine.foreign is not None:
        start += [(_JUMP_GREATER_EQUAL, 0, 1, machine.foreign), _answer(_ERRNO | foreign)]
    start += [(_JUMP_GREATER_EQUAL, 0, 1, newest + 1), _answer(_ERRNO | unknown)]
    body = [instruction for rule in rules for instruction in rule.instructions()]
    instructions = [*start, *body, _answer(_ALLOW)]
    assert len(instructions) <= _MOST_INSTRUCTIONS
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)


def _answer(value: int) -> Instruction:
    return (_RETURN, 0, 0, value)
