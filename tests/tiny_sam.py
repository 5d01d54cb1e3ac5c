"""Segment Anything without its weights: a network far too small to be of use, and random weights that give masks."""

from __future__ import annotations

import functools

import cv2
import numpy as np
import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

SHARPENED_THRESHOLDS = {"pred_iou_thresh": 0.4, "stability_score_thresh": 0.3, "box_nms_thresh": 0.98}
"""With the weights of `sharpen`, these keep tens of masks per image and drop others."""


def build_tiny_sam(checkpoint: None = None) -> Sam:
    """SAM's own architecture, far too small to be of use: 128-pixel input, two encoder blocks, random weights.

    Args:
        checkpoint: as the builders of `segment_anything.sam_model_registry` have it.
    """
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=128,
        patch_size=16,
        embed_dim=32,
        depth=2,
        num_heads=2,
        out_chans=32,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
    )
    prompts = PromptEncoder(embed_dim=32, image_embedding_size=(8, 8), input_image_size=(128, 128), mask_in_chans=4)
    transformer = TwoWayTransformer(depth=2, embedding_dim=32, num_heads=2, mlp_dim=32)
    decoder = MaskDecoder(transformer_dim=32, transformer=transformer, iou_head_depth=2, iou_head_hidden_dim=16)
    return Sam(encoder, prompts, decoder).eval()


@torch.no_grad()
def sharpen(model: Sam) -> Sam:
    """Scale random weights, in place, so that different prompts give different masks and tens of them survive.

    Attention between prompts and pixels follows their places (equal projections of both), the decoder's own tokens are
    weak beside the prompts', masks are smooth and steep, and predicted IoUs are around one half.
    """
    decoder = model.mask_decoder
    attentions = [decoder.transformer.final_attn_token_to_image]
    for layer in decoder.transformer.layers:
        attentions += [layer.cross_attn_image_to_token, layer.cross_attn_token_to_image]
    for attention in attentions:
        attention.q_proj.weight *= 6
        attention.k_proj.weight.copy_(attention.q_proj.weight)
    tokens = [decoder.iou_token, decoder.mask_tokens, model.prompt_encoder.not_a_point_embed]
    for token in (*tokens, *model.prompt_encoder.point_embeddings):
        token.weight *= 0.3
    model.image_encoder.pos_embed.normal_()
    for layer in (decoder.output_upscaling[0], decoder.output_upscaling[3]):
        layer.weight.copy_(layer.weight[:, :, :1, :1].expand_as(layer.weight))
    for head in decoder.output_hypernetworks_mlps:
        head.layers[-1].weight *= 1000
        head.layers[-1].bias *= 1000
    decoder.iou_prediction_head.layers[-1].bias += 0.5
    return model


def synthetic_image(seed: int, height: int, width: int) -> np.ndarray:
    """Soft spots of colour, uint8 RGB HxWx3."""
    coarse = np.random.default_rng(seed).random((6, 8, 3)).astype(np.float32)
    return (255 * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)).clip(0, 255).astype(np.uint8)
