"""Replaces itself by a command that cannot outlive whoever started it:

    python child.py [--signal N] [--user-namespace | --uid N] COMMAND…

Standard library only: it starts in milliseconds and the supervisor sees the command's own pid.
"""

import argparse
import ctypes
import os
import signal
from pathlib import Path

PR_SET_PDEATHSIG = 1
CLONE_NEWUSER = 0x10000000
NAMESPACE_UID = 1000

_libc = ctypes.CDLL(None, use_errno=True)


def enter_user_namespace() -> None:
    """Lets root run a program that refuses uid 0, with nothing but the files that root owns.

    Inside the namespace our uid reads as an ordinary one and the next exec drops every capability, so no system
    account is needed and no file changes its owner. Raises OSError where the kernel or a container forbids it.
    """
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare(CLONE_NEWUSER) != 0:
        raise OSError(ctypes.get_errno(), "user namespaces are not allowed here")
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"{NAMESPACE_UID} {uid} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"{NAMESPACE_UID} {gid} 1", encoding="ascii")


def become(uid: int) -> None:
    """Gives up root for good."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


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
    _libc.prctl(PR_SET_PDEATHSIG, options.signal)
    os.execv(options.command[0], options.command)


if __name__ == "__main__":
    main()
