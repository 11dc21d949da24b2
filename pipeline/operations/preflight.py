"""Look before training: can this stage run at all, and is every node of the job fit?

    python -m pipeline.operations.preflight STAGE [key=value ...]
        check, on a login node, what can be known before submission; prints the run's folder
    python -m pipeline.operations.preflight --verdict DIR --nodes "n1 n2"
        judge what `pipeline.operations.node_check` wrote on every node; bad nodes are named, in DIR/bad_nodes too

Ends with 0 (all is well), 1 (nodes are bad, others may do) or 2 (something to be put right, whatever the node).
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from omegaconf import OmegaConf

from model.common.errors import UserError, command
from model.common.files import write_atomic
from pipeline.operations.attempts import needs_gpu
from pipeline.stage.config import StageConfig, load_stage
from pipeline.stage.corpus import open_corpus, shares

CLOCK_SECONDS = 5.0
"""Clocks may differ by this; S3 refuses requests that are minutes off, and logs of many nodes are read side by side."""
SLOW_SHARE = 0.5
"""A node whose own all-reduce is slower than this share of the median is bad."""
SHARED = ("store", "run")
"""Topics that are nobody's fault where all nodes have them, even if there is only one node."""


@dataclass
class NodeReport:
    """What one process found."""

    node: str
    rank: int
    local_rank: int
    gpus: int = 0
    errors: list[tuple[str, str]] = field(default_factory=list)
    """Topic and text: `gpu`, `shm`, `cache`, `store`, `run`, `network`."""
    versions: dict[str, str] = field(default_factory=dict)
    clock: float | None = None
    """Seconds since 1970, right after all processes had met; None = they have not."""
    node_bandwidth: float | None = None
    """GB/s of an all-reduce among the node's processes, and among all."""
    bandwidth: float | None = None
    seconds: float = 0.0

    def write(self, folder: Path) -> None:
        """Write it down for `pipeline.operations.preflight`."""
        write_atomic(folder / f"rank_{self.rank:05d}.json", json.dumps(asdict(self)))


def read_reports(folder: Path) -> list[NodeReport]:
    """The reports of all processes that wrote one, by rank."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("rank_*.json"))]
    return [NodeReport(**{**record, "errors": [(topic, text) for topic, text in record["errors"]]}) for record in records]


@dataclass
class Verdict:
    """What the reports of all processes come to."""

    bad: dict[str, str] = field(default_factory=dict)
    """Node -> why it is bad."""
    everywhere: str = ""
    """What is wrong on all nodes alike, so that no other node would do better."""
    network: str = ""
    """The nodes are well and do not reach one another: whose fault it is, nobody can say."""
    notes: list[str] = field(default_factory=list)


def before_submission(stage: StageConfig, gpus: int, made_here: Path | None, after_another: bool) -> None:
    """Check what can be known before a job is queued.

    Args:
        stage: the stage.
        gpus: whether the partition has GPUs (how many node groups of it).
        made_here: a dataset's YAML that jobs before this one prepare: its store may be empty yet.
        after_another: whether the stage starts from a run that is queued before it.

    Raises:
        UserError: the stage cannot run.
    """
    stage.dit(channels=16)
    if needs_gpu(stage) and not gpus:
        raise UserError(
            f"{stage.name} needs GPUs, and no node of this partition has any: see `sinfo -o '%P %G'`, give --partition=..."
        )
    if stage.start_from and not after_another and "://" not in stage.start_from and not Path(stage.start_from).exists():
        raise UserError(f"start_from={stage.start_from}: no such run or file")
    if made_here is not None:
        prepared = dict(OmegaConf.load(made_here))
        if any((prepared.get("store"), prepared.get("name")) == (share.store, name) for name, share in shares(stage).items()):
            return
    open_corpus(stage)


def decide(reports: list[NodeReport], nodes: list[str]) -> Verdict:
    """Tell a bad node from a bad setting: what all nodes have alike is no node's fault."""
    verdict = Verdict()
    errors: dict[str, set[tuple[str, str]]] = {node: set() for node in nodes}
    for report in reports:
        errors.setdefault(report.node, set()).update(error for error in report.errors if error[0] != "network")
    came = {report.node for report in reports}
    for node in nodes:
        if node not in came:
            errors[node].add(("node", "did not answer"))
    for name, compare in (("versions", _odd_versions), ("clock", _odd_clocks), ("bandwidth", _slow_nodes)):
        for node, text in compare(reports).items():
            errors[node].add((name, text))
    topics = Counter(topic for found in errors.values() for topic in {topic for topic, _ in found})
    alike = sorted(topic for topic, count in topics.items() if count == len(errors) and (count > 1 or topic in SHARED))
    if alike:
        verdict.everywhere = next(text for found in errors.values() for topic, text in sorted(found) if topic in alike)
    verdict.bad = {
        node: "; ".join(text for _, text in sorted(found))
        for node, found in errors.items()
        if any(topic not in alike for topic, _ in found)
    }
    network = [f"{report.node}: {text}" for report in reports for topic, text in report.errors if topic == "network"]
    if network and not verdict.bad and not alike:
        verdict.network = network[0]
    bandwidths = [report.bandwidth for report in reports if report.bandwidth is not None]
    verdict.notes = [
        f"{len(came)} nodes, {len(reports)} processes, {sum(report.gpus for report in reports if report.local_rank == 0)} GPUs",
        f"all-reduce {min(bandwidths):.2f} GB/s" if bandwidths else "no all-reduce",
        f"{max((report.seconds for report in reports), default=0):.0f} s",
    ]
    return verdict


def _odd_versions(reports: list[NodeReport]) -> dict[str, str]:
    """Nodes with another version of something than most."""
    odd: dict[str, str] = {}
    ours = {report.node: report.versions for report in reports if report.versions}
    for name in sorted({name for found in ours.values() for name in found}):
        usual = Counter(found.get(name, "missing") for found in ours.values()).most_common(1)[0][0]
        for node, found in ours.items():
            if found.get(name, "missing") != usual:
                odd[node] = f"{name} {found.get(name, 'missing')} where the others have {usual}"
    return odd


def _odd_clocks(reports: list[NodeReport]) -> dict[str, str]:
    """Nodes whose clock is off, taken at the moment when all processes had met."""
    clocks = {report.node: report.clock for report in reports if report.clock is not None}
    if not clocks:
        return {}
    usual = statistics.median_low(list(clocks.values()))
    return {node: f"clock is {clock - usual:+.0f} s off" for node, clock in clocks.items() if abs(clock - usual) > CLOCK_SECONDS}


def _slow_nodes(reports: list[NodeReport]) -> dict[str, str]:
    """Nodes whose processes reach one another more slowly than most."""
    speeds = {report.node: report.node_bandwidth for report in reports if report.node_bandwidth is not None and report.gpus}
    usual = statistics.median(speeds.values()) if speeds else 0.0
    return {
        node: f"all-reduce in the node {speed:.1f} GB/s, usual {usual:.1f}"
        for node, speed in speeds.items()
        if speed < SLOW_SHARE * usual
    }


def print_verdict(verdict: Verdict, folder: Path) -> int:
    """Print the verdict, write the bad nodes down, and return the exit code."""
    print("== preflight: " + ", ".join(verdict.notes), flush=True)
    for node, why in sorted(verdict.bad.items()):
        print(f"== preflight: {node} is bad: {why}", flush=True)
    if verdict.everywhere:
        raise UserError(f"preflight, on all nodes: {verdict.everywhere}")
    if verdict.network:
        print(f"== preflight: the nodes do not reach one another: {verdict.network}", flush=True)
    (folder / "bad_nodes").write_text(",".join(sorted(verdict.bad)))
    return 1 if verdict.bad or verdict.network else 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.operations.preflight", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", nargs="?", help="name of a shipped stage, or path of a YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--verdict", type=Path, metavar="DIR", help="judge what all processes wrote there")
    parser.add_argument("--nodes", default="", help="with --verdict: the job's nodes")
    parser.add_argument("--gpus", type=int, default=1, help="0 = the partition has no GPUs")
    parser.add_argument("--made-here", type=Path, metavar="DATASET.yaml", help="a dataset that earlier jobs prepare")
    parser.add_argument("--after-another", action="store_true", help="the run that the stage starts from is queued before it")
    arguments = parser.parse_args()
    if arguments.stage is None and arguments.verdict is None:
        parser.error("name a stage")
    return arguments


@command
def main() -> None:
    """Entry of `python -m pipeline.operations.preflight`."""
    arguments = parse()
    if arguments.verdict is not None:
        sys.exit(print_verdict(decide(read_reports(arguments.verdict), arguments.nodes.split()), arguments.verdict))
    stage = load_stage(arguments.stage, arguments.overrides)
    before_submission(stage, arguments.gpus, arguments.made_here, arguments.after_another)
    print(stage.run)


if __name__ == "__main__":
    main()
