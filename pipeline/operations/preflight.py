"""Check before training that a stage can run at all, and that every node of the job is fit.

    python -m pipeline.operations.preflight STAGE [key=value ...]
        check on a login node what can be known before submission; prints the run's folder. With
        `--processes 64 --gpu-memory 80` also that the stage fits so many GPUs of so many GB
    python -m pipeline.operations.preflight --verdict DIR --nodes "n1 n2"
        judge the reports of `pipeline.operations.node_check`; bad nodes are printed, and written to
        DIR/bad_nodes

Exit codes: 0 everything is fit; 1 some nodes are bad, others may work; 2 an error that the user can fix, on
any node.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

from model.common.errors import UserError, command
from model.common.files import write_atomic
from model.common.records import read_record
from model.common.settings import load_yaml
from pipeline.operations.attempts import needs_gpu
from pipeline.operations.planning import check_memory
from pipeline.stage.config import StageConfig, check_start_from, load_stage
from pipeline.stage.corpus import check_files, open_corpus, shares

MAX_CLOCK_SECONDS = 5.0
"""Maximum difference of clocks. S3 refuses requests that are minutes off."""
MIN_SPEED_SHARE = 0.5
"""Minimum speed of a node's own all-reduce, as a share of the median."""
SHARED = ("store", "run", "memory")
"""Topics that are no node's fault if all nodes report them, even if there is only one node."""


@dataclass
class NodeReport:
    """The report of one process."""

    node: str
    rank: int
    local_rank: int
    gpus: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)
    """(topic, message); topics are `gpu`, `memory`, `shm`, `cache`, `store`, `run`, `network`."""
    versions: dict[str, str] = field(default_factory=dict)
    clock: float | None = None
    """Seconds since 1970, right after all processes had connected; None = they have not."""
    node_bandwidth: float | None = None
    """GB/s of an all-reduce among the node's processes."""
    bandwidth: float | None = None
    """GB/s of an all-reduce among all processes."""
    seconds: float = 0.0

    def write(self, folder: Path) -> None:
        """Write the report for `pipeline.operations.preflight`."""
        write_atomic(folder / f"rank_{self.rank:05d}.json", json.dumps(asdict(self)))


def read_reports(folder: Path) -> list[NodeReport]:
    """Return the reports of all processes that wrote one, by rank."""
    paths = sorted(folder.glob("rank_*.json"))
    return [read_record(path, NodeReport, "run the check again") for path in paths]


@dataclass
class Verdict:
    """The result of all reports."""

    bad: dict[str, str] = field(default_factory=dict)
    """Node -> reason why it is bad."""
    everywhere: str = ""
    """An error of all nodes, so that other nodes would not help."""
    network: str = ""
    """An error of the network between nodes that are fit; it is not known which node causes it."""
    notes: list[str] = field(default_factory=list)


def before_submission(stage: StageConfig, gpus: int, made_here: Path | None, after_another: bool) -> None:
    """Check what can be known before a job is queued.

    Args:
        stage: the stage.
        gpus: number of node groups of the partition that have GPUs.
        made_here: YAML of a dataset that earlier jobs prepare: its store may still be empty.
        after_another: True if the stage starts from a run that is queued before it.

    Raises:
        UserError: if the stage cannot run.
    """
    # sizes that do not fit, such as a width that heads do not divide, are errors here
    stage.dit(stage.model.channels)
    if not gpus and needs_gpu(stage):
        raise UserError(
            f"{stage.name} needs GPUs, and no node of this partition has any: "
            "see `sinfo -o '%P %G'`, give --partition=..."
        )
    if not after_another:
        check_start_from(stage)

    # a dataset that earlier jobs fill has no snapshot yet, so its store cannot be checked now
    if made_here is not None:
        prepared = dict(load_yaml(made_here))
        dataset = prepared.get("store"), prepared.get("name")
        if any(dataset == (share.store, name) for name, share in shares(stage).items()):
            return
    check_files(stage, open_corpus(stage))


def decide(reports: list[NodeReport], nodes: list[str]) -> Verdict:
    """Distinguish bad nodes from bad settings: an error that all nodes report is no node's fault."""
    verdict = Verdict()
    errors: dict[str, set[tuple[str, str]]] = {node: set() for node in nodes}
    for report in reports:
        # network errors name no culprit: the process that reports one may be the healthy end
        errors.setdefault(report.node, set()).update(
            error for error in report.errors if error[0] != "network"
        )
    present = {report.node for report in reports}
    # a node that is down writes no report at all
    for node in nodes:
        if node not in present:
            errors[node].add(("node", "did not answer"))
    for name, compare in (("versions", _odd_versions), ("clock", _odd_clocks), ("bandwidth", _slow_nodes)):
        for node, text in compare(reports).items():
            errors[node].add((name, text))

    common = _common_topics(errors)
    for node, node_errors in errors.items():
        for topic, text in sorted(node_errors):
            if topic in common:
                verdict.everywhere = verdict.everywhere or text
        if any(topic not in common for topic, _ in node_errors):
            verdict.bad[node] = "; ".join(text for _, text in sorted(node_errors))

    network: list[str] = []
    for report in reports:
        network += [f"{report.node}: {text}" for topic, text in report.errors if topic == "network"]
    # with a bad node, the network's errors follow from it
    if network and not verdict.bad and not common:
        verdict.network = network[0]

    bandwidths = [report.bandwidth for report in reports if report.bandwidth is not None]
    gpus = sum(report.gpus for report in reports if report.local_rank == 0)
    verdict.notes = [
        f"{len(present)} nodes, {len(reports)} processes, {gpus} GPUs",
        # the slowest process, since all wait for it
        f"all-reduce {min(bandwidths):.2f} GB/s" if bandwidths else "no all-reduce",
        f"{max((report.seconds for report in reports), default=0):.0f} s",
    ]

    return verdict


def _common_topics(errors: dict[str, set[tuple[str, str]]]) -> set[str]:
    """Return the topics that all nodes report; with a single node, only topics that nodes share."""
    counts: Counter[str] = Counter()
    for node_errors in errors.values():
        # a set, so that several processes of a node count once
        counts.update({topic for topic, _ in node_errors})
    return {
        topic for topic, count in counts.items() if count == len(errors) and (count > 1 or topic in SHARED)
    }


def _odd_versions(reports: list[NodeReport]) -> dict[str, str]:
    """Return the nodes that have another version of a package than most."""
    odd: dict[str, str] = {}
    by_node = {report.node: report.versions for report in reports if report.versions}
    for name in sorted(set(chain.from_iterable(by_node.values()))):
        versions = {node: installed.get(name, "missing") for node, installed in by_node.items()}
        # the majority is right: an update usually misses single nodes
        usual = Counter(versions.values()).most_common(1)[0][0]
        for node, version in versions.items():
            if version != usual:
                odd[node] = f"{name} {version}, the other nodes have {usual}"

    return odd


def _odd_clocks(reports: list[NodeReport]) -> dict[str, str]:
    """Return the nodes whose clock is off, read right after all processes had connected."""
    clocks = {report.node: report.clock for report in reports if report.clock is not None}
    if not clocks:
        return {}
    # the majority's clock, even if a few are off by hours
    usual = statistics.median_low(list(clocks.values()))
    return {
        node: f"clock is {clock - usual:+.0f} s off"
        for node, clock in clocks.items()
        if abs(clock - usual) > MAX_CLOCK_SECONDS
    }


def _slow_nodes(reports: list[NodeReport]) -> dict[str, str]:
    """Return the nodes with GPUs whose own all-reduce is slower than on most."""
    speeds = {
        report.node: report.node_bandwidth
        for report in reports
        if report.node_bandwidth is not None and report.gpus
    }
    # relative to the other nodes, since the speed of a fit node depends on its GPUs
    usual = statistics.median(speeds.values()) if speeds else 0.0
    return {
        node: f"all-reduce in the node {speed:.1f} GB/s, usual {usual:.1f}"
        for node, speed in speeds.items()
        if speed < MIN_SPEED_SHARE * usual
    }


def print_verdict(verdict: Verdict, folder: Path) -> int:
    """Print the verdict, write the names of the bad nodes, and return the exit code."""
    print("== preflight: " + ", ".join(verdict.notes), flush=True)
    for node, why in sorted(verdict.bad.items()):
        print(f"== preflight: {node} is bad: {why}", flush=True)
    # exit code 2: other nodes would not help, so the job is not queued again
    if verdict.everywhere:
        raise UserError(f"preflight, on all nodes: {verdict.everywhere}")
    if verdict.network:
        print(f"== preflight: the nodes cannot reach each other: {verdict.network}", flush=True)
    # cluster/train.sh excludes these nodes when it queues the job again
    (folder / "bad_nodes").write_text(",".join(sorted(verdict.bad)))

    return 1 if verdict.bad or verdict.network else 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.operations.preflight",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", nargs="?", help="name of a shipped stage, or path of a YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--verdict", type=Path, metavar="DIR", help="judge the reports of all processes there"
    )
    parser.add_argument("--nodes", default="", help="with --verdict: nodes of the job")
    parser.add_argument("--gpus", type=int, default=1, help="0 = the partition has no GPUs")
    parser.add_argument("--processes", type=int, help="processes of the job, one per GPU")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="memory of a GPU")
    parser.add_argument(
        "--made-here", type=Path, metavar="DATASET.yaml", help="dataset that earlier jobs prepare"
    )
    parser.add_argument(
        "--after-another", action="store_true", help="the stage starts from a run that is queued before it"
    )
    arguments = parser.parse_args()
    if arguments.stage is None and arguments.verdict is None:
        parser.error("name a stage")
    if (arguments.processes is None) != (arguments.gpu_memory is None):
        parser.error("give --processes and --gpu-memory together")

    return arguments


@command
def main() -> None:
    """Run the command line."""
    arguments = parse()
    if arguments.verdict is not None:
        verdict = decide(read_reports(arguments.verdict), arguments.nodes.split())
        sys.exit(print_verdict(verdict, arguments.verdict))
    stage = load_stage(arguments.stage, arguments.overrides)
    if arguments.processes is not None:
        check_memory(stage, arguments.processes, 1e9 * arguments.gpu_memory)
    before_submission(stage, arguments.gpus, arguments.made_here, arguments.after_another)
    print(stage.run)


if __name__ == "__main__":
    main()
