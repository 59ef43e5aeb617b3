// What the packages' C++ code for the host uses of torch for CUDA; a tensor of a CPU is taken for one of a GPU.
#pragma once
#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/types.h>

#include "device.h"

namespace at::cuda {
struct Stream { void* stream() const { return nullptr; } };
inline Stream getCurrentCUDAStream() { return {}; }
struct CUDAGuard { explicit CUDAGuard(c10::Device) {} };
}  // namespace at::cuda

#define is_cuda is_cpu
