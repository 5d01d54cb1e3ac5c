"""One-line faults that a test must notice: each would give a wrong number without a word.

    python tests/faults.py           # all of them, minutes
    python tests/faults.py 3 7       # these

Each fault is put into a copy of the repository, and its test is run there; it must fail. Exit code 1 if one passes.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAILED = 1
"""Exit code of pytest where a test fails; others mean that it could not run."""


LIBRARIES = (
    "timm",
    "torchvision.transforms.v2",
    "torch.utils.tensorboard",
    "segment_anything",
    "skimage.filters",
    "cv2",
)
"""Loaded once, not with each test."""


class Fault(NamedTuple):
    """`old`, which occurs once in `file`, becomes `new`; then `test` (file::name, below tests/) must fail."""

    what: str
    file: str
    old: str
    new: str
    test: str


FAULTS = (
    # -- once found to pass all tests --------------------------------------------------------------------------------
    Fault(
        "DeepLabV3+ is trained on photographs that are not normalised",
        "train_segmentation.py",
        'images = normalize(batch["image"].to(device, non_blocking=True))',
        'images = batch["image"].to(device, non_blocking=True).float()',
        "test_joints.py::test_a_training_step_is_the_smoothed_cross_entropy_on_normalised_photographs",
    ),
    Fault(
        "its predictions are not refined by the dense CRF",
        "train_segmentation.py",
        "    if not how.crf.iterations and not reading:\n",
        "    if not reading:\n",
        "test_joints.py::test_a_prediction_is_refined_as_the_golden_segmentations",
    ),
    Fault(
        "its predictions are refined with the settings of CAMs",
        "train_segmentation.py",
        "unary_from_probabilities(before), SEGMENTATION_SETTINGS",
        "unary_from_probabilities(before), CAM_SETTINGS",
        "test_joints.py::test_a_prediction_is_refined_as_the_golden_segmentations",
    ),
    Fault(
        "images are not scaled at random",
        "datasets/transforms.py",
        "scale = _uniform(self.low, self.high) * fit(height, width, self.long_side)",
        "scale = fit(height, width, self.long_side)",
        "test_joints.py::test_geometry_of_the_two_halves",
    ),
    Fault(
        "inference.py ignores --threshold",
        "inference.py",
        "return cam_labels(maps, self.outputs.threshold)",
        "return cam_labels(maps, options.PSEUDO_MASK_THRESHOLD)",
        "test_joints.py::test_pseudo_masks_are_cut_at_the_threshold",
    ),
    Fault(
        "pseudo masks are not refined by the dense CRF",
        "inference.py",
        "if not crf.iterations or len(keys) == 1:",
        "if True:",
        "test_joints.py::test_pseudo_masks_are_refined_as_the_golden_labels",
    ),
    Fault(
        "maps of the segmentation branch are sigmoids",
        "inference.py",
        "maps = logits[:, keys].softmax(dim=1)",
        "maps = logits[:, keys].sigmoid()",
        "test_joints.py::test_maps_of_the_segmentation_branch_pixel_by_pixel",
    ),
    Fault(
        "CSRM's labeled half is neither scaled nor mirrored",
        "train_csrm.py",
        "geometries = (train_geometry(*options.image_sizes(args)), ",
        "geometries = (crop_geometry(args.image_size, args.min_image_size), ",
        "test_joints.py::test_geometry_of_the_two_halves",
    ),
    Fault(
        "the losses get the image labels from before mixing",
        "train_csrm.py",
        "targets = Targets(image_labels, ",
        "targets = Targets(batch.image_labels, ",
        "test_joints.py::test_the_losses_get_the_image_labels_after_mixing",
    ),
    Fault(
        "--augment colorjitter changes nothing",
        "train_classifier.py",
        'if "colorjitter" in names:',
        'if "colorjitter " in names:',
        "test_joints.py::test_colour_jitter_changes_colours_and_only_on_request",
    ),
    Fault(
        "long photographs of the unlabeled half are not reduced",
        "datasets/transforms.py",
        "RandomScale(1, 1, (min_size, size))",
        "RandomScale(1, 1, (min_size, math.inf))",
        "test_joints.py::test_geometry_of_the_two_halves",
    ),
    Fault(
        "P-NOC's ordinary classifier starts its schedule again on resume",
        "tools/optim.py",
        '"optimizer": self.optimizer, "schedule": self.schedule, ',
        '"optimizer": self.optimizer, ',
        "test_joints.py::test_the_ordinary_classifier_of_pnoc_goes_on_at_its_learning_rate",
    ),
    Fault(
        "chunked losses take no account of the channels",
        "tools/losses.py",
        "CHUNK_VALUES // (channels * size[0] * size[1])",
        "CHUNK_VALUES // (size[0] * size[1])",
        "test_joints.py::test_chunks_are_of_as_many_values_as_allowed",
    ),
    Fault(
        "SAM's boxes are not moved back before the NMS across crops",
        "tools/proposals/generator.py",
        "uncrop_boxes_xyxy(boxes, view.box)",
        "boxes",
        "test_mask_generator.py::test_boxes_of_a_crop_lie_in_the_image",
    ),
    Fault(
        "a byte order mark in labels.csv is read as a part of the header",
        "tools/files.py",
        'else "utf-8-sig")',
        'else "utf-8")',
        "test_joints.py::test_labels_of_windows",
    ),
    Fault(
        "training images are never mirrored",
        "datasets/transforms.py",
        "        v2.RandomHorizontalFlip(0.5),\n",
        "",
        "test_joints.py::test_geometry_of_the_two_halves",
    ),
    # -- joints of CSRM ----------------------------------------------------------------------------------------------
    Fault(
        "the unlabeled half sees the first epoch again and again",
        "train_csrm.py",
        "unlabeled.set_epoch(epoch, trainer.batch)",
        "unlabeled.set_epoch(0, trainer.batch)",
        "test_joints.py::test_batches_of_csrm",
    ),
    Fault(
        "both halves have one order and one augmentation",
        "train_csrm.py",
        '"seed": 2 * args.seed + half',
        '"seed": args.seed',
        "test_joints.py::test_batches_of_csrm",
    ),
    Fault(
        "the labeled half keeps its colours",
        "train_csrm.py",
        "augment = PhotometricAugmentation()",
        "augment = nn.Identity()",
        "test_joints.py::test_batches_of_csrm",
    ),
    Fault(
        "with --c2s_labels the dataset's own masks are learnt",
        "train_csrm.py",
        "build_loaders(learnt, args)",
        "build_loaders(source, args)",
        "test_joints.py::test_batches_of_csrm",
    ),
    Fault(
        "the two thresholds on CAMs change places",
        "train_csrm.py",
        'return thresholds["bg"], thresholds["fg"]',
        'return thresholds["fg"], thresholds["bg"]',
        "test_seeds.py::test_a_computed_threshold_of_the_foreground_can_be_exceeded",
    ),
    Fault(
        "the student is validated, not the teacher",
        "train_csrm.py",
        "validate(teacher.module, ",
        "validate(student, ",
        "test_joints.py::test_options_of_csrm_and_its_teacher",
    ),
    Fault(
        "the teacher's decay counts the batches of the epoch",
        "train_csrm.py",
        "teacher_decay(epoch, trainer.updates, **warmup)",
        "teacher_decay(epoch, trainer.batch, **warmup)",
        "test_joints.py::test_options_of_csrm_and_its_teacher",
    ),
    Fault(
        "CAM labels ignore --crf_gt_prob",
        "train_csrm.py",
        "        gt_prob=options.crf.gt_prob,\n",
        "",
        "test_joints.py::test_cam_labels_follow_the_flags",
    ),
    Fault(
        "the teacher's average begins an epoch early",
        "train_csrm.py",
        "if epoch <= warmup_epochs:",
        "if epoch < warmup_epochs:",
        "test_train_csrm.py::test_the_teacher_copies_through_the_epoch_after_warm_up_then_averages",
    ),
    Fault(
        "L_u takes the uncertain pixels",
        "train_csrm.py",
        "labels.shape[-2:]), 100 - self.alpha(epoch))",
        "labels.shape[-2:]), self.alpha(epoch))",
        "test_train_csrm.py::test_losses_golden",
    ),
    Fault(
        "warm-up lasts an epoch longer",
        "train_csrm.py",
        "return epoch >= self.health.warmup_epochs(epoch)",
        "return epoch > self.health.warmup_epochs(epoch)",
        "test_train_csrm.py::test_losses_golden",
    ),
    Fault(
        "the student sees the images from before mixing",
        "train_csrm.py",
        "inputs = normalize(images)",
        "inputs = normalize(batch.images)",
        "test_joints.py::test_student_and_teacher_see_the_mixed_images",
    ),
    Fault(
        "the teacher's labels are those of the images from before mixing",
        "train_csrm.py",
        "teacher_labels(seg_logits, image_labels, ",
        'teacher_labels(teacher_out["seg_logits"], image_labels, ',
        "test_joints.py::test_student_and_teacher_see_the_mixed_images",
    ),
    Fault(
        "the teacher's uncertainty is that of the images from before mixing",
        "train_csrm.py",
        "teacher_out = teacher(inputs, ",
        "teacher_out = teacher(normalize(batch.images), ",
        "test_joints.py::test_student_and_teacher_see_the_mixed_images",
    ),
    Fault(
        "--restore is not read",
        "train_csrm.py",
        "    if args.restore:\n",
        "    if False:\n",
        "test_joints.py::test_a_training_starts_from_the_weights_of_restore",
    ),
    Fault(
        "classes of --restore are taken by place, not by name",
        "train_csrm.py",
        "restore(student, args.restore, classes)",
        "restore(student, args.restore)",
        "test_joints.py::test_a_training_starts_from_the_weights_of_restore",
    ),
    Fault(
        "CSRM goes on though the masks of --c2s_labels are others now",
        "train_csrm.py",
        'masks=labels.c2s_mode == "gt")',
        "masks=False)",
        "test_identity.py::test_a_run_of_csrm_is_its_masks_and_image_labels",
    ),
    Fault(
        "CSRM is validated on the masks it learns",
        "train_csrm.py",
        "validate(teacher.module, source, ",
        "validate(teacher.module, learnt, ",
        "test_joints.py::test_options_of_csrm_and_its_teacher",
    ),
    Fault(
        "L_s2c ignores --s2c_sigma",
        "train_csrm.py",
        "targets.confidence > self.options.s2c_sigma, IGNORE_INDEX)",
        "targets.confidence > 0.5, IGNORE_INDEX)",
        "test_train_csrm.py::test_smoothing_threshold_and_ranks_are_those_of_the_flags",
    ),
    Fault(
        "the ramp of L_s2c begins after one epoch, however long the warm-up",
        "train_csrm.py",
        "s2c_weight(epoch, options.max_epoch, warmup)",
        "s2c_weight(epoch, options.max_epoch)",
        "test_train_csrm.py::test_warm_up_has_two_losses_and_needs_no_teacher",
    ),
    Fault(
        "--c2s_mode mp ignores --c2s_sigma",
        "train_csrm.py",
        "labels, options.c2s_sigma, max_classes",
        "labels, max_classes",
        "test_joints.py::test_labels_against_the_background_follow_the_flag",
    ),
    Fault(
        "--augment cutmix is classmix",
        "train_csrm.py",
        'mix = classmix if labels.augment == "classmix" else cutmix',
        "mix = classmix",
        "test_train_csrm.py::test_every_source_of_labels_and_every_mix",
    ),
    Fault(
        "health compares logits from before mixing with labels from after it",
        "train_csrm.py",
        "criterion.observe(targets, class_logits, batch.image_labels)",
        "criterion.observe(targets, class_logits, image_labels)",
        "test_joints.py::test_the_losses_get_the_image_labels_after_mixing",
    ),
    Fault(
        "labels of CAM files ignore the flags of the dense CRF",
        "train_csrm.py",
        "thresholds=thresholds,\n            crf=options.crf(args)",
        "thresholds=thresholds,\n            crf=options.CRF()",
        "test_seeds.py::test_auto_thresholds_are_those_of_the_cam_files",
    ),
    # -- joints of the classifier ------------------------------------------------------------------------------------
    Fault(
        "the schedules of the CAM priors begin again with each epoch",
        "train_classifier.py",
        "progress = trainer.updates / trainer.max_updates",
        "progress = trainer.batch / trainer.max_updates",
        "test_joints.py::test_progress_and_average_of_a_classifier",
    ),
    Fault(
        "--ema is .99 whatever it says",
        "train_classifier.py",
        "ema_decay(trainer.updates, args.ema)",
        "ema_decay(trainer.updates)",
        "test_joints.py::test_progress_and_average_of_a_classifier",
    ),
    Fault(
        "each epoch sees the images of the first",
        "train_classifier.py",
        "loader.set_epoch(epoch, trainer.batch)",
        "loader.set_epoch(0, trainer.batch)",
        "test_joints.py::test_progress_and_average_of_a_classifier",
    ),
    Fault(
        "--sampler balanced draws images evenly",
        "train_classifier.py",
        'class_balance(dataset.labels) if args.sampler == "balanced" else None',
        "None",
        "test_joints.py::test_the_balanced_sampler_draws_classes_not_images",
    ),
    Fault(
        "mixup instead of cutmix",
        "train_classifier.py",
        '"cutmix": v2.CutMix',
        '"cutmix": v2.MixUp',
        "test_joints.py::test_cutmix_pastes_a_rectangle_and_mixup_blends",
    ),
    Fault(
        "all classes of an image are hidden at once",
        "train_classifier.py",
        "hidden=random_class(labels)",
        "hidden=labels",
        "test_joints.py::test_progress_and_average_of_a_classifier",
    ),
    Fault(
        "the ordinary classifier's classes are taken by place, not by name",
        "train_classifier.py",
        "restore(model, args.oc_weights, info.classes)",
        "restore(model, args.oc_weights)",
        "test_priors.py::test_what_may_change_in_the_ordinary_classifier",
    ),
    Fault(
        "the ordinary classifier of P-NOC steps with every batch",
        "train_classifier.py",
        "                if stepped:\n                    opponent",
        "                if True:\n                    opponent",
        "test_priors.py::test_the_opponent_of_pnoc_is_trained_but_for_its_batch_norm_and_stem",
    ),
    # -- joints of pseudo masks and proposals ------------------------------------------------------------------------
    Fault(
        "--threshold auto looks at the images of another split",
        "inference.py",
        "auto_threshold(cams_of, source.ids(args.domain)",
        "auto_threshold(cams_of, source.ids(source.domains()[0])",
        "test_joints.py::test_what_is_kept_of_an_inference_follows_the_flags",
    ),
    Fault(
        "pseudo masks are made from any map that lies there, also of another model",
        "inference.py",
        "if kind in self.outputs.wanted:",
        "if self.path(kind, image_id).exists():",
        "test_identity.py::test_pseudo_masks_are_not_made_of_another_models_maps",
    ),
    Fault(
        "pseudo masks differ by whether the maps that they are made of are written",
        "inference.py",
        "maps = maps.astype(np.float16)",
        "maps = maps.astype(np.float32)",
        "test_joints.py::test_pseudo_masks_are_the_same_whether_their_maps_are_written",
    ),
    Fault(
        "two computed thresholds mix in one folder",
        "inference.py",
        'pseudos["settings"]["threshold"] = outputs.threshold',
        'pseudos["settings"]["threshold"] = args.threshold',
        "test_identity.py::test_two_computed_thresholds_do_not_mix",
    ),
    Fault(
        "masks of the classes in another order are learnt",
        "datasets/__init__.py",
        "if masks_dir is not None:",
        "if masks_dir is None:",
        "test_identity.py::test_masks_and_maps_of_classes_in_another_order",
    ),
    Fault(
        "a file that no run has listed is taken",
        "tools/identity.py",
        "unlisted = made - _ids(stored)",
        "unlisted = set()",
        "test_identity.py::test_a_file_that_the_record_does_not_list_is_not_taken",
    ),
    Fault(
        "photographs without compression are compared by size",
        "tools/identity.py",
        "return _content(path) if path.suffix.lower() in UNCOMPRESSED else _size(path)",
        "return _size(path)",
        "test_identity.py::test_a_run_is_its_uncompressed_photographs",
    ),
    Fault(
        "masks of other image labels are learnt",
        "tools/identity.py",
        'for kind in ("photographs", "labels") if kind in inputs}',
        'for kind in ("photographs",) if kind in inputs}',
        "test_identity.py::test_masks_and_maps_of_other_photographs_or_labels_of_the_same_names",
    ),
    Fault(
        "what was made from a stage that was done anew is shown and scored",
        "tools/identity.py",
        'if _state(Path(place)) not in ("", before):',
        'if _state(Path(place)) == "":',
        "test_identity.py::test_what_was_made_from_a_stage_that_was_done_anew_is_named_and_left_off_the_page",
    ),
    Fault(
        "a model does not say what it was made of",
        "train_segmentation.py",
        "    identity.inherit(made_by, checkpoint)\n",
        "",
        "test_identity.py::test_what_was_made_from_a_stage_that_was_done_anew_is_named_and_left_off_the_page",
    ),
    Fault(
        "photographs are predicted at their full size, not at that of the training",
        "inference.py",
        'options.views(args, checkpoint["args"])',
        'options.views(args, {**checkpoint["args"], "image_size": 10**9})',
        "test_joints.py::test_what_is_kept_of_an_inference_follows_the_flags",
    ),
    Fault(
        "relabelling does not heed the image labels",
        "inference.py",
        "classes = label.nonzero().flatten()",
        "classes = torch.arange(len(label))",
        "test_joints.py::test_maps_of_the_segmentation_branch_pixel_by_pixel",
    ),
    Fault(
        "maps are read another way than they were trained",
        "inference.py",
        'return checkpoint["args"].get("teacher_labels", default)',
        "return default",
        "test_joints.py::test_the_reading_is_that_of_the_training",
    ),
    Fault(
        "refine_sam.py ignores --mode",
        "refine_sam.py",
        "rule = options.from_flags(Rule, args)",
        'rule = options.from_flags(Rule, args, mode="max_iou_imp2")',
        "test_joints.py::test_every_flag_of_merging_counts",
    ),
    Fault(
        "refine_sam.py ignores --stability_score_thresh",
        "refine_sam.py",
        "sought = options.from_flags(MaskOptions, args)",
        "sought = options.from_flags(MaskOptions, args, stability_score_thresh=0.95)",
        "test_joints.py::test_every_flag_of_sam_counts",
    ),
    Fault(
        "proposals are merged with recall_threshold for inside_threshold",
        "refine_sam.py",
        "rule = options.from_flags(Rule, args)",
        "rule = options.from_flags(Rule, args, inside_threshold=args.recall_threshold)",
        "test_joints.py::test_every_flag_of_merging_counts",
    ),
    Fault(
        "the table of changes shows before for after",
        "refine_sam.py",
        "np.bincount((before * side + after).ravel(), ",
        "np.bincount((after * side + before).ravel(), ",
        "test_refine_sam.py::test_what_changed_is_counted_from_before_to_after",
    ),
    Fault(
        "CSRM's maps are cut at the threshold of a final model's",
        "inference.py",
        'graded=checkpoint["config"]["kind"] == "csrm"',
        "graded=False",
        "test_scripts.py::test_the_threshold_on_relative_maps_is_that_of_the_network",
    ),
    Fault(
        "pseudo masks ignore --crf_gt_prob",
        "inference.py",
        "unary_from_labels(labels[None], len(keys), crf.gt_prob)",
        "unary_from_labels(labels[None], len(keys))",
        "test_joints.py::test_pseudo_masks_are_refined_with_the_confidence_of_the_flag",
    ),
    Fault(
        "maps of the weights before a training anew are taken",
        "inference.py",
        '{**vars(args), "weights": weights, ',
        "{**vars(args), ",
        "test_identity.py::test_what_each_flag_of_inference_changes",
    ),
    Fault(
        "relative maps are not divided by their maxima",
        "inference.py",
        "maps = unit_maximum(torch.from_numpy(maps)).numpy()",
        "pass",
        "test_joints.py::test_relative_maps_are_divided_each_by_its_maximum",
    ),
    Fault(
        "regions without an edge are proposed",
        "tools/proposals/regions.py",
        "allowed &= tree.contrasts >= self.min_contrast",
        "pass",
        "test_proposals.py::test_regions_out_of_range_or_without_an_edge_or_nearly_there_already_are_left_out",
    ),
    # -- joints of the last model ------------------------------------------------------------------------------------
    Fault(
        "DeepLabV3+ ignores --label_smoothing",
        "train_segmentation.py",
        "train_step(model, batch, device, args.label_smoothing)",
        "train_step(model, batch, device, 0.1)",
        "test_joints.py::test_epochs_smoothing_and_validation_of_the_last_model",
    ),
    Fault(
        "DeepLabV3+ is predicted on photographs that are not normalised",
        "train_segmentation.py",
        "image = normalize(working_photograph(photograph, views).to(next(model.parameters()).device))",
        "image = working_photograph(photograph, views).to(next(model.parameters()).device).float()",
        "test_joints.py::test_a_network_sees_normalised_photographs_in_prediction",
    ),
    Fault(
        "--crf_backend and --crf_t of the prediction are the defaults",
        "train_segmentation.py",
        "crf = options.CRF(args.crf_t, RELATIVE_GT_PROB, args.crf_backend)",
        "crf = options.CRF(gt_prob=RELATIVE_GT_PROB)",
        "test_joints.py::test_views_and_crf_of_a_prediction_are_those_of_the_flags_and_of_the_training",
    ),
    Fault(
        "corrected masks count once",
        "train_segmentation.py",
        "] * args.corrected_weight",
        "]",
        "test_corrected.py::test_corrected_masks_replace_pseudo_masks_and_come_more_often",
    ),
    Fault(
        "--restore is not read",
        "train_segmentation.py",
        "    if args.restore:",
        "    if False:",
        "test_joints.py::test_a_training_starts_from_the_weights_of_restore",
    ),
    Fault(
        "DeepLabV3+ is validated on the pseudo masks it learns",
        "train_segmentation.py",
        "validate(model, truth, ",
        "validate(model, source, ",
        "test_joints.py::test_epochs_smoothing_and_validation_of_the_last_model",
    ),
    Fault(
        "DeepLabV3+ sees one scale",
        "train_segmentation.py",
        "geometry = segmentation_geometry(*options.image_sizes(args))",
        "geometry = segmentation_geometry(*[args.image_size] * 3)",
        "test_joints.py::test_geometry_of_the_last_model",
    ),
    Fault(
        "predictions of another folder of the same name are taken",
        "train_segmentation.py",
        "args.images and str(args.images.resolve())",
        "None",
        "test_predict.py::test_nor_are_those_with_other_views_weights_or_photographs",
    ),
    # -- scores ------------------------------------------------------------------------------------------------------
    Fault(
        "false positives and false negatives change places in FILE.json",
        "evaluate.py",
        '"false_positive": per_class(score.false_positive)',
        '"false_positive": per_class(score.false_negative)',
        "test_evaluate.py::test_masks_table_json_and_csv",
    ),
    Fault(
        "the best threshold is that of the foreground alone",
        "evaluate.py",
        "best = int(np.argmax([score.miou for score in curve]))",
        "best = int(np.argmax([score.miou_foreground for score in curve]))",
        "test_evaluate.py::test_cams_sweep_finds_the_best_threshold",
    ),
    Fault(
        "images are scored twice at the borders of jobs",
        "evaluate.py",
        "mine[start : start + IDS_PER_JOB]",
        "mine[start : start + IDS_PER_JOB + 1]",
        "test_evaluate.py::test_worker_processes_and_chunks_change_nothing",
    ),
    Fault(
        "reports during training see photographs at their full size",
        "tools/validation.py",
        "hflip=False, long_side=long_side)",
        "hflip=False, long_side=(0, 10_000))",
        "test_validation.py::test_longer_images_are_reduced_to_the_size_of_training",
    ),
    Fault(
        "a stage is compared with itself in the review queue",
        "report.py",
        "for title, mask in found.items() if title != reviewed.title]",
        "for title, mask in found.items()]",
        "test_report.py::test_the_queue_is_by_doubt_and_the_page_by_iou",
    ),
    Fault(
        "the last threshold of a sweep is left out",
        "tools/metrics.py",
        " / step + 1e-6)) + 1",
        " / step)) + 1",
        "test_metrics.py::test_threshold_range_includes_its_end_and_does_not_drift",
    ),
    # -- the ground --------------------------------------------------------------------------------------------------
    Fault(
        "a flag of the schedule is not passed on",
        "tools/options.py",
        "optimization=from_flags(Optimization, args)",
        "optimization=from_flags(Optimization, args, lr_poly_power=0.9)",
        "test_joints.py::test_every_flag_of_the_optimisation_counts",
    ),
    Fault(
        "the schedule ignores its power",
        "tools/optim.py",
        "poly_schedule(self.optimizer, updates, options.lr_poly_power)",
        "poly_schedule(self.optimizer, updates)",
        "test_joints.py::test_every_flag_of_the_optimisation_counts",
    ),
    Fault(
        "--dilated changes nothing",
        "tools/options.py",
        "8 if args.dilated else 16",
        "16",
        "test_joints.py::test_every_flag_of_the_network_counts",
    ),
    Fault(
        "gradients are not cut",
        "tools/optim.py",
        "        if self.options.grad_max_norm:",
        "        if not self.options.grad_max_norm:",
        "test_joints.py::test_a_long_gradient_is_cut_and_batches_are_averaged",
    ),
    Fault(
        "accumulated batches are added, not averaged",
        "tools/optim.py",
        "self.scaler.scale(loss / self.options.accumulate_steps)",
        "self.scaler.scale(loss)",
        "test_joints.py::test_a_long_gradient_is_cut_and_batches_are_averaged",
    ),
    Fault(
        "biases decay",
        "tools/optim.py",
        '"weight_decay": 0.0 if is_bias else options.wd',
        '"weight_decay": options.wd',
        "test_optim.py::test_groups_split_the_trainable_parameters_by_origin_and_kind",
    ),
    Fault(
        "the teacher moves by the decay",
        "tools/ema.py",
        "list(student.parameters()), 1 - decay)",
        "list(student.parameters()), decay)",
        "test_ema.py::test_update_is_the_weighted_mean_of_parameters_and_a_copy_of_buffers",
    ),
    Fault(
        "the teacher has dropout",
        "tools/ema.py",
        "return super().train(False)",
        "return super().train(mode)",
        "test_ema.py::test_teacher_never_trains",
    ),
    Fault(
        "maps of mirrored views stay mirrored",
        "tools/cam.py",
        "maps[1:].flip(-1)]",
        "maps[1:]]",
        "test_cam.py::test_a_mirrored_image_has_mirrored_maps",
    ),
    Fault(
        "ignored pixels are scored",
        "tools/metrics.py",
        "valid = truth != IGNORE_INDEX\n    columns",
        "truth = truth.clip(max=num_classes - 1)\n    valid = truth == truth\n    columns",
        "test_metrics.py::test_everything_ignored_and_empty_batches_count_nothing",
    ),
    Fault(
        "shares of several processes overlap",
        "tools/parallel.py",
        "mine = items[index::number]",
        "mine = items[index:]",
        "test_parallel.py::test_shares_are_disjoint_and_whole",
    ),
    Fault(
        "photographs lie as the camera held them",
        "tools/files.py",
        "return _turn(pixels, orientation(image))",
        "return pixels",
        "test_pictures.py::test_every_orientation_in_every_container",
    ),
    Fault(
        "with --on_error skip a run that left images out ends with exit code 0",
        "tools/left_out.py",
        "        if self.reasons:",
        "        if not ids:",
        "test_left_out.py::test_each_part_keeps_its_own_lines_of_the_list",
    ),
    Fault(
        "reports during training see the network with dropout",
        "tools/validation.py",
        "    model.eval()\n",
        "",
        "test_validation.py::test_the_report",
    ),
    Fault(
        "after a report the network is trained without dropout",
        "tools/training.py",
        "                self.model.train()\n",
        "",
        "test_joints.py::test_epochs_smoothing_and_validation_of_the_last_model",
    ),
    Fault(
        "in half precision the scaled gradients are cut",
        "tools/optim.py",
        "            self.scaler.unscale_(self.optimizer)\n",
        "",
        "test_joints.py::test_a_long_gradient_is_cut_and_batches_are_averaged",
    ),
    Fault(
        "in half precision losses are not scaled",
        "tools/optim.py",
        "{} if dtype == torch.float16 else",
        "{} if dtype is None else",
        "test_joints.py::test_half_precision_scales_its_losses_and_goes_on_with_the_scale",
    ),
    Fault(
        "--optimizer adamw is Lion",
        "tools/optim.py",
        'if name == "adamw" else',
        'if name == "lion" else',
        "test_optim.py::test_each_optimizer_is_that_of_its_name",
    ),
    Fault(
        "of a run resumed within an epoch the means are of its last part",
        "tools/training.py",
        'self.sums = {name: total.to(self.device) for name, total in checkpoint["sums"].items()}',
        "pass",
        "test_training.py::test_a_run_killed_within_an_epoch_ends_with_the_same_bytes",
    ),
    Fault(
        "of a run resumed within an epoch the health is that of its last part",
        "tools/health.py",
        '"sums": self.sums}',
        '"sums": {}}',
        "test_training.py::test_a_run_killed_within_an_epoch_ends_with_the_same_bytes",
    ),
    Fault(
        "reduced photographs of a training are not antialiased",
        "datasets/transforms.py",
        'params["size"], antialias=True)',
        'params["size"], antialias=False)',
        "test_transforms.py::test_reduced_images_are_those_of_pillow_which_antialiases",
    ),
    Fault(
        "reduced views are not antialiased",
        "tools/cam.py",
        'size, mode="bilinear", antialias=True)  # corner',
        'size, mode="bilinear")  # corner',
        "test_cam.py::test_reduced_views_are_those_of_pillow_which_antialiases",
    ),
    Fault(
        "labels of other CAM files are learnt",
        "tools/seeds.py",
        ', "CAM files": identity.contents(files)}',
        "}",
        "test_seeds.py::test_nor_do_those_of_other_classes_image_labels_or_cam_files",
    ),
    Fault(
        "masks of another program that hold 0 and 1 are empty",
        "tools/proposals/files.py",
        "encode(picture[None] > 0)",
        "encode(picture[None] > 127)",
        "test_mask_files.py::test_folders_of_pictures",
    ),
    Fault(
        "predictions of photographs that have changed are taken",
        "train_segmentation.py",
        "    inputs = source.fingerprints(ids)\n",
        '    inputs = {"photographs": {}}\n',
        "test_predict.py::test_nor_are_those_with_other_views_weights_or_photographs",
    ),
    Fault(
        "overlays show no mask",
        "train_segmentation.py",
        "image, mask, self.source.info)",
        "image, mask * 0, self.source.info)",
        "test_predict.py::test_files_of_each_photograph",
    ),
    Fault(
        "a network of other classes is taken for the dataset's",
        "train_segmentation.py",
        'identity.compare_classes(weights, checkpoint["classes"][1:], source.info.classes[1:])',
        "pass",
        "test_identity.py::test_segmentations_of_classes_in_another_order",
    ),
    Fault(
        "DeepLabV3+ starts from the same weights whatever the seed",
        "train_segmentation.py",
        "seed_everything(args.seed)",
        "seed_everything(0)",
        "test_training.py::test_the_seed_decides_on_the_first_weights_and_on_the_batches",
    ),
    Fault(
        "Segment Anything 2 and 3 ignore the flags of the generator",
        "refine_sam.py",
        "LaterMaskGenerator(*later, sought, **running)",
        "LaterMaskGenerator(*later, MaskOptions(), **running)",
        "test_joints.py::test_every_flag_of_sam_counts",
    ),
    Fault(
        "every pass over the photographs has the same order",
        "datasets/loaders.py",
        "(self.seed, ORDER_STREAM, number)",
        "(self.seed, ORDER_STREAM, 0)",
        "test_loaders.py::test_two_seeds_and_two_passes_have_independent_orders",
    ),
    # -- networks, weights and proposals -----------------------------------------------------------------------------
    Fault(
        "the decoder enlarges maps with corners that are not aligned",
        "models/layers.py",
        'mode="bilinear", align_corners=True)',
        'mode="bilinear", align_corners=False)',
        "test_models.py::test_the_new_layers_are_those_of_the_papers_written_out",
    ),
    Fault(
        "the low features of a plain transformer are those of the block in the middle",
        "models/backbone.py",
        "self._low = len(strides) // 4 if",
        "self._low = len(strides) // 2 if",
        "test_models.py::test_low_features_of_a_plain_transformer_are_those_of_the_block_a_quarter_up",
    ),
    Fault(
        "at stride 8, stage 3 of a ResNeSt loses the pooling of its authors",
        "models/backbone.py",
        "for block in stages[1:]:",
        "for block in stages[2:]:",
        "test_models.py::test_resnest_keeps_the_pooling_of_its_authors",
    ),
    Fault(
        "outputs that do not fit the file's own classes are taken by place",
        "models/restore.py",
        " or len(rows) != len(theirs) - first:",
        ":",
        "test_restore.py::test_outputs_that_do_not_fit_the_files_own_classes_are_not_taken",
    ),
    Fault(
        "P-NOC's ordinary classifier learns with what the other turn has kept",
        "tools/priors.py",
        "        self.model.train().eval()",
        "        self.model.train().eval() if not on else None",
        "test_priors.py::test_the_opponent_forgets_what_its_network_has_kept",
    ),
    Fault(
        "reduced photographs are not antialiased",
        "tools/cam.py",
        'photograph, size, mode="bilinear", antialias=True)',
        'photograph, size, mode="bilinear")',
        "test_cam.py::test_reduced_photographs_are_those_of_pillow_which_antialiases",
    ),
    Fault(
        "Segment Anything keeps its random weights",
        "tools/proposals/generator.py",
        "    model.load_state_dict(state)\n",
        "",
        "test_proposals.py::test_sam_has_the_weights_of_the_file",
    ),
    Fault(
        "Segment Anything 2 and 3 see the whole image for each crop",
        "tools/proposals/later_sams.py",
        "images=image[y0:y1, x0:x1].copy()",
        "images=image.copy()",
        "test_later_sams.py::test_of_a_crop_the_network_sees_its_pixels_alone",
    ),
    Fault(
        "merged regions forget a part of their common borders",
        "tools/proposals/regions.py",
        "(old_length + length, old_strength + strength)",
        "(length, strength)",
        "test_proposals.py::test_every_merge_and_every_contrast_is_that_of_plain_loops",
    ),
    Fault(
        "of merged regions the smaller counts as much as the larger",
        "tools/proposals/regions.py",
        "weighted = self.histograms[first] * self.sizes[first] + self.histograms[second] * self.sizes[second]",
        "weighted = (self.histograms[first] + self.histograms[second]) * size / 2",
        "test_proposals.py::test_every_merge_and_every_contrast_is_that_of_plain_loops",
    ),
    # -- preparation, exchange, listing, review and pictures ---------------------------------------------------------
    Fault(
        "COCO's crowds count for no label",
        "datasets/prepare/coco14.py",
        'sorted({index_of[item["category_id"]] for item in annotations})',
        'sorted({index_of[item["category_id"]] for item in annotations if not item["iscrowd"]})',
        "test_coco14.py::test_a_crowd_counts_for_the_label",
    ),
    Fault(
        "COCO's lists of two parts may have their categories in different orders",
        "datasets/prepare/coco14.py",
        "if classes and names != classes:",
        "if classes and {*names} != {*classes}:",
        "test_coco14.py::test_categories_of_two_releases_and_a_missing_file",
    ),
    Fault(
        "a conversion that stopped between two lists counts as complete",
        "datasets/prepare/__main__.py",
        "is_written(data_dir, COCO14_PARTS)",
        "is_written(data_dir, COCO14_PARTS[:1])",
        "test_prepare.py::test_coco_from_its_archives",
    ),
    Fault(
        "what says that an archive is unpacked is there before the rest",
        "datasets/prepare/download.py",
        "path == last or path in last.parents",
        "path == last",
        "test_download.py::test_what_says_that_all_is_there_is_moved_last",
    ),
    Fault(
        "a mask of which only the class was corrected is not imported",
        "datasets/exchange/__main__.py",
        "if not np.array_equal(mask, old):",
        "if not np.array_equal(mask > 0, old > 0):",
        "test_exchange.py::test_a_class_put_right_is_a_change",
    ),
    Fault(
        "Label Studio's strokes count from the faintest trace on",
        "datasets/exchange/label_studio.py",
        "OPAQUE = 128",
        "OPAQUE = 1",
        "test_exchange.py::test_strokes_count_from_half_opacity_and_lie_on_earlier_ones",
    ),
    Fault(
        "images/train/ has the photographs of images/training/ too",
        "datasets/base.py",
        'i.startswith(f"{domain}/"))',
        "i.startswith(domain))",
        "test_listing.py::test_folders_of_splits_are_the_splits",
    ),
    Fault(
        "what a mask leaves undecided adds no doubt",
        "tools/review.py",
        "1 - image_iou(other, mask)",
        "1 - image_iou(mask, other)",
        "test_review.py::test_stages_that_agree_leave_no_doubt_and_others_add_theirs",
    ),
    Fault(
        "a legend gives colours the names of other classes",
        "tools/drawing.py",
        "info.classes[i], i) for i in indices if i != 0]",
        "info.classes[i - 1], i) for i in indices if i != 0]",
        "test_report.py::test_a_legend_gives_each_colour_its_name",
    ),
    # -- what made a folder, the dense CRF, and verify ---------------------------------------------------------------
    Fault(
        "two files of weights that begin alike are one",
        "tools/identity.py",
        "while block := file.read(1 << 20):",
        "if block := file.read(1 << 20):",
        "test_identity.py::test_fingerprints_are_of_the_content",
    ),
    Fault(
        "--overwrite leaves masks of the old settings among the new ones",
        "tools/identity.py",
        "for image_id in (ids | _ids(stored)) & products.keys():",
        "for image_id in ids & products.keys():",
        "test_identity.py::test_overwrite_deletes_the_files_of_images_that_are_no_longer_listed",
    ),
    Fault(
        "a folder is refined in place if it is read by its absolute path",
        "tools/identity.py",
        "if folder.resolve() == Path(place).resolve():",
        "if folder == Path(place):",
        "test_identity.py::test_no_folder_is_read_and_written_however_it_is_spelt",
    ),
    Fault(
        "the dense CRF of dark images lacks the pixels that pydensecrf adds",
        "tools/crf/lattice.py",
        "if pixels % 4:",
        "if pixels % 2:",
        "test_crf.py::test_dark_images_of_any_number_of_pixels_equal_pydensecrf",
    ),
    Fault(
        "in images that are not square, keys of the dense CRF's lattice run into each other",
        "tools/crf/__init__.py",
        "[(width - 1) / sxy, (height - 1) / sxy] + ",
        "[(height - 1) / sxy, (width - 1) / sxy] + ",
        "test_crf.py::test_bounds_of_features_are_their_maxima",
    ),
    Fault(
        "the dense CRF's quick softmax overflows",
        "tools/crf/__init__.py",
        "settings.bilateral_weight < 20",
        "settings.bilateral_weight < 200",
        "test_crf.py::test_energies_and_weights_of_any_size",
    ),
    Fault(
        "labels at stride 4 are those of other pixels",
        "tools/maps.py",
        'size, mode="nearest")',
        'size, mode="nearest-exact")',
        "test_pseudo_labels.py::test_labels_are_reduced_to_the_first_pixel_of_each_cell",
    ),
    Fault(
        "verify forgets a split to be scored whose name is mistyped",
        "datasets/verify.py",
        "for domain in [*args.domains, *args.scored]:",
        "for domain in args.domains:",
        "test_verify.py::test_a_split_to_be_scored_must_be_there",
    ),
    Fault(
        "in half precision the trainer does not say so, and losses are not scaled",
        "tools/training.py",
        "updates=self.max_updates, dtype=self.dtype)",
        "updates=self.max_updates, dtype=None)",
        "test_training.py::test_the_precision_is_that_of_the_flag",
    ),
    Fault(
        "--optimizer adamw decays weights as Adam",
        "tools/optim.py",
        "torch.optim.AdamW(groups, ",
        "torch.optim.Adam(groups, ",
        "test_optim.py::test_weights_decay_as_each_optimizer_says",
    ),
    Fault(
        "--mixed_precision is that of the device",
        "tools/training.py",
        "torch.autocast(self.device.type, dtype=self.dtype, ",
        "torch.autocast(self.device.type, ",
        "test_training.py::test_the_precision_is_that_of_the_flag",
    ),
    Fault(
        "the schedule forgets the update of an epoch's last batches",
        "tools/training.py",
        "-(-self.steps_per_epoch // run.optimization.accumulate_steps)",
        "self.steps_per_epoch // run.optimization.accumulate_steps",
        "test_training.py::test_the_learning_rate_falls_over_the_updates_of_all_epochs",
    ),
    Fault(
        "all processes drop the same neurons",
        "tools/training.py",
        "epoch + 1, parallel.rank(), self.batch)",
        "epoch + 1, 0, self.batch)",
        "test_training.py::test_first_weights_epochs_parts_and_processes_draw_their_own",
    ),
    Fault(
        "weights that get no gradient any more go on moving",
        "tools/optim.py",
        "set_to_none=True",
        "set_to_none=False",
        "test_optim.py::test_weights_without_a_gradient_neither_decay_nor_go_on_moving",
    ),
    Fault(
        "the factor of the losses grows until updates are left out",
        "tools/optim.py",
        ', "growth_interval": 2**31 - 1}',
        "}",
        "test_optim.py::test_the_factor_of_the_losses_does_not_grow",
    ),
    Fault(
        "reports during training score another class than the likeliest",
        "tools/validation.py",
        "truth.shape)[0].max(dim=0).indices",
        "truth.shape)[0].min(dim=0).indices",
        "test_validation.py::test_the_report",
    ),
    Fault(
        "health after a save within an epoch counts its first part once per process",
        "tools/health.py",
        "(all_reduce_sum(_pair(sums)) / world_size()).unbind()",
        "all_reduce_sum(_pair(sums)).unbind()",
        "test_health.py::test_processes_that_share_an_epoch_go_on_with_halves",
    ),
    Fault(
        "CutMix never pastes the lower right corner",
        "datasets/mixing.py",
        "(position * (total - length + 1))",
        "(position * (total - length))",
        "test_mixing.py::test_rectangles_reach_every_border_equally_often",
    ),
)


def run_tests(folder: Path, tests: Iterable[str], *, shown: bool = False) -> int:
    """pytest's exit code, from a process of its own, which finds the libraries loaded."""
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(folder, tests, shown))
    process.start()
    process.join()
    return process.exitcode


def _pytest(folder: Path, tests: Iterable[str], shown: bool) -> None:
    os.chdir(folder)
    sys.path = [entry for entry in sys.path if Path(entry).resolve() not in (ROOT, ROOT / "tests")]
    if not shown:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)])
    sys.stdout.flush()
    os._exit(code)


def is_caught(folder: Path, fault: Fault) -> bool:
    """Put the fault into the copy of the repository in `folder`, run its test, and take the fault out again."""
    file = folder / fault.file
    sound = file.read_text(encoding="utf-8")
    file.write_text(sound.replace(fault.old, fault.new), encoding="utf-8")
    try:
        return run_tests(folder, [fault.test]) == FAILED
    finally:
        file.write_text(sound, encoding="utf-8")


def main(numbers: list[int]) -> int:
    """Try the faults (from 1), print a line for each, and return how many passed their tests."""
    numbers, passed = numbers or [*range(1, len(FAULTS) + 1)], 0
    for fault in (FAULTS[number - 1] for number in numbers):
        if (ROOT / fault.file).read_text(encoding="utf-8").count(fault.old) != 1:
            sys.exit(f"{fault.file}: does not hold once what this fault changes: {fault.what}. Correct the fault")
    sys.dont_write_bytecode = True  # a file may change twice a second
    for library in LIBRARIES:
        importlib.import_module(library)
    with tempfile.TemporaryDirectory() as temporary:
        leave = shutil.ignore_patterns(".*", "__pycache__", "data", "experiments", "shared", "assets")
        folder = shutil.copytree(ROOT, Path(temporary) / "code", ignore=leave)
        if run_tests(folder, dict.fromkeys(FAULTS[number - 1].test for number in numbers), shown=True):
            sys.exit("a test fails without any fault")
        for number in numbers:
            fault = FAULTS[number - 1]
            caught = is_caught(folder, fault)
            passed += not caught
            print(
                f"{number:3}  {'caught' if caught else 'PASSES'}  {fault.file}: {fault.what}  ({fault.test})",
                flush=True,
            )
    print(f"{passed} of {len(numbers)} faults pass")
    return passed


if __name__ == "__main__":
    sys.exit(main([int(text) for text in sys.argv[1:]]) > 0)
