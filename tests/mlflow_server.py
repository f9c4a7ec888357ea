"""A real MLflow tracking server, which can be killed and started again on the same port."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

from tests.processes import free_port, wait_until


class MlflowServer:
    """Starts when it is made.

    Args:
        folder: has the store, `mlflow.db`, which is there already so that the start is quick.
    """

    def __init__(self, folder: Path):
        self.folder, self._port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "log").open("ab") as output:
            # without the processes that wait for evaluations to run, which take more of the cores than all else it does
            quiet = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=quiet, stdout=output, stderr=output, start_new_session=True
            )
        wait_until(self._answers)

    def kill(self) -> None:
        """End it with its workers, and without their long farewell."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as response:
                return bool(response.status == 200)
        except OSError:
            return False
