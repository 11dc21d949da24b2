"""The finish of a plan by one plain loop over all rows in memory: any number of tasks must agree with it."""

import io
import json
from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from data_prep.dataset.schema import Manifest
from data_prep.plan.against import evaluation_key, set_name
from data_prep.plan.drop_list import read_ids
from data_prep.plan.listing import source_counts, source_files
from data_prep.plan.manifest import MANIFEST
from data_prep.plan.rows import DROPPED
from data_prep.plan.scan import EVALUATION
from data_prep.plan.scan_tables import read_scan, scan_key
from model.common.records import seal


def judge(config, rows, evaluation):
    """Fill in the reason of each row, and hand over the captions of exact duplicates."""
    dedupe = config.dedupe
    names = [set_name(source) for source in dedupe.against or []]
    firsts, copies = {}, defaultdict(list)
    for row in rows:
        equal = [number for number, (hashes, _) in enumerate(evaluation) if row["hash"] in hashes]
        if not row["reason"] and equal:
            row["reason"] = f"dedupe: same file as in {names[equal[0]]}"
        if not row["reason"] and dedupe.exact:
            first = firsts.setdefault(row["hash"], row)
            if first is not row:
                copies[first["id"]] += row["captions"]
                row["reason"] = "dedupe: same file"

    kept = [row for row in rows if not row["reason"]] if dedupe.near is not None else []
    for row in kept:
        for number, (_, hashes) in enumerate(evaluation):
            if not row["reason"] and any(near(row, hash, dedupe.near) for hash in hashes):
                row["reason"] = f"dedupe: looks the same as in {names[number]}"
    kept = [row for row in kept if not row["reason"]]
    for place, row in enumerate(kept):
        if any(near(row, other["phash"], dedupe.near) for other in kept[:place]):
            row["reason"] = "dedupe: looks the same"

    listed = set(np.concatenate(list(read_ids(dedupe.drop))).tolist()) if dedupe.drop else set()
    for row in rows:
        if not row["reason"] and row["id"] in listed:
            row["reason"] = "dedupe: listed in dedupe.drop"
        if not row["reason"]:
            captions = {(entry["kind"], entry["text"]): entry for entry in row["captions"]}
            captions |= {(entry["kind"], entry["text"]): entry for entry in copies[row["id"]]}
            row["captions"] = list(captions.values())


def near(row, hash, distance):
    return (row["phash"] ^ hash).bit_count() <= distance


def parquet(parts, schema):
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for part in parts:
            writer.write_table(pa.Table.from_pylist(part, schema), row_group_size=max(1, len(part)))
    return sink.getvalue()


def plan_in_one_pass(config, dataset):
    """Return the bytes of every object of the plan by key; its files must be scanned."""
    files = source_files(dataset)
    rows, evaluation = [], []
    for file in files:
        for table in read_scan(dataset, scan_key(file.number)):
            rows += table.to_pylist()
    if config.dedupe.against:
        evaluation = [(set(), set()) for _ in config.dedupe.against]
        for file in source_files(dataset, "scan/against"):
            for table in read_scan(dataset, evaluation_key(file.number), EVALUATION):
                for row in table.to_pylist():
                    evaluation[file.source][0].add(row["hash"])
                    if row["phash"] is not None:
                        evaluation[file.source][1].add(row["phash"])
    judge(config, rows, evaluation)

    objects, hashes, buckets = {}, {}, defaultdict(list)
    for number in np.random.default_rng([config.seed, 0]).permutation(len(files)).tolist():
        mine = [row for row in rows if row["id"] >> 32 == number]
        dropped = [{name: row[name] for name in DROPPED.names} for row in mine if row["reason"]]
        objects[f"dropped/{number:08d}.parquet"] = parquet([dropped] if mine else [], DROPPED)
        for row in mine:
            if not row["reason"]:
                buckets[row["bucket"]].append({name: row[name] for name in MANIFEST.names})

    windows = config.part_rows * max(1, config.shuffle_window // config.part_rows)
    parts = defaultdict(list)
    for name, kept in buckets.items():
        for number, start in enumerate(range(0, len(kept), windows)):
            window = kept[start : start + windows]
            order = np.random.default_rng([config.seed, 1, *name.encode(), number]).permutation(len(window))
            window = [window[place] for place in order]
            parts[name] += [
                window[at : at + config.part_rows] for at in range(0, len(window), config.part_rows)
            ]
        for number, start in enumerate(range(0, len(parts[name]), 16)):
            key = f"manifest/{name}/{number:06d}.parquet"
            objects[key] = parquet(parts[name][start : start + 16], MANIFEST)
            hashes[key] = xxhash.xxh64_hexdigest(objects[key])

    sizes = {name: [len(part) for part in parts[name]] for name in parts}
    manifest = Manifest(config.name, list(config.caption_kinds), sizes)
    objects["manifest.json"] = manifest.to_json()
    record = {**count(config, files, rows, buckets), "sources": source_counts(dataset), "manifest": hashes}
    # What evaluation sets and drop lists count is not about the rows, so it is taken as it is.
    if dataset.exists("manifest/plan.json"):
        stored = json.loads(dataset.read("manifest/plan.json"))
        record |= {name: stored[name] for name in ("against", "drop") if name in stored}
    objects["manifest/plan.json"] = seal(record)
    return objects


def count(config, files, rows, buckets):
    counts = []
    for file in files:
        mine = [row["reason"] for row in rows if row["id"] >> 32 == file.number]
        dropped = Counter(reason for reason in mine if reason)
        entry = {"number": file.number, "label": file.label, "rows": len(mine)}
        counts.append({**entry, "kept": len(mine) - dropped.total(), "dropped": dict(dropped)})

    kinds, letters = Counter(), Counter()
    for row in (row for kept in buckets.values() for row in kept):
        for entry in row["captions"]:
            kinds[config.caption_kinds[entry["kind"]]] += 1
            letters[config.caption_kinds[entry["kind"]]] += len(entry["text"])
    refused = Counter(reason for row in rows for reason in row["refused"])
    texts = []
    for number in np.random.default_rng([config.seed, 0]).permutation(len(files)).tolist():
        for row in rows:
            if row["id"] >> 32 == number and not row["reason"]:
                texts += [entry["text"] for entry in row["captions"]]
    captions = {"kept": kinds, "letters": letters, "refused": refused, "examples": texts[:3]}
    captions["bracketed"] = sum(text.startswith(("[", "{")) for text in texts)
    return {"files": counts, "captions": captions}
