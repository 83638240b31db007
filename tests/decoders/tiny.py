"""Every causal decoder of the installed transformers, made tiny."""

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.support.models import VOCAB_SIZE

LAYERS, LARGEST = 2, 5_000_000
# What a configuration may call its sizes -> how large they are here.
NAMES = [
    (VOCAB_SIZE, "vocab_size decoder_vocab_size vocab_size_per_layer_input"),
    (64, "hidden_size d_model n_embd emb_dim embedding_dim word_embed_proj_dim"),
    (64, "lru_width input_embedding_size output_embedding_size dim_model_base"),
    (96, "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim n_inner dff"),
    (96, "dim_ff d_inner ffn_hidden_size feed_forward_size intermediate_size_mlp"),
    (96, "dense_intermediate_size"),
    (32, "moe_intermediate_size shared_expert_intermediate_size q_lora_rank"),
    (32, "moe_shared_expert_intermediate_size shared_intermediate_size o_lora_rank"),
    (32, "expert_ffn_hidden_size router_hidden_size kv_lora_rank laurel_rank"),
    (32, "hidden_size_per_layer_input hc_lowrank index_head_dim"),
    (16, "linear_key_head_dim linear_value_head_dim"),
    (8, "num_attention_heads n_head n_heads num_heads decoder_attention_heads"),
    (8, "encoder_attention_heads num_decoder_attention_heads attention_heads"),
    (8, "num_encoder_attention_heads head_dim v_head_dim qk_nope_head_dim"),
    (8, "kv_channels d_head dim_head swa_num_attention_heads swa_head_dim"),
    (8, "swa_v_head_dim attention_head_dim global_head_dim"),
    (4, "num_key_value_heads num_kv_heads swa_num_key_value_heads rotary_dim"),
    (4, "num_query_groups index_n_heads global_num_key_value_heads"),
    (4, "linear_num_value_heads linear_num_key_heads qk_rope_head_dim"),
    (4, "num_global_key_value_heads"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_topk moe_k moe_top_k top_k_experts"),
    (2, "num_hidden_layers n_layer n_layers num_layers decoder_layers"),
    (2, "encoder_layers num_decoder_layers num_encoder_layers num_blocks"),
    (1, "n_group topk_group first_k_dense_replace num_kv_shared_layers"),
    (128, "max_position_embeddings n_positions max_target_positions"),
]
SIZES = {name: size for size, names in NAMES for name in names.split()}
# Sizes that depend on each other in a way that their names do not show.
LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
FOUR_LAYERS = {
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "num_hidden_layers": 4,
}
SPECIAL = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0}
        }
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 8, "per_layer_config": None},
    "falcon_h1": {
        "mamba_chunk_size": 16,
        "mamba_d_state": 16,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 96},
    "granitemoehybrid": {**LINEAR_THEN_FULL, "mamba_n_heads": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {
        **LINEAR_THEN_FULL,
        "linear_head_dim": 8,
        "linear_num_heads": 8,
        "num_experts_per_token": 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16, "n_groups": 1},
    "nemotron": {"num_key_value_heads": 8},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 1,
    },
    "roc_bert": {"shape_vocab_size": 509, "pronunciation_vocab_size": 509},
    "xmod": {"default_language": "en_XX"},
    "zamba": FOUR_LAYERS,
    "zamba2": FOUR_LAYERS,
    "zaya": {"num_experts_per_tok": 1},
}


@cache
def decoders() -> dict[str, type]:
    """The class of the text model's configuration, by its ``model_type``."""
    found = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        try:
            text = type(kind().get_text_config())
        except Exception:  # its defaults do not fit, or it has several text models
            text = kind
        if text in MODEL_FOR_CAUSAL_LM_MAPPING:
            found[text.model_type] = text
    return dict(sorted(found.items()))


def tiny_config(name: str):
    """A configuration with two layers, hidden size 64 and a prime vocabulary."""
    kind, special = CONFIG_MAPPING[name], SPECIAL.get(name, {})
    default, settings = kind(), {}
    for key, value in default.to_dict().items():
        if "drop" in key and isinstance(value, float):
            settings[key] = 0.0
        elif key.endswith("_token_id") and isinstance(value, int):
            settings[key] = min(value, 3)
        elif key in SIZES and ((isinstance(value, int) and value) or key == "head_dim"):
            settings[key] = SIZES[key]
        elif isinstance(value, list) and len(value) > LAYERS and is_per_layer(key):
            settings[key] = [value[0], value[-1]]
    if hasattr(default, "qk_rope_head_dim"):  # multi-head latent attention
        settings |= {"qk_rope_head_dim": 8, "head_dim": 8, "qk_head_dim": 16}
        settings["num_key_value_heads"] = settings.get("num_attention_heads")
    if hasattr(default, "is_decoder"):
        settings["is_decoder"] = True
    for key in ("initializer_range", "init_std"):
        if hasattr(default, key):
            settings[key] = 0.2  # attention matters
    return kind(**settings | special)


def is_per_layer(key: str) -> bool:
    return "layer" in key or key.endswith(("_types", "_pattern"))


def write(name: str, directory: Path) -> None:
    """Write the decoder with random weights; no norm is all ones, no bias zeros.

    Raises:
        ValueError: its sizes have names that are not known here.
    """
    config = tiny_config(name)
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > LARGEST:
        raise ValueError(f"{size} parameters are not tiny")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    words = {f"w{number}": number for number in range(VOCAB_SIZE)}
    words = Tokenizer(WordLevel(words, unk_token="w0"))
    # The family's own class might need a package, or more files.
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(directory)
