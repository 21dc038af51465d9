// Small kernels with one planted fault each, which the shim must bring to light: run_planted FOLDER.
#include "call.h"

constexpr int kThreads = 96;

enum Fault { kNone, kNoBarrier, kNoWarpBarrier, kOutOfBounds, kSharedOutOfBounds, kStrided, kEarlyExit };

// The block's values in reverse order, by way of shared memory; with kNoWarpBarrier each warp's values.
template <Fault fault>
__global__ void reverse(const float* in, float* out) {
  __shared__ float shared[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  if (fault == kEarlyExit && thread == 5) {
    return;
  }
  const int from = fault == kStrided ? thread * 32 : fault == kOutOfBounds ? thread + 1 : thread;
  shared[fault == kSharedOutOfBounds ? thread + 1 : thread] = __ldg(in + from);
  if (fault == kEarlyExit) {
    __syncwarp();
  }
  if (fault != kNoBarrier && fault != kNoWarpBarrier) {
    __syncthreads();
  }
  const int partner = fault == kNoWarpBarrier ? thread / 32 * 32 + 31 - thread % 32 : kThreads - 1 - thread;
  __stcs(out + thread, shared[partner]);
}

template <Fault fault>
void run(const Call& call) {
  const auto in = call.array<float>("in");
  const Array<float> out(kThreads);
  cuda_shim::launch(1, kThreads, [&] { reverse<fault>(in.data(), out.data()); });
  call.write("result", out);
}

int main(int, char** arguments) {
  const Call call(arguments[1]);
  const std::string& fault = call.word("fault");
  if (fault == "none") run<kNone>(call);
  if (fault == "no_barrier") run<kNoBarrier>(call);
  if (fault == "no_warp_barrier") run<kNoWarpBarrier>(call);
  if (fault == "out_of_bounds") run<kOutOfBounds>(call);
  if (fault == "shared_out_of_bounds") run<kSharedOutOfBounds>(call);
  if (fault == "strided") run<kStrided>(call);
  if (fault == "early_exit") run<kEarlyExit>(call);
  return 0;
}
