"""Connect to service managers, containers, agents and desktops."""

import os
import socket
import stat

from cloister.prove.inside.support import Box, read

ID = "ipc-known-sockets"
TITLE = "Connect to service managers, containers, agents and desktops"
PROMISE = "P-041"
CLASSES = (41, 43)
EXPECT = "none of their sockets is there"
SHAPE = "any"


def attack(box: Box) -> None:
    """Where they usually are."""
    for path in usual_places(box.home):
        if _redirects(path):
            continue
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            box.connects(path, "ENOENT ENOTDIR EACCES", socket.AF_UNIX, kind, path)


def _redirects(path: str) -> bool:
    """Tell whether it is no socket but a file for libassuan that names the run's own, filtered one."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode) and read(path).startswith("%Assuan%\nsocket=/run/cloister/box/")
    except OSError:
        return False


def usual_places(home: str) -> list[str]:
    """Return paths of sockets as distributions have them."""
    user = f"/run/user/{os.getuid()}"
    return [
        "/run/dbus/system_bus_socket",
        "/var/run/dbus/system_bus_socket",
        f"{user}/bus",
        f"{user}/systemd/private",
        "/run/systemd/private",
        "/run/systemd/journal/socket",
        "/run/systemd/journal/stdout",
        "/run/systemd/resolve/io.systemd.Resolve",
        "/run/systemd/userdb/io.systemd.DynamicUser",
        "/dev/log",
        "/run/docker.sock",
        "/var/run/docker.sock",
        f"{user}/docker.sock",
        "/run/containerd/containerd.sock",
        "/run/podman/podman.sock",
        f"{user}/podman/podman.sock",
        "/run/crio/crio.sock",
        "/run/libvirt/libvirt-sock",
        "/nix/var/nix/daemon-socket/socket",
        f"{user}/gnupg/S.gpg-agent",
        f"{user}/gnupg/S.gpg-agent.ssh",
        f"{home}/.gnupg/S.gpg-agent",
        f"{user}/keyring/ssh",
        f"{user}/keyring/control",
        f"{user}/wayland-0",
        f"{user}/wayland-1",
        "/tmp/.X11-unix/X0",
        "/tmp/.X11-unix/X1",
        f"{user}/pipewire-0",
        f"{user}/pulse/native",
        "/run/nscd/socket",
        "/run/cups/cups.sock",
        "/run/snapd.socket",
        "/run/lxd/unix.socket",
        "/run/avahi-daemon/socket",
        "/run/tailscale/tailscaled.sock",
        "/run/pcscd/pcscd.comm",
        "/run/mysqld/mysqld.sock",
        "/run/postgresql/.s.PGSQL.5432",
        "/run/user/0/bus",
        "/run/udev/control",
        f"{home}/.ssh/agent.sock",
        "/tmp/tmux-1000/default",
        "/run/fail2ban/fail2ban.sock",
    ]
