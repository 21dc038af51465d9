// The kernels of RoIAlign in 3D: two for each memory format, forward and backward.
//
// Channels last: the lanes of a warp take neighbouring channels, so every voxel is one run of memory. A warp makes a
// line of bins along x. The taps of z and y belong to the line; their weighted sum at one voxel of x is taken once and
// goes to all bins that read that voxel. A line of length X costs Z * Y * X loads a channel instead of eight a sample.
//
// Channels first: a block takes a tile of bins of one box, a thread one bin of several channels. The taps of the tile's
// bins lie in shared memory, one list per bin and axis; a bin costs Z * Y * X loads a channel.
//
// Z, Y, X are the voxels that a line or bin reads on each axis. A box that is not finite, or whose image is not in the
// batch, pools NaN and gets no gradient: a kernel cannot raise.
#pragma once

#include <cstdint>

#include "axis_taps.cuh"
#include "vector_access.cuh"

namespace seg3d {

constexpr int kPoolThreads = 128;
constexpr int kPoolWarps = kPoolThreads / kWarp;

template <typename coord_t>
__device__ inline bool can_pool(const coord_t* box, int64_t image, const PoolGeometry& geometry) {
  return image >= 0 && image < geometry.num_images && is_finite_box(box, geometry);
}

template <typename acc_t>
__device__ inline acc_t share_of_sample(acc_t grid) {
  return grid > acc_t(0) ? acc_t(1) / grid : acc_t(0);
}

// ---- Channels last ----

// The taps of z and y that a line of bins shares. Almost always one list each; else they are made anew for each voxel.
template <typename coord_t, typename acc_t>
struct LineTaps {
  const coord_t* box;
  int z_bin, y_bin;
  int64_t z_lists, y_lists;
  int num_z, num_y;
  Tap<acc_t>* z;
  Tap<acc_t>* y;

  __device__ LineTaps(const coord_t* of_box, int line, const PoolGeometry& geometry, Tap<acc_t> (*lists)[kWarp])
      : box(of_box), z_bin(line / geometry.y.out), y_bin(line % geometry.y.out), z(lists[0]), y(lists[1]) {
    z_lists = num_lists(pool_bins(box, 0, geometry.z, geometry), geometry.z.size);
    y_lists = num_lists(pool_bins(box, 1, geometry.y, geometry), geometry.y.size);
    fill(0, 0, geometry);
  }

  __device__ void fill(int64_t z_list, int64_t y_list, const PoolGeometry& geometry) {
    const int64_t row = geometry.x.size * geometry.channels;
    __syncwarp();
    num_z =
        fill_taps(pool_bins(box, 0, geometry.z, geometry), z_bin, z_list, geometry.z.size, geometry.y.size * row, z);
    num_y = fill_taps(pool_bins(box, 1, geometry.y, geometry), y_bin, y_list, geometry.y.size, row, y);
    __syncwarp();
  }

  // Call `visit(offset, weight)` for every pair of a tap of z and one of y.
  template <typename Visit>
  __device__ void for_each(const PoolGeometry& geometry, Visit visit) {
    const int64_t lists = z_lists * y_lists;
    for (int64_t list = 0; list < lists; ++list) {
      if (lists > 1) {
        fill(list / y_lists, list % y_lists, geometry);
      }
      for (int i = 0; i < num_z; ++i) {
        const Tap<acc_t> z_tap = z[i];
        for (int j = 0; j < num_y; ++j) {
          const Tap<acc_t> y_tap = y[j];
          visit(z_tap.offset + y_tap.offset, z_tap.weight * y_tap.weight);
        }
      }
    }
  }
};

// features [N, D, H, W, C], boxes [K, 6], output [K, d, h, w, C].
template <int width, typename scalar_t, typename coord_t>
__global__ void __launch_bounds__(kPoolThreads, 1)
    pool_channels_last(const scalar_t* __restrict__ features, const coord_t* __restrict__ boxes,
                       const int64_t* __restrict__ batch_index, const PoolGeometry geometry, scalar_t* output) {
  using acc_t = accumulate_t<scalar_t>;
  __shared__ Tap<acc_t> lists[kPoolWarps][2][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t channels = geometry.channels;
  const int64_t num_lines = geometry.num_boxes * geometry.z.out * geometry.y.out;
  for (int64_t line = int64_t(blockIdx.x) * kPoolWarps + warp; line < num_lines;
       line += int64_t(gridDim.x) * kPoolWarps) {
    const int64_t k = line / (geometry.z.out * geometry.y.out);
    const int in_box = static_cast<int>(line - k * (geometry.z.out * geometry.y.out));
    const coord_t* box = boxes + k * 6;
    const int64_t image = __ldg(batch_index + k);
    scalar_t* out = output + line * geometry.x.out * channels;
    if (!can_pool(box, image, geometry)) {
      for (int64_t i = lane; i < geometry.x.out * channels; i += kWarp) {
        store_row<1>(out + i, {static_cast<acc_t>(NAN)});
      }
      continue;
    }
    LineTaps<coord_t, acc_t> taps(box, in_box, geometry, lists[warp]);
    const auto x_bins = pool_bins(box, 2, geometry.x, geometry);
    const acc_t share = share_of_sample(static_cast<acc_t>(x_bins.grid));
    const scalar_t* volume = features + image * geometry.z.size * geometry.y.size * geometry.x.size * channels;
    for (int64_t first_channel = 0; first_channel < channels; first_channel += kWarp * width) {
      const int64_t channel = first_channel + lane * width;
      // The sums over z and y at the two voxels of x that were read last. Samples go along x, so the next one needs
      // these two or their neighbour.
      int64_t older_voxel = -1, newer_voxel = -1;
      acc_t older[width] = {}, newer[width] = {};
      for (int bin = 0; bin < geometry.x.out; ++bin) {
        const auto run = samples_on_axis(x_bins, bin, geometry.x.size);
        acc_t sum[width] = {};
        for (int64_t number = 0; number < run.count; ++number) {
          const coord_t position = sample_position(x_bins, bin, run.first + static_cast<coord_t>(number));
          const auto sample = clamped_sample(position, geometry.x.size);
#pragma unroll 1
          for (int side = 0; side < 2; ++side) {
            const int64_t voxel = side == 0 ? sample.low : sample.high;
            const acc_t weight = static_cast<acc_t>(side == 0 ? sample.low_weight : sample.high_weight);
            if (weight == acc_t(0)) {
              continue;
            }
            if (voxel != newer_voxel && voxel != older_voxel) {
              older_voxel = newer_voxel;
              newer_voxel = voxel;
#pragma unroll
              for (int i = 0; i < width; ++i) {
                older[i] = newer[i];
                newer[i] = acc_t(0);
              }
              taps.for_each(geometry, [&](int64_t offset, acc_t tap_weight) {
                if (channel < channels) {
                  acc_t row[width];
                  load_row<width>(volume + offset + voxel * channels + channel, row);
#pragma unroll
                  for (int i = 0; i < width; ++i) {
                    newer[i] += tap_weight * row[i];
                  }
                }
              });
            }
#pragma unroll
            for (int i = 0; i < width; ++i) {
              sum[i] += weight * (voxel == newer_voxel ? newer[i] : older[i]);
            }
          }
        }
        if (channel < channels) {
#pragma unroll
          for (int i = 0; i < width; ++i) {
            sum[i] *= share;
          }
          store_row<width>(out + int64_t(bin) * channels + channel, sum);
        }
      }
    }
  }
}

// The same lines the other way: grad [K, d, h, w, C] is summed into grad_features [N, D, H, W, C], which starts as
// zero.
template <int width, typename scalar_t, typename coord_t>
__global__ void __launch_bounds__(kPoolThreads, 1)
    unpool_channels_last(const scalar_t* __restrict__ grad, const coord_t* __restrict__ boxes,
                         const int64_t* __restrict__ batch_index, const PoolGeometry geometry,
                         accumulate_t<scalar_t>* grad_features) {
  using acc_t = accumulate_t<scalar_t>;
  __shared__ Tap<acc_t> lists[kPoolWarps][2][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t channels = geometry.channels;
  const int64_t num_lines = geometry.num_boxes * geometry.z.out * geometry.y.out;
  for (int64_t line = int64_t(blockIdx.x) * kPoolWarps + warp; line < num_lines;
       line += int64_t(gridDim.x) * kPoolWarps) {
    const int64_t k = line / (geometry.z.out * geometry.y.out);
    const int in_box = static_cast<int>(line - k * (geometry.z.out * geometry.y.out));
    const coord_t* box = boxes + k * 6;
    const int64_t image = __ldg(batch_index + k);
    if (!can_pool(box, image, geometry)) {
      continue;
    }
    LineTaps<coord_t, acc_t> taps(box, in_box, geometry, lists[warp]);
    const auto x_bins = pool_bins(box, 2, geometry.x, geometry);
    const acc_t share = share_of_sample(static_cast<acc_t>(x_bins.grid));
    acc_t* volume = grad_features + image * geometry.z.size * geometry.y.size * geometry.x.size * channels;
    const scalar_t* grad_line = grad + line * geometry.x.out * channels;
    for (int64_t first_channel = 0; first_channel < channels; first_channel += kWarp * width) {
      const int64_t channel = first_channel + lane * width;
      // The gradients of two voxels of x are held back until the samples have moved on.
      int64_t older_voxel = -1, newer_voxel = -1;
      acc_t older[width] = {}, newer[width] = {};
      // Give the older voxel's gradient to the volume, and make room for `voxel`.
      const auto advance = [&](int64_t voxel) {
        if (older_voxel >= 0) {
          taps.for_each(geometry, [&](int64_t offset, acc_t tap_weight) {
            if (channel < channels) {
              add_row<width>(volume + offset + older_voxel * channels + channel, tap_weight, older);
            }
          });
        }
        older_voxel = newer_voxel;
        newer_voxel = voxel;
#pragma unroll
        for (int i = 0; i < width; ++i) {
          older[i] = newer[i];
          newer[i] = acc_t(0);
        }
      };
      for (int bin = 0; bin < geometry.x.out; ++bin) {
        const auto run = samples_on_axis(x_bins, bin, geometry.x.size);
        acc_t row[width] = {};
        if (channel < channels) {
          load_row<width>(grad_line + int64_t(bin) * channels + channel, row);
        }
        for (int64_t number = 0; number < run.count; ++number) {
          const coord_t position = sample_position(x_bins, bin, run.first + static_cast<coord_t>(number));
          const auto sample = clamped_sample(position, geometry.x.size);
#pragma unroll 1
          for (int side = 0; side < 2; ++side) {
            const int64_t voxel = side == 0 ? sample.low : sample.high;
            const acc_t weight = share * static_cast<acc_t>(side == 0 ? sample.low_weight : sample.high_weight);
            if (weight == acc_t(0)) {
              continue;
            }
            if (voxel != newer_voxel && voxel != older_voxel) {
              advance(voxel);
            }
#pragma unroll
            for (int i = 0; i < width; ++i) {
              newer[i] += voxel == newer_voxel ? weight * row[i] : acc_t(0);
              older[i] += voxel == newer_voxel ? acc_t(0) : weight * row[i];
            }
          }
        }
      }
      for (int i = 0; i < 2; ++i) {
        advance(-1);
      }
    }
  }
}

// ---- Channels first ----

// A block's bins: x runs fastest over the lanes, so that neighbouring lanes read neighbouring voxels.
constexpr int kTileX = 8, kTileY = 4, kTileZ = 4;
constexpr int kTileLists = kTileZ + kTileY + kTileX;
static_assert(kTileX * kTileY * kTileZ == kPoolThreads);
// The channels that a block goes through with the same taps.
constexpr int kTileChannels = 32;

template <typename acc_t>
struct TileTaps {
  Tap<acc_t> taps[kTileLists][kWarp];
  int count[kTileLists];
};

// Which bins of which box, and which channels, a block works on.
struct Tile {
  int64_t box, channel;
  int z, y, x;
};

__host__ __device__ inline int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

__host__ __device__ inline int tiles_of_box(const PoolGeometry& geometry) {
  return ceil_div(geometry.z.out, kTileZ) * ceil_div(geometry.y.out, kTileY) * ceil_div(geometry.x.out, kTileX);
}

__host__ __device__ inline int64_t num_tiles(const PoolGeometry& geometry) {
  return geometry.num_boxes * ((geometry.channels + kTileChannels - 1) / kTileChannels) * tiles_of_box(geometry);
}

__device__ inline Tile tile_of(int64_t number, const PoolGeometry& geometry) {
  const int num_x = ceil_div(geometry.x.out, kTileX), num_y = ceil_div(geometry.y.out, kTileY);
  const int64_t group = number / tiles_of_box(geometry);
  const int in_box = static_cast<int>(number - group * tiles_of_box(geometry));
  const int64_t slices = (geometry.channels + kTileChannels - 1) / kTileChannels;
  const int64_t box = group / slices;
  return {box, (group - box * slices) * kTileChannels, in_box / num_x / num_y * kTileZ, in_box / num_x % num_y * kTileY,
          in_box % num_x * kTileX};
}

// Fill the lists of all bins of a tile, a warp one bin of an axis at a time. True if some bin may read something.
template <typename coord_t, typename acc_t>
__device__ inline bool fill_tile(const coord_t* box, const Tile& tile, int64_t z_list, int64_t y_list, int64_t x_list,
                                 const PoolGeometry& geometry, TileTaps<acc_t>& shared) {
  const int64_t row = geometry.x.size, slice = geometry.y.size * row;
  __syncthreads();
  for (int list = threadIdx.x / kWarp; list < kTileLists; list += kPoolWarps) {
    const bool is_z = list < kTileZ, is_y = !is_z && list < kTileZ + kTileY;
    const PoolAxis axis = is_z ? geometry.z : is_y ? geometry.y : geometry.x;
    const int bin = is_z ? tile.z + list : is_y ? tile.y + list - kTileZ : tile.x + list - kTileZ - kTileY;
    int count = 0;
    if (bin < axis.out) {
      const auto bins = pool_bins(box, is_z ? 0 : is_y ? 1 : 2, axis, geometry);
      count = fill_taps(bins, bin,
                        is_z   ? z_list
                        : is_y ? y_list
                               : x_list,
                        axis.size,
                        is_z   ? slice
                        : is_y ? row
                               : 1,
                        shared.taps[list]);
    }
    if (threadIdx.x % kWarp == 0) {
      shared.count[list] = count;
    }
  }
  __syncthreads();
  bool reads_z = false, reads_y = false, reads_x = false;
  for (int i = 0; i < kTileZ; ++i) {
    reads_z = reads_z || shared.count[i] > 0;
  }
  for (int i = 0; i < kTileY; ++i) {
    reads_y = reads_y || shared.count[kTileZ + i] > 0;
  }
  for (int i = 0; i < kTileX; ++i) {
    reads_x = reads_x || shared.count[kTileZ + kTileY + i] > 0;
  }
  return reads_z && reads_y && reads_x;
}

// Call `visit(offset, weight)` for every voxel that this thread's bin reads.
template <typename acc_t, typename Visit>
__device__ inline void for_each_voxel(const TileTaps<acc_t>& shared, Visit visit) {
  const int x_list = kTileZ + kTileY + threadIdx.x % kTileX;
  const int y_list = kTileZ + threadIdx.x / kTileX % kTileY;
  const int z_list = threadIdx.x / (kTileX * kTileY);
  for (int a = 0; a < shared.count[z_list]; ++a) {
    const Tap<acc_t> z_tap = shared.taps[z_list][a];
    for (int b = 0; b < shared.count[y_list]; ++b) {
      const Tap<acc_t> y_tap = shared.taps[y_list][b];
      for (int c = 0; c < shared.count[x_list]; ++c) {
        const Tap<acc_t> x_tap = shared.taps[x_list][c];
        visit(z_tap.offset + y_tap.offset + x_tap.offset, z_tap.weight * y_tap.weight * x_tap.weight);
      }
    }
  }
}

// The place of this thread's bin in a channel of the output, -1 if the tile juts out of the grid of bins.
__device__ inline int bin_of_thread(const Tile& tile, const PoolGeometry& geometry) {
  const int thread = threadIdx.x;
  const int x = tile.x + thread % kTileX, y = tile.y + thread / kTileX % kTileY,
            z = tile.z + thread / (kTileX * kTileY);
  const bool is_bin = z < geometry.z.out && y < geometry.y.out && x < geometry.x.out;
  return is_bin ? (z * geometry.y.out + y) * geometry.x.out + x : -1;
}

template <typename coord_t>
__device__ inline int64_t num_tile_lists(const coord_t* box, int number, const PoolAxis& axis,
                                         const PoolGeometry& geometry) {
  return num_lists(pool_bins(box, number, axis, geometry), axis.size);
}

// Walk over a tile's channels, `width` at a time, and over the lists of its bins. For each group of channels: start(c),
// visit(c, offset, weight) for every voxel of the bin, finish(c).
template <int width, typename coord_t, typename acc_t, typename Start, typename Visit, typename Finish>
__device__ inline void walk_tile(const coord_t* box, const Tile& tile, const PoolGeometry& geometry,
                                 TileTaps<acc_t>& shared, Start start, Visit visit, Finish finish) {
  const int64_t z_lists = num_tile_lists(box, 0, geometry.z, geometry),
                y_lists = num_tile_lists(box, 1, geometry.y, geometry),
                x_lists = num_tile_lists(box, 2, geometry.x, geometry);
  const int64_t lists = z_lists * y_lists * x_lists;
  const int64_t end =
      tile.channel + kTileChannels < geometry.channels ? tile.channel + kTileChannels : geometry.channels;
  bool reads = false;
  for (int64_t channel = tile.channel; channel < end; channel += width) {
    start(channel);
    for (int64_t list = 0; list < lists; ++list) {
      if (lists > 1 || channel == tile.channel) {
        reads = fill_tile(box, tile, list / (y_lists * x_lists), list / x_lists % y_lists, list % x_lists, geometry,
                          shared);
      }
      if (reads) {
        for_each_voxel(shared, [&](int64_t offset, acc_t weight) { visit(channel, offset, weight); });
      }
    }
    finish(channel);
  }
}

// features [N, C, D, H, W], boxes [K, 6], output [K, C, d, h, w].
template <int width, typename scalar_t, typename coord_t>
__global__ void __launch_bounds__(kPoolThreads, 1)
    pool_channels_first(const scalar_t* __restrict__ features, const coord_t* __restrict__ boxes,
                        const int64_t* __restrict__ batch_index, const PoolGeometry geometry, scalar_t* output) {
  using acc_t = accumulate_t<scalar_t>;
  __shared__ TileTaps<acc_t> shared;
  const int64_t channels = geometry.channels;
  const int64_t voxels = geometry.z.size * geometry.y.size * geometry.x.size;
  const int bins = geometry.z.out * geometry.y.out * geometry.x.out;
  for (int64_t number = blockIdx.x; number < num_tiles(geometry); number += gridDim.x) {
    const Tile tile = tile_of(number, geometry);
    const int bin = bin_of_thread(tile, geometry);
    const coord_t* box = boxes + tile.box * 6;
    const int64_t image = __ldg(batch_index + tile.box);
    const bool pools = can_pool(box, image, geometry);
    const scalar_t* volume = features + (pools ? image : 0) * channels * voxels;
    scalar_t* out = output + tile.box * channels * bins + bin;
    acc_t sum[width];
    const auto start = [&](int64_t) {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        sum[i] = pools ? acc_t(0) : static_cast<acc_t>(NAN);
      }
    };
    const auto visit = [&](int64_t channel, int64_t offset, acc_t weight) {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        if (channel + i < channels) {
          acc_t value[1];
          load_row<1>(volume + (channel + i) * voxels + offset, value);
          sum[i] += weight * value[0];
        }
      }
    };
    const auto finish = [&](int64_t channel) {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        if (bin >= 0 && channel + i < channels) {
          store_row<1>(out + (channel + i) * bins, {sum[i]});
        }
      }
    };
    if (pools) {
      walk_tile<width>(box, tile, geometry, shared, start, visit, finish);
    } else {
      for (int64_t channel = tile.channel; channel < tile.channel + kTileChannels; channel += width) {
        start(channel);
        finish(channel);
      }
    }
  }
}

// The same tiles the other way: grad [K, C, d, h, w] is summed into grad_features [N, C, D, H, W], which starts as
// zero.
template <int width, typename scalar_t, typename coord_t>
__global__ void __launch_bounds__(kPoolThreads, 1)
    unpool_channels_first(const scalar_t* __restrict__ grad, const coord_t* __restrict__ boxes,
                          const int64_t* __restrict__ batch_index, const PoolGeometry geometry,
                          accumulate_t<scalar_t>* grad_features) {
  using acc_t = accumulate_t<scalar_t>;
  __shared__ TileTaps<acc_t> shared;
  const int64_t channels = geometry.channels;
  const int64_t voxels = geometry.z.size * geometry.y.size * geometry.x.size;
  const int bins = geometry.z.out * geometry.y.out * geometry.x.out;
  for (int64_t number = blockIdx.x; number < num_tiles(geometry); number += gridDim.x) {
    const Tile tile = tile_of(number, geometry);
    const int bin = bin_of_thread(tile, geometry);
    const coord_t* box = boxes + tile.box * 6;
    const int64_t image = __ldg(batch_index + tile.box);
    if (!can_pool(box, image, geometry)) {
      continue;
    }
    acc_t* volume = grad_features + image * channels * voxels;
    const scalar_t* grad_box = grad + tile.box * channels * bins + bin;
    acc_t value[width];
    const auto start = [&](int64_t channel) {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        acc_t row[1] = {acc_t(0)};
        if (bin >= 0 && channel + i < channels) {
          load_row<1>(grad_box + (channel + i) * bins, row);
        }
        value[i] = row[0];
      }
    };
    const auto visit = [&](int64_t channel, int64_t offset, acc_t weight) {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        if (channel + i < channels) {
          atomicAdd(volume + (channel + i) * voxels + offset, weight * value[i]);
        }
      }
    };
    walk_tile<width>(box, tile, geometry, shared, start, visit, [](int64_t) {});
  }
}

}  // namespace seg3d
