// Which kernels launchers launch, without a GPU: the library's objects with a stand-in for the CUDA runtime, which
// notes kernels in place of running them, and launches and tensor maps that the real one would refuse (stderr).
// scripts/launches.py builds it and asks.
//
// stdin, a problem a line: op, dtype (their numbers), allow_tf32; N C H W K R S; strides of x, w and y (n c h w);
// stride, padding (top bottom left right), dilation; groups; bytes that x, w and y are aligned to; whether there is a
// bias. Every row that supports a problem is launched. stdout, a kernel a line: the first problem that launched it, or
// -1, and its mangled name.
#include <cuda.h>
#include <driver_types.h>

#include <cstdio>
#include <cstring>
#include <iostream>
#include <string>
#include <unordered_map>

#include "../csrc/core/folded.h"
#include "../csrc/core/planner.h"
#include "../csrc/cuda/launch.h"
#include "../csrc/cuda/pack.h"

namespace {

struct Kernel {
  std::string name;
  long first = -1;
};
auto& kernels() {
  static auto& all = *new std::unordered_map<void const*, Kernel>;
  return all;
}
long problem = 0;
char const* row_name = "";

struct Sizes {
  unsigned x, y, z;
  size_t count() const { return size_t(x) * y * z; }
};

void refused(char const* what, std::string const& name) {
  std::fprintf(stderr, "problem %ld, row %s: %s %s\n", problem, row_name, what, name.c_str());
}

// What the runtime refuses.
void launched(void const* kernel, Sizes grid, Sizes block, size_t shared, Sizes cluster = {1, 1, 1}) {
  Kernel& of = kernels()[kernel];
  if (of.first < 0) of.first = problem;
  bool const blocks = grid.count() > 0 && grid.x < 1u << 31 && grid.y < 1u << 16 && grid.z < 1u << 16,
             clusters = grid.x % cluster.x == 0 && grid.y % cluster.y == 0 && grid.z % cluster.z == 0;
  if (!blocks || !clusters || block.count() == 0 || block.count() > 1024 || shared > 227 * 1024)
    refused("no such launch of", of.name);
}

// What the driver refuses of tensor maps.
CUresult encoded(char const* kind, CUtensorMapDataType type, unsigned rank, void const* address, cuuint64_t const* size,
                 cuuint64_t const* stride, cuuint32_t const* step, unsigned inner, CUtensorMapSwizzle swizzle,
                 bool good) {
  unsigned const half = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ||
                        type == CU_TENSOR_MAP_DATA_TYPE_UINT16;
  unsigned const bytes = inner * (half ? 2 : 4);
  good = good && reinterpret_cast<uint64_t>(address) % 16 == 0 && bytes % 16 == 0;
  for (unsigned i = 0; i < rank; ++i)
    good = good && size[i] > 0 && size[i] <= cuuint64_t(1) << 32 && step[i] > 0 && step[i] <= 8;
  for (unsigned i = 0; i + 1 < rank; ++i) good = good && stride[i] % 16 == 0 && stride[i] < cuuint64_t(1) << 40;
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_128B) good = good && bytes <= 128;
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_64B) good = good && bytes <= 64;
  if (!good) refused("no such map,", kind);
  return CUDA_SUCCESS;
}
CUresult encode_tiled(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank, void* address, cuuint64_t const* size,
                      cuuint64_t const* stride, cuuint32_t const* box, cuuint32_t const* step, CUtensorMapInterleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  bool good = true;
  for (unsigned i = 0; i < rank; ++i) good = good && box[i] > 0 && box[i] <= 256;
  return encoded("tiled", type, rank, address, size, stride, step, box[0], swizzle, good);
}
CUresult encode_im2col(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank, void* address, cuuint64_t const* size,
                       cuuint64_t const* stride, int const* lower, int const* upper, cuuint32_t channels,
                       cuuint32_t pixels, cuuint32_t const* step, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  int const most = rank == 4 ? 128 : 16;
  bool good = channels > 0 && channels <= 256 && pixels > 0 && pixels <= 1024;
  for (unsigned i = 0; i + 2 < rank; ++i)
    good = good && lower[i] >= -most && lower[i] < most && upper[i] >= -most && upper[i] < most;
  return encoded("im2col", type, rank, address, size, stride, step, channels, swizzle, good);
}

struct {
  Sizes grid, block;
  size_t shared;
  void* stream;
} configured;

}  // namespace

extern "C" {
void** __cudaRegisterFatBinary(void*) {
  static void* module;
  return &module;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, char const* host, char*, char const* name, int, void*, void*, void*, void*, int*) {
  kernels()[host].name = name;
}
unsigned __cudaPushCallConfiguration(Sizes grid, Sizes block, size_t shared, void* stream) {
  configured = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(Sizes* grid, Sizes* block, size_t* shared, void** stream) {
  *grid = configured.grid, *block = configured.block, *shared = configured.shared, *stream = configured.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(void const** kernel, void const* host) {
  *kernel = host;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(void const* kernel, Sizes grid, Sizes block, void**, size_t shared, void*) {
  return launched(kernel, grid, block, shared), cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(cudaLaunchConfig_t const* config, void const* kernel, void**) {
  Sizes cluster{1, 1, 1};
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (auto const& of = config->attrs[i]; of.id == cudaLaunchAttributeClusterDimension)
      cluster = {of.val.clusterDim.x, of.val.clusterDim.y, of.val.clusterDim.z};
  auto const sizes = [](dim3 const& d) { return Sizes{d.x, d.y, d.z}; };
  return launched(kernel, sizes(config->gridDim), sizes(config->blockDim), config->dynamicSmemBytes, cluster),
         cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(void const*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  conv2d_ext::Device const& d = conv2d_ext::h200_sxm;
  *value = which == cudaDevAttrMultiProcessorCount      ? d.sm_count
           : which == cudaDevAttrComputeCapabilityMajor ? d.compute_capability / 10
                                                        : d.compute_capability % 10;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(char const* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  bool const tiled = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = tiled ? reinterpret_cast<void*>(encode_tiled) : reinterpret_cast<void*>(encode_im2col);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
}

namespace conv2d_ext {

#define CONV2D_EXT_DECLARE_LAUNCHER(family, op, dtype, tm, tn, tk, variant)                                    \
  cudaError_t family##_##op##_##dtype##_##tm##x##tn##_##variant(Problem const&, Plan const&, Arguments const&, \
                                                                cudaStream_t);
CONV2D_EXT_KERNELS(CONV2D_EXT_DECLARE_LAUNCHER)
#define CONV2D_EXT_ADDRESS(family, op, dtype, tm, tn, tk, variant) &family##_##op##_##dtype##_##tm##x##tn##_##variant,
constexpr Launcher kLaunchers[] = {CONV2D_EXT_KERNELS(CONV2D_EXT_ADDRESS)};

Row const& row_of(Plan const& plan) { return table_row(plan.kernel); }

std::istream& operator>>(std::istream& in, Strides& s) { return in >> s.n >> s.c >> s.h >> s.w; }

// An address so far from others, and so aligned.
void* address(int place, int align) { return reinterpret_cast<void*>((int64_t(place) << 40) + align % 16); }

void launch(Op op, Problem const& p, int row, bool bias) {
  Choice const choice = choice_of_row(row, op, p, h200_sxm);
  row_name = table_row(row).name;
  void *const x = address(1, p.x_align), *const w = address(2, p.w_align), *const y = address(3, p.y_align);
  Arguments args{};
  args.a = op == Op::dgrad ? y : x, args.b = op == Op::wgrad ? y : w;
  args.out = op == Op::fprop ? y : op == Op::dgrad ? x : w;
  args.workspace = address(4, 16);
  if (bias && op == Op::fprop) args.bias = address(5, 16), args.bias_stride = 1;
  if (choice.copies != 0 || choice.parts)
    launch_packed(kLaunchers[row], op, p, choice.plan, args, nullptr);
  else
    kLaunchers[row](choice.turn, choice.plan, args, nullptr);
}

}  // namespace conv2d_ext

int main() {
  using namespace conv2d_ext;
  int op, dtype, tf32, x_align, w_align, y_align, bias;
  for (Problem p; std::cin >> op >> dtype >> tf32; ++problem, p = {}) {
    std::cin >> p.N >> p.C >> p.H >> p.W >> p.K >> p.R >> p.S >> p.x >> p.w >> p.y >> p.stride_h >> p.stride_w;
    std::cin >> p.pad_top >> p.pad_bottom >> p.pad_left >> p.pad_right >> p.dilation_h >> p.dilation_w >> p.groups;
    std::cin >> x_align >> w_align >> y_align >> bias;
    p.dtype = DType(dtype), p.allow_tf32 = tf32 != 0;
    p = folded(Op(op), p);
    p.x_align = x_align, p.w_align = w_align, p.y_align = y_align;
    for (int row = 0; row < row_count(); ++row)
      if (row_supports(row, Op(op), p, h200_sxm)) launch(Op(op), p, row, bias != 0);
  }
  for (auto const& [address, kernel] : kernels()) std::printf("%ld %s\n", kernel.first, kernel.name.c_str());
}
