"""Speed and memory of `tools.proposals.generator` against SamAutomaticMaskGenerator, same model and images in one run.

    python -m benchmarks.sam                                                     # CPU, a tiny network: under a minute
    python -m benchmarks.sam --device cuda --num_images 32 --checkpoint sam_vit_h_4b8939.pth --images photographs/
    python -m benchmarks.sam --device cuda --num_images 32 --model_type vit_h    # without weights: random ones
    python -m benchmarks.sam --model_type vit_h --count                          # operations and bytes, on any machine

A row per generator: images per second, peak memory (of the GPU; on a CPU that of the process so far, so the stock
generator comes last), masks per image, and how well they agree with the stock generator's: the share of masks that have
a partner with an IoU above .95 on the other side. The time is from the image in memory to its
RLEs. With random weights the networks' cost is real, and that of what follows depends on how many masks survive.
With --count nothing is run: what the networks would compute and move per image is counted.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_rle
from segment_anything import SamAutomaticMaskGenerator, sam_model_registry
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import ByteCounter, peak_memory
from tools import cli, devices, options
from tools.files import load_image
from tools.proposals import load_sam
from tools.proposals.generator import MaskGenerator, MaskOptions

SHARPENED_THRESHOLDS = {"pred_iou_thresh": 0.4, "stability_score_thresh": 0.3, "box_nms_thresh": 0.98}
"""What leaves tens of masks of an image, and drops others, when the weights are those of `sharpen`."""


def make_parser() -> cli.Parser:
    """The command line of this benchmark."""
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    group.add_argument("--checkpoint", type=Path, help="SAM's public weights; without them, random ones")
    group.add_argument(
        "--model_type", choices=["tiny", *options.SAM_TYPES], help="default: tiny, or vit_h with a checkpoint"
    )
    group.add_argument("--images", type=Path, help="folder of photographs (.jpg); synthetic 375x500 images without it")
    group.add_argument("--num_images", type=cli.positive_int, default=2, help="images")
    group.add_argument("--points_per_side", type=cli.positive_int, help="prompts per side (default: 32; tiny: 20)")
    group.add_argument(
        "--points_per_batch", type=cli.positive_int, default=128, help="ours; the stock generator has 64"
    )
    group.add_argument("--images_per_batch", type=cli.positive_int, default=2, help="ours; the stock generator has 1")
    group.add_argument(
        "--mixed_precision",
        choices=["auto", "bf16", "fp16", "off"],
        default="auto",
        help="auto: bf16 on GPUs, else off",
    )
    cli.add_switch(group, "--compile", False, "also time ours with compiled networks")
    cli.add_switch(group, "--count", False, "only count operations and bytes of the networks per image")
    return parser


def main(args: argparse.Namespace) -> None:
    """Time both generators on the same images."""
    args.model_type = args.model_type or ("vit_h" if args.checkpoint else "tiny")
    args.points_per_side = args.points_per_side or (20 if args.model_type == "tiny" else 32)
    if args.count:
        print_count(args)
        return
    device = devices.select_device(args.device)
    model, images = build_model(args, device), load_images(args)
    generators = build_generators(args, model, devices.autocast_dtype(args.mixed_precision, device))
    print(f"{args.device}, {len(images)} images, up to {args.images_per_batch} at a time")
    rows = {name: measure(generate, images, args.images_per_batch, device) for name, generate in generators.items()}
    print(f"{'':<16} {'images/s':>9} {'peak GB':>8} {'masks':>7} {'agree':>7}")
    for name, (rate, memory, masks) in rows.items():
        count, agree = np.mean([len(found) for found in masks]), agreement(masks, rows["stock"][2])
        print(f"{name:<16} {rate:9.3f} {memory / 1e9:8.2f} {count:7.1f} {agree:7.3f}")


def build_generators(args: argparse.Namespace, model: Sam, dtype: torch.dtype | None) -> dict[str, Callable]:
    """The rows of the table: functions from images to the RLEs of each."""
    options = {"points_per_side": args.points_per_side}
    options |= {} if args.checkpoint else SHARPENED_THRESHOLDS
    batches = {"points_per_batch": args.points_per_batch, "images_per_batch": args.images_per_batch}
    ours = functools.partial(MaskGenerator, model, MaskOptions(**options), **batches)
    generators: dict[str, Callable] = {"ours, float32": ours()}
    if dtype:
        generators[f"ours, {dtype}".replace("torch.", "")] = ours(dtype=dtype)
    if args.compile:
        generators["ours, compiled"] = ours(dtype=dtype, compile=True)
    stock = SamAutomaticMaskGenerator(model, output_mode="coco_rle", **options)
    return generators | {"stock": functools.partial(run_stock, stock)}


def print_count(args: argparse.Namespace) -> None:
    """Print what the networks of both generators compute and move per image, counted on tensors without memory."""
    prompts = args.points_per_side**2
    with torch.device("meta"):
        model = BUILDERS[args.model_type]().eval().requires_grad_(False)
        image = torch.empty(1, 3, model.image_encoder.img_size, model.image_encoder.img_size)
        tokens = torch.empty(prompts, 2, model.prompt_encoder.embed_dim)
    generator = MaskGenerator(model, MaskOptions())
    embedding = model.image_encoder(image)
    dense = model.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(prompts, *embedding.shape[1:])
    parts = {
        "encoder, both": lambda: model.image_encoder(image),
        "decoder, ours": lambda: generator.predict(embedding, tokens),
        "decoder, stock": lambda: model.mask_decoder.predict_masks(
            embedding, model.prompt_encoder.get_dense_pe(), tokens, dense
        ),
    }
    print(f"{args.model_type}, {image.shape[-1]} pixels, {prompts} prompts; GB in float32, half in bf16")
    for name, part in parts.items():
        counter, sizes = FlopCounterMode(display=False), ByteCounter()
        with torch.inference_mode(), counter, sizes:
            part()
        print(f"{name:<16} {counter.get_total_flops() / 1e12:9.3g} TFLOP {sizes.total / 1e9:9.3g} GB")


def run_stock(generator: SamAutomaticMaskGenerator, images: list[np.ndarray]) -> list[list[dict]]:
    """The RLEs of some images, one image after the other."""
    return [[record["segmentation"] for record in generator.generate(image)] for image in images]


def measure(
    generate: Callable, images: list[np.ndarray], batch: int, device: torch.device
) -> tuple[float, int, list[list[dict]]]:
    """Images per second, peak memory in bytes, and the masks."""
    generate(images[:batch])  # kernels are chosen and compiled, memory is reserved
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    masks = [found for index in range(0, len(images), batch) for found in generate(images[index : index + batch])]
    rate = len(images) / (time.perf_counter() - start)  # masks come as text: the device has finished
    return rate, peak_memory(device), masks


def agreement(found: list[list[dict]], expected: list[list[dict]]) -> float:
    """The share of masks, of both sides together, that have a partner with an IoU above .95 on the other side."""
    matched = total = 0
    for ours, theirs in zip(found, expected, strict=True):
        total += len(ours) + len(theirs)
        if ours and theirs:
            iou = coco_rle.iou(ours, theirs, [0] * len(theirs))
            matched += (iou.max(axis=0) > 0.95).sum() + (iou.max(axis=1) > 0.95).sum()
    return matched / max(total, 1)


def build_model(args: argparse.Namespace, device: torch.device) -> Sam:
    """The network that the flags name, on its device."""
    if args.checkpoint:
        return load_sam(args.checkpoint, args.model_type, device)
    torch.manual_seed(0)
    return sharpen(BUILDERS[args.model_type]()).to(device).eval()


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


BUILDERS = {"tiny": build_tiny_sam, **sam_model_registry}
"""Networks with random weights, by `--model_type`."""


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


def load_images(args: argparse.Namespace) -> list[np.ndarray]:
    """The images to segment, uint8 RGB HxWx3."""
    if args.images:
        return [load_image(path) for path in sorted(args.images.glob("*.jpg"))[: args.num_images]]
    return [synthetic_image(seed, 375, 500) for seed in range(args.num_images)]


def synthetic_image(seed: int, height: int, width: int) -> np.ndarray:
    """Soft spots of colour, uint8 RGB HxWx3."""
    coarse = np.random.default_rng(seed).random((6, 8, 3)).astype(np.float32)
    return (255 * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)).clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
