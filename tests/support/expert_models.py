"""Small true models with experts: random weights of two layers, in the families' own classes."""

import torch
import transformers

__all__ = ["EXPERTS", "expert_model", "logprobs"]

_TWO_OF_FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
_NARROW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
EXPERTS = {
    "mixtral": ("MixtralConfig", _TWO_OF_FOUR),
    "qwen2_moe": ("Qwen2MoeConfig", {**_NARROW, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_NARROW, "head_dim": 8}),
    "gpt_oss": ("GptOssConfig", {**_TWO_OF_FOUR, "head_dim": 8, "sliding_window": 8}),
    "llama4": (
        "Llama4TextConfig",
        {
            **_TWO_OF_FOUR,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "head_dim": 8,
            "interleave_moe_layer_step": 1,
        },
    ),
    "granitemoe": ("GraniteMoeConfig", _TWO_OF_FOUR),
    "deepseek_v3": ("DeepseekV3Config", _DEEPSEEK),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("PhimoeConfig", _TWO_OF_FOUR),
    "jetmoe": ("JetMoeConfig", {**_TWO_OF_FOUR, "kv_channels": 8}),
    "glm4_moe": ("Glm4MoeConfig", {**_NARROW, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "head_dim": 8}),
    "minimax_m2": ("MiniMaxM2Config", {**_TWO_OF_FOUR, "head_dim": 8}),
}
"""Config classes by the names of the families, and what they need beside the sizes."""


def expert_model(family, seed=0, **settings):
    """A model of this family, on which experts matter: its matrices are wider than those of a fresh model."""
    name, more = EXPERTS[family]
    sizes = {
        "vocab_size": 262, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**{**sizes, **more, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


@torch.no_grad()
def logprobs(model, ids):
    """(T, V) float32, of one plain forward pass."""
    return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
