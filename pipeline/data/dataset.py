"""From planned rows to a packed batch: the work of a loader process.

Bytes go from the files straight into the batch's block.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_prep.dataset.mds import Row, Shard
from data_prep.dataset.schema import Bucket, Family
from data_prep.store.store import StoreError
from model.common.errors import UserError
from model.encoders.latent_spaces import encodes_clips, latent_sizes
from model.encoders.token_size import bytes_per_token
from pipeline.data.batch import Layout, PackedBatch, allocate, sample_keys, tensors_in
from pipeline.data.captions import Caption, CaptionChoice, WrittenCaptions
from pipeline.data.epoch_plan import sample_rng
from pipeline.data.mixture import EpochRows
from pipeline.data.noise import SampleKey
from pipeline.data.part_files import DatasetFiles, OpenShards, Place, disagree
from pipeline.stage.corpus import is_clip

Rows = dict[str, list[Row]]
"""Family -> row of each sample of a batch."""

Spans = dict[str, list[tuple[int, int]]]
"""Text family -> of each sample's caption, its first token in the row and its number of tokens."""

Copy = tuple[Shard, int, memoryview]
"""File, position in it, and the target of its bytes."""


@dataclass(frozen=True)
class BatchRequest:
    """The order that the trainer gives to a loader process: this rank's rows of one global batch."""

    rows: EpochRows
    epoch: int
    index: int
    seeds: tuple[int, ...]
    """Seeds of the samples, one per dataset."""
    last: bool = False
    """True if the batch is the last of its epoch."""
    ahead: tuple[Place, ...] = ()
    """Parts of the bucket that will be needed soon."""
    drop_captions: bool = True
    """False for validation, which drops no users either."""


class SnapshotDataset(Dataset[PackedBatch | Exception]):
    """Rows of one or more snapshots. Map-style: an item is a whole batch, and its key a `BatchRequest`."""

    def __init__(
        self,
        sources: Sequence[DatasetFiles],
        choices: Sequence[CaptionChoice],
        latents: Family,
        texts: Mapping[bool, Sequence[Family]],
        reads_captions: bool,
        user_drop: float | None = None,
        forgotten: Collection[int] = (),
    ) -> None:
        """Read these families.

        Args:
            sources: the datasets, by number.
            choices: how captions are picked in each of them.
            latents: the latents family.
            texts: text families of images (False) and of clips (True).
            reads_captions: put the captions of the pairs themselves into the batch, instead of text families.
            user_drop: share of training samples whose user is left out; None = batches without users.
            forgotten: users whose samples are nobody's.
        """
        self._user_drop, self._forgotten = user_drop, frozenset(forgotten)
        self.shards = OpenShards(sources, {clips: [latents, *of_kind] for clips, of_kind in texts.items()})
        self._choices = list(choices)
        self._latents, self._texts = latents, texts
        self._written = WrittenCaptions(sources) if reads_captions else None

    def __getitem__(self, request: BatchRequest) -> PackedBatch | Exception:
        """Read a batch; return a `UserError` instead of raising it, since torch would add a traceback."""
        try:
            # Before this batch is read, so that the downloads overlap with the reading.
            self.shards.fetch_ahead(request.rows.bucket, request.ahead)
            return self._read(request)
        except UserError as error:
            return error

    def _read(self, request: BatchRequest) -> PackedBatch:
        sources, passes = request.rows.sources.tolist(), request.rows.passes.tolist()
        rows = self._open_shards(request.rows)
        # Families are written by separate jobs. A part that was encoded from other pairs would silently train
        # images with the captions of others.
        ids = _same_in_all(rows, lambda row: row.id, "sample ids")
        keys = sample_keys(request.seeds, sources, passes, ids)
        chosen, captions = self._choose_captions(request, rows, ids, keys)

        # The captions decide how many tokens the batch has, so its block can only be allocated now.
        spans = {}
        for family in self._texts_of(request.rows.bucket):
            spans[family.name] = list(map(_find_span, rows[family.name], chosen))
        layout, memory = self._allocate_block(request.rows, spans)
        tensors = tensors_in(memory, layout)
        copies = self._plan_copies(request.rows.bucket, rows, spans, tensors)
        # All reads are announced before the first one starts: the system can order them and work on them at
        # once.
        _announce_reads(copies)

        # While the system reads ahead, the small tensors are filled.
        for name, values in (("ids", ids), ("sources", sources), ("passes", passes)):
            tensors[name][:] = torch.tensor(values)
        if self._user_drop is not None:
            tensors["users"][:] = torch.tensor(self._choose_users(request, keys))
        uniform = [sample_rng(*key, "timestep").random(dtype=np.float32) for key in keys]
        tensors["u"][:] = torch.tensor(np.array(uniform))
        counts: dict[str, list[int]] = {}
        for name, family_spans in spans.items():
            counts[name] = [length for _, length in family_spans]
            tensors[f"{name}/lengths"][:] = torch.tensor(counts[name], dtype=torch.int32)

        _copy_bytes(copies)
        return PackedBatch(
            bucket=request.rows.bucket,
            epoch=request.epoch,
            index=request.index,
            last=request.last,
            memory=memory,
            layout=layout,
            seeds=request.seeds,
            counts=counts,
            captions=captions,
        )

    def _texts_of(self, bucket: str) -> Sequence[Family]:
        return self._texts[is_clip(bucket)]

    def _open_shards(self, batch: EpochRows) -> Rows:
        """Open the shards of a batch's parts and find its rows in them."""
        places = batch.places
        shards = self.shards.open(batch.bucket, set(places))
        rows: Rows = {}
        for family in self.shards.families(batch.bucket):
            samples = zip(places, batch.indices.tolist(), strict=True)
            rows[family] = [shards[place][family].row(index) for place, index in samples]
        return rows

    def _choose_captions(
        self, request: BatchRequest, rows: Rows, ids: Sequence[int], keys: Sequence[SampleKey]
    ) -> tuple[list[int | None], list[str] | None]:
        """Pick each sample's caption, the same in every text family.

        Returns:
            Index of each sample's caption, None = the null caption; and the captions themselves if the
            trainer encodes them.
        """
        written: list[list[Caption]] = []
        if self._written is not None:
            written = self._written.read(request.rows.bucket, request.rows.places, ids)
            # The same form as the stored column `kinds`: one byte per caption.
            kinds = []
            for captions in written:
                kinds.append(bytes(kind for kind, _ in captions))
        else:
            texts = {family.name: rows[family.name] for family in self._texts_of(request.rows.bucket)}
            # A caption is picked by its index, which must mean the same caption to every LLM.
            kinds = _same_in_all(texts, lambda row: row.read("kinds"), "captions")

        chosen = []
        for source, key, sample_kinds in zip(request.rows.sources.tolist(), keys, kinds, strict=True):
            # A stream of its own: other caption settings leave timesteps and noise as they are.
            rng, kinds_array = sample_rng(*key, "caption"), np.frombuffer(sample_kinds, np.uint8)
            chosen.append(self._choices[source].pick(rng, kinds_array, request.drop_captions))
        if self._written is None:
            return chosen, None
        pairs = zip(written, chosen, strict=True)
        return chosen, ["" if index is None else captions[index][1] for captions, index in pairs]

    def _choose_users(self, request: BatchRequest, keys: Sequence[SampleKey]) -> list[int]:
        """Return the number of each sample's user, -1 = none."""
        assert self._user_drop is not None
        rows, index = request.rows, self.shards.sources[0].index

        users = []
        for (source, part), row, key in zip(rows.places, rows.indices.tolist(), keys, strict=True):
            # Numbers of different datasets mean different users: those of the first one count.
            user = index.user(rows.bucket, part, row) if source == 0 else -1
            dropped = request.drop_captions and sample_rng(*key, "user").random() < self._user_drop
            users.append(-1 if dropped or user in self._forgotten else user)
        return users

    def _allocate_block(self, batch: EpochRows, spans: Spans) -> tuple[Layout, Tensor]:
        """Lay out the batch's tensors and allocate their memory."""
        size = len(batch.indices)
        layout: Layout = [(name, torch.int64, (size,)) for name in ("ids", "sources", "passes")]
        layout.append(("u", torch.float32, (size,)))
        if self._user_drop is not None:
            layout.append(("users", torch.int64, (size,)))
        shape = (size, *latent_shape(self._latents, batch.bucket))
        layout += [(name, torch.bfloat16, shape) for name in ("mean", "std")]

        for family in self._texts_of(batch.bucket):
            # Only picked captions, without padding: the block has no bytes that the network does not read.
            tokens = sum(length for _, length in spans[family.name])
            quantization, width = str(family.info["quantisation"]), int(family.info["width"])
            layout += [
                (f"{family.name}/values", torch.uint8, (tokens, bytes_per_token(quantization, width))),
                # bf16 states are stored raw and have no scales; an empty tensor keeps the layout the same.
                (f"{family.name}/scales", torch.float32, (0 if quantization == "bf16" else tokens,)),
                (f"{family.name}/lengths", torch.int32, (size,)),
            ]
        return layout, allocate(layout)

    def _plan_copies(self, bucket: str, rows: Rows, spans: Spans, tensors: dict[str, Tensor]) -> list[Copy]:
        copies = []
        moments = [name for name in ("mean", "std") if name in self._latents.columns]
        if "std" not in moments:
            tensors["std"].zero_()
        for name in moments:
            targets = zip(rows[self._latents.name], tensors[name], strict=True)
            copies += [_copy(row, name, 0, target) for row, target in targets]
        for family in self._texts_of(bucket):
            values, scales = tensors[f"{family.name}/values"], tensors[f"{family.name}/scales"]
            copies += _text_copies(rows[family.name], spans[family.name], values, scales)
        return copies


def latent_shape(latents: Family, bucket: str) -> tuple[int, ...]:
    """Return the shape of one sample's latents, [C, h, w], or [C, T, h, w] of a space of clips.

    Args:
        latents: the latents family; one that records `frames` has latents of so many frames in all buckets.
        bucket: the sample's bucket.
    """
    size, info = Bucket.parse(bucket), latents.info
    frames = int(info["frames"]) if "frames" in info else size.frames
    if "frames" not in info and not encodes_clips(info["downsampling"]):
        frames = None
    return int(info["channels"]), *latent_sizes(info["downsampling"], size.height, size.width, frames)


def _same_in_all(rows: Rows, read: Callable[[Row], Any], what: str) -> list[Any]:
    """Return what `read` returns for each row, which has to be the same in every family."""
    (first, *others) = rows.values()
    values = [read(row) for row in first]
    for other in others:
        for value, left, right in zip(values, first, other, strict=True):
            if read(right) != value:
                raise disagree(left.shard, right.shard, what)
    return values


def _find_span(row: Row, caption: int | None) -> tuple[int, int]:
    """Return the first token of a caption among the row's tokens, and its number of tokens."""
    if caption is None:
        return 0, 0
    # A row has the tokens of all its captions one after another; `tokens` has the length of each.
    tokens = np.frombuffer(row.read("tokens"), "<i4")
    return int(tokens[:caption].sum()), int(tokens[caption])


def _copy(row: Row, column: str, start: int, target: Tensor, size: int | None = None) -> Copy:
    """Plan to copy a column's bytes from `start` on into a contiguous tensor.

    The whole column must have `size` bytes; None = just as many as the tensor.
    """
    position, column_size = row.column(column)
    # A view of the block itself: the file is read into it without another buffer.
    view = target.view(torch.uint8).numpy().reshape(-1).data
    # A column of another size belongs to another shape: reading it would shift all numbers after it.
    if column_size != (len(view) if size is None else size):
        raise StoreError(
            f"{row.shard.path}: `{column}` of sample {row.id} has {column_size} bytes: "
            "run `python -m data_prep verify`"
        )
    return row.shard, position + start, view


def _text_copies(
    rows: Sequence[Row], spans: Sequence[tuple[int, int]], values: Tensor, scales: Tensor
) -> list[Copy]:
    copies, filled, width = [], 0, values.shape[1]
    for row, (first, length) in zip(rows, spans, strict=True):
        if length:
            # The whole column is checked too, not only the caption's part of it.
            total = int(np.frombuffer(row.read("tokens"), "<i4").sum())
            copies.append(
                _copy(row, "values", first * width, values[filled : filled + length], total * width)
            )
            if len(scales):
                # 4 bytes per token: scales are fp32.
                copies.append(_copy(row, "scales", first * 4, scales[filled : filled + length], total * 4))
            filled += length
    return copies


def _announce_reads(copies: Sequence[Copy]) -> None:
    for shard, start, target in copies:
        shard.announce(start, len(target))


def _copy_bytes(copies: Sequence[Copy]) -> None:
    for shard, start, target in copies:
        shard.read_into(start, target)
