"""A table of model families: a config for each that makes a tiny random model, and the reason where one is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["FAMILIES", "Family", "family", "names"]

SIZES = {
    "vocab_size": 262,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
"""Of every model below, unless it says otherwise; those that a family's config does not know do no harm."""


@dataclass(frozen=True)
class Family:
    """A kind of model."""

    name: str
    """In this table."""
    kind: str
    """"attention", "hybrid" (attention and recurrent layers), "recurrent", or "bidirectional"."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of its config, beside or in place of SIZES; None leaves one of those out, but for `pad_token_id`."""
    model_type: str = ""
    """As transformers calls it; "": as `name`."""
    refused: str | None = None
    """Words of the error with which it is refused when it is loaded; None: it is sampled and trained."""

    def config(self) -> Any:
        from transformers import AutoConfig

        settings = SIZES | self.settings
        settings = {name: value for name, value in settings.items() if value is not None or name == "pad_token_id"}
        return AutoConfig.for_model(self.model_type or self.name, **settings)

    def model(self, seed: int = 0) -> Any:
        """A model of random weights, in evaluation mode."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(self.config()).eval()


def attention(name: str, model_type: str = "", **settings: Any) -> Family:
    return Family(name, "attention", settings, model_type)


def hybrid(name: str, **settings: Any) -> Family:
    return Family(name, "hybrid", settings)


def recurrent(name: str, **settings: Any) -> Family:
    return Family(name, "recurrent", settings)


def bidirectional(name: str, **settings: Any) -> Family:
    return Family(name, "bidirectional", settings, refused="is not a causal language model")


# ── settings that several families share ─────────────────────────────────────────────────────────────────────────────

HEADS = {"head_dim": 8}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
SHARED = EXPERTS | HEADS | {"shared_expert_intermediate_size": 32}
GROUPS = EXPERTS | {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
# With few heads many keys score 0, as all keys do where the padding token's embedding is 0: a top-k among equals is anybody's.
INDEXER = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 8, "pad_token_id": None}
SPARSE = GROUPS | LATENT | INDEXER
DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "num_hidden_layers": None,
}
GEMMA3N = HEADS | {
    "sliding_window": 8,
    "vocab_size_per_layer_input": 262,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
}
GEMMA4 = HEADS | {
    "global_head_dim": 8,
    "sliding_window": 8,
    "vocab_size_per_layer_input": 262,
    "hidden_size_per_layer_input": 8,
}
EYES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.0, 1.0, 1.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 24,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
DELTA = LINEAR | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
INKLING = HEADS | {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "layer_types": ["hybrid_sliding", "hybrid"],
}
ZAMBA = {
    "mamba_d_state": 8,
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
}

# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────

FAMILIES = [
    attention("afmoe", **EXPERTS, **HEADS, **WINDOW, num_dense_layers=1),
    attention("apertus"),
    attention("arcee"),
    attention("aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    attention("axk1", **GROUPS, **LATENT),
    attention("axk2", **SPARSE),
    attention("bart", **DECODER, is_decoder=True),
    attention("beam", **GROUPS, **HEADS, **WINDOW, mlp_layer_types=["dense", "sparse"]),
    attention("bert_decoder", "bert", is_decoder=True),
    attention("biogpt"),
    attention("bitnet"),
    attention("bloom"),
    attention("codegen", rotary_dim=4),
    attention("cohere"),
    attention("cohere2", **WINDOW),
    attention("cohere2_moe", **EXPERTS, **HEADS, **WINDOW),
    attention("ctrl", n_embd=32, dff=64, n_layer=2, n_head=4, n_positions=256, num_key_value_heads=None),
    attention("cwm", **HEADS, sliding_window=8),
    attention("deepseek_v2", **GROUPS, **LATENT),
    attention("deepseek_v3", **GROUPS, **LATENT),
    attention("deepseek_v32", **SPARSE),
    attention(
        "deepseek_v4", **EXPERTS, **INDEXER, n_shared_experts=1, num_key_value_heads=1, head_dim=16, q_lora_rank=16,
        sliding_window=8, o_groups=2, o_lora_rank=8, hc_mult=2, num_hidden_layers=3, mlp_layer_types=["moe"] * 3,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    ),
    attention("diffllama"),
    attention("doge"),
    attention("dots1", **GROUPS, layer_types=["full_attention", "full_attention"]),
    attention("dots3_note_text", **SPARSE, use_sliding_window=False),
    attention("ernie4_5", **HEADS),
    attention("ernie4_5_moe", **EXPERTS, moe_num_experts=4, moe_k=2, moe_layer_start_index=1, moe_layer_end_index=1),
    attention("exaone4", **WINDOW),
    attention("exaone_moe", **EXPERTS, **HEADS, **WINDOW, first_k_dense_replace=1, num_shared_experts=1),
    attention("falcon", new_decoder_architecture=True, num_kv_heads=2),
    attention("falcon_alibi", "falcon", alibi=True),
    attention("flex_olmo", **EXPERTS),
    attention("flint", **SHARED, **WINDOW, mlp_only_layers=[0]),
    attention("gemma", **HEADS),
    attention("gemma2", **HEADS, sliding_window=8),
    attention("gemma3", text_config=SIZES | HEADS | WINDOW, mm_tokens_per_image=4, vision_config=EYES | {"image_size": 28}),
    attention("gemma3_text", **HEADS, **WINDOW),
    attention("gemma3n_text", **GEMMA3N, layer_types=WINDOW["layer_types"], num_kv_shared_layers=0),
    attention(
        "gemma3n_shared_keys", "gemma3n_text", **GEMMA3N,
        num_hidden_layers=4, layer_types=WINDOW["layer_types"] * 2, num_kv_shared_layers=2,
    ),
    attention("gemma4", text_config=SIZES | GEMMA4, vision_config=EYES | HEADS | {"global_head_dim": 8}, audio_config=None),
    attention("gemma4_text", **GEMMA4),
    attention("glm", **HEADS),
    attention("glm4", **HEADS),
    attention("glm4_moe", **GROUPS, **HEADS),
    attention("glm4_moe_lite", **GROUPS, **LATENT),
    attention("glm_moe_dsa", **SPARSE),
    attention("gpt2"),
    attention("gpt_bigcode"),
    attention("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=8),
    attention("gpt_neox"),
    attention("gpt_neox_japanese", intermediate_multiple_size=2),
    attention("gpt_oss", **EXPERTS, **HEADS, sliding_window=8),
    attention("gptj", rotary_dim=4),
    attention("granite"),
    attention("granite_swa", **WINDOW),
    attention("granitemoe", **EXPERTS),
    attention("granitemoe_swa", **EXPERTS, **WINDOW),
    attention("granitemoeshared", **EXPERTS),
    attention("helium", **HEADS),
    attention("hrm_text", **HEADS, num_hidden_layers=1, H_cycles=1, L_cycles=1, L_bp_cycles=[1]),
    attention("hunyuan_v1_dense", **HEADS),
    attention("hunyuan_v1_moe", **EXPERTS, **HEADS, moe_topk=2),
    attention("hy_v3", **EXPERTS, **HEADS),
    attention("hy_v4", **SPARSE, hc_mult=2),
    attention("hyperclovax"),
    attention("jais2"),
    attention("jetmoe", **EXPERTS, kv_channels=8),
    attention("kolibri1", **SHARED, **WINDOW),
    attention("laguna", **SHARED, **WINDOW),
    attention("llama"),
    attention("llama_dynamic", "llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=64),
    attention("llama_longrope", "llama", rope_parameters=LONGROPE),
    attention("llama_yarn", "llama", rope_parameters=YARN),
    attention(
        "llama4_text", **EXPERTS, **HEADS, intermediate_size_mlp=64, attention_chunk_size=8,
        layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0],
    ),
    attention(
        "longcat_flash", **LATENT, **HEADS, num_hidden_layers=None, num_layers=1, ffn_hidden_size=64,
        expert_ffn_hidden_size=32, n_routed_experts=4, zero_expert_num=2, moe_topk=2,
    ),
    attention("mellum", **EXPERTS, **HEADS, **WINDOW),
    attention("mimo_v2_flash", **GROUPS, **HEADS, **WINDOW, v_head_dim=8),
    attention("minicpm3", **LATENT, dim_model_base=32),
    attention("minicpm3_longrope", "minicpm3", **LATENT, dim_model_base=32, rope_parameters=LONGROPE),
    attention("minimax_m2", **EXPERTS, **HEADS),
    attention(
        "minimax_m3_vl_text", **EXPERTS, **HEADS, rotary_dim=4, dense_intermediate_size=64, shared_intermediate_size=32,
        index_n_heads=2, index_head_dim=8, index_block_size=4, index_topk_blocks=2, index_local_blocks=1,
        layer_types=["full_attention", "minimax_m3_sparse"], mlp_layer_types=["dense", "sparse"],
    ),
    attention("ministral", **HEADS, sliding_window=8),
    attention("ministral3", **HEADS, rope_parameters=YARN | {"llama_4_scaling_beta": 0.1}),
    attention("mistral", sliding_window=8),
    attention("mixtral", **EXPERTS),
    attention("modernbert-decoder", local_attention=8),
    attention("mpt", d_model=32, n_heads=4, n_layers=2, max_seq_len=256, num_key_value_heads=None),
    attention("nanochat"),
    attention("nemotron"),
    attention("olmo"),
    attention("olmo2"),
    attention("olmo3", **WINDOW),
    attention("olmoe", **EXPERTS),
    attention("openai-gpt"),
    attention("opt", ffn_dim=64, word_embed_proj_dim=32),
    attention("persimmon"),
    attention("phi"),
    attention("phi3"),
    attention("phi3_longrope", "phi3", rope_parameters=LONGROPE, original_max_position_embeddings=24),
    attention("phimoe", **EXPERTS),
    attention("phimoe_longrope", "phimoe", **EXPERTS, rope_parameters=LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3}),
    attention("qwen2"),
    attention("qwen2_moe", **EXPERTS, shared_expert_intermediate_size=32),
    attention("qwen3", **HEADS),
    attention("qwen3_moe", **EXPERTS, **HEADS),
    attention("roberta_decoder", "roberta", is_decoder=True),
    attention("seed_oss", **HEADS),
    attention("smollm3"),
    attention("solar_open", **GROUPS, **HEADS),
    attention("stablelm"),
    attention("starcoder2"),
    attention("vaultgemma", **HEADS, sliding_window=8),
    attention("xglm", d_model=32, ffn_dim=64, attention_heads=4, num_layers=2),
    # Its pad token's embedding is set to 0 whenever it is loaded, trained or not.
    attention("youtu", **LATENT, pad_token_id=None),
    hybrid("bailing_hybrid", **GROUPS, **LATENT, **LINEAR, **HEADS),
    hybrid("bamba", **SSM, attn_layer_indices=[1]),
    hybrid("falcon_h1", **SSM, mamba_d_ssm=64),
    hybrid("granitemoehybrid", **EXPERTS, **SSM, **LINEAR, shared_intermediate_size=32),
    hybrid("inkling_text", **EXPERTS, **INKLING, n_shared_experts=1),
    hybrid("inkling2_text", **EXPERTS, **INKLING, unpadded_vocab_size=262, n_layers_per_attn_res_block=1),
    hybrid("jamba", **EXPERTS, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False),
    hybrid("kimi_linear", **GROUPS, **LINEAR, **(LATENT | {"q_lora_rank": None}), linear_head_dim=8, linear_num_heads=4),
    hybrid("lfm2", layer_types=["conv", "full_attention"]),
    hybrid("lfm2_moe", **EXPERTS, layer_types=["conv", "full_attention"]),
    hybrid("lfm3", **HEADS, sliding_window=8, num_hidden_layers=3, layer_types=["conv", *WINDOW["layer_types"]]),
    hybrid("minimax", **EXPERTS, **HEADS, block_size=8),
    hybrid(
        "nemotron_h", **EXPERTS, **HEADS, num_hidden_layers=3, layers_block_type=["mamba", "attention", "moe"],
        mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=8,
    ),
    hybrid("olmo_hybrid", **LINEAR, num_key_value_heads=4),
    hybrid("qwen3_5", text_config=SIZES | DELTA | HEADS, vision_config={"hidden_size": 16, "depth": 1, "num_heads": 2}),
    hybrid("qwen3_5_text", **DELTA, **HEADS),
    hybrid("qwen3_5_moe_text", **DELTA, **SHARED),
    hybrid("qwen3_next", **DELTA, **SHARED),
    hybrid(
        "qwen4_exp_text", **DELTA, **SHARED, hc_count=2, hc_lowrank=8, indexer_n_heads=2, indexer_kv_heads=1,
        indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=2,
    ),
    hybrid("recurrent_gemma", block_types=["recurrent", "attention"], attention_window_size=8, w_init_variance_scale=1.0),
    hybrid("zamba", **ZAMBA, n_mamba_heads=2, use_mamba_kernels=False),
    hybrid("zamba2", **ZAMBA, n_mamba_heads=8, mamba_headdim=8, mamba_ngroups=1, chunk_size=8, num_mem_blocks=1),
    hybrid("zaya", **(EXPERTS | {"num_experts_per_tok": 1}), **HEADS, router_hidden_size=16),
    recurrent("falcon_mamba", state_size=8),
    recurrent("mamba", state_size=8),
    recurrent("mamba2", num_heads=8, head_dim=8, n_groups=1, state_size=8, chunk_size=8),
    recurrent("rwkv", attention_hidden_size=32),
    recurrent("xlstm", hidden_size=128, num_heads=4),
    bidirectional("bert"),
    bidirectional("cpmant", dim_head=8, dim_ff=64),
    bidirectional("electra"),
    bidirectional("roberta"),
    bidirectional("xlm"),
    bidirectional("xlnet", d_model=32, n_layer=2, n_head=4, d_inner=64, max_position_embeddings=None),
]  # fmt: skip


def names(kind: str | None = None) -> list[str]:
    """Of the families that are sampled and trained: of one kind, or of all."""
    return [made.name for made in FAMILIES if made.refused is None and kind in (None, made.kind)]


def family(name: str) -> Family:
    return next(made for made in FAMILIES if made.name == name)
