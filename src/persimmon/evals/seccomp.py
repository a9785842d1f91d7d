"""The system-call filter of the sandbox, assembled here as classic BPF without any library.

A deny-list: a Python interpreter uses too many calls, varying with its version, for an allow-list to stay right. What
is denied answers EPERM, so a program sees an ordinary PermissionError. Five calls need more than their number:
`clone` passes only to start a thread, `prlimit64` only on the caller itself, `fcntl` not to choose whom a descriptor
signals (a kill by detour) nor with what, `prctl` not to change the signal of the parent's death, and `clone3` says
ENOSYS, whereupon the C library falls back to `clone` (the filter cannot look into clone3's argument block). Calls
newer than this table say ENOSYS, so a future kernel opens nothing by itself. Another architecture's calls kill the
process.

Layout of a filter and its instructions: Linux `Documentation/userspace-api/seccomp_filter.rst`.
"""

from __future__ import annotations

import errno
import struct

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH value of each machine name that the table covers."""

LAST_KNOWN_CALL = 469
"""Highest number of Linux 6.18, the newest that the table was read against; numbers from 424 up are shared."""

DENIED: dict[str, tuple[int | None, int | None]] = {
    # name: (number on x86_64, on aarch64), None where the machine has no such call.
    # Other processes: none may be made, replaced, signalled, watched or given other limits.
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # Network, local sockets, and io_uring, which would reach them around this filter.
    "socket": (41, 198),
    "socketpair": (53, 199),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # Namespaces, mounts and file handles.
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "fsconfig": (431, 431),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # Large or rarely used kernel interfaces.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "fanotify_init": (300, 262),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    # Memory and queues that RLIMIT_AS does not count.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    # Metadata of files, which Landlock leaves open.
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    # The machine itself.
    "personality": (135, 92),
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
}

DENIED_COMMANDS: dict[str, tuple[tuple[int, int], int, tuple[int, ...]]] = {
    # name: (numbers as above, index of the argument that says what to do, its values that are denied)
    "fcntl": ((72, 25), 1, (8, 10, 15)),  # F_SETOWN, F_SETSIG, F_SETOWN_EX
    "prctl": ((157, 167), 0, (1,)),  # PR_SET_PDEATHSIG
}

_SPECIAL: dict[str, tuple[int, int]] = {"clone": (56, 220), "clone3": (435, 435), "prlimit64": (302, 261)}

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets into struct seccomp_data (low word of the argument)
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_CLONE_THREAD = 0x00010000


def _instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, operand)


def _deny_commands(column: int, deny: bytes) -> list[bytes]:
    """Calls of which some commands are denied; only the low word of the argument counts, as in the kernel."""
    parts = []
    for numbers, argument, commands in DENIED_COMMANDS.values():
        tests = [_instruction(_EQUAL, command, 0, 1) + deny for command in commands]
        body = b"".join([_instruction(_LOAD, _FIRST_ARGUMENT + 8 * argument), *tests, _instruction(_RETURN, _ALLOW)])
        parts.append(_instruction(_EQUAL, numbers[column], 0, len(body) // 8) + body)
    return parts


def assemble(machine: str) -> bytes:
    """The filter program for `machine` (as `platform.machine()` names it); KeyError for another one."""
    column = list(ARCHITECTURES).index(machine)
    deny, unknown = (_instruction(_RETURN, _ERRNO | code) for code in (errno.EPERM, errno.ENOSYS))
    allow = _instruction(_RETURN, _ALLOW)
    load_argument = _instruction(_LOAD, _FIRST_ARGUMENT)
    clone, clone3, prlimit = (numbers[column] for numbers in _SPECIAL.values())
    parts = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_EQUAL, ARCHITECTURES[machine], 1, 0),
        _instruction(_RETURN, _KILL_PROCESS),
        _instruction(_LOAD, _NUMBER),
        # Also catches the x32 calls of x86_64, whose numbers start at 2^30.
        _instruction(_AT_LEAST, LAST_KNOWN_CALL + 1, 0, 1) + unknown,
        _instruction(_EQUAL, clone3, 0, 1) + unknown,
        _instruction(_EQUAL, clone, 0, 4) + load_argument + _instruction(_ANY_BIT, _CLONE_THREAD, 1, 0) + deny + allow,
        _instruction(_EQUAL, prlimit, 0, 4) + load_argument + _instruction(_EQUAL, 0, 1, 0) + deny + allow,
        *_deny_commands(column, deny),
    ]
    for numbers in DENIED.values():
        number = numbers[column]
        if number is not None:
            parts.append(_instruction(_EQUAL, number, 0, 1) + deny)
    return b"".join([*parts, allow])
