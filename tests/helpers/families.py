"""Every text family of the installed transformers, built tiny from its own config: three layers, width 32, random weights."""

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

CAUSAL = dict(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGE_TEXT = dict(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)

# What each number of a config becomes; a name that is not here keeps its default.
WIDTH = (
    "hidden_size d_model n_embd dim word_embed_proj_dim embed_dim emb_dim embedding_size lru_width output_dim out_hidden_size \
  projection_dim embedding_dim backbone_hidden_size text_hidden_size projector_hidden_size attention_hidden_size hidden_dim \
  vision_output_dim decoder_hidden_size input_embedding_size output_embedding_size hidden_size_global encoder_hidden_size \
  vision_hidden_size image_text_hidden_size projection_hidden_size shared_experts_intermediate_size emb_size latent_dim"
)
INNER = "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff d_inner dim_ff dff n_inner ffn_hidden_size \
  shared_intermediate_size shared_expert_intermediate_size intermediate_size_mlp feed_forward_size mlp_dim dense_intermediate_size \
  expert_ffn_hidden_size moe_intermediate_size moe_shared_expert_intermediate_size projection_intermediate_size \
  projection_hidden_dim share_expert_dim alignment_intermediate_size moe_hidden_size attention_intermediate_size \
  merged_hidden_size aligner_intermediate_size"
LAYERS = "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers layers depth num_encoder_layers \
  num_decoder_layers conf_num_hidden_layers"
HEADS = "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads \
  num_encoder_attention_heads num_decoder_attention_heads conf_num_attention_heads resampler_n_heads swa_num_attention_heads \
  num_sliding_attention_heads linear_num_value_heads linear_num_heads index_n_heads"
SHARED_HEADS = "num_key_value_heads swa_num_key_value_heads linear_num_key_heads num_kv_heads kv_n_heads"
HEAD_WIDTH = "head_dim d_kv dim_head swa_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim kv_channels \
  linear_key_head_dim linear_value_head_dim linear_head_dim attention_head_size d_head resampler_head_dim resampler_dim_head \
  rotary_dim mamba_headdim mamba_head_dim mamba_d_head head_dim_global attention_head_dim"
EXPERTS = "num_experts num_local_experts n_routed_experts moe_num_experts"
CHOSEN = "num_experts_per_tok moe_topk moe_top_k moe_k num_experts_per_token top_k"
ONE = (
    "n_group topk_group num_expert_group first_k_dense_replace n_shared_experts num_shared_experts moe_num_shared_experts \
  num_dense_layers num_nextn_predict_layers n_groups mamba_n_groups mamba_ngroups num_limited_groups"
)

SMALL: dict[str, int] = {
    **dict.fromkeys(WIDTH.split(), 32),
    **dict.fromkeys(INNER.split(), 64),
    **dict.fromkeys(LAYERS.split(), 3),
    **dict.fromkeys(HEADS.split(), 4),
    **dict.fromkeys(SHARED_HEADS.split(), 2),
    **dict.fromkeys(HEAD_WIDTH.split(), 8),
    **dict.fromkeys(EXPERTS.split(), 4),
    **dict.fromkeys(CHOSEN.split(), 2),
    **dict.fromkeys(ONE.split(), 1),
    "vocab_size": 128, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_head_dim": 16, "o_lora_rank": 8, "o_groups": 2,
    "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "context_length": 256, "max_seq_len": 256,
    "state_size": 8, "mamba_d_state": 8, "ssm_state_size": 8, "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_d_ssm": 64,
    "time_step_rank": 4, "mamba_dt_rank": 4, "chunk_size": 16, "mamba_chunk_size": 16, "n_mamba_heads": 2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "image_size": 32, "patch_size": 8, "shared_heads": 2,
    "index_head_dim": 16, "index_topk": 64, "laurel_rank": 8, "adapter_rank": 8, "sliding_window": 64, "attention_window_size": 64,
    "type_vocab_size": 2, "max_source_positions": 32, "gated_norm_rank": 8, "num_mel_bins": 8,
    "unpadded_vocab_size": 128,
}  # fmt: skip


def tiny_kwargs(default: PreTrainedConfig) -> dict[str, Any]:
    "The arguments that make a config of the same class tiny."
    have = {key: value for key, value in default.to_dict().items() if not key.startswith("_")}
    small: dict[str, Any] = {}
    for key, value in have.items():
        if key in SMALL and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            small[key] = SMALL[key]
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int | list):
            small[key] = 100 + len(small) % 20
    small |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    heads, kv = have.get("num_attention_heads"), have.get("num_key_value_heads")
    if isinstance(heads, int) and heads == kv:
        small["num_key_value_heads"] = 4
    small |= _per_layer(default, have)
    for key, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            inner = tiny_kwargs(value)
            lists = any(isinstance(entry, list) and len(entry) == 3 for entry in inner.values())
            # Longer than the text stack, so that the longest list is the wrong one.
            if ("vision" in key or "audio" in key) and not lists:
                inner |= {name: 5 for name in LAYERS.split() if inner.get(name) == 3}
            small[key] = type(value)(**inner)
    return small | MORE.get(default.model_type, {})


def _per_layer(default: PreTrainedConfig, have: dict[str, Any]) -> dict[str, Any]:
    "Lists with an entry a layer, cut to one layer of each kind (three at least)."
    total = getattr(default, "num_hidden_layers", None)
    lists = {k: v for k, v in have.items() if isinstance(v, list) and len(v) == total and len(v) > 3}
    if not lists:
        return {}
    indices = {k for k, v in lists.items() if v == list(range(total))}
    kinds: dict[tuple[Any, ...], int] = {}
    for n, kind in enumerate(zip(*(v for k, v in lists.items() if k not in indices), strict=True)):
        kinds.setdefault(tuple(map(str, kind)), n)
    chosen = sorted({*kinds.values(), *list(range(3))[: max(0, 3 - len(kinds))]})
    for n in range(total):
        if len(chosen) >= 3:
            break
        chosen = sorted({*chosen, n})
    cut: dict[str, Any] = {key: [values[n] for n in chosen] for key, values in lists.items()}
    cut |= {key: list(range(len(chosen))) for key in indices}
    name = next(
        (k for k in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if k in have), "num_hidden_layers"
    )
    return cut | {name: len(chosen)}


# Arguments that a family needs besides.
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4], "use_cache": False},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "dots3_note": {},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots3_note_audio_encoder": {"adapter_out_dim": 32, "adapter_input_size": 32},
    "dots3_note_text": {"vocab_size": 128},
    "gemma4_assistant": {"backbone_hidden_size": 32},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
        "ple_layer_ids": [],
    },
    "xlstm": {"hidden_size": 128, "num_heads": 4, "embedding_dim": 128, "num_blocks": 3},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"num_kv_shared_layers": 0, "global_head_dim": 8},
    "gemma4_unified_text": {"num_kv_shared_layers": 0, "global_head_dim": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "mamba_d_head": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16]},
    "zaya": {"num_experts_per_tok": 1},
    # image and text
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cosmos3_edge_text": {"rope_parameters": ROPE},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}},
    "ernie4_5_vl_moe_text": {"rope_parameters": ROPE},
    "glm4v_text": {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},
    "glm4v_moe_text": {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},
    "glm_ocr_text": {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},
    "molmo2_adapter": {"vision_feature_layer": [2, 1]},
    "radio": {"video_temporal_patch_size": 2},
    "hunyuan_vl_text": {"head_dim": 8},
    "hy_v4_vl_text": {"rope_parameters": ROPE},
    "paddleocr_vl_text": {"rope_parameters": ROPE},
    "qwen2_vl_text": {"rope_parameters": ROPE},
    "qwen2_5_vl_text": {"rope_parameters": ROPE},
    "qwen2_5_omni_text": {"rope_parameters": ROPE},
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_headdim": 32,
        "kv_channels": 8,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "wavtokenizer": {"codebook_dim": 32},
    "wavtokenizer_encoder": {"codebook_dim": 32},
    "xmod": {"default_language": "en_XX"},
}


# Families that are not built here, and why.
CANNOT: dict[str, str] = {
    "gemma3n": "its vision tower needs timm, which is not installed (its text model, gemma3n_text, is built)",
    "gemma4_assistant": "a draft model that reads the cache of the model it drafts for, and cannot run alone",
    "gemma4_unified_assistant": "a draft model that reads the cache of the model it drafts for, and cannot run alone",
}


# What transformers itself, or the family, makes impossible.
FLOAT32 = {  # no float64
    "inkling2_loop_text": "its router computes in float32 only",
    "inkling2_text": "its router computes in float32 only",
    "xglm": "its mask overflows in float64",
    "xlnet": "its masks are float32",
}
# In float64 their masks of padding become NaN.
PADDED_FLOAT32 = "bloom gemma2 granite_swa granitemoe_swa mpt vaultgemma xlm".split()
ONE_ROW = {"rwkv": "its cached steps mix the rows of a batch"}
NO_CACHE = {"blt": "its config has no num_hidden_layers, which transformers' cache asks for"}
NOT_TEXT = dict.fromkeys(
    ["musicgen", "musicgen_melody"], "writes audio codes: its `generate` lays the codebooks out in a pattern of its own"
)
REFUSED = {  # single tokens cannot be told in what a block returns: a clear error, never a guess
    "cpmant": "32 learned columns stand before the text",
    "prophetnet": "the streams of future tokens stand behind the text's, as if they were more of it",
    "xlnet": "the sequence comes first, then the batch",
}
CANNOT_IMAGE = {
    "apertus1p5": "its audio tokens do not fit into a tiny vocabulary",
    "diffusion_gemma": "its tiny config is refused by its own experts",
    "fast_vlm": "needs timm",
    "gemma3n": "needs timm",
    "glmga": "the class of glm46v under another config",
    "granite4_vision": "needs a map of vision layers that fits its window",
    "perception_lm": "needs timm",
    "pp_chart2table": "the class of got_ocr2 under another config",
    "shieldgemma2": "the class of gemma3 under another config",
}
AMBIGUOUS = {"pi0": "a text model and an action model side by side, and no word of which is the decoder"}


@contextlib.contextmanager
def quiet():  # type: ignore[no-untyped-def]
    "Without the warnings of configs that are made of nonsense."
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("transformers").setLevel(level)


def tiny_config(model_type: str) -> PreTrainedConfig:
    "The tiny config of a family."
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**tiny_kwargs(config_class()))


def build(model_type: str, mapping: dict[str, str] | None = None) -> PreTrainedModel:
    "The tiny model of a family, the same at every call."
    import transformers

    name = (mapping or CAUSAL)[model_type]
    with quiet():
        config = tiny_config(model_type)
        model_class = getattr(transformers, name)
        if not isinstance(config, model_class.config_class):
            config = config.get_text_config(decoder=True)
        if hasattr(config, "is_decoder"):
            config.is_decoder = True
        config._experts_implementation = "eager"  # the grouped kernel knows no float64
        torch.manual_seed(0)
        model: PreTrainedModel = model_class(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # a part whose weights are all zero would hide what happens before it
            if weight.ndim > 1 and not weight.any():
                weight.normal_(std=0.1)
    made = getattr(model, "generation_config", None)
    if made is not None:
        made.forced_eos_token_id = made.forced_bos_token_id = None
        made.pad_token_id = 0
    return model


def describe(found: Any) -> dict[str, Any]:
    "What `find_layers` found, short enough to commit: templates, and the numbers where not every block has the part."
    from steering_vectors.model.layers import _spans
    from steering_vectors.model.overview import _templates

    blocks = found["decoder_block"]
    said: dict[str, Any] = {"blocks": len(blocks)}
    for kind, names in found.layers.items():
        some = f" [{_spans(names)}]" if names and len(names) < len(blocks) else ""
        said[kind] = " ".join(_templates(names)) + some if names else None
    return said


LIST = Path(__file__).with_name("families.json")


def listed(mapping: str = "causal") -> dict[str, Any]:
    "The families that build, and the parts of their blocks, as committed."
    return json.loads(LIST.read_text())[mapping] if LIST.exists() else {}


def write_list() -> None:
    "Write the list anew. Read the difference before you commit it."
    from steering_vectors import find_layers

    causal = {name: describe(find_layers(build(name))) for name in sorted(CAUSAL) if name not in CANNOT}
    skip = {*CANNOT_IMAGE, *AMBIGUOUS}
    image = {n: describe(find_layers(build(n, IMAGE_TEXT))) for n in sorted(IMAGE_TEXT) if n not in skip}
    LIST.write_text(json.dumps({"causal": causal, "image_text": image}, indent=1) + "\n")


if __name__ == "__main__":
    write_list()
