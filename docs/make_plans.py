"""Writes docs/plans.md, the plans of real architectures: ``python docs/make_plans.py``, or ``make plans``.

The models are made from their configurations, small and with random weights: no network is needed, but transformers and
peft are, which ``make plans`` installs. A test of ``make test-trainers`` fails where the page is not what this prints.
"""

import argparse
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TARGET = Path(__file__).with_name("plans.md")

HEAD = """# Plans of known models

This page lets you look up what [`layer_groups`](layer_groups.md) does with the models that people train: which tensors
rotate, as how many layers, and why the others do not. `make plans` writes it: each table is
`layer_groups(model).summary(short=True)`, in which one row stands for the same tensor of all blocks. `print` shows the
plan of your own model; look for *unknown* and *so as one layer* in it.

The models are small, made from their configurations. Larger ones have the same rows. What is known of the modules of
other packages stands in one file, [`known.py`](../layca_fast/groups/known.py), in a line for each fact.
"""

#: Sizes that most configurations of transformers have.
SIZES: Mapping[str, int] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER: Mapping[str, int] = {**SIZES, "num_key_value_heads": 2}


class Family(NamedTuple):
    """A kind of models: its title, what is worth a look in its plan, and a small one of them."""

    title: str
    note: str
    make: Callable[[], Any]


def transformer(architecture: str, configuration: str, **sizes: Any) -> Callable[[], Any]:
    """Makes a model of transformers from its configuration."""

    def make() -> Any:
        import transformers

        return getattr(transformers, architecture)(getattr(transformers, configuration)(**sizes))

    return make


llama = transformer("LlamaForCausalLM", "LlamaConfig", **DECODER)


def lora() -> Any:
    """Adapters of two projections of every block of a Llama."""
    import peft

    with warnings.catch_warnings():
        # Of transformers, about what peft asks it.
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def timm_vit() -> Any:
    """The modules of a VisionTransformer of timm, by their names and shapes: timm itself needs torchvision."""
    import torch
    from torch import nn

    def block() -> nn.Module:
        attention = nn.ModuleDict({"qkv": nn.Linear(32, 96), "proj": nn.Linear(32, 32)})
        mlp = nn.ModuleDict({"fc1": nn.Linear(32, 48), "fc2": nn.Linear(48, 32)})
        return nn.ModuleDict({"norm1": nn.LayerNorm(32), "attn": attention, "norm2": nn.LayerNorm(32), "mlp": mlp})

    model = nn.Module()
    model.cls_token = nn.Parameter(torch.randn(1, 1, 32))
    model.pos_embed = nn.Parameter(torch.randn(1, 5, 32))
    model.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 32, 8, 8)})
    model.blocks = nn.Sequential(*(block() for _ in range(2)))
    model.norm = nn.LayerNorm(32)
    model.head = nn.Linear(32, 10)
    return model


FAMILIES: Sequence[Family] = (
    Family(
        "GPT-2",
        "The head is tied to the embedding. `Conv1D` stores its weights as (in, out): query, key and value are columns "
        "of `c_attn`, which only the torch backend turns, [at its cost](options.md#which-parts-are-layers). They turn "
        "as one unless you ask for them: "
        '`rotate={block.attn.c_attn: ("columns", 3) for block in model.transformer.h}`.',
        transformer(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=96,
            n_positions=16,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    Family("Llama", "Grouped-query attention, whose projections are tensors of their own.", llama),
    Family("Qwen2", "", transformer("Qwen2ForCausalLM", "Qwen2Config", **DECODER)),
    Family("Qwen3", "", transformer("Qwen3ForCausalLM", "Qwen3Config", head_dim=8, **DECODER)),
    Family(
        "Qwen3-MoE",
        "Experts are stacked: each is a layer, its gate and its up one each. Routers stay off the sphere.",
        transformer(
            "Qwen3MoeForCausalLM",
            "Qwen3MoeConfig",
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            **DECODER,
        ),
    ),
    Family(
        "gpt-oss",
        "Its experts are stored as (in, out), with gate and up interleaved: they turn as one, expert by expert.",
        transformer(
            "GptOssForCausalLM",
            "GptOssConfig",
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default"},
            **DECODER,
        ),
    ),
    Family(
        "DeepSeek-V3",
        "Latent attention packs unequal parts. Those that lie interleaved, head by head, turn as one.",
        transformer(
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            moe_intermediate_size=24,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=12,
            qk_rope_head_dim=4,
            **{"qk_nope_head_dim": 4, "v_head_dim": 8, **SIZES},
        ),
    ),
    Family(
        "Phi-3",
        "Packed projections of unequal parts: the numbers behind them are their sizes.",
        transformer("Phi3ForCausalLM", "Phi3Config", **DECODER),
    ),
    Family(
        "GPT-NeoX",
        "Query, key and value lie interleaved, head by head: the plan says that they turn as one.",
        transformer("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES),
    ),
    Family("BERT", "", transformer("BertForMaskedLM", "BertConfig", **SIZES)),
    Family(
        "T5",
        "Tables of relative positions are embeddings.",
        transformer(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=96,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
    ),
    Family(
        "Whisper",
        "The encoder's table of positions is frozen by transformers.",
        transformer(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=96,
            d_model=32,
            num_mel_bins=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=16,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
    ),
    Family(
        "ViT",
        "Positions and tokens are parameters of their own, known by their names. The classifier rotates: it is no head "
        "over a vocabulary.",
        transformer(
            "ViTForImageClassification",
            "ViTConfig",
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
            num_labels=10,
        ),
    ),
    Family("ViT of timm", "Names and shapes as timm has them.", timm_vit),
    Family(
        "ResNet",
        "",
        transformer(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[16, 32],
            depths=[2, 2],
            num_labels=10,
        ),
    ),
    Family(
        "ConvNeXt",
        "",
        transformer(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            hidden_sizes=[8, 16],
            depths=[2, 2],
            num_stages=2,
            num_labels=10,
        ),
    ),
    Family(
        "LoRA",
        "Adapters of peft. B starts at zero and has to grow: it takes plain steps, in a resumed run, too, or, with "
        '`zeros="rotate-later"`, [until it has a norm](layer_groups.md#layers-that-start-at-zero).',
        lora,
    ),
)


def render() -> str:
    """The whole of docs/plans.md."""
    import transformers

    from layca_fast import layer_groups

    transformers.logging.set_verbosity_error()
    parts = [HEAD, "\n".join(f"- [{family.title}](#{family.title.lower().replace(' ', '-')})" for family in FAMILIES)]
    for family in FAMILIES:
        note = f"{textwrap.fill(family.note, 120)}\n\n" if family.note else ""
        plan = layer_groups(family.make()).summary(short=True)
        parts.append(f"## {family.title}\n\n{note}```text\n{plan}\n```")
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description="Writes docs/plans.md, the plans of real architectures.").parse_args()
    TARGET.write_text(render(), encoding="utf-8")
    print(f"written: {TARGET}")
