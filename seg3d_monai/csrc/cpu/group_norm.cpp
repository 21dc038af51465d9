// GroupNorm with the channels first on the CPU, forward and backward, with a ReLU behind it where that is wanted.
//
// A segment, the channels of one group in one image, is one run of memory. It is measured, which is to read it once,
// and then normed from the cache by the thread that measured it. Where segments are too long for that, or too few for
// the threads, all threads measure pieces of them, then norm pieces of them. Both ways do the same arithmetic: pieces
// depend on nothing but the shape and are joined in their order, so the bits are the same for any number of threads.
//
// The mean is kept relative to the first value of its segment: those far from zero lose nothing, constant ones are
// exact.
//
// The backward pass keeps the sums of grad and of grad * (x - mean) of each channel: they give the gradients of weight
// and bias, and the two means over a segment that the gradient of x needs. Cost: memory traffic.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/huge_pages.h"
#include "cpu/lanes.h"
#include "cpu/moments.h"
#include "cpu/norm.h"
#include "dispatch.h"

namespace seg3d {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// How many numbers a thread should get at least, and how many bytes stay in a core's cache.
constexpr int64_t kLeastWork = 32768, kCached = int64_t(1) << 20;

// What a channel of one image is normed with.
template <typename acc_t>
struct Channel {
  Vec<acc_t> centred(Vec<acc_t> x) const { return x - first - mean; }
  Vec<acc_t> result(Vec<acc_t> centred) const { return centred * scale + bias; }
  acc_t first, mean, scale, bias;
};

template <typename acc_t>
std::vector<acc_t> values_of(const Tensor& given) {
  const Tensor vector = torch::stable::contiguous(given);
  std::vector<acc_t> values(vector.numel());
  dispatch_floating(vector.scalar_type(), "group_norm: weight", [&](auto zero) {
    const auto* const source = vector.const_data_ptr<decltype(zero)>();
    std::transform(source, source + vector.numel(), values.begin(), [](auto x) { return static_cast<acc_t>(x); });
  });
  return values;
}

// x [N, C, ...] in its segments, each of them `rows` channels, with their moments.
template <typename scalar>
struct Segments {
  using scalar_t = scalar;
  using acc_t = accumulate_t<scalar_t>;

  Segments(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& rstd)
      : values(x.const_data_ptr<scalar_t>()),
        means(static_cast<acc_t*>(mean.data_ptr())),
        rstds(static_cast<acc_t*>(rstd.data_ptr())),
        channels(x.size(1)),
        rows(channels / mean.size(1)),
        count(mean.numel()),
        whole(x.numel() / count),
        row(whole.length() / rows),
        weight(values_of<acc_t>(weight)),
        bias(values_of<acc_t>(bias)) {}

  // Pieces of the rows of a segment.
  int64_t num_parts() const { return rows * row.num_pieces(); }
  int64_t channel_of(int64_t segment, int64_t part) const {
    return (segment * rows + part / row.num_pieces()) % channels;
  }

  // Call visit(place in x, WholePair or PartOfPair, what the channel is normed with) along a part of a segment.
  template <typename Visit>
  void for_each_pair(int64_t segment, int64_t part, Visit visit) const {
    const int64_t start = segment * whole.length(), c = channel_of(segment, part);
    const int64_t row_start = start + part / row.num_pieces() * row.length();
    const Channel<acc_t> channel{acc_t(values[start]), means[segment], rstds[segment] * weight[c], bias[c]};
    row.for_each_pair(part % row.num_pieces(),
                      [&](int64_t place, const auto& pair) { visit(row_start + place, pair, channel); });
  }

  // Call measure(segment, i) for i < num_measured, then join(segment), then finish(segment, part) for all parts.
  template <typename Measure, typename Join, typename Finish>
  void for_each(int64_t num_measured, Measure measure, Join join, Finish finish) const {
    const int64_t threads = torch::stable::get_num_threads(), length = whole.length();
    const bool shares_are_even = count % threads == 0 || count >= 4 * threads;
    if (shares_are_even && length * int64_t(sizeof(scalar_t)) <= kCached) {
      torch::stable::parallel_for(0, count, (kLeastWork + length - 1) / length, [&](int64_t begin, int64_t end) {
        for (int64_t segment = begin; segment < end; ++segment) {
          for (int64_t i = 0; i < num_measured; ++i) {
            measure(segment, i);
          }
          join(segment);
          for (int64_t part = num_parts(); part-- > 0;) {  // what was read last is nearest
            finish(segment, part);
          }
        }
      });
      return;
    }
    const auto share_out = [&](int64_t number, const auto& visit) {
      const int64_t grain = (kLeastWork * number + length - 1) / length;
      torch::stable::parallel_for(0, count * number, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          visit(i / number, i % number);
        }
      });
    };
    share_out(num_measured, measure);
    for (int64_t segment = 0; segment < count; ++segment) {
      join(segment);
    }
    share_out(num_parts(), finish);
  }

  const scalar_t* values;
  acc_t *means, *rstds;
  int64_t channels, rows, count;
  Run<acc_t> whole, row;
  std::vector<acc_t> weight, bias;
};

template <bool relu, typename Segments>
void forward(const Segments& segments, double eps, Tensor& output) {
  using scalar_t = typename Segments::scalar_t;
  using acc_t = typename Segments::acc_t;
  scalar_t* const results = output.mutable_data_ptr<scalar_t>();
  const int64_t length = segments.whole.length(), pieces = segments.whole.num_pieces();
  std::vector<Moments> moments(segments.count * pieces);
  segments.for_each(
      pieces,
      [&](int64_t segment, int64_t piece) {
        moments[segment * pieces + piece] = measure_piece(segments.values + segment * length, segments.whole, piece);
      },
      [&](int64_t segment) {
        const Moments joined = join_pieces(&moments[segment * pieces], segments.whole);
        segments.means[segment] = static_cast<acc_t>(joined.mean);
        segments.rstds[segment] = static_cast<acc_t>(1 / std::sqrt(joined.squares / static_cast<double>(length) + eps));
      },
      [&](int64_t segment, int64_t part) {
        segments.for_each_pair(segment, part, [&](int64_t at, const auto& pair, const auto& channel) {
          Vec<acc_t> y[2];
          pair.load(segments.values + at, y[0], y[1]);
          for (Vec<acc_t>& half : y) {
            half = channel.result(channel.centred(half));
            half = relu ? keep_above<acc_t>(half, half, 0) : half;
          }
          pair.store(results + at, y[0], y[1]);
        });
      });
}

// Sums of the gradient, and of its products with the centred values.
struct Sums {
  double grad = 0, product = 0;
};

template <bool relu, typename Segments>
void backward(const Segments& segments, const Tensor& grad, Tensor& grad_x, Tensor& grad_weight, Tensor& grad_bias) {
  using scalar_t = typename Segments::scalar_t;
  using acc_t = typename Segments::acc_t;
  const scalar_t* const grads = grad.const_data_ptr<scalar_t>();
  scalar_t* const results = grad_x.mutable_data_ptr<scalar_t>();
  const int64_t num_parts = segments.num_parts();
  std::vector<Sums> sums(segments.count * num_parts);
  std::vector<acc_t> offsets(segments.count), slopes(segments.count);
  // Load centred values, and the gradients that pass the ReLU.
  const auto load = [&](int64_t at, const auto& pair, const auto& channel, auto& centred, auto& passed) {
    pair.load(segments.values + at, centred[0], centred[1]);
    pair.load(grads + at, passed[0], passed[1]);
    for (int half = 0; half < 2; ++half) {
      centred[half] = channel.centred(centred[half]);
      if constexpr (relu) {
        passed[half] = keep_above<acc_t>(passed[half], channel.result(centred[half]), largest_zero<scalar_t>());
      }
    }
  };
  segments.for_each(
      num_parts,
      [&](int64_t segment, int64_t part) {
        Vec<acc_t> of_grad[2] = {}, of_product[2] = {};
        segments.for_each_pair(segment, part, [&](int64_t at, const auto& pair, const auto& channel) {
          Vec<acc_t> centred[2], passed[2];
          load(at, pair, channel, centred, passed);
          for (int half = 0; half < 2; ++half) {
            of_grad[half] += passed[half];
            of_product[half] += passed[half] * centred[half];
          }
        });
        sums[segment * num_parts + part] = {sum_of_lanes<acc_t>(of_grad[0] + of_grad[1]),
                                            sum_of_lanes<acc_t>(of_product[0] + of_product[1])};
      },
      [&](int64_t segment) {
        Sums total;
        for (int64_t part = 0; part < num_parts; ++part) {
          const double weight = segments.weight[segments.channel_of(segment, part)];
          total.grad += weight * sums[segment * num_parts + part].grad;
          total.product += weight * sums[segment * num_parts + part].product;
        }
        const double rstd = segments.rstds[segment], share = rstd / static_cast<double>(segments.whole.length());
        offsets[segment] = static_cast<acc_t>(total.grad * share);
        slopes[segment] = static_cast<acc_t>(total.product * rstd * share * rstd);
      },
      [&](int64_t segment, int64_t part) {
        const acc_t offset = offsets[segment], slope = slopes[segment];
        segments.for_each_pair(segment, part, [&](int64_t at, const auto& pair, const auto& channel) {
          Vec<acc_t> centred[2], passed[2];
          load(at, pair, channel, centred, passed);
          for (int half = 0; half < 2; ++half) {
            passed[half] = passed[half] * channel.scale - offset - centred[half] * slope;
          }
          pair.store(results + at, passed[0], passed[1]);
        });
      });
  std::vector<Sums> totals(segments.channels);
  for (int64_t i = 0; i < segments.count * num_parts; ++i) {
    Sums& total = totals[segments.channel_of(i / num_parts, i % num_parts)];
    total.grad += sums[i].grad;
    total.product += sums[i].product * static_cast<double>(segments.rstds[i / num_parts]);
  }
  dispatch_floating(grad_weight.scalar_type(), "group_norm: weight", [&](auto zero) {
    using weight_t = decltype(zero);
    for (int64_t c = 0; c < segments.channels; ++c) {
      grad_weight.mutable_data_ptr<weight_t>()[c] = static_cast<weight_t>(static_cast<acc_t>(totals[c].product));
      grad_bias.mutable_data_ptr<weight_t>()[c] = static_cast<weight_t>(static_cast<acc_t>(totals[c].grad));
    }
  });
}

// Call function(segments, whether there is a ReLU as a constant), where there is anything.
template <typename Function>
void dispatch_segments(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                       const Tensor& rstd, bool relu, Function function) {
  dispatch_floating(x.scalar_type(), "group_norm: x", [&](auto zero) {
    if (x.numel() > 0) {
      const Segments<decltype(zero)> segments(x, weight, bias, mean, rstd);
      relu ? function(segments, std::true_type{}) : function(segments, std::false_type{});
    }
  });
}

// Returns the dtype of the moments.
ScalarType check_arguments(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups) {
  STD_TORCH_CHECK(x.dim() >= 2 && x.size(1) >= 1, "group_norm: x must have the shape [N, C, ...] with C >= 1");
  STD_TORCH_CHECK(groups >= 1 && x.size(1) % groups == 0, "group_norm: groups must divide C of x");
  check_affine("group_norm", x, x.size(1), weight, bias);
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor, Tensor> group_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups,
                                              double eps, bool relu) {
  const ScalarType dtype = check_arguments(x, weight, bias, groups);
  const Tensor volume = torch::stable::contiguous(x);
  Tensor output = torch::stable::empty_like(volume);
  Tensor mean = torch::stable::new_zeros(x, {x.size(0), groups}, dtype), rstd = torch::stable::clone(mean);
  advise_huge_pages(output);
  dispatch_segments(volume, weight, bias, mean, rstd, relu,
                    [&](const auto& segments, auto has_relu) { forward<has_relu.value>(segments, eps, output); });
  return {output, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                       const Tensor& bias, const Tensor& mean, const Tensor& rstd,
                                                       int64_t groups, bool relu) {
  const ScalarType dtype = check_arguments(x, weight, bias, groups);
  check_grad("group_norm", grad, x);
  for (const Tensor* moments : {&mean, &rstd}) {
    STD_TORCH_CHECK(moments->is_cpu() && moments->scalar_type() == dtype && moments->dim() == 2 &&
                        moments->size(0) == x.size(0) && moments->size(1) == groups && moments->is_contiguous(),
                    "group_norm_backward: mean and rstd must be those of group_norm");
  }
  const Tensor volume = torch::stable::contiguous(x), grads = torch::stable::contiguous(grad);
  Tensor grad_x = torch::stable::empty_like(volume);
  Tensor grad_weight = torch::stable::new_zeros(weight, {x.size(1)}), grad_bias = torch::stable::clone(grad_weight);
  advise_huge_pages(grad_x);
  dispatch_segments(volume, weight, bias, mean, rstd, relu, [&](const auto& segments, auto has_relu) {
    backward<has_relu.value>(segments, grads, grad_x, grad_weight, grad_bias);
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace seg3d

STABLE_TORCH_LIBRARY_IMPL(seg3d, CPU, m) {
  m.impl("group_norm", TORCH_BOX(&seg3d::group_norm));
  m.impl("group_norm_backward", TORCH_BOX(&seg3d::group_norm_backward));
}
