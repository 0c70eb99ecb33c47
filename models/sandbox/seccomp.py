"""seccomp: from here on the kernel denies this process the system calls that reading a file does not need.

A denied call fails with EPERM instead of ending the process, so that libraries can do without.
"""

import ctypes
import errno
import os

from models.sandbox.bpf import Rule, Word, program
from models.sandbox.kernel import Machine, Syscall, Unavailable
from models.sandbox.numbers import NEWEST, find, number

_SET_MODE_FILTER, _ALL_THREADS = 1, 1

NETWORK = """
socket socketpair connect bind listen accept accept4 sendto recvfrom sendmsg recvmsg sendmmsg recvmmsg
""".split()

PROCESSES = """
fork vfork execve execveat tkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal pidfd_open pidfd_getfd
ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp migrate_pages move_pages
setpriority ioprio_set sched_setscheduler sched_setparam sched_setattr setrlimit
""".split()

SHARED = """
memfd_create memfd_secret shmget shmat shmctl semget semop semctl semtimedop msgget msgsnd msgrcv msgctl
mq_open mq_unlink
""".split()

# Landlock says who may open a file; these change or watch one by its name alone.
FILES = """
chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes futimesat utimensat setxattr lsetxattr
fsetxattr removexattr lremovexattr fremovexattr setxattrat removexattrat file_setattr truncate inotify_init
inotify_init1 inotify_add_watch
""".split()

SYSTEM = """
mount umount2 pivot_root chroot open_tree open_tree_attr move_mount fsopen fsconfig fsmount fspick mount_setattr
statmount listmount unshare setns add_key request_key keyctl bpf perf_event_open io_uring_setup io_uring_enter
io_uring_register userfaultfd init_module finit_module delete_module kexec_load kexec_file_load reboot swapon
swapoff syslog acct quotactl quotactl_fd settimeofday clock_settime adjtimex clock_adjtime sethostname
setdomainname vhangup personality iopl ioperm modify_ldt mknod mknodat fanotify_init fanotify_mark
name_to_handle_at open_by_handle_at
""".split()

_CLONE_THREAD = 0x00010000
_CLONE_NEW = 0x7E020000  # every CLONE_NEW*: namespaces of its own
_MAP_SHARED_ANONYMOUS = 0x21
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX = 8, 10, 15
_TIOCSCTTY, _TIOCSTI, _TIOCLINUX, _FIOSETOWN, _SIOCSPGRP = 0x540E, 0x5412, 0x541C, 0x8901, 0x8902


def denied(*, network: bool) -> list[str]:
    """The calls that are denied whatever their arguments; with `network` as a download needs it."""
    always = [*PROCESSES, *SHARED, *SYSTEM]
    return always if network else [*NETWORK, *FILES, *always]


def rules(machine: Machine, *, network: bool, pid: int) -> list[Rule]:
    """The filter for the process `pid`."""
    numbers = [find(name, machine) for name in denied(network=network)]
    plain = [Rule(found, errno.EPERM) for found in numbers if found is not None]
    own = ((Word(0), pid),)
    calls = [
        # Threads, but no processes. What clone3 is asked stands in memory, where no filter sees it: without it,
        # the C library takes clone.
        Rule(number("clone3", machine), errno.ENOSYS),
        Rule(
            number("clone", machine),
            errno.EPERM,
            unless=((Word(0, _CLONE_THREAD | _CLONE_NEW), _CLONE_THREAD),),
        ),
        Rule(number("kill", machine), errno.EPERM, unless=own),  # abort() does this
        Rule(number("tgkill", machine), errno.EPERM, unless=own),
        # Of other processes by their number; of the calling thread, 0.
        Rule(number("sched_setaffinity", machine), errno.EPERM, unless=((Word(0), 0),)),
        # Limits may be read, with no new one given.
        Rule(number("prlimit64", machine), errno.EPERM, unless=((Word(2), 0), (Word(2, high=True), 0))),
        # Memory that no limit counts.
        Rule(
            number("mmap", machine),
            errno.EPERM,
            when=((Word(3, _MAP_SHARED_ANONYMOUS), _MAP_SHARED_ANONYMOUS),),
        ),
        # Signals to whom it likes, when a file is ready.
        Rule(
            number("fcntl", machine),
            errno.EPERM,
            when=tuple((Word(1), command) for command in (_F_SETOWN, _F_SETSIG, _F_SETOWN_EX)),
        ),
        # The same, and keys typed into a terminal.
        Rule(
            number("ioctl", machine),
            errno.EPERM,
            when=tuple(
                (Word(1), command) for command in (_TIOCSCTTY, _TIOCSTI, _TIOCLINUX, _FIOSETOWN, _SIOCSPGRP)
            ),
        ),
    ]
    return plain + calls


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def restrict(machine: Machine, call: Syscall, *, network: bool = False) -> None:
    """Put the filter on this process for good. Raises Unavailable."""
    code = program(
        machine,
        rules(machine, network=network, pid=os.getpid()),
        newest=NEWEST,
        foreign=errno.EPERM,
        unknown=errno.ENOSYS,
    )
    filter = _Program(len(code) // 8, code)
    try:
        if call(number("seccomp", machine), _SET_MODE_FILTER, _ALL_THREADS, ctypes.byref(filter)) != 0:
            raise Unavailable("a thread has another seccomp filter")
    except OSError as error:
        raise Unavailable(f"the kernel takes no seccomp filter ({error.strerror})") from error
