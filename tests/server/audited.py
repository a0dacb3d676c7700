"""`mythos serve` under watch: python audited.py LOG ARGUMENTS... writes what it opens, unpickles and connects to."""

import os
import sys

TOLD = ("open", "pickle.find_class", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system")


def watch(log: str) -> None:
    """Write the events to a file, a line each: name, then the first argument."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in TOLD:
            os.write(handle, f"{event}\t{args[0]!r}\n".encode())

    sys.addaudithook(hook)


if __name__ == "__main__":
    watch(sys.argv[1])
    from open_mythos.cli import main

    sys.exit(main(["serve", *sys.argv[2:]]))
