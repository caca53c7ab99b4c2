"""How a configuration is made tiny: a table of sizes by attribute name, and what single models need beside it.

Sizes are caps: an attribute that is smaller by default stays what it is. Token ids from `SPECIAL` on are special; the
inputs of `tests.zoo.tiny` draw from ids 8 to `SPECIAL` - 1.
"""

from types import EllipsisType

VOCAB, SPECIAL = 64, 48
MAX_LAYERS = 4

_NAMES: dict[int, str] = {
    VOCAB: "char_vocab_size decoder_vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input "
    "audio_vocab_size mamba_d_ssm max_pos_emb rel_extent n_positions num_position_embeddings "
    "t2u_max_position_embeddings max_encoder_position_embeddings max_decoder_position_embeddings",
    # What the model is wide.
    32: "hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim input_embedding_size "
    "lru_width output_embedding_size cross_hidden_size hidden_size_global encoder_hidden_size hidden_dim "
    "backbone_hidden_size cross_attention_hidden_size attention_hidden_size projector_hidden_size "
    "audio_hidden_size adapter_in_dim adapter_input_size adapter_out_dim out_hidden_size output_dim "
    "vision_output_dim projector_input_dim projector_output_dim output_channels input_size ple_embed_dim "
    "pronunciation_embed_dim shape_embed_dim upsample_groups max_source_positions output_hidden_size "
    "ext_pw_out_channel nemo_conv_channels depthwise_separable_out_channel conv_channels prompt_mid_dim "
    "router_hidden_size unit_embed_dim",
    # What its MLPs are wide.
    48: "intermediate_size ffn_dim d_ff d_inner dff dim_ff n_inner decoder_ffn_dim encoder_ffn_dim "
    "ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size feed_forward_size "
    "moe_shared_expert_intermediate_size dense_intermediate_size expert_ffn_hidden_size intermediate_size_mlp "
    "shared_intermediate_size mlp_dim shared_experts_intermediate_size prefix_dense_intermediate_size "
    "speech_encoder_intermediate_size t2u_decoder_ffn_dim t2u_encoder_ffn_dim",
    16: "relative_attention_max_distance position_bias_max_distance relative_max_distance conv_dim q_lora_rank "
    "kv_lora_rank o_lora_rank hc_lowrank qk_head_dim index_head_dim indexer_head_dim num_mel_bins "
    "input_feat_per_channel feature_projection_input_dim input_dim image_size input_feat_size codebook_size "
    "hidden_size_per_layer_input prompt_length prompt_types segment_types position_bias_num_buckets "
    "dim_model_base relative_attention_num_buckets num_buckets laurel_rank gated_norm_rank adapter_rank "
    "subsampling_conv_channels speech_decoder_prenet_units speech_decoder_postnet_units "
    "downsample_hidden_size num_centroids codevector_dim proj_codevector_dim classifier_proj_size "
    "feature_size encoder_max_relative_position moe_latent_size",
    8: "query_pre_attn_scalar head_dim d_kv d_head attention_head_size qk_nope_head_dim qk_rope_head_dim "
    "v_head_dim linear_key_head_dim linear_value_head_dim swa_head_dim kv_channels dim_head linear_head_dim "
    "mamba_d_head mamba_head_dim mamba_headdim cross_head_dim state_size ssm_state_size mamba_d_state "
    "mamba_n_heads mamba_num_heads n_mamba_heads codebook_dim patch_size spkr_embed_dim lang_embed_dim "
    "speaker_embedding_dim num_conv_pos_embeddings d_rel altup_rank vector_quantization_hidden_dimension "
    "index_block_size max_num_tiles base_channels centroid_intermediate_top_k encoder_hash_byte_group_vocab "
    "num_codevectors_per_group upsample_initial_channel",
    # Windows, chunks and floors are shorter than the texts.
    5: "floor_scale log_scaling_n_floor sliding_window sliding_window_size attention_window_size "
    "attention_chunk_size local_attention keep_window_size local_attention_window_len window_size index_topk "
    "chunk_size mamba_chunk_size context_size conv_depthwise_kernel_size fsmn_kernel_size",
    4: "block_size num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
    "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
    "decoder_num_attention_heads encoder_num_attention_heads cross_num_attention_heads "
    "swa_num_attention_heads speech_encoder_attention_heads t2u_decoder_attention_heads "
    "t2u_encoder_attention_heads index_n_heads linear_num_heads linear_num_value_heads "
    "conf_num_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts rotary_dim "
    "time_step_rank mamba_dt_rank attention_window num_filters num_conv_pos_embedding_groups "
    "num_attention_heads_per_layer block_multiple_of num_global_tokens local_attn_chunk_length "
    "lsh_attn_chunk_length",
    2: "num_key_value_heads num_kv_heads kv_n_heads cross_num_key_value_heads swa_num_key_value_heads "
    "linear_num_key_heads decoder_num_key_value_heads encoder_num_key_value_heads num_query_groups "
    "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k top_k_experts n_group "
    "num_expert_group n_groups zero_expert_num index_topk_blocks attn_layer_period decoder_sparse_step "
    "encoder_sparse_step local_radius num_hidden_layers n_layer n_layers num_layers decoder_layers "
    "encoder_layers num_encoder_layers num_decoder_layers decoder_num_hidden_layers encoder_num_hidden_layers "
    "conf_num_hidden_layers num_blocks depth num_layers_per_stack speech_encoder_layers t2u_decoder_layers "
    "t2u_encoder_layers num_global_layers num_codebooks num_quantizers num_sparse_encoder_layers "
    "num_sparse_decoder_layers global_block_size heads_per_ngram",
    1: "depths topk_group n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace "
    "num_dense_layers max_window_layers num_kv_shared_layers attn_layer_offset moe_layer_end_index "
    "num_timestamp_prediction_layers speech_decoder_postnet_layers num_residual_layers num_lstm_layers "
    "num_res_blocks prefix_dense_sliding_window_pattern",
}  # fmt: skip

CAPS: dict[str, int] = {name: cap for cap, names in _NAMES.items() for name in names.split()}

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
LAYER_LISTS = ("layers_block_type", "layer_types")
"""Names of the number of layers, which lists with one entry per layer have as their length, and of two such lists."""

EQUAL: dict[str, str] = {
    "num_key_value_heads": "num_attention_heads",
    "num_kv_heads": "num_attention_heads",
    "swa_num_key_value_heads": "swa_num_attention_heads",
    "cross_num_key_value_heads": "cross_num_attention_heads",
    "decoder_num_key_value_heads": "decoder_num_attention_heads",
    "encoder_num_key_value_heads": "encoder_num_attention_heads",
    "linear_num_key_heads": "linear_num_value_heads",
}
"""What equals another size by default, so that it has to be its equal when tiny."""

DERIVED = frozenset({"moe_layers", "full_attn_idxs", "qk_head_dim"})
"""Fields that a configuration fills in itself where they are not given."""

Value = int | float | str | bool | None | list["Value"] | dict[str, "Value"] | EllipsisType

GIVEN: dict[str, Value] = {"head_dim": 8, "num_key_value_heads": 2, "num_experts_per_tok": 2, "n_routed_experts": 4}
"""Fields without a default that some models cannot do without."""

_ASSISTED: dict[str, Value] = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
STARTS: dict[str, dict[str, Value]] = {
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **_ASSISTED}},
}
"""By model type, what its default configuration is not valid without."""

_GLOBAL_HEADS: dict[str, Value] = {"global_head_dim": 16}
_QSA: dict[str, Value] = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 16,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
    "eos_token_id": 2,
}
_SWA: dict[str, Value] = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}

_ROPE: dict[str, Value] = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}

EXCEPTIONS: dict[str, dict[str, Value]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx.attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8.0},
    "dory": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
    },
    "dots1": {"n_shared_experts": 1, "layer_types": ["sliding_attention", "full_attention"]},
    "dots3_note_text": _SWA | {"head_dim": 16},
    "fun_asr_nano.adaptor_config": {"intermediate_size": 8},
    "gemma4_text": _GLOBAL_HEADS,
    "gemma4_assistant.text_config": {"num_kv_shared_layers": 2},
    "gemma4_unified_text": _GLOBAL_HEADS,
    "gemma4_unified_assistant.text_config": {"num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "attention_layers": ...},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "laguna": {"layer_types": ["sliding_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": ["sliding_attention", "full_attention"]},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "qwen4_exp_text": _QSA,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": 2,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": ...,
        "attention_head_dim": ...,
    },
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 5},
}
"""By model type, or `model type.field` of the one that holds it, fields as they are to be; `...`: left to the class."""

IDS: dict[str, tuple[int, tuple[int, ...]]] = {
    "dia": (1, (9,)),
    "kyutai_speech_to_text": (1, (3,)),
    "musicgen_decoder": (2, ()),
    "musicgen_melody_decoder": (2, ()),
}
"""By model type, where ids are not ``[batch, rows]``: how many texts a sequence has, and the axes of one row."""

FEATURES: dict[str, tuple[int, ...]] = {
    "canary": (40, 16),
    "cohere_asr": (40, 16),
    "moonshine": (2000,),
    "moonshine_streaming": (800,),
    "seamless_m4t": (24, 16),
    "seamless_m4t_v2": (24, 16),
    "speech-encoder-decoder": (3000,),
    "speech_to_text": (32, 16),
    "speecht5": (3000,),
    "voxtral_realtime": (16, -8),
    "whisper": (16, 64),
}
"""By model type, the axes of what an encoder hears, without the batch; a negative one grows with the text, by row."""

ENCODED_BY: dict[str, int] = {"led": 8}
"""By model type, how many tokens an encoder reads where it warns of any other number."""

MASKED = ("fsmt",)
"""Model types that look for padding in the tokens, which splits the graph, unless they are told where it is."""

NUMBERS: dict[str, dict[str, int]] = {"voxtral_realtime": {"num_delay_tokens": 2}}
"""By model type, arguments without which it warns that it guesses them."""
