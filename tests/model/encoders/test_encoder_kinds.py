"""A kind of encoder from outside the package: a BERT."""

import pytest
import torch
from transformers import BertConfig, BertModel

from model.common.errors import UserError
from model.encoders.encoder_kinds import ENCODERS, EncoderKind
from model.encoders.text_encoder import load_encoder, relative_error
from tests.helpers import tiny_llm

CPU = torch.device("cpu")
CAPTIONS = ["a red house", "", "two small blue birds on a wire"]


@pytest.fixture
def bert_kind():
    """The toy kind, registered for one test."""

    @ENCODERS.register("bert")
    class BertEncoder(EncoderKind):
        blocks = (("encoder", "layer"),)

        @classmethod
        def load(cls, name, settings, folder, **loading):
            return BertModel.from_pretrained(folder, add_pooling_layer=False, **loading)

    yield BertEncoder
    ENCODERS.remove("bert")


def tiny_bert():
    sizes = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 5}
    return BertModel(BertConfig(**sizes, num_attention_heads=4), add_pooling_layer=False)


def test_a_kind_of_encoder_from_outside_the_package(tmp_path, bert_kind):
    words = tiny_llm.tokenizer("", "<eos>")
    plain = {"encoder": "bert", "prefix": "", "suffix": "", "reuse_prefix": False, "max_tokens": 60}
    config = tiny_llm.make(tmp_path, tiny_bert, words, **plain)
    torch.manual_seed(0)
    whole = tiny_bert().eval()
    encoder = load_encoder(config, CPU)

    # The third-to-last block, and no block above it is kept.
    assert len(bert_kind.block_list(encoder.llm.module)) == 3
    ids = encoder.tokenize(CAPTIONS)
    for caption, states in zip(ids, encoder.encode(ids), strict=True):
        with torch.inference_mode():
            expected = whole(input_ids=torch.tensor([caption]), output_hidden_states=True).hidden_states[-3][
                0
            ]
        assert relative_error(states, expected) < 1e-4


def test_an_unknown_kind_is_one_line(tmp_path):
    config = tiny_llm.make(tmp_path, tiny_bert, encoder="bert", reuse_prefix=False)
    with pytest.raises(UserError, match=r"^text.encoder=bert is unknown: known are causal, clip, t5$"):
        load_encoder(config, CPU)


def test_a_model_whose_blocks_are_elsewhere_is_one_line(tmp_path):
    config = tiny_llm.make(tmp_path, tiny_bert, layer="-1")
    with pytest.raises(UserError, match="BertModel: unknown architecture"):
        load_encoder(config, CPU)
