"""Attempts made inside a unit, each a function that raises where it is refused. Standard library only, sent as text.

`python3 -c TEXT ATTEMPTS` takes and prints JSON: for each attempt, a name with arguments, `allowed`, the error, or how
its process ended. Nothing here changes the machine when it succeeds: what is written is what stands there.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import threading

_LIBC = ctypes.CDLL(None, use_errno=True)
_X86 = platform.machine() == "x86_64"
_NUMBERS = {  # x86_64, generic
    "unshare": (272, 97), "clone3": (435, 435), "io_uring_setup": (425, 425), "userfaultfd": (323, 282),
    "bpf": (321, 280), "perf_event_open": (298, 241), "add_key": (248, 217), "keyctl": (250, 219),
    "personality": (135, 92), "syslog": (103, 116), "init_module": (175, 105), "clock_adjtime": (305, 266),
    "mount": (165, 40), "setns": (308, 268), "sethostname": (170, 161), "shmget": (29, 194), "ptrace": (101, 117),
    "open_by_handle_at": (304, 265), "swapon": (167, 224), "iopl": (172, 0), "setpriority": (141, 140),
    "name_to_handle_at": (303, 264), "process_vm_readv": (310, 270),
}  # fmt: skip


def call(name, *arguments):
    """Make a system call; raise what it answers."""
    ctypes.set_errno(0)
    result = _LIBC.syscall(_NUMBERS[name][0 if _X86 else 1], *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def user_namespace():
    """Make a user namespace."""
    call("unshare", 0x10000000)


def mount_namespace():
    """Make a mount namespace."""
    call("unshare", 0x20000)


def clone3():
    """Call clone3 with no arguments: EINVAL where it may be called."""
    try:
        call("clone3", 0, 0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def harmless(name, arguments, fine=(errno.EINVAL, errno.EFAULT, errno.EBADF, errno.ENOENT, errno.ESRCH, errno.ENOSYS)):
    """Make a call whose arguments are wrong: whoever may call it is told so."""
    try:
        call(name, *arguments)
    except OSError as error:
        if error.errno not in fine:
            raise


def io_uring():
    """Set up io_uring."""
    harmless("io_uring_setup", (0, 0))


def userfaultfd():
    """Ask for user faults."""
    harmless("userfaultfd", (0xFFFFFF,))


def bpf():
    """Load a BPF program."""
    harmless("bpf", (99, 0, 0))


def perf():
    """Open a performance event."""
    harmless("perf_event_open", (0, 0, -1, -1, 0))


def keyring():
    """Add a key."""
    buffer = ctypes.create_string_buffer(b"user"), ctypes.create_string_buffer(b"cloister-test")
    call("add_key", buffer[0], buffer[1], buffer[1], 4, -3)


def modules():
    """Load a module that is none."""
    harmless("init_module", (0, 0, 0))


def clock():
    """Look at the clock through the call that sets it."""
    buffer = ctypes.create_string_buffer(512)
    call("clock_adjtime", 0, buffer)


def kernel_log():
    """Ask for the size of the kernel's log."""
    call("syslog", 10, 0, 0)


def mounting():
    """Mount a file system of no kind."""
    harmless("mount", (0, 0, 0, 0, 0), (errno.EFAULT, errno.ENODEV))


def handles():
    """Open a file by its handle."""
    harmless("open_by_handle_at", (-1, 0, 0))


def handle_of(path):
    """Ask for the handle of a file: too small a buffer for it is the answer of a kernel that gives them."""
    buffer = ctypes.create_string_buffer(8)
    number = ctypes.c_int()
    harmless(
        "name_to_handle_at", (-100, path.encode(), buffer, ctypes.byref(number), 0), (errno.EOVERFLOW, errno.ENOTSUP)
    )


def other_memory():
    """Read from the own memory by the call that reads others'."""
    harmless("process_vm_readv", (os.getpid(), 0, 0, 0, 0, 1))


def control_group():
    """Open what would move a process to another control group."""
    path = "/sys/fs/cgroup/cgroup.procs"
    os.close(os.open(path if os.path.exists(path) else "/sys/fs/cgroup/pids/cgroup.procs", os.O_WRONLY))


def swap():
    """Swap to a file that is not there."""
    harmless("swapon", (0, 0))


def ports():
    """Ask for the processor's ports."""
    harmless("iopl", (0,)) if _X86 else None


def hostname():
    """Give the machine the name it has."""
    name = os.uname().nodename.encode()
    call("sethostname", name, len(name))


def tracing():
    """Trace a process that is not there."""
    harmless("ptrace", (16, 999999, 0, 0))


def personality():
    """Become a process with executable data."""
    call("personality", 0x400000)


def realtime():
    """Become a realtime process."""
    try:
        os.sched_setscheduler(999999, os.SCHED_FIFO, os.sched_param(1))
    except ProcessLookupError:
        return


def set_uid_bit():
    """Leave a set-uid file behind."""
    with tempfile.NamedTemporaryFile() as file:
        os.chmod(file.name, 0o4755)  # noqa: S103  # the attempt


def write_execute():
    """Write code into memory and run it, as a just-in-time compiler does."""
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    if _X86:
        memory.write(b"\xb8\x2a\x00\x00\x00\xc3")
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert ctypes.CFUNCTYPE(ctypes.c_int)(address)() == 42


def execute_later():
    """Write code into memory first, and make it executable then."""
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _LIBC.mprotect(ctypes.c_void_p(address), 4096, 1 | 4) < 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def foreign_calls():
    """Make a system call of 32 bits."""
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(b"\x53\xb8\x14\x00\x00\x00\xcd\x80\x5b\xc3")  # push rbx; mov eax, 20 (getpid); int 0x80; pop rbx; ret
    answer = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
    if answer < 0:
        raise OSError(-answer, "int 0x80")


def family(number):
    """Make a socket of an address family."""
    socket.socket(int(number), socket.SOCK_STREAM).close()


def packet():
    """Make a socket for raw frames."""
    socket.socket(17, socket.SOCK_RAW).close()


def read(path):
    """Read a file, or list a directory."""
    os.listdir(path) if os.path.isdir(path) else open(path, "rb").close()


def write(path):
    """Open a file for writing; in a directory, make one."""
    if os.path.isdir(path):
        tempfile.NamedTemporaryFile(dir=path).close()
    else:
        os.close(os.open(path, os.O_WRONLY))


def connect(path):
    """Connect to a Unix socket."""
    kind = socket.SOCK_DGRAM if "/journal/" in path else socket.SOCK_STREAM
    socket.socket(socket.AF_UNIX, kind).connect(path)


def tcp(address):
    """Connect to an address with a port."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), 3).close()


def shared_memory(key):
    """Find a System V segment of somebody else's."""
    call("shmget", int(key), 0, 0)


def owner(path):
    """Be told whose a file is."""
    found = os.stat(path).st_uid
    if found == 65534:
        raise OSError(errno.ENOENT, "nobody's")


def process(pid):
    """See a process by its number on the host."""
    os.stat(f"/proc/{pid}")


def core_file():
    """Be allowed to leave a core file."""
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        raise OSError(errno.EPERM, "no core")


def world_readable():
    """Make a file that others can read, by doing nothing."""
    with tempfile.TemporaryDirectory() as folder:
        os.close(os.open(f"{folder}/x", os.O_CREAT | os.O_WRONLY, 0o666))
        if not os.stat(f"{folder}/x").st_mode & 0o077:
            raise OSError(errno.EPERM, "private")


def capabilities():
    """Have a capability in the bounding set, or be able to get more by a program."""
    with open("/proc/self/status") as file:
        status = dict(line.split(":\t", 1) for line in file if ":\t" in line)
    if int(status["CapBnd"], 16) == 0 and status["NoNewPrivs"].strip() == "1":
        raise OSError(errno.EPERM, "none")


def memory(size):
    """Use that many bytes."""
    block = bytearray(int(size))
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])


def tasks(count):
    """Start that many threads at a time."""
    done = threading.Event()
    started = []
    try:
        for _ in range(int(count)):
            one = threading.Thread(target=done.wait)
            one.start()
            started.append(one)
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, "threads") from error
    finally:
        done.set()
        for one in started:
            one.join()


def own_sandbox(proc):
    """Build a sandbox with bubblewrap; `proc` says whether with a /proc of its own."""
    words = ["bwrap", "--unshare-user", "--unshare-pid", "--unshare-net", "--ro-bind", "/usr", "/usr"]
    words += ["--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64", "--dev", "/dev"]
    words += ["--proc", "/proc"] if proc == "proc" else ["--bind", "/proc", "/proc"]
    done = subprocess.run([*words, "/usr/bin/true"], capture_output=True, check=False)
    if done.returncode:
        raise OSError(errno.EPERM, done.stderr.decode())


def python():
    """Do what programs in Python do: threads, processes, queues, TLS, sockets among themselves, locks."""
    import multiprocessing
    import ssl

    ssl.create_default_context()
    queue = multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(target=queue.put, args=(7,))
    child.start()
    assert queue.get(timeout=10) == 7
    child.join()
    for family_, address in ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET6, ("::1", 0))):
        server = socket.socket(family_, socket.SOCK_STREAM)
        server.bind(address)
        server.listen()
        socket.create_connection(server.getsockname()[:2], 5).close()
    socket.socketpair()
    with tempfile.TemporaryFile() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    socket.if_nameindex()
    struct.pack("<I", os.cpu_count() or 1)


def git():
    """Make a repository with a commit in it."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PATH": "/usr/bin:/bin", "HOME": folder}
        commit = ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x", "--allow-empty"]
        for words in (["init", "-q"], commit, ["gc", "-q"], ["fsck"]):
            subprocess.run(["git", *words], cwd=folder, env=environment, check=True, capture_output=True)


def interfaces():
    """Ask the kernel for the network's interfaces over netlink, as Node's os.networkInterfaces() does."""
    link = socket.socket(16, socket.SOCK_RAW, 0)
    link.send(struct.pack("=IHHIIB", 17, 18, 0x301, 1, 0, 0))
    assert link.recv(1 << 16)


def attempt(name, *arguments):
    """Make one attempt in a process of its own; return what came of it."""
    hear, say = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            globals()[name](*arguments)
            answer = "allowed"
        except OSError as error:
            answer = f"{errno.errorcode.get(error.errno, 'timeout')} {error}"
        os.write(say, answer.encode())
        os._exit(0)
    os.close(say)
    with os.fdopen(hear) as file:
        answer = file.read()
    return answer or f"ended {os.waitpid(child, 0)[1]}"


if __name__ == "__main__":
    sys.stdout.write(json.dumps([attempt(*words) for words in json.loads(sys.argv[1])]))
