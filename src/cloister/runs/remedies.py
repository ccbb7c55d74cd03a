"""What to type when a host lacks something: the texts of the doctor, one place per cause.

Each is a command, or an instruction that names what to change. Values of this host are filled
in by the doctor, which quotes them. Not here: when which text applies (`doctor`).
"""

from __future__ import annotations

import shlex

INSTALL_BWRAP = "sudo apt-get install bubblewrap"
INSTALL_QEMU = "sudo apt-get install qemu-system-x86"
INSTALL_FIRECRACKER = (
    "only if you want it: its program from https://github.com/firecracker-microvm/firecracker/releases, by "
    "sudo install -m 755 firecracker-* /usr/local/bin/firecracker"
)
OWN_FIRECRACKER = "sudo install -m 755 firecracker /usr/local/bin/firecracker"
INSTALL_DISK_TOOLS = "sudo apt-get install e2fsprogs util-linux"
INSTALL_IMAGE_TOOLS = "sudo apt-get install mmdebstrap erofs-utils"
FIRST_IMAGE = "cloister image build minimal"
INSTALL_INTERNET = "sudo apt-get install passt nftables"
TUN = "sudo modprobe tun && sudo chmod 0666 /dev/net/tun"
NEW_SYSTEMD = "upgrade the system: Debian 12 has systemd 252"
REINSTALL = "sudo apt-get install gcc libc6-dev, then install cloister again"
MAX_USER_NAMESPACES = (
    "echo user.max_user_namespaces=28633 | sudo tee /etc/sysctl.d/60-userns.conf && sudo sysctl --system"
)
USERNS_CLONE = "echo kernel.unprivileged_userns_clone=1 | sudo tee /etc/sysctl.d/60-userns.conf && sudo sysctl --system"
UNMASK_PROC = (
    "start the container with an unmasked /proc: docker run --security-opt systempaths=unconfined "
    "--security-opt seccomp=unconfined --security-opt apparmor=unconfined, or podman run --security-opt unmask=ALL"
)
CONTAINER = (
    "start the container so that user namespaces work: docker run --security-opt seccomp=unconfined "
    "--security-opt apparmor=unconfined --security-opt systempaths=unconfined, or podman run"
)
RETRY_BWRAP = "{bwrap} --unshare-all --ro-bind / / --dev /dev --proc /proc true"
NEW_KERNEL = "use Linux 6.12 or later"
NEW_KERNEL_OVERLAY = "use Linux 5.11 or later with overlayfs: sudo modprobe overlay"
LANDLOCK_LSM = "add lsm={lsms} to the kernel command line and reboot"
UNIFIED_CGROUPS = "add systemd.unified_cgroup_hierarchy=1 to the kernel command line and reboot"
LINGER = "sudo loginctl enable-linger $USER, or log in (ssh, not su)"
DELEGATE = (
    "printf '[Service]\\nDelegate=cpu memory pids\\n' | sudo install -D -m 644 /dev/stdin "
    "/etc/systemd/system/user@.service.d/delegate.conf && sudo systemctl daemon-reload, then log in again"
)
CONTAINER_CGROUP = (
    "in a container with its own, writable cgroups (docker run --cgroupns=private): "
    "mkdir /sys/fs/cgroup/main; "
    "xargs -n1 < /sys/fs/cgroup/cgroup.procs sh -c 'echo $0 > /sys/fs/cgroup/main/cgroup.procs'; "
    "echo +cpu +memory +pids > /sys/fs/cgroup/cgroup.subtree_control"
)
BOOT_SYSTEMD = "use a host that is booted with systemd, or stay with the other backends"
BTF = "use a kernel with CONFIG_DEBUG_INFO_BTF, as Debian's and Ubuntu's have"
KVM_GROUP = "sudo usermod -aG kvm $USER, then log in again"
KVM_MACHINE = "switch on virtualization in the firmware or, in a virtual machine, nested virtualization"


def apparmor_profile(name: str, path: str) -> str:
    """Return the command that gives the program at `path` a profile allowing user namespaces.

    The profile confines nothing else; the syntax is that of AppArmor 4, which brought the restriction
    (Ubuntu 23.10). Turning the restriction off for all programs would work too, and is not offered.
    """
    profile = f'profile {name} "{path}" flags=(unconfined) {{ userns, }}'
    lines = ("abi <abi/4.0>,", "include <tunables/global>", profile)
    target = f"/etc/apparmor.d/{name}"
    text = " ".join(map(shlex.quote, lines))
    return f"printf '%s\\n' {text} | sudo tee {target} && sudo apparmor_parser -r {target}"
