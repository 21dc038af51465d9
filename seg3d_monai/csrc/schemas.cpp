// Schemas of the operators. The Python package declares the same ones (ops/schemas.py) when it runs without this
// library.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(seg3d, m) {
  m.def(
      "roi_align3d(Tensor features, Tensor boxes, Tensor batch_index, SymInt out_d, SymInt out_h, SymInt out_w, "
      "float scale_z, float scale_y, float scale_x, int sampling_ratio, bool aligned) -> Tensor");
  m.def(
      "roi_align3d_backward(Tensor grad, Tensor boxes, Tensor batch_index, SymInt batch, SymInt depth, SymInt height, "
      "SymInt width, float scale_z, float scale_y, float scale_x, int sampling_ratio, bool aligned, bool "
      "channels_last) "
      "-> Tensor");
  m.def("nms3d(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor");
  m.def("batched_nms3d(Tensor boxes, Tensor scores, Tensor group, float iou_threshold) -> Tensor");
  m.def(
      "match_boxes3d(Tensor boxes, Tensor truth, float foreground_iou, float background_iou, bool match_best) -> "
      "Tensor");
  m.def(
      "mask_targets3d(Tensor label, Tensor ids, Tensor boxes, SymInt out_d, SymInt out_h, SymInt out_w) -> (Tensor, "
      "Tensor)");
  m.def("label_pairs(Tensor a, Tensor b) -> (Tensor, Tensor)");
  m.def("label_extents(Tensor labels, int num_labels) -> Tensor");
  m.def("paste_masks3d(Tensor logits, Tensor sizes, Tensor boxes, float cut) -> (Tensor, Tensor)");
  m.def(
      "ms_deform_attn3d(Tensor value, Tensor spatial_shapes, Tensor sampling_locations, Tensor attention_weights) -> "
      "Tensor");
  m.def(
      "ms_deform_attn3d_backward(Tensor grad, Tensor value, Tensor spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights) -> (Tensor, Tensor, Tensor)");
  m.def("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, bool relu) -> Tensor");
  m.def(
      "layer_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, float eps, bool relu) -> (Tensor, "
      "Tensor, Tensor)");
  m.def(
      "group_norm(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool relu) -> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int groups, "
      "bool relu) -> (Tensor, Tensor, Tensor)");
}
