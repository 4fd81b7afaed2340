"""Several machines in one: nodes with a name and a network of their own, joined by a cable.

    python eval/backends/multi_node.py accelerate launch --config_file accelerate_configs/ddp_nodes.yaml \
        --num_processes 2 --machine_rank {rank} --main_process_ip node0 --main_process_port 29500 \
        recipes/train_mtl15.py --tasks sst2

runs the command on two nodes, with the node's number in the place of {rank}. A node is a tree of processes in new
network, host-name, mount and process namespaces: it has its own ports, its own loopback, and reaches the other node,
whose name `node<rank>` it knows, over the cable alone. What the nodes share is the disk. Needs Linux and root. Nothing
stays when the processes have ended, and they end with this one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ADDRESS = "10.77.0.{}"
"""Of a node, by 1 + its rank: on the cable, so of no meaning elsewhere."""
_NEEDED = "they need Linux, iproute2, util-linux and root"
# It ends with this process, and all processes of the node with it.
_OWN = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child",
        "--mount-proc"]  # fmt: skip
# The name has to be in place, and the loopback up, before anything asks for them; then the cable is plugged in.
_BEGIN = """
echo node$1 > /proc/sys/kernel/hostname && mount --bind "$2" /etc/hosts && ip link set lo up && read -r || exit 125
shift 2
"$@"
exit $?
"""


@functools.cache
def why_not() -> str | None:
    """Why no nodes can be made here; None: they can. Two are made once, to see."""
    try:
        codes = run([["true"]] * 2, os.environ, [Path(os.devnull)] * 2, seconds=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"no network namespaces here ({getattr(error, 'stderr', None) or error}); {_NEEDED}"
    return None if codes == [0, 0] else f"no network namespaces here; {_NEEDED}"


def run(
    commands: Sequence[Sequence[str]], environment: Mapping[str, str], logs: Sequence[Path], seconds: float
) -> list[int]:
    """Run a command a node, on one node or two, and return the exit codes.

    Args:
        commands: by rank of the node.
        environment: of all.
        logs: a file a node, for what its command prints.
        seconds: until all are killed.

    Raises:
        OSError, subprocess.CalledProcessError: if the system refuses to make nodes.
        subprocess.TimeoutExpired: if they were killed.
    """
    end = time.monotonic() + seconds
    with nodes(commands, environment, logs) as begun:
        return [node.wait(max(0.0, end - time.monotonic())) for node in begun]


@contextlib.contextmanager
def nodes(
    commands: Sequence[Sequence[str]], environment: Mapping[str, str], logs: Sequence[Path]
) -> Iterator[list[subprocess.Popen]]:
    """The nodes as processes, arguments as of `run`; those that still run when the block ends are killed.

    Raises:
        OSError, subprocess.CalledProcessError: if the system refuses to make nodes.
    """
    addresses = [ADDRESS.format(1 + rank) for rank in range(len(commands))]
    with contextlib.ExitStack() as ending:
        hosts = Path(ending.enter_context(tempfile.TemporaryDirectory())) / "hosts"
        names = "".join(f"{address} node{rank}\n" for rank, address in enumerate(addresses))
        hosts.write_text(f"127.0.0.1 localhost\n{names}", encoding="utf-8")
        begun = []
        for rank, (command, log) in enumerate(zip(commands, logs, strict=True)):
            said = ending.enter_context(open(log, "w", encoding="utf-8"))
            begin = [*_OWN, "bash", "-c", _BEGIN, "node", str(rank), str(hosts), *command]
            node = subprocess.Popen(
                begin, env=dict(environment), stdin=subprocess.PIPE, stdout=said, stderr=said, text=True
            )
            ending.callback(_end, node)
            begun.append(node)
        for node in begun:
            _wait_for_network(node)
        if len(begun) == 2:
            _plug_in(begun, addresses)
        for node in begun:
            node.stdin.write("begin\n")
            node.stdin.close()
        yield begun


def _wait_for_network(node: subprocess.Popen) -> None:
    """Until it is no longer this process's own."""
    own = os.readlink("/proc/self/ns/net")
    while node.poll() is None and os.readlink(f"/proc/{node.pid}/ns/net") == own:
        time.sleep(0.005)
    if node.poll() is not None:
        raise OSError(f"unshare ended with code {node.returncode}")


def _plug_in(begun: list[subprocess.Popen], addresses: list[str]) -> None:
    first, second = (str(node.pid) for node in begun)
    commands = [
        ["ip", "link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second]
    ]
    for node, address in zip(begun, addresses, strict=True):
        inside = ["nsenter", "--target", str(node.pid), "--net", "ip"]
        commands += [[*inside, "address", "add", f"{address}/24", "dev", "cable"],
                     [*inside, "link", "set", "cable", "up"]]  # fmt: skip
    for command in commands:
        subprocess.run(command, check=True, capture_output=True, text=True)


def _end(node: subprocess.Popen) -> None:
    node.kill()
    node.wait()


def main() -> int:
    template = sys.argv[1:]
    if not template or template[0].startswith("-"):
        sys.exit(__doc__)
    if (reason := why_not()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    commands = [[word.replace("{rank}", str(rank)) for word in template] for rank in (0, 1)]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"node{rank}.log" for rank in (0, 1)]
        codes = run(commands, os.environ, logs, seconds=float("inf"))
        for rank, log in enumerate(logs):
            print("".join(f"node{rank}: {line}\n" for line in log.read_text(encoding="utf-8").splitlines()), end="")
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
