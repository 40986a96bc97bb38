"""What is left of a terminal after a SIGHUP."""

import os
import pty
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import signal, sys, time
from cascade_det.parallel.signals import handled, let_go_of_lost_terminal
received = []
def handle(number, frame):
    let_go_of_lost_terminal()
    received.append(number)
with handled({signal.SIGHUP: handle}):
    print("here", flush=True)
    while not received:
        time.sleep(0.01)
    print("not read", flush=True)
    print("nor this", file=sys.stderr, flush=True)
sys.exit(7)
"""


def test_a_command_can_still_print_when_its_terminal_is_gone():
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", PROGRAM])
    shown = b""
    while not shown.endswith(b"\n"):  # before it, the write of the child has not returned
        shown += os.read(terminal, 100)
    assert shown == b"here\r\n"
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
