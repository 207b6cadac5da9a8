// What a CPU build of torch lacks to take tensors for CUDA's, as far as shapes and devices go.
//
// torch.compile's fake tensors have a device and a shape, and no values. With these three parts the
// real training step and the real sampling loop run on fake tensors of cuda:0, and torch chooses
// attention kernels as it does on an H100. tests/fake_cuda.py loads it; tests/test_cuda_guard.py
// says what is checked. Nothing here computes anything.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device cuda0(c10::DeviceType::CUDA, 0);

// 1) There is one GPU. Its pinned memory is ordinary memory, its generators are the CPU's. torch finds
// the class by its name.
struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs = {}) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
};

// 2) Changing the device and the stream does nothing.
struct FakeGuard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return cuda0; }
  c10::Device getDevice() const override { return cuda0; }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, cuda0);
  }
  c10::Stream getDefaultStream(c10::Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, cuda0);
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, cuda0);
  }
};

// 3) The choice of an attention kernel, after torch's sdp_utils.cpp for capability 9.0: the first in
// the order of preference that is switched on and can do it. cuDNN takes a mask; flash takes none.
int64_t choose_kernel(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const std::optional<at::Tensor>& mask,
    double /*dropout*/,
    bool is_causal,
    std::optional<double> /*scale*/,
    bool /*enable_gqa*/) {
  auto& context = at::globalContext();
  const bool one_dtype = q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type();
  const bool half = q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16;
  const bool is_square = q.size(2) == k.size(2);
  for (auto kernel : context.sDPPriorityOrder()) {
    bool can = false;
    switch (kernel) {
      case at::SDPBackend::cudnn_attention:
        can = context.userEnabledCuDNNSDP() && one_dtype && half && q.size(3) % 8 == 0 &&
            q.size(3) <= 128 && k.size(2) != 1;
        break;
      case at::SDPBackend::flash_attention:
        can = context.userEnabledFlashSDP() && one_dtype && half && !mask.has_value() &&
            q.size(3) <= 256 && (is_square || !is_causal);
        break;
      case at::SDPBackend::efficient_attention:
        can = context.userEnabledMemEfficientSDP() && one_dtype && q.size(3) % (half ? 8 : 4) == 0;
        break;
      case at::SDPBackend::math:
        can = context.userEnabledMathSDP();
        break;
      default:
        break;
    }
    if (can) {
      return static_cast<int64_t>(kernel);
    }
  }
  TORCH_CHECK(false, "No available kernel. Aborting execution.");
}

} // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard)
}

namespace at::native {
const RegisterCUDADispatch<_fused_sdp_choice_stub_DECLARE_DISPATCH_type> registered(
    _fused_sdp_choice_stub,
    &choose_kernel);
}
