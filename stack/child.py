"""Replaces itself by a command that cannot outlive whoever started it:

    python child.py [--signal N] [--user-namespace | --uid N] COMMAND…

Standard library only: it starts in milliseconds and the supervisor sees the command's own pid.
"""

import argparse
import ctypes
import os
import signal
from pathlib import Path

# From <linux/prctl.h>, <linux/securebits.h>, <linux/capability.h> and <linux/sched.h>.
PR_SET_PDEATHSIG = 1
PR_SET_SECUREBITS = 28
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
SECBIT_NO_SETUID_FIXUP = 1 << 2
CAPABILITY_VERSION_3 = 0x20080522
CAP_DAC_OVERRIDE = 1
CLONE_NEWUSER = 0x10000000
NAMESPACE_UID = 1000

_libc = ctypes.CDLL(None, use_errno=True)


def enter_user_namespace() -> None:
    """Lets root run a program that refuses uid 0, with nothing but the files that root owns.

    Inside the namespace our uid reads as an ordinary one and the next exec drops every capability, so no system
    account is needed and no file changes its owner. Raises OSError where the kernel or a container forbids it.
    """
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(CLONE_NEWUSER))
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"{NAMESPACE_UID} {uid} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"{NAMESPACE_UID} {gid} 1", encoding="ascii")


def become(uid: int) -> None:
    """Gives up root for `uid` and keeps one privilege of root: no file mode stops it.

    For root where user namespaces are forbidden, as in many containers: what root may reach (a checkout in /root, a
    private state folder) the program still reaches, and no file mode has to be opened for it. Raises OSError.
    """
    os.setgroups([])
    os.setgid(uid)
    # Without this bit a change of uid drops every capability, and access() reports by file mode alone.
    _check(_libc.prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0))
    os.setuid(uid)
    kept = 1 << CAP_DAC_OVERRIDE
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    # Effective, permitted and inheritable, for capabilities 0 to 31 and again for the rest.
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)(kept, kept, kept, 0, 0, 0)))
    _check(_libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_OVERRIDE, 0, 0))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs a command that dies with its parent")
    parser.add_argument("--signal", type=int, default=signal.SIGKILL, help="sent when the parent dies")
    parser.add_argument("--user-namespace", action="store_true")
    parser.add_argument("--uid", type=int)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if options.user_namespace:
        enter_user_namespace()
    if options.uid is not None:
        become(options.uid)
    # Last, because a change of identity clears it.
    _check(_libc.prctl(PR_SET_PDEATHSIG, options.signal, 0, 0, 0))
    os.execv(options.command[0], options.command)


if __name__ == "__main__":
    main()
