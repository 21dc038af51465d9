// Runs the kernels of deformable attention once: run_ms_deform_attn3d FOLDER.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "call.h"
#include "cuda/ms_deform_attn3d.cuh"

template <typename scalar_t, int width>
void run(const Call& call, const seg3d::AttendGeometry& geometry) {
  using acc_t = seg3d::accumulate_t<scalar_t>;
  const auto value = call.array<scalar_t>("value");
  const auto locations = call.array<acc_t>("locations");
  const auto weights = call.array<acc_t>("weights");
  const auto blocks = static_cast<unsigned>(call.integer("blocks"));
  if (call.integer("backward") != 0) {
    const auto grad = call.array<scalar_t>("grad");
    const Array<acc_t> grad_value(value.size()), grad_locations(locations.size()), grad_weights(weights.size());
    cuda_shim::launch(blocks, seg3d::kAttendThreads, [&] {
      seg3d::attend_backward<width, scalar_t>(grad.data(), value.data(), locations.data(), weights.data(), geometry,
                                              grad_value.data(), grad_locations.data(), grad_weights.data());
    });
    call.write("grad_value", grad_value);
    call.write("grad_locations", grad_locations);
    call.write("grad_weights", grad_weights);
  } else {
    const Array<scalar_t> output(
        static_cast<size_t>(geometry.num_images * geometry.num_queries * geometry.heads * geometry.channels));
    cuda_shim::launch(blocks, seg3d::kAttendThreads, [&] {
      seg3d::attend<width, scalar_t>(value.data(), locations.data(), weights.data(), geometry, output.data());
    });
    call.write("result", output);
  }
}

template <typename scalar_t>
void run_width(const Call& call, const seg3d::AttendGeometry& geometry) {
  call.integer("wide") != 0 ? run<scalar_t, seg3d::kRow<scalar_t>>(call, geometry) : run<scalar_t, 1>(call, geometry);
}

int main(int, char** arguments) {
  const Call call(arguments[1]);
  seg3d::AttendGeometry geometry{};
  geometry.num_images = call.integer("num_images");
  geometry.num_queries = call.integer("num_queries");
  geometry.num_values = call.integer("num_values");
  geometry.heads = static_cast<int>(call.integer("heads"));
  geometry.channels = static_cast<int>(call.integer("channels"));
  geometry.levels = static_cast<int>(call.integer("levels"));
  geometry.points = static_cast<int>(call.integer("points"));
  geometry.group = static_cast<int>(call.integer("group"));
  const auto shapes = call.array<int64_t>("shapes");
  int64_t start = 0;
  for (int level = 0; level < geometry.levels; ++level) {
    const int64_t* shape = shapes.data() + level * 3;
    geometry.start[level] = start;
    geometry.depth[level] = shape[0];
    geometry.height[level] = shape[1];
    geometry.width[level] = shape[2];
    start += shape[0] * shape[1] * shape[2];
  }
  const std::string& dtype = call.word("dtype");
  if (dtype == "float64") {
    run_width<double>(call, geometry);
  } else if (dtype == "bfloat16") {
    run_width<c10::BFloat16>(call, geometry);
  } else if (dtype == "float16") {
    run_width<c10::Half>(call, geometry);
  } else {
    run_width<float>(call, geometry);
  }
  return 0;
}
