"""The tokenizer inside a GGUF file, built from its own vocabulary, scores and merges.

There are two kinds: byte-level BPE with explicit merges (`gpt2`), and SentencePiece BPE (`llama`) without a
list of merges. In the latter, two neighboring pieces may merge if together they are a known piece; the piece
with the best score is merged first. So every split of a piece into two known pieces is a merge, ordered by
the piece's score. (transformers 4.57 reads Gemma's vocabulary as a Unigram model, which splits words into
letters.)
"""

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from model.common.errors import UserError
from model.encoders.gguf import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of GGUF."""
_SPACE = "▁"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"


def build_tokenizer(file: GGUFFile) -> Tokenizer:
    """Build the tokenizer of a GGUF file; it adds a beginning-of-sequence token if the file says so.

    Raises:
        UserError: if the kind of tokenizer or of pre-tokenization is not supported.
    """
    kind = file.metadata["tokenizer.ggml.model"]
    if kind == "gpt2":
        tokenizer = _byte_level(file)
    elif kind == "llama":
        tokenizer = _sentencepiece(file)
    else:
        raise UserError(
            f"{file.path}: tokenizer of kind {kind!r} is not read from GGUF: "
            "use the model's folder or hub name"
        )
    _add_special_tokens(tokenizer, file)

    # llama.cpp's default, where the file does not say, depends on the kind.
    if file.metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        number = int(file.metadata["tokenizer.ggml.bos_token_id"])
        name = file.metadata["tokenizer.ggml.tokens"][number]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{name}:0 $A:0", special_tokens=[(name, number)]
        )
    return tokenizer


def _byte_level(file: GGUFFile) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(file.metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in file.metadata["tokenizer.ggml.merges"]]
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    # Llama 3 takes words of the vocabulary whole, even if no sequence of merges leads to them.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name == "llama-bpe"))

    # GGUF names only the pre-tokenizer; its rules are those of llama.cpp.
    if name in ("gpt-2", "default"):
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    elif name == "smollm":
        steps = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    elif name in ("llama-bpe", "qwen2"):
        pattern = Regex(_LLAMA3 if name == "llama-bpe" else _QWEN2)
        steps = [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    else:
        raise UserError(
            f"{file.path}: pre-tokenization {name!r} is not read from GGUF: "
            "use the model's folder or hub name"
        )

    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    # Part of Qwen's tokenizer.json, which GGUF does not record.
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def _sentencepiece(file: GGUFFile) -> Tokenizer:
    tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    unknown = tokens[int(file.metadata["tokenizer.ggml.unknown_token_id"])]
    # Letters that are no piece are written as bytes, `<0xE4>`.
    model = models.BPE(
        vocabulary, merges_from_scores(file), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)

    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    if file.metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def merges_from_scores(file: GGUFFile) -> list[tuple[str, str]]:
    """Return every split of a piece into two known pieces, best score first.

    Control, byte and user-defined tokens are neither merged nor the result of a merge.
    """
    tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
    types: np.ndarray = file.metadata["tokenizer.ggml.token_type"]
    scores: np.ndarray = file.metadata["tokenizer.ggml.scores"]
    known = {tokens[number]: number for number in np.flatnonzero(types == NORMAL).tolist()}

    merges: list[tuple[str, str]] = []
    # Pieces of equal score keep the order of the vocabulary.
    order = np.argsort(-scores, kind="stable")
    for number in order[types[order] == NORMAL].tolist():
        piece = tokens[number]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in known and right in known:
                merges.append((left, right))
    return merges


def _add_special_tokens(tokenizer: Tokenizer, file: GGUFFile) -> None:
    """Add control tokens as special ones, which captions cannot contain, and user-defined tokens as words."""
    tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
    types: np.ndarray = file.metadata["tokenizer.ggml.token_type"]
    special = np.flatnonzero((types == CONTROL) | (types == UNKNOWN)).tolist()
    tokenizer.add_special_tokens(
        [AddedToken(tokens[number], normalized=False, special=True) for number in special]
    )

    words = np.flatnonzero(types == USER_DEFINED).tolist()
    tokenizer.add_tokens([AddedToken(tokens[number], normalized=False) for number in words])
