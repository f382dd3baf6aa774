"""The process that shuts itself in and then runs a program; a script, started by `sandbox.py`, that imports nothing of ours.

    trainer  →  this process: new namespaces, its own root    →  pid 1 of the namespace: waits  →  pid 2: the program
                (killed with its group; then pid 1 dies,          (not the program itself, so that
                since its parent has)                              nothing in there can refuse to die)

It reads the program from standard input, and leaves what follows to the program. What becomes of it goes to the trainer
through a pipe that the program does not have: "ready", then "exit N" or "signal N"; or "error …" where the walls could not
be put up, and then nothing has run. Where pid 1 dies, the kernel kills everything in its namespace.
"""

import ctypes
import json
import os
import resource
import signal
import sys

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, AT_RECURSIVE, AT_FDCWD, SYS_MOUNT_SETATTR = 1, 2, 0x8000, -100, 442
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
INSIDE, NOBODY = 1000, 65534  # the program's user inside, and outside where the trainer is root
DEVICES = ("null", "zero", "random", "urandom")

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """A function of the C library. Raises: OSError where it fails."""
    if getattr(libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    data = options.encode() if options else None
    call("mount", source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags), data)


def enter_namespaces() -> None:
    """New namespaces of every kind: no network but a loopback that is down, no other processes, no shared memory.

    Root gets a second user, for the program: the kernel does not count the processes of root. Only a process outside
    may give two.
    """
    user, group, outside = os.geteuid(), os.getegid(), os.getpid()
    to_helper, from_helper = os.pipe(), os.pipe()
    helper = os.fork() if user == 0 else None
    if helper == 0:
        os.close(to_helper[1])
        os.read(to_helper[0], 1)
        try:
            for kind in ("uid", "gid"):
                with open(f"/proc/{outside}/{kind}_map", "w") as map_:
                    map_.write(f"0 0 1\n{INSIDE} {NOBODY} 1\n")
            os.write(from_helper[1], b"1")
        finally:
            os._exit(0)
    everything = (
        CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET
    )
    call("unshare", everything)
    for end in (to_helper[1], from_helper[1]):
        os.close(end)
    if helper is None or not os.read(from_helper[0], 1):
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{INSIDE} {user} 1"),
            ("gid_map", f"{INSIDE} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    if helper is not None:
        os.waitpid(helper, 0)
    try:
        with open("/proc/sys/user/max_user_namespaces", "w") as file:
            file.write("0")  # the program may not become root of another namespace, whose system calls reach further
    except OSError:
        pass  # a container's /proc/sys is read-only; such namespaces would have no more to see than this one


def enter_root(root: str, shown: list[str], files_mb: int) -> None:
    """A root of its own in memory: Python and the system's libraries, read-only; an empty writable /tmp; no /proc.

    Args:
        root: an empty folder, which the new root is mounted on.
        shown: what of the old root is seen in the new one.
        files_mb: size of /tmp.
    """
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("none", root, "tmpfs", MS_NOSUID, "mode=0755,size=1m,nr_inodes=1000")
    for path in [*shown, *(f"/dev/{name}" for name in DEVICES)]:
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        mount(path, target, None, MS_BIND | MS_REC)
    os.mkdir(root + "/tmp")
    os.chdir(root)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.c_size_t(32))
    owner = f"mode=0700,uid={INSIDE},gid={INSIDE},size={files_mb}m,nr_inodes=2000"
    mount("none", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, owner)


def set_limits(limits: dict[str, int]) -> None:
    """Of this process and its children, each: bytes and seconds by the names of `resource`."""
    for name, limit in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def run(plan: dict, folder: str, status: int) -> None:
    """Becomes the program, in `folder`; never returns. As nobody's user, in whom exec leaves no capabilities."""
    try:
        os.chdir(folder)
        with open("main.py", "wb") as file:
            file.write(plan["program"])
        if os.geteuid() == 0 and plan["isolate"]:
            os.chown("main.py", INSIDE, INSIDE)
            os.setgroups([])
            os.setresgid(INSIDE, INSIDE, INSIDE)
            os.setresuid(INSIDE, INSIDE, INSIDE)
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        set_limits(plan["limits"])
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.write(status, b"ready\n")
        environment = {"HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"} | plan[
            "environment"
        ]
        os.execve(plan["python"], [plan["python"], "-I", "-S", "-X", "utf8", "main.py"], environment)
    except BaseException as error:
        os.write(status, f"error {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(127)


def wait_for(child: int) -> str:
    """How a child ended; others that end meanwhile are its orphans."""
    while True:
        ended, how = os.waitpid(-1, 0)
        if ended == child:
            return f"signal {os.WTERMSIG(how)}" if os.WIFSIGNALED(how) else f"exit {os.WEXITSTATUS(how)}"


def main() -> None:
    plan = json.loads(sys.argv[1])
    status: int = plan["status"]
    os.set_inheritable(status, False)
    try:
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        program = b""
        while missing := plan["length"] - len(program):
            if not (more := os.read(0, missing)):
                raise EOFError("the program ended early")
            program += more
        plan["program"] = program
        folder = plan["folder"]
        if plan["isolate"]:
            enter_namespaces()
            enter_root(folder, plan["shown"], plan["files_mb"])
            folder = "/tmp"
            if first := os.fork():
                for end in (0, 1, 2, status):
                    os.close(end)
                os.waitpid(first, 0)
                os._exit(0)
            call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            call(
                "prctl", PR_SET_DUMPABLE, 0, 0, 0, 0
            )  # the program, which may be the same user, cannot trace this process
        child = os.fork()
        if not child:
            run(plan, folder, status)
        os.write(status, wait_for(child).encode() + b"\n")
    except BaseException as error:
        os.write(status, f"error {type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
