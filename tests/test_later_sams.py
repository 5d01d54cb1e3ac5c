"""SAM 2 and 3 by transformers: tiny networks of its own classes, saved and loaded as theirs are, called by hand."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_rle
from segment_anything.utils.amg import build_point_grid

from tests.test_mask_generator import assert_partners
from tests.test_refine_sam import project, proposals_folder, run  # noqa: F401
from tools.errors import UserError
from tools.files import load_mask
from tools.proposals.generator import MaskOptions, View
from tools.proposals.later_sams import LaterMaskGenerator, load_later_sam

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
HEADS = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
KEPT = {"pred_iou_thresh": 0.05, "stability_score_thresh": 0.5, "box_nms_thresh": 0.995}


def sam2_configs() -> dict:
    sizes = {"embed_dim_per_stage": [12, 24, 48, 96], "num_attention_heads_per_stage": [1, 2, 4, 8]}
    blocks = {"blocks_per_stage": [1, 1, 2, 1], "window_size_per_stage": [4] * 4, "global_attention_blocks": [3]}
    trunk = transformers.Sam2HieraDetConfig(hidden_size=12, image_size=[128, 128], **sizes, **blocks)
    vision = transformers.Sam2VisionConfig(
        backbone_config=trunk,
        backbone_channel_list=sizes["embed_dim_per_stage"][::-1],
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        fpn_hidden_size=32,
    )
    prompts = transformers.Sam2PromptEncoderConfig(hidden_size=32, image_size=128, patch_size=16, mask_input_channels=4)
    decoder = transformers.Sam2MaskDecoderConfig(**HEADS)
    return {"vision_config": vision, "prompt_encoder_config": prompts, "mask_decoder_config": decoder}


def tiny_sam2():
    processor = transformers.Sam2ImageProcessor(size={"height": 128, "width": 128})
    return transformers.Sam2Model(transformers.Sam2Config(**sam2_configs())), processor


def tiny_sam3():
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    places = {"image_size": 112, "pretrain_image_size": 112, "patch_size": 14}
    trunk = transformers.Sam3ViTConfig(**sizes, **places, window_size=4, global_attn_indexes=[1])
    vision = transformers.Sam3VisionConfig(
        backbone_config=trunk, fpn_hidden_size=32, backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]]
    )
    module = transformers.models.sam3_tracker.configuration_sam3_tracker
    prompts = module.Sam3TrackerPromptEncoderConfig(
        hidden_size=32, image_size=112, patch_size=14, mask_input_channels=4
    )
    decoder = module.Sam3TrackerMaskDecoderConfig(**HEADS)
    configs = {"vision_config": vision, "prompt_encoder_config": prompts, "mask_decoder_config": decoder}
    size = {"size": {"height": 112, "width": 112}}
    return transformers.Sam3TrackerModel(transformers.Sam3TrackerConfig(**configs)), transformers.Sam3ImageProcessor(
        **size
    )


@pytest.fixture(scope="module", params=["sam2", "sam3"])
def saved(request, tmp_path_factory):
    """The family, and a folder of random weights, larger than initial ones: masks then depend on prompts."""
    torch.manual_seed(0)
    model, processor = {"sam2": tiny_sam2, "sam3": tiny_sam3}[request.param]()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 12
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return request.param, folder


@pytest.fixture(scope="module")
def network(saved):
    family, folder = saved
    return load_later_sam(str(folder), family, CPU)


def picture(height: int, width: int) -> np.ndarray:
    blocks = np.random.default_rng(0).integers(0, 255, (height // 10, width // 10, 3))
    return np.kron(blocks, np.ones((10, 10, 1))).astype(np.uint8)


def by_hand(model, processor, image, side: int) -> list[dict]:
    """Every prompt by itself, its masks enlarged, and the two filters."""
    height, width = image.shape[:2]
    inputs = processor(images=image, return_tensors="pt")["pixel_values"]
    masks = []
    for x, y in build_point_grid(side).tolist():
        point = torch.tensor([x, y]) * processor.size["height"]
        prompt = {"input_points": point[None, None, None], "input_labels": torch.ones(1, 1, 1).int()}
        with torch.inference_mode():
            output = model(pixel_values=inputs, **prompt)
        logits = F.interpolate(output.pred_masks[0], (height, width), mode="bilinear")[0]
        stability = (logits > 1).sum(dim=(1, 2)) / (logits > -1).sum(dim=(1, 2))
        kept = (output.iou_scores[0, 0] > KEPT["pred_iou_thresh"]) & (stability >= KEPT["stability_score_thresh"])
        masks += (logits[kept] > 0).numpy().astype(np.uint8).tolist()
    return [coco_rle.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]


@pytest.mark.parametrize("shape", [(60, 80), (120, 40)])
def test_its_masks_are_those_of_the_network_called_by_hand(network, shape):
    image = picture(*shape)
    options = MaskOptions(points_per_side=5, **KEPT | {"box_nms_thresh": 1.0})
    (found,) = LaterMaskGenerator(*network, options, points_per_batch=7)([image])
    assert 5 < len(found) < 75
    assert_partners(found, by_hand(*network, image, side=5))


def test_its_masks_are_those_of_the_pipeline_on_a_square_image(saved, network):
    """Of other images the pipeline prompts a part only."""
    image = picture(60, 60)
    generate = transformers.pipeline("mask-generation", model=str(saved[1]), device=CPU)
    filters = {"crops_nms_thresh" if name == "box_nms_thresh" else name: value for name, value in KEPT.items()}
    stock = generate(Image.fromarray(image), points_per_crop=6, output_rle_mask=True, **filters)["rle_mask"]
    expected = [coco_rle.frPyObjects(rle, *rle["size"]) for rle in stock]
    assert_partners(LaterMaskGenerator(*network, MaskOptions(points_per_side=6, **KEPT))([image])[0], expected)


def test_of_a_crop_the_network_sees_its_pixels_alone(network):
    model, processor = network
    image, view = picture(60, 80), View(0, (60, 80), (10, 5, 50, 45))
    expected = processor(images=image[5:45, 10:50], return_tensors="pt")["pixel_values"][0]
    seen = LaterMaskGenerator(model, processor, MaskOptions())._resize(image, view)
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("options", [{"crop_n_layers": 1}, {"pred_iou_thresh": 9.0}, {"min_mask_region_area": 40}])
def test_crops_small_regions_several_images_and_half_precision(network, options):
    """Crops: a mask that the half of an image gives lies in that half."""
    images = [picture(60, 80), picture(50, 40), picture(40, 40)]
    options = MaskOptions(points_per_side=4, **{**KEPT, **options})
    one_by_one = [LaterMaskGenerator(*network, options)([image])[0] for image in images]
    together = LaterMaskGenerator(*network, options, images_per_batch=2)(images)
    for found, expected, image in zip(together, one_by_one, images, strict=True):
        assert_partners(found, expected)
        assert all(tuple(rle["size"]) == image.shape[:2] for rle in found)
    assert bool(together[0]) == (options.pred_iou_thresh < 1)
    half = LaterMaskGenerator(*network, options, dtype=torch.bfloat16)(images[:1])[0]
    assert len(together[0]) / 2 <= len(half) <= 2 * len(together[0])


def test_from_the_command_line(saved, project, capsys):  # noqa: F811
    family, folder = saved
    filters = ["--pred-iou-thresh", "0", "--stability-score-thresh", "0", "--points-per-side", "2", "--device", "cpu"]
    run("--proposals", family, "--checkpoint", str(folder), *filters)
    assert "Apache-2.0" in (text := capsys.readouterr().out) or "SAM License" in text
    assert load_mask(f"experiments/predictions/t@train/sam-{family}-max_iou_imp2/a.png").shape == (96, 96)
    made_by = json.loads((proposals_folder(family) / "settings.json").read_text())
    assert made_by["files"]["checkpoint"]["file"] == str(folder / "model.safetensors")


def test_mistakes_are_one_line(saved, tmp_path, monkeypatch):
    family, folder = saved
    other = {"sam2": "sam3", "sam3": "sam2"}[family]
    with pytest.raises(UserError, match=f"a network of kind {family}.*Pass one of {other}"):
        load_later_sam(str(folder), other, CPU)
    with pytest.raises(UserError, match="not to be loaded by transformers") as error:
        load_later_sam(str(tmp_path), family, CPU)
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="Run: pip install transformers"):
        load_later_sam(str(folder), family, CPU)


def test_weights_of_a_part_of_the_network_are_refused(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    family, folder = saved
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "iou_prediction_head" not in k}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(UserError, match="not the weights of all of its network"):
        load_later_sam(str(tmp_path), family, CPU)


def test_of_the_video_network_that_the_hub_has_the_part_for_images_is_loaded(tmp_path):
    small = ("memory_attention_hidden_size", "memory_attention_feed_forward_hidden_size", "memory_encoder_hidden_size")
    small += ("mask_downsampler_embed_dim", "memory_fuser_embed_dim", "memory_fuser_intermediate_dim")
    configs = {name: config.to_dict() for name, config in sam2_configs().items()}
    video = transformers.Sam2VideoModel(transformers.Sam2VideoConfig(**configs, **dict.fromkeys(small, 32)))
    video.save_pretrained(tmp_path)
    tiny_sam2()[1].save_pretrained(tmp_path)
    model, _ = load_later_sam(str(tmp_path), "sam2", CPU)
    assert isinstance(model, transformers.Sam2Model)
    expected = video.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
