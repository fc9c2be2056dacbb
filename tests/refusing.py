"""Makes Linux refuse the tile registers to this process, its threads to come and its children."""

from __future__ import annotations

import ctypes

ARCH_PRCTL, AUDIT_ARCH_X86_64, EPERM = 158, 0xC000003E, 1
GET_SUPPORTED, REQUEST = 0x1021, 0x1023  # of ARCH_PRCTL; the loader of programs needs others
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, FILTER = 22, 38, 2
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # of BPF
ALLOW, ERROR, KILL = 0x7FFF0000, 0x00050000 | EPERM, 0x80000000


class Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    )


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("first", ctypes.POINTER(Instruction)))


def refuse_tiles(*, kill: bool = False) -> None:
    """What asks for them fails from now on, or kills the process; the emulated question, too."""
    filter = (Instruction * 9)(
        (LOAD, 0, 0, 4),  # the architecture
        (JUMP_IF_EQUAL, 0, 5, AUDIT_ARCH_X86_64),
        (LOAD, 0, 0, 0),  # the system call's number
        (JUMP_IF_EQUAL, 0, 3, ARCH_PRCTL),
        (LOAD, 0, 0, 16),  # its first argument
        (JUMP_IF_EQUAL, 2, 0, GET_SUPPORTED),
        (JUMP_IF_EQUAL, 1, 0, REQUEST),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, KILL if kill else ERROR),
    )
    libc = ctypes.CDLL(None, use_errno=True)
    program = Program(len(filter), filter)
    for call in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, FILTER, program)):
        arguments = [ctypes.byref(x) if isinstance(x, Program) else ctypes.c_ulong(x) for x in call]
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl failed")
