"""A private Slurm on this machine: its own munged, slurmctld and two slurmd, in one folder, on free ports;
gone afterwards."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
PATH = os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin:/sbin"
MISSING = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
NODES = ("n1", "n2", "g1", "t1")
LAUNCHERS = ("SLURM", "SBATCH", "SQUEUE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_")
"""How variables begin that Slurm or torchrun set, and so do commands that other tests ran in this process."""
MARK = "DAEMON_OF"
"""In the environment of a daemon and of the slurmstepds that it starts: whose they are."""

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,defer_batch
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
JobRequeue=1
ReturnToService=2
KillWait=2
SlurmdTimeout=6
BatchStartTimeout=10
UnkillableStepTimeout=15
MessageTimeout=5
TCPTimeout=2
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
{nodes}
PartitionName=cpu Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
PartitionName=gpu Nodes=g1 MaxTime=INFINITE State=UP
PartitionName=aside Nodes=t1 MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on just now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass
class Slurm:
    """The cluster: nodes n1 and n2 (partition `cpu`), g1 with two make-believe GPUs (`gpu`), and t1
    (`aside`).

    What runs in `aside` goes on from test to test.
    """

    folder: Path
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs in order to talk to this Slurm and no other."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
        return {**kept, "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def start(self) -> None:
        """Write the configuration and start the daemons; returns when the nodes are idle."""
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        ports = free_ports(1 + len(NODES))
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 "
            f"RealMemory=500{gpus} State=UNKNOWN"
            for node, port, gpus in zip(NODES, ports[1:], ("", "", " Gres=gpu:2", ""), strict=True)
        )
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        config = CONFIG.format(host=host, ports=ports, user=user, folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(config)
        (self.folder / "gres.conf").write_text(
            "NodeName=g1 Name=gpu File=/dev/null\nNodeName=g1 Name=gpu File=/dev/zero\n"
        )
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
        munge = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._start(
            "munged", "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *munge
        )
        self.wait(lambda: (self.folder / "munge.socket").exists(), "munged's socket")
        self._start("slurmctld", "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        for node in NODES:
            self.start_node(node)
        self.wait(
            lambda: self.run("sinfo", "-N", "-h", "-o", "%T", check=False).split() == ["idle"] * len(NODES),
            "idle nodes",
        )

    def _start(self, name: str, *command: str) -> None:
        environment = {**self.environment, MARK: name}
        with (self.folder / f"{name}.out").open("ab") as out:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
            self.daemons[name] = subprocess.Popen(command, env=environment, start_new_session=True, **streams)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._start(node, "slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf"))

    def kill_node(self, node: str) -> None:
        """The machine dies: its slurmd, the slurmstepds, and all that ran under them; nobody reports
        anything."""
        daemon = self.daemons.pop(node)
        for mark in (f"{MARK}={node}", f"SLURMD_NODENAME={node}"):
            for pid in self.processes():
                if mark in self.environ(pid):
                    self.kill(pid)
        daemon.wait()
        # what Slurm finds out by itself after SlurmdTimeout (tried: half a minute), without the wait
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=dead")

    def revive_node(self, node: str) -> None:
        """The machine is back."""
        self.start_node(node)
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.wait(
            lambda: self.run("sinfo", "-N", "-h", "-n", node, "-o", "%T").strip() == "idle",
            f"{node} to be idle",
        )

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, **environment: str) -> str:
        """Run a command on the cluster and return what it printed on stdout."""
        done = subprocess.run(
            command,
            env={**self.environment, **environment},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not check or done.returncode == 0, (
            f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done.stdout

    def queue(self) -> list[str]:
        """Jobs of the present test that have not ended."""
        return self.run("squeue", "-h", "-p", "cpu,gpu", "-o", "%A").split()

    def empty(self) -> None:
        """Cancel the jobs of the present test; one that was just queueing itself again, a second time."""

        def cancelled() -> bool:
            jobs = self.queue()
            if jobs:
                self.run("scancel", *jobs, check=False)
            return not jobs

        self.wait(cancelled, "empty queue")

    def job(self, job: int | str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "-o", str(job))))

    def start_now(self, job: int | str) -> None:
        """Skip the two minutes that Slurm lets a requeued job wait; returns when it has started again."""
        self.wait(lambda: self.job(job)["Reason"] == "BeginTime", f"job {job} requeued")
        time.sleep(
            1.1
        )  # Slurm counts in seconds when it revokes a job's credential: a start in the same one fails
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        self.wait(lambda: self.job(job)["JobState"] != "PENDING", f"new start of job {job}")

    def wait_for(self, job: int | str, *states: str, seconds: float = 40) -> dict[str, str]:
        """Wait until the job is in one of the states, or has ended."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(lambda: self.job(job)["JobState"] in wanted, f"job {job} to be {wanted}", seconds)
        return self.job(job)

    def wait(self, true, what: str, seconds: float = 40) -> None:
        """Wait until `true()`, at most `seconds`.

        Raises:
            AssertionError: it did not come true; the message holds the queue and the controller's last lines.
        """
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                logs = "\n".join(
                    log.read_text(errors="replace")[-1500:] for log in sorted(self.folder.glob("slurm*.log"))
                )
                raise AssertionError(
                    f"no {what} after {seconds} s\n{self.run('squeue', check=False)}\n{logs}"
                )
            time.sleep(0.1)

    def processes(self) -> list[int]:
        """All processes that belong to this Slurm, by the configuration named in their environment."""
        mark = f"SLURM_CONF={self.folder / 'slurm.conf'}"
        return [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and mark in self.environ(int(entry.name))
        ]

    def stop(self) -> None:
        """End every process of this Slurm."""
        self.run("scancel", *self.run("squeue", "-h", "-o", "%A", check=False).split(), check=False)
        for pid in self.processes():
            if pid != os.getpid():
                self.kill(pid)
        for daemon in self.daemons.values():
            daemon.wait()

    @staticmethod
    def environ(pid: int) -> list[str]:
        """The environment that a process was started with; empty when it is gone."""
        try:
            return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            return []

    @staticmethod
    def kill(pid: int) -> None:
        """SIGKILL, unless it is gone already."""
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    @staticmethod
    def freeze(pid: int) -> None:
        """SIGSTOP."""
        os.kill(pid, signal.SIGSTOP)
