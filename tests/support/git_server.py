"""Real git over https: git-http-backend behind nginx and fcgiwrap, with one accepted Authorization field.

Everything runs as the test's own user in a folder of the test's. nginx cannot be told to take a free
port, so one is looked for first. For tests only.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

from support.listening import listens

CONFIG = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log {folder}/access.log combined;
    client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
    uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
    server {{
        listen 127.0.0.1:{port} ssl http2;
        ssl_certificate {certificate}; ssl_certificate_key {key};
        client_max_body_size 0;
        location / {{
            if ($http_authorization != "{authorization}") {{
                add_header WWW-Authenticate 'Basic realm="git"' always;
                return 401;
            }}
            fastcgi_pass unix:{folder}/cgi.sock;
            fastcgi_param SCRIPT_FILENAME {backend};
            fastcgi_param GIT_PROJECT_ROOT {folder}/repositories;
            fastcgi_param GIT_HTTP_EXPORT_ALL "1";
            fastcgi_param HTTP_CONTENT_ENCODING $http_content_encoding;
            fastcgi_param GIT_PROTOCOL $http_git_protocol;
            fastcgi_param HOME {folder};
            fastcgi_param PATH_INFO $uri;
            fastcgi_param QUERY_STRING $query_string;
            fastcgi_param REQUEST_METHOD $request_method;
            fastcgi_param CONTENT_TYPE $content_type;
            fastcgi_param CONTENT_LENGTH $content_length;
            fastcgi_param REMOTE_USER somebody;
            fastcgi_param REMOTE_ADDR $remote_addr;
        }}
    }}
}}
"""


class GitServer:
    """The servers, and one bare repository `demo.git`. A context manager."""

    def __init__(self, folder: Path, certificate: tuple[Path, Path], authorization: str) -> None:
        """Make the repository and start both servers."""
        folder.mkdir()
        self.folder = folder
        self.repository = folder / "repositories/demo.git"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._make_repository()
        backend = Path(
            subprocess.run(["git", "--exec-path"], capture_output=True, check=True, text=True).stdout.strip()
        )
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        text = CONFIG.format(
            folder=folder, port=self.port, certificate=certificate[0], key=certificate[1], authorization=authorization,
            backend=backend / "git-http-backend",
        )  # fmt: skip
        (folder / "nginx.conf").write_text(text)
        self._start(_program("fcgiwrap"), "-s", f"unix:{folder}/cgi.sock")
        self._start(_program("nginx"), "-p", str(folder), "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf")
        self._wait()

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """End both servers."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(10)

    def log(self) -> list[str]:
        """Return the subjects of all commits on `main`, newest first."""
        return _git(self.repository, "log", "--format=%s", "main").splitlines()

    def _make_repository(self) -> None:
        self.repository.mkdir(parents=True)
        _git(self.repository, "init", "-q", "--bare", "-b", "main")
        _git(self.repository, "config", "http.receivepack", "true")
        first = self.folder / "first"
        first.mkdir()
        _git(first, "init", "-q", "-b", "main")
        (first / "README").write_text("from the server\n")
        _git(first, "add", "README")
        _git(first, "-c", "user.name=Dev", "-c", "user.email=dev@example.org", "commit", "-q", "-m", "first")
        _git(first, "push", "-q", str(self.repository), "main")

    def _start(self, *words: str) -> None:
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(self.folder)}
        null = subprocess.DEVNULL
        self._processes.append(subprocess.Popen(words, env=environment, stdin=null, stdout=null, stderr=null))

    def _wait(self) -> None:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                time.sleep(0.05)
            else:
                if listens(self.folder / "cgi.sock"):
                    return
        self.__exit__()
        raise AssertionError((self.folder / "error.log").read_text())


def _program(name: str) -> str:
    found = shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin")))
    assert found, f"{name} is not installed: tools/packages names it"
    return found


def _git(folder: Path, *words: str) -> str:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(
        ["git", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout
