"""Folders with scorer models of the real classes, with random weights and small enough for a test."""

import json
import string

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertTokenizerFast,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizerFast,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    PreTrainedTokenizerFast,
    SwinConfig,
)

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LETTERS = string.ascii_lowercase + string.digits + "?.,'\"{}-"
SIDE = {"height": 32, "width": 32}


def save(folder, model, *others):
    torch.manual_seed(0)
    with torch.no_grad():
        # Initial weights are so small that the answers would hardly depend on the inputs.
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    for part in (model.eval(), *others):
        part.save_pretrained(folder)
    return folder


def bert_tokenizer(folder):
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "yes",
        "no",
        *LETTERS,
        *(f"##{letter}" for letter in LETTERS),
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizerFast(str(folder / "vocab.txt")), len(words)


def clip_tokenizer(folder):
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    return tokenizer, len(words)


def word_tokenizer(*special):
    words = ["<pad>", "</s>", "<unk>", "Yes", "No", "a", "red", "cat", "Is", "it", "there", "?", *special]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(special),
        model_input_names=["input_ids", "attention_mask"],
    )
    return fast, len(words)


def blip(folder):
    tokenizer, size = bert_tokenizer(folder)
    ids = {"bos_token_id": size, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    text = {**SMALL, "vocab_size": size + 2, "encoder_hidden_size": 16, "max_position_embeddings": 48, **ids}
    torch.manual_seed(0)
    config = BlipConfig(
        text_config=text, vision_config={**SMALL, "image_size": 32, "patch_size": 16}, projection_dim=16
    )
    return save(folder, BlipForQuestionAnswering(config), tokenizer, BlipImageProcessor(size=SIDE))


def clip(folder):
    tokenizer, size = clip_tokenizer(folder)
    text = {
        **SMALL,
        "vocab_size": size,
        "max_position_embeddings": 16,
        "eos_token_id": size - 1,
        "bos_token_id": size - 2,
    }
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text, vision_config={**SMALL, "image_size": 32, "patch_size": 16}, projection_dim=16
    )
    return save(
        folder,
        CLIPModel(config),
        CLIPProcessor(CLIPImageProcessor(size=SIDE, do_center_crop=False), tokenizer),
    )


def owl(folder):
    tokenizer, size = clip_tokenizer(folder)
    text = {
        **SMALL,
        "vocab_size": size,
        "max_position_embeddings": 16,
        "eos_token_id": size - 1,
        "bos_token_id": size - 2,
    }
    torch.manual_seed(0)
    config = Owlv2Config(
        text_config=text, vision_config={**SMALL, "image_size": 32, "patch_size": 16}, projection_dim=16
    )
    tokenizer.pad_token = "a"
    return save(
        folder, Owlv2ForObjectDetection(config), Owlv2Processor(Owlv2ImageProcessor(size=SIDE), tokenizer)
    )


def mask2former(folder, labels=("cat", "dog", "mouse")):
    backbone = SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    torch.manual_seed(0)
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=6,
        id2label=dict(enumerate(labels)),
    )
    return save(folder, Mask2FormerForUniversalSegmentation(config), Mask2FormerImageProcessor(size=SIDE))


def blip2(folder):
    tokenizer, size = word_tokenizer("<image>")
    text = {
        "model_type": "t5",
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": size,
    }
    text |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    vision = {**SMALL, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = Blip2Config(
        vision_config=vision,
        qformer_config={**SMALL, "encoder_hidden_size": 16, "vocab_size": size},
        text_config=text,
        num_query_tokens=4,
        image_token_index=size - 1,
    )
    processor = Blip2Processor(BlipImageProcessor(size=SIDE), tokenizer, num_query_tokens=4)
    return save(folder, Blip2ForConditionalGeneration(config), processor)


TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def llava(folder, template=TEMPLATE):
    tokenizer, size = word_tokenizer("<image>")
    text = {
        "model_type": "llama",
        **SMALL,
        "vocab_size": size,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    vision = {"model_type": "clip_vision_model", **SMALL, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=size - 1, vision_feature_layer=-1
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size=SIDE, do_center_crop=False),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )
    return save(folder, LlavaForConditionalGeneration(config), processor)
