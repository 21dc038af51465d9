"""Names and schemas of the operators, as csrc/schemas.cpp declares them; used where no compiled library is loaded."""

NAMESPACE = "seg3d"

SCHEMAS = {
    "roi_align3d": (
        "(Tensor features, Tensor boxes, Tensor batch_index, SymInt out_d, SymInt out_h, SymInt out_w, "
        "float scale_z, float scale_y, float scale_x, int sampling_ratio, bool aligned) -> Tensor"
    ),
    "roi_align3d_backward": (
        "(Tensor grad, Tensor boxes, Tensor batch_index, SymInt batch, SymInt depth, SymInt height, SymInt width, "
        "float scale_z, float scale_y, float scale_x, int sampling_ratio, bool aligned, "
        "bool channels_last) -> Tensor"
    ),
    "nms3d": "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor",
    "batched_nms3d": "(Tensor boxes, Tensor scores, Tensor group, float iou_threshold) -> Tensor",
    "match_boxes3d": (
        "(Tensor boxes, Tensor truth, float foreground_iou, float background_iou, bool match_best) -> Tensor"
    ),
    "mask_targets3d": (
        "(Tensor label, Tensor ids, Tensor boxes, SymInt out_d, SymInt out_h, SymInt out_w) -> (Tensor, Tensor)"
    ),
    "label_pairs": "(Tensor a, Tensor b) -> (Tensor, Tensor)",
    "label_extents": "(Tensor labels, int num_labels) -> Tensor",
    "paste_masks3d": "(Tensor logits, Tensor sizes, Tensor boxes, float cut) -> (Tensor, Tensor)",
    "ms_deform_attn3d": (
        "(Tensor value, Tensor spatial_shapes, Tensor sampling_locations, Tensor attention_weights) -> Tensor"
    ),
    "ms_deform_attn3d_backward": (
        "(Tensor grad, Tensor value, Tensor spatial_shapes, Tensor sampling_locations, Tensor attention_weights) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "layer_norm": "(Tensor x, Tensor weight, Tensor bias, float eps, bool relu) -> Tensor",
    "layer_norm_backward": (
        "(Tensor grad, Tensor x, Tensor weight, Tensor bias, float eps, bool relu) -> (Tensor, Tensor, Tensor)"
    ),
    "group_norm": (
        "(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool relu) -> (Tensor, Tensor, Tensor)"
    ),
    "group_norm_backward": (
        "(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int groups, bool relu) "
        "-> (Tensor, Tensor, Tensor)"
    ),
}
