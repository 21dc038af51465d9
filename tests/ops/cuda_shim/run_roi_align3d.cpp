// Runs the kernels of RoIAlign once: run_roi_align3d FOLDER.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "call.h"
#include "cuda/roi_align3d.cuh"

using seg3d::accumulate_t;

template <typename scalar_t, typename coord_t, int width>
void run(const Call& call, const seg3d::PoolGeometry& geometry) {
  const auto boxes = call.array<coord_t>("boxes");
  const auto batch_index = call.array<int64_t>("batch_index");
  const auto source = call.array<scalar_t>("source");
  const bool channels_last = call.integer("channels_last") != 0;
  const auto blocks = static_cast<unsigned>(call.integer("blocks"));
  const auto launch = [&](auto kernel, auto& result) {
    cuda_shim::launch(blocks, seg3d::kPoolThreads,
                      [&] { kernel(source.data(), boxes.data(), batch_index.data(), geometry, result.data()); });
    call.write("result", result);
  };
  if (call.integer("backward") != 0) {
    Array<accumulate_t<scalar_t>> grad(static_cast<size_t>(geometry.num_images * geometry.channels * geometry.z.size *
                                                           geometry.y.size * geometry.x.size));
    channels_last ? launch(seg3d::unpool_channels_last<width, scalar_t, coord_t>, grad)
                  : launch(seg3d::unpool_channels_first<width, scalar_t, coord_t>, grad);
  } else {
    Array<scalar_t> output(
        static_cast<size_t>(geometry.num_boxes * geometry.channels * geometry.z.out * geometry.y.out * geometry.x.out));
    channels_last ? launch(seg3d::pool_channels_last<width, scalar_t, coord_t>, output)
                  : launch(seg3d::pool_channels_first<width, scalar_t, coord_t>, output);
  }
}

template <typename scalar_t, typename coord_t>
void run_width(const Call& call, const seg3d::PoolGeometry& geometry) {
  call.integer("wide") != 0 ? run<scalar_t, coord_t, seg3d::kRow<scalar_t>>(call, geometry)
                            : run<scalar_t, coord_t, 1>(call, geometry);
}

int main(int, char** arguments) {
  const Call call(arguments[1]);
  const auto axis = [&](const std::string& name) {
    return seg3d::PoolAxis{call.integer("size_" + name), static_cast<int>(call.integer("out_" + name)),
                           call.number("scale_" + name)};
  };
  const seg3d::PoolGeometry geometry{axis("z"),
                                     axis("y"),
                                     axis("x"),
                                     call.integer("num_images"),
                                     call.integer("channels"),
                                     call.integer("num_boxes"),
                                     call.integer("sampling_ratio"),
                                     call.integer("aligned") != 0};
  const std::string& dtype = call.word("dtype");
  if (dtype == "float64") {
    run_width<double, double>(call, geometry);
  } else if (dtype == "bfloat16") {
    run_width<c10::BFloat16, float>(call, geometry);
  } else if (dtype == "float16") {
    run_width<c10::Half, float>(call, geometry);
  } else if (call.word("coordinates") == "float64") {
    run<float, double, 1>(call, geometry);
  } else {
    run_width<float, float>(call, geometry);
  }
  return 0;
}
