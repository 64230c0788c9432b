"""The code blocks of docs/frameworks.md as files and commands, and an application made of them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from support.app import LIMIT_S, App, wait_until

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"# (\S+\.\w+|\.env)\n")
SHARED = "The same everywhere"
TOGETHER = "Inside your transaction"
AT_IMPORT = "What is made at import"


def sections():
    """Return the code blocks of the page by section, each as (language, text)."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return {title: BLOCK.findall(text) for title, text in zip(parts[::2], parts[1::2], strict=True)}


def files_of(section):
    """Return the files of a section by name: the blocks whose first line names one."""
    return {found[1]: text for _, text in sections()[section] if (found := FILE_NAME.match(text))}


def commands_of(section):
    """Return the commands of a section, each with the output that the page shows."""
    told = "\n".join(text for language, text in sections()[section] if language == "console")
    return [tuple(part.strip("\n").partition("\n")[::2]) for part in re.split(r"^\$ ", told, flags=re.MULTILINE)[1:]]


class Following(App):
    """An application of what the page says, and nothing else."""

    def __init__(self, folder):
        folder.mkdir()
        self.folder = folder
        self.config = folder / "bgsupervisor.toml"
        self.state_dir = folder / ".bgsupervisor"
        self.supervisors = []
        self._service = None
        self._servers = []

    def write_files(self, *titles):
        for title in titles:
            for name, text in files_of(title).items():
                path = self.folder / name
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)

    def shell(self, command, environment=None):
        """Run a command of the page in the application's folder; this Python's programs are found first."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return subprocess.run(
            ["sh", "-c", command],
            cwd=self.folder,
            env=self.environment(PATH=path, **(environment or {})),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S * 3,
            check=False,
        )

    def python(self, text, **environment):
        """Run a program in the application's folder, any warning an error; return what it printed as JSON."""
        (self.folder / "asking.py").write_text(text)
        done = self.shell(f"{shlex.quote(sys.executable)} -W error asking.py", environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def serve(self, arguments, said):
        """Start a web server and return the address that it tells."""
        output = self.folder / f"serve-{len(self._servers)}.log"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self.environment(PYTHONUNBUFFERED="1"),
            )
        self._servers.append(process)
        found = wait_until(
            lambda: process.poll() is not None or re.search(said, output.read_text()), "the server tells"
        )
        assert process.poll() is None, output.read_text()
        return found[1]

    def end(self):
        for server in self._servers:
            server.kill()
            server.wait(LIMIT_S)
        super().end()
