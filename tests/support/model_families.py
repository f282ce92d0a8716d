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
    "initializer_range": 0.2,
}
"""Of every model below, unless it says otherwise; those that a family's config does not know do no harm."""
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
"""Multi-head latent attention."""
GROUPS = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
"""Gated delta nets, with an attention layer."""
SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
INDEXER = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 8}
"""Of sparse attention. With few heads many keys score 0, and which of them a top-k takes is nobody's choice."""
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.0, 1.0, 1.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 24,
}


@dataclass(frozen=True)
class Family:
    """A kind of model."""

    name: str
    """In this table."""
    kind: str
    """"attention", "hybrid" (attention and recurrent layers) or "recurrent"."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of its config, beside or in place of SIZES; None leaves one of those out."""
    model_type: str = ""
    """As transformers calls it; "": as `name`."""
    refused: str | None = None
    """Words of the error with which it is refused when it is loaded; None: it is sampled and trained."""

    def config(self) -> Any:
        from transformers import AutoConfig

        settings = {name: value for name, value in (SIZES | self.settings).items() if value is not None}
        return AutoConfig.for_model(self.model_type or self.name, **settings)

    def model(self, seed: int = 0) -> Any:
        """A model of random weights."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(self.config()).eval()


def attention(name: str, model_type: str = "", refused: str | None = None, **settings: Any) -> Family:
    return Family(name, "attention", settings, model_type, refused)


def hybrid(name: str, model_type: str = "", refused: str | None = None, **settings: Any) -> Family:
    return Family(name, "hybrid", settings, model_type, refused)


def recurrent(name: str, model_type: str = "", refused: str | None = None, **settings: Any) -> Family:
    return Family(name, "recurrent", settings, model_type, refused)


FAMILIES = [
    attention("afmoe", **EXPERTS, head_dim=8, **WINDOW, num_dense_layers=1),
    attention("apertus"),
    attention("arcee"),
    attention("bitnet"),
    attention("bloom"),
    attention("codegen", rotary_dim=4),
    attention("cohere"),
    attention("cohere2", **WINDOW),
    attention("cwm", sliding_window=8),
    attention("deepseek_v2", **EXPERTS, **LATENT, **GROUPS),
    attention("deepseek_v3", **EXPERTS, **LATENT, **GROUPS),
    attention("deepseek_v32", **EXPERTS, **LATENT, **GROUPS, **INDEXER),
    attention("diffllama"),
    attention("doge"),
    attention("dots1", **EXPERTS, **GROUPS, layer_types=["full_attention", "full_attention"]),
    attention("ernie4_5"),
    attention("ernie4_5_moe", **EXPERTS, moe_num_experts=4, moe_k=2, moe_layer_start_index=1, moe_layer_end_index=1),
    attention("exaone4", **WINDOW),
    attention("falcon", head_dim=None, new_decoder_architecture=True, num_kv_heads=2),
    attention("falcon_alibi", "falcon", alibi=True),
    attention("flex_olmo", **EXPERTS),
    attention("gemma", head_dim=8),
    attention("gemma2", head_dim=8, sliding_window=8),
    attention("gemma3_text", head_dim=8, **WINDOW),
    attention(
        "gemma3n_text",
        **WINDOW,
        head_dim=8,
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=262,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
    ),
    attention(
        "gemma3n_shared",
        "gemma3n_text",
        head_dim=8,
        sliding_window=8,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=262,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
    ),
    attention(
        "gemma4_text",
        head_dim=8,
        global_head_dim=8,
        sliding_window=8,
        vocab_size_per_layer_input=262,
        hidden_size_per_layer_input=8,
    ),
    attention("glm", head_dim=8),
    attention("glm4", head_dim=8),
    attention("glm4_moe", **EXPERTS, **GROUPS, head_dim=8),
    attention("glm_moe_dsa", **EXPERTS, **LATENT, **GROUPS, **INDEXER),
    attention("gpt2"),
    attention("gpt_bigcode"),
    attention("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=8, intermediate_size=64),
    attention("gpt_neox"),
    attention("gpt_oss", **EXPERTS, head_dim=8, sliding_window=8),
    attention("gptj", rotary_dim=4),
    attention("granite"),
    attention("granitemoe", **EXPERTS),
    attention("granitemoeshared", **EXPERTS),
    attention("helium", head_dim=8),
    attention("hunyuan_v1_dense", head_dim=8),
    attention("hunyuan_v1_moe", **EXPERTS, head_dim=8, moe_topk=2),
    attention("jetmoe", **EXPERTS, kv_channels=8, num_attention_heads=4),
    attention("llama"),
    attention(
        "llama4_text",
        **EXPERTS,
        head_dim=8,
        intermediate_size_mlp=64,
        attention_chunk_size=8,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
    ),
    attention("minimax_m2", **EXPERTS, head_dim=8),
    attention("ministral", sliding_window=8, head_dim=8),
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
    attention(
        "phimoe_longrope",
        "phimoe",
        **EXPERTS,
        rope_parameters=LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3},
        original_max_position_embeddings=24,
    ),
    attention("llama_longrope", "llama", rope_parameters=LONGROPE),
    attention(
        "llama_dynamic", "llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=40
    ),
    attention(
        "llama_yarn",
        "llama",
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    ),
    attention("qwen2"),
    attention("qwen2_moe", **EXPERTS, shared_expert_intermediate_size=32),
    attention("qwen3", head_dim=8),
    attention("qwen3_moe", **EXPERTS, head_dim=8),
    attention("seed_oss", head_dim=8),
    attention("smollm3"),
    attention("stablelm"),
    attention("starcoder2"),
    attention("vaultgemma", head_dim=8, sliding_window=8),
    attention("xglm", d_model=32, ffn_dim=64, attention_heads=4, num_layers=2),
    attention("aria_text", **EXPERTS, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    attention("axk1", **EXPERTS, **LATENT, **GROUPS),
    attention("axk2", **EXPERTS, **LATENT, **GROUPS, **INDEXER),
    attention("beam", **EXPERTS, **WINDOW, head_dim=8, n_group=1, topk_group=1, mlp_layer_types=["dense", "sparse"]),
    attention("biogpt"),
    attention("cohere2_moe", **EXPERTS, **WINDOW, head_dim=8),
    attention("cpmant", dim_head=8, dim_ff=64, prompt_length=4, prompt_types=2, segment_types=2),
    attention("ctrl", n_embd=32, dff=64, n_layer=2, n_head=4, n_positions=256, num_key_value_heads=None),
    attention(
        "dbrx",
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=256,
        attn_config={"kv_n_heads": 2},
        ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    ),
    attention(
        "deepseek_v4",
        **EXPERTS,
        **INDEXER,
        num_key_value_heads=1,
        head_dim=16,
        q_lora_rank=16,
        sliding_window=8,
        o_groups=2,
        o_lora_rank=8,
        hc_mult=2,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        mlp_layer_types=["moe", "moe", "moe"],
        n_shared_experts=1,
    ),
    attention("dots3_note", **EXPERTS, **LATENT, **GROUPS, **INDEXER, use_sliding_window=False),
    attention("exaone_moe", **EXPERTS, **WINDOW, head_dim=8, first_k_dense_replace=1, num_shared_experts=1),
    attention("flint", **EXPERTS, **WINDOW, head_dim=8, shared_expert_intermediate_size=32, mlp_only_layers=[0]),
    attention(
        "gemma3",
        text_config=SIZES | WINDOW | {"head_dim": 8},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    ),
    attention("glm4_moe_lite", **EXPERTS, **LATENT, **GROUPS),
    attention("gpt_neox_japanese", intermediate_multiple_size=2),
    attention("granite_swa", **WINDOW),
    attention("granitemoe_swa", **EXPERTS, **WINDOW),
    attention("hrm_text", head_dim=8, num_hidden_layers=1, H_cycles=1, L_cycles=1, L_bp_cycles=[1]),
    attention("hy_v3", **EXPERTS, head_dim=8),
    attention("hy_v4", **EXPERTS, **LATENT, **GROUPS, **INDEXER, hc_mult=2),
    attention("hyperclovax"),
    attention("jais2"),
    attention("kolibri1", **EXPERTS, **WINDOW, head_dim=8, shared_expert_intermediate_size=32),
    attention("laguna", **EXPERTS, **WINDOW, head_dim=8, shared_expert_intermediate_size=32),
    attention(
        "longcat_flash",
        **LATENT,
        num_hidden_layers=None,
        num_layers=1,
        ffn_hidden_size=64,
        expert_ffn_hidden_size=32,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        head_dim=8,
    ),
    attention("mellum", **EXPERTS, **WINDOW, head_dim=8),
    attention("mimo_v2_flash", **EXPERTS, **WINDOW, head_dim=8, v_head_dim=8, n_group=1, topk_group=1),
    attention("minicpm3", **LATENT),
    attention("minicpm3_longrope", "minicpm3", **LATENT, rope_parameters=LONGROPE),
    attention(
        "minimax_m3_vl_text",
        **EXPERTS,
        head_dim=8,
        rotary_dim=4,
        dense_intermediate_size=64,
        shared_intermediate_size=32,
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=4,
        index_topk_blocks=2,
        index_local_blocks=1,
        layer_types=["full_attention", "minimax_m3_sparse"],
        mlp_layer_types=["dense", "sparse"],
    ),
    attention(
        "ministral3",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    attention("solar_open", **EXPERTS, n_shared_experts=1, n_group=1, topk_group=1, head_dim=8),
    attention("youtu", **LATENT),
    attention(
        "bart",
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=64,
        encoder_layers=1,
        num_hidden_layers=None,
        is_decoder=True,
    ),
    attention("bert"),
    attention("roberta"),
    attention("xlm"),
    hybrid("bamba", **SSM, attn_layer_indices=[1]),
    hybrid("falcon_h1", **SSM, mamba_d_ssm=64),
    hybrid(
        "granitemoehybrid",
        **EXPERTS,
        **SSM,
        layer_types=["linear_attention", "full_attention"],
        shared_intermediate_size=32,
    ),
    hybrid("jamba", **EXPERTS, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False),
    hybrid("lfm2", layer_types=["conv", "full_attention"]),
    hybrid("lfm2_moe", **EXPERTS, layer_types=["conv", "full_attention"]),
    hybrid("minimax", **EXPERTS, head_dim=8, block_size=8),
    hybrid(
        "nemotron_h",
        **EXPERTS,
        layers_block_type=["mamba", "attention", "moe"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=8,
        head_dim=8,
        num_hidden_layers=3,
    ),
    hybrid("olmo_hybrid", num_key_value_heads=4, layer_types=["linear_attention", "full_attention"]),
    hybrid("qwen3_5_text", **DELTA, head_dim=8),
    hybrid("qwen3_5_moe_text", **DELTA, **EXPERTS, head_dim=8, shared_expert_intermediate_size=32),
    hybrid("qwen3_next", **DELTA, **EXPERTS, head_dim=8, shared_expert_intermediate_size=32),
    hybrid(
        "recurrent_gemma", block_types=["recurrent", "attention"], attention_window_size=8, w_init_variance_scale=1.0
    ),
    hybrid(
        "zamba",
        n_mamba_heads=2,
        mamba_d_state=8,
        num_hidden_layers=5,
        num_key_value_heads=4,
        layers_block_type=["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        use_mamba_kernels=False,
    ),
    hybrid(
        "zamba2",
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_headdim=8,
        mamba_ngroups=1,
        chunk_size=8,
        num_hidden_layers=3,
        layers_block_type=["linear_attention", "linear_attention", "hybrid"],
        num_mem_blocks=1,
    ),
    hybrid(
        "bailing_hybrid", **EXPERTS, **LATENT, **GROUPS, layer_types=["linear_attention", "full_attention"], head_dim=8
    ),
    hybrid(
        "inkling_text",
        **EXPERTS,
        head_dim=8,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=8,
        sliding_window_size=8,
        d_rel=4,
        rel_extent=16,
        n_shared_experts=1,
        layer_types=["hybrid_sliding", "hybrid"],
    ),
    hybrid(
        "inkling2_text",
        **EXPERTS,
        head_dim=8,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        swa_head_dim=8,
        sliding_window_size=8,
        d_rel=4,
        rel_extent=16,
        unpadded_vocab_size=262,
        n_layers_per_attn_res_block=1,
        layer_types=["hybrid_sliding", "hybrid"],
    ),
    hybrid(
        "kimi_linear",
        **EXPERTS,
        **{**LATENT, "q_lora_rank": None},
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        linear_head_dim=8,
        linear_num_heads=4,
        layer_types=["linear_attention", "full_attention"],
    ),
    hybrid(
        "lfm3",
        head_dim=8,
        sliding_window=8,
        num_hidden_layers=3,
        layer_types=["conv", "sliding_attention", "full_attention"],
    ),
    hybrid(
        "qwen3_5",
        text_config=SIZES | DELTA | {"head_dim": 8},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2},
    ),
    hybrid(
        "qwen4_exp_text",
        **DELTA,
        **EXPERTS,
        head_dim=8,
        shared_expert_intermediate_size=32,
        hc_count=2,
        hc_lowrank=8,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=8,
        indexer_compress_ratio=2,
    ),
    hybrid("zaya", **(EXPERTS | {"num_experts_per_tok": 1}), head_dim=8, router_hidden_size=16),
    recurrent("falcon_mamba", state_size=8),
    recurrent("mamba", state_size=8),
    recurrent("mamba2", num_heads=8, head_dim=8, n_groups=1, state_size=8, chunk_size=8),
    recurrent("rwkv", attention_hidden_size=32),
    recurrent("xlstm", hidden_size=128, num_heads=4),
]


def names(kind: str | None = None) -> list[str]:
    """Of those in the table, or of one kind."""
    return [made.name for made in FAMILIES if kind in (None, made.kind)]


def family(name: str) -> Family:
    return next(made for made in FAMILIES if made.name == name)
