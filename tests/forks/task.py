"""What Slurm starts in place of the program; see `tests.forks`. Run as `python -I -S task.py gpc-dist WORDS`."""

import json
import os
import signal
import socket
import sys

PASSED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT)


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED)
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.environ["TESTS_FORKS"])
    asked = [os.getpid(), sys.argv[2:], os.getcwd(), dict(os.environ)]
    server.sendall(json.dumps(asked).encode() + b"\n")
    answers = server.makefile()
    fork = int(answers.readline())
    for number in PASSED:
        signal.signal(number, lambda number, _: os.kill(fork, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED)
    code = int(answers.readline() or 1)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    sys.exit(code)


main()
