"""All that the network's prediction depends on besides the noisy latents."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ragged import Rows
from model.sub_network import Part


@dataclass
class Text:
    """One LLM's standardized hidden states of a batch of prompts, padded on the right."""

    states: Tensor
    """[B, T, W]: the first `prefix` positions are the prefix, the same in every sample; padding is not
    read."""
    mask: Tensor
    """bool [B, T]: True = a token, False = padding."""
    prefix: int
    """Tokens of system prompt and instruction before the caption."""
    padded: bool = True
    """False = the caller knows that no position is padding, so that attention may run without a mask."""

    @property
    def shown(self) -> Tensor:
        """The mask."""
        return self.mask

    def without_padding(self, total: int) -> "RaggedText":
        """Return the same tokens without padding; `total` is their number, which is not read from the
        device."""
        rows = Rows.of_lengths(self.mask.sum(dim=1), total, self.mask.shape[1])
        return RaggedText(rows.unpad(self.states), rows, self.prefix)

    def rows(self, rows: slice | Tensor) -> "Text":
        """Return some of the batch's samples, by a range or by their numbers."""
        return replace(self, states=self.states[rows], mask=self.mask[rows])

    def trimmed(self, tokens: int, padded: bool) -> "Text":
        """Return the prefix and `tokens` caption tokens of each sample, of which none may have more; `padded`
        as in the attribute."""
        end = self.prefix + tokens
        return replace(self, states=self.states[:, :end], mask=self.mask[:, :end], padded=padded)

    def repeat(self, times: int) -> "Text":
        """Return each sample `times` times, one after another."""
        return replace(
            self,
            states=self.states.repeat_interleave(times, dim=0),
            mask=self.mask.repeat_interleave(times, dim=0),
        )

    def to(
        self, device: torch.device | str, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> "Text":
        """Return it on a device, its states in a type; accelerate's offloading moves arguments by this
        name."""
        states = self.states.to(device=device, dtype=dtype, non_blocking=non_blocking)
        return replace(self, states=states, mask=self.mask.to(device, non_blocking=non_blocking))

    def row(self, index: int) -> "Text":
        """Return one sample of the batch, without its padding."""
        # Padding is on the right, so the number of tokens is also the end of the last one.
        tokens = int(self.mask[index].sum())
        states, mask = self.states[index : index + 1, :tokens], self.mask[index : index + 1, :tokens]
        return Text(states, mask, self.prefix, padded=False)

    @staticmethod
    def concatenate(texts: Sequence["Text"]) -> "Text":
        """Join batches of one LLM, padded on the right to the longest."""
        length = max(text.states.shape[1] for text in texts)
        missing = [length - text.states.shape[1] for text in texts]

        states = [F.pad(text.states, (0, 0, 0, pad)) for text, pad in zip(texts, missing, strict=True)]
        masks = [F.pad(text.mask, (0, pad)) for text, pad in zip(texts, missing, strict=True)]
        # A batch without padding may be shorter than another, and so is padded here.
        padded = any(text.padded for text in texts) or any(missing)
        return Text(torch.cat(states), torch.cat(masks), texts[0].prefix, padded)


@dataclass
class RaggedText:
    """One LLM's standardized hidden states of a batch of prompts, one prompt after another without padding:
    for training alone."""

    states: Tensor
    """[1, N, W]: each sample begins with the prefix."""
    shown: Rows
    """Places of the samples' tokens."""
    prefix: int
    """Tokens of system prompt and instruction before the caption."""
    padded: bool = False
    """Nothing is."""


@dataclass
class Levels:
    """Times that patches share: `Condition.timesteps` [B, K] are the levels, and each patch is at one of
    them."""

    places: Tensor
    """int64 [B, N] in [0, K): number of each patch's level."""
    sample_times: Tensor
    """fp32 [B]: the one time of each sample that the text side reads."""

    def rows(self, rows: slice | Tensor) -> "Levels":
        """Return some of the batch's samples."""
        return Levels(self.places[rows], self.sample_times[rows])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Levels":
        """Return them on a device."""
        return Levels(
            self.places.to(device, non_blocking=non_blocking),
            self.sample_times.to(device, non_blocking=non_blocking),
        )


@dataclass
class Users:
    """The users of a batch, for a network with an adapter of users (`model/adapters/users.py`)."""

    ids: Tensor
    """int64 [B]: row of each sample's user in the table; -1 = none."""
    tokens: Tensor | None = None
    """[B, L, R]: embeddings that are read instead of the table's rows, where the id is not -1."""
    probes: Tensor | None = None
    """int64 [n]: users whose shifts under an empty text are wanted too; None = nobody's."""
    answers: Tensor | None = None
    """[n, K]: shifts of the `probes`, which the network's forward pass fills in."""

    def rows(self, rows: slice | Tensor) -> "Users":
        """Return the users of some of the samples; the probes, which are not those of samples, stay."""
        return Users(self.ids[rows], None if self.tokens is None else self.tokens[rows], self.probes)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Users":
        """Return them on a device."""
        moved = []
        for values in (self.ids, self.tokens, self.probes):
            moved.append(None if values is None else values.to(device, non_blocking=non_blocking))
        return Users(*moved)

    @staticmethod
    def concatenate(users: Sequence["Users"]) -> "Users":
        """Join the users of several batches, of which all or none have tokens."""
        tokens = [batch.tokens for batch in users if batch.tokens is not None]
        return Users(torch.cat([batch.ids for batch in users]), torch.cat(tokens) if tokens else None)


@dataclass
class Condition:
    """All conditions of a batch of samples: one object from the batch to the blocks, in training and in
    sampling."""

    timesteps: Tensor
    """fp32 [B] in [0, 1], 1 = pure noise; with `levels`, [B, K]; or [B, N], a time of its own for each of the
    N patches."""
    texts: Sequence[Text]
    """One per LLM, in the order of `fusion.families`; in training, the network also takes `RaggedText`."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Values [B, ...] of the network's further conditions (`model/conditions.py`), by name."""
    levels: Levels | None = None
    """The level of each patch, if patches share a few times; None = `timesteps` says it all."""
    users: Users | None = None
    """User of each sample, if the network has an adapter of users; None = nobody."""
    with_difficulty: bool = False
    """True = the prediction has one more channel, the log-variance of the error that the network expects."""
    part: Part | None = None
    """The part of an elastic network that computes; None = the full network."""

    def rows(self, rows: slice | Tensor) -> "Condition":
        """Return the conditions of some of the samples."""
        return replace(
            self,
            timesteps=self.timesteps[rows],
            texts=[text.rows(rows) for text in self.texts],
            extra={name: values[rows] for name, values in self.extra.items()},
            levels=self.levels and self.levels.rows(rows),
            users=self.users and self.users.rows(rows),
        )

    def row(self, index: int) -> "Condition":
        """Return the condition of one sample, its texts without padding."""
        texts = [text.row(index) for text in self.texts]
        return replace(self.rows(slice(index, index + 1)), texts=texts)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Condition":
        """Return it on a device; accelerate's offloading moves arguments by this name."""
        return replace(
            self,
            timesteps=self.timesteps.to(device, non_blocking=non_blocking),
            texts=[text.to(device, non_blocking=non_blocking) for text in self.texts],
            extra={name: values.to(device, non_blocking=non_blocking) for name, values in self.extra.items()},
            levels=self.levels and self.levels.to(device, non_blocking),
            users=self.users and self.users.to(device, non_blocking),
        )

    def at(self, time: float) -> "Condition":
        """Return the same conditions with one time for all samples, on which the part may depend."""
        part = self.part and self.part.at(time)
        return replace(self, timesteps=torch.full_like(self.timesteps, time), part=part)

    @staticmethod
    def concatenate(conditions: Sequence["Condition"]) -> "Condition":
        """Join the samples of several batches at one time each, such as the branches of guidance."""
        of_llms = zip(*(condition.texts for condition in conditions), strict=True)
        texts = [Text.concatenate(of_llm) for of_llm in of_llms]

        extra = {}
        for name in conditions[0].extra:
            extra[name] = torch.cat([condition.extra[name] for condition in conditions])
        timesteps = torch.cat([condition.timesteps for condition in conditions])
        users = [condition.users for condition in conditions if condition.users is not None]
        joined = Users.concatenate(users) if users else None
        return Condition(timesteps, texts, extra, users=joined, part=conditions[0].part)


Predict = Callable[[Tensor, Condition], Tensor]
"""The network as a function: noisy latents [B, C, ...] and their condition -> prediction [B, C, ...]. With
the branches of guidance in one condition the latents may come once for all branches, [B / branches, C,
...]."""
