#!/usr/bin/env python3
"""hearth train --hostfile over two hosts: two network namespaces joined by a cable, with an agent in the place of ssh.
Needs the right to make namespaces (root).

Usage: two_hosts.py --bin DIR all
"""
import os
import pathlib
import signal
import subprocess

import e2e
from e2e import LONG, check, check_equal, check_finished, check_one_token

ADDRESSES = ("10.77.0.1", "10.77.0.2")
NET = "10.77.0.0/24"


class Hosts:
    """Two namespaces; `here` runs a command on the first. They see one file system, as hosts of a cluster do."""

    def __init__(self, root):
        self.root = pathlib.Path(root)
        self.names = [f"hearth{os.getpid()}{letter}" for letter in "ab"]
        self.agent, self.calls, self.file = self.root / "agent", self.root / "agent.calls", self.root / "hosts"

    def __enter__(self):
        ends = [f"h{os.getpid()}{letter}" for letter in "ab"]
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", self.names[0], "type", "veth", "peer", "name", ends[1], "netns",
           self.names[1])
        for name, end, address in zip(self.names, ends, ADDRESSES):
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        cases = "".join(f"{address}) host={name} ;;\n" for name, address in zip(self.names, ADDRESSES))
        self.agent.write_text("#!/bin/bash\n# AGENT [OPTION…] HOST COMMAND…\nwhile [[ $1 == -* ]]; do shift; done\n"
                              f"case $1 in\n{cases}*) echo \"no host $1\" >&2; exit 1 ;;\nesac\n"
                              f"echo \"$1\" >>{self.calls}\nshift\nexec ip netns exec $host /bin/bash -c \"$*\"\n")
        self.agent.chmod(0o755)
        self.file.write_text("".join(f"{address} slots=3\n" for address in ADDRESSES))
        return self

    def __exit__(self, *_):
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], stdin=subprocess.DEVNULL)

    def here(self, *command):
        return ["ip", "netns", "exec", self.names[0], *map(str, command)]

    def environment(self):
        return dict(os.environ, OMPI_MCA_plm_rsh_agent=str(self.agent), OMPI_MCA_oob_tcp_if_include=NET,
                    OMPI_MCA_btl="tcp,self", OMPI_MCA_pml="ob1", OMPI_MCA_btl_tcp_if_include=NET)

    def of(self, pid):
        """The index of the host that a process is on."""
        net = os.stat(f"/proc/{pid}/ns/net").st_ino
        return [os.stat(f"/run/netns/{name}").st_ino for name in self.names].index(net)


def ip(*arguments):
    done = subprocess.run(["ip", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    check(done.returncode == 0, f"ip {' '.join(arguments)}: {done.stdout}")


def two_hosts_train_to_the_hash_of_one(bench):
    bench.generate(records=LONG)
    whole = bench.train("whole", ps=2, worker=2)
    with Hosts(bench.root) as hosts:
        out = open(bench.root / "two.out", "w")
        command = bench.command(*bench.train_arguments("two", ps=2, worker=3), "--hostfile", hosts.file)
        process = subprocess.Popen(hosts.here(*command), env=hosts.environment(), stdin=subprocess.DEVNULL, stdout=out,
                                   stderr=subprocess.STDOUT)
        try:
            bench.wait_for_step("two", 12, process)
            found = {pid: hosts.of(pid) for program in ("hearth-scheduler", "hearth-ps", "hearth-worker")
                     for pid in bench.pids(program, "two")}
            check_equal(len(found), 6, "ranks")
            check_equal(set(found.values()), {0, 1}, "hosts with ranks")
            check_one_token(found)
            victim = max(pid for pid, host in found.items() if host == 1)
            os.kill(victim, signal.SIGKILL)
            print(f"  killed a rank on {ADDRESSES[1]} after step {bench.newest_step('two')}", flush=True)
            code = bench.end(process)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        text = (bench.root / "two.out").read_text()
        check_equal(code, 0, f"exit code\n{text}\n{bench.logs()}\nexit code")
        check(hosts.calls.read_text().split().count(ADDRESSES[1]) >= 2, "mpirun did not go to the second host twice")
    run = bench.run_json("two")
    check_finished(run, LONG)
    check_equal(run["restarts"], 1, f"restarts\n{text}\nrestarts")
    check_equal(run["model_hash"], whole["model_hash"], "hash over two hosts, one rank killed, against one host")


if __name__ == "__main__":
    e2e.main([two_hosts_train_to_the_hash_of_one], "hearth-hosts-")
