"""Tiny transformers and diffusers models from configs, the same weights at every call."""

from __future__ import annotations

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)


def llama() -> PreTrainedModel:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def clip() -> PreTrainedModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    return CLIPTextModel(config).eval()


def unet() -> UNet2DConditionModel:
    torch.manual_seed(1)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=32,
        attention_head_dim=2,
    )
    return model.eval()


def denoise(model: UNet2DConditionModel) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 8, 8, generator=rng)
    states = torch.randn(2, 4, 32, generator=rng)
    return model(x, torch.tensor([3, 500]), encoder_hidden_states=states).sample


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(seed))
