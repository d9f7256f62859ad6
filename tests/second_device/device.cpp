// A device of its own on the CPU's memory: its tensors mix with those of the CPU as little as a
// GPU's do, and its memory can be counted, limited and made to run out at a given allocation.
//
//   memory      the ledger of what is allocated, which every allocation goes through
//   device      what torch asks of a device: an allocator, a guard, hooks
//   kernels     the few operators that make, move or view memory; all others run on the CPU,
//               with their operands copied there and their results copied back
//   ops         torch.ops.second_device.*: the ledger, as Python reads and sets it

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <cstring>
#include <mutex>
#include <optional>

namespace {

using at::Tensor;
constexpr auto SECOND = c10::DeviceType::PrivateUse1;

// memory ---------------------------------------------------------------------------------------

class Ledger {
 public:
  // Enter an allocation, or throw what a device throws that has no room for it.
  void take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++allocations;
    const bool planted = allocations >= fail_from && allocations < fail_to;
    if (planted || allocated + bytes > limit) {
      const auto why = planted ? "as planted" : "beyond its limit";
      const auto text = c10::str("out of memory on the second device, ", why, ": ", bytes,
          " bytes in allocation ", allocations, ", ", allocated, " of ", limit, " are taken");
      throw c10::OutOfMemoryError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, text);
    }
    allocated += bytes;
    peak = std::max(peak, allocated);
  }

  void give_back(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    allocated -= bytes;
  }

  int64_t allocated = 0, peak = 0, limit = 0;  // bytes
  int64_t allocations = 0;                     // since the last plant
  int64_t fail_from = 0, fail_to = 0;          // the allocations that fail, by their numbers

 private:
  std::mutex mutex_;  // backward runs in a thread of its own
};

Ledger ledger;

struct Chunk {  // of memory, as its deleter must know it
  void* data;
  int64_t bytes;
};

void free_chunk(void* context) {
  auto* chunk = static_cast<Chunk*>(context);
  ledger.give_back(chunk->bytes);
  c10::free_cpu(chunk->data);
  delete chunk;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(SECOND, 0);
    if (bytes == 0) return {nullptr, device};
    ledger.take(static_cast<int64_t>(bytes));
    auto* chunk = new Chunk{c10::alloc_cpu(bytes), static_cast<int64_t>(bytes)};
    return {chunk->data, chunk, &free_chunk, device};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(SECOND, &allocator);

// device ---------------------------------------------------------------------------------------

// One device with one stream on which all work is done as soon as it is asked for.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Device only() { return {SECOND, 0}; }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, only()); }

  c10::DeviceType type() const override { return SECOND; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return only(); }
  c10::Device exchangeDevice(c10::Device) const override { return only(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// Give a storage room for so many bytes, and keep what it holds.
void grow(const c10::Storage& storage, size_t bytes) {
  auto* impl = storage.unsafeGetStorageImpl();
  auto room = allocator.allocate(bytes);
  if (const auto kept = std::min(bytes, impl->nbytes())) {
    std::memcpy(room.get(), storage.data(), kept);
  }
  impl->set_data_ptr_noswap(std::move(room));
  impl->set_nbytes(bytes);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  at::Allocator* getPinnedMemoryAllocator() const override { return at::getCPUAllocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    grow(storage, bytes);
  }
};

[[maybe_unused]] const bool hooked = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks);  // for as long as the process lives
  return true;
}();

// kernels --------------------------------------------------------------------------------------

using Sizes = c10::SymIntArrayRef;
constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

Tensor empty(Sizes sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(sizes), &allocator, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(Sizes sizes, Sizes strides, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(sizes),
      C10_AS_INTARRAYREF_SLOW(strides), &allocator, KEYS, c10::dtype_or_default(dtype));
}

void resize_to(const Tensor& x, at::IntArrayRef sizes) {
  x.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  const size_t bytes = (x.storage_offset() + x.numel()) * x.element_size();
  if (x.storage().nbytes() < bytes) grow(x.storage(), bytes);
}

const Tensor& resize_(const Tensor& self, Sizes sizes, std::optional<at::MemoryFormat>) {
  const auto plain = C10_AS_INTARRAYREF_SLOW(sizes);
  if (self.sizes() != plain) resize_to(self, plain);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source, c10::SymInt offset, Sizes sizes,
                    Sizes strides) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), offset.expect_int());
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / self.element_size());
  return set_storage(self, std::move(source), 0, c10::SymInt(count), c10::SymInt(1));
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source.storage());
  impl->set_sizes_and_strides(source.sizes(), source.strides(), source.storage_offset());
  return self;
}

// The same memory as a tensor of the CPU, for kernels alone.
Tensor on_cpu(const Tensor& x) {
  if (x.device().type() != SECOND) return x;
  const auto options = at::TensorOptions(x.dtype()).device(at::kCPU);
  return at::from_blob(const_cast<void*>(x.const_data_ptr()), x.sizes(), x.strides(), options);
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool) {
  on_cpu(target).copy_(on_cpu(source));
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  if (target.sizes() != source.sizes()) resize_to(target, source.sizes());
  return copy_from(source, target, false);
}

at::Scalar item(const Tensor& self) { return on_cpu(self).item(); }

Tensor as_strided(const Tensor& self, Sizes sizes, Sizes strides,
                  std::optional<c10::SymInt> offset) {
  std::optional<int64_t> start;
  if (offset) start = offset->expect_int();
  return at::native::as_strided_tensorimpl(
      self, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), start);
}

Tensor view(const Tensor& self, Sizes sizes) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(sizes));
}

Tensor reshape_alias(const Tensor& self, Sizes sizes, Sizes strides) {
  return at::native::_reshape_alias(
      self, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
}

Tensor unfold(const Tensor& self, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(self, dimension, size, step);
}

// Convolutions ask for an operator that every device must bring along.
template <typename... Tensors>
void check_second(const Tensors&... tensors) {
  const bool all = ((!tensors.defined() || tensors.device().type() == SECOND) && ...);
  TORCH_CHECK(all, "Expected all tensors of a convolution to be on the same device");
}

Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   Sizes stride, Sizes padding, Sizes dilation, bool transposed,
                   Sizes output_padding, c10::SymInt groups) {
  check_second(x, weight, bias.value_or(Tensor()));
  const auto plain_bias = bias && bias->defined() ? std::optional(on_cpu(*bias)) : std::nullopt;
  return at::convolution_symint(on_cpu(x), on_cpu(weight), plain_bias, stride, padding, dilation,
      transposed, output_padding, groups).to(Guard::only());
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& weight, Sizes stride, Sizes padding,
    Sizes dilation, bool transposed, Sizes output_padding, c10::SymInt groups,
    std::array<bool, 3> which) {
  check_second(gradient, x, weight);
  const std::array<c10::SymInt, 1> bias{weight.sym_size(transposed ? 1 : 0)};
  auto gradients = at::convolution_backward_symint(on_cpu(gradient), on_cpu(x), on_cpu(weight),
      Sizes(bias), stride, padding, dilation, transposed, output_padding, groups, which);
  const auto back = [](const Tensor& y) { return y.defined() ? y.to(Guard::only()) : y; };
  return {back(std::get<0>(gradients)), back(std::get<1>(gradients)),
          back(std::get<2>(gradients))};
}

// Refuse what a GPU refuses: tensors of several devices in one operator. A number (a tensor of no
// dimensions) may come from anywhere, and so may the indices of x[indices].
void check_devices(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const auto& name = op.schema().name();
  const bool indexing = name.rfind("aten::index", 0) == 0 || name == "aten::_index_put_impl_";
  bool second = false, other = false;
  const auto add = [&](const Tensor& x) {
    if (!x.defined()) return;
    if (x.device().type() == SECOND) second = true;
    else if (x.dim() > 0) other = true;
  };
  const auto arguments = torch::jit::last(stack, op.schema().arguments().size());
  for (const auto& value : arguments) {
    if (value.isTensor()) {
      add(value.toTensor());
    } else if (value.isTensorList()) {
      for (const Tensor& x : value.toTensorVector()) add(x);
    } else if (value.isOptionalTensorList() && !indexing) {
      for (const std::optional<Tensor> x : value.toOptionalTensorList()) {
        if (x) add(*x);
      }
    }
  }
  TORCH_CHECK(!(second && other), "Expected all tensors to be on the same device, but ", name,
              " got some on the second device and some on the CPU");
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check_devices(op, *stack);
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {  // without effect
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &item);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("unfold", &unfold);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

// ops ------------------------------------------------------------------------------------------

TORCH_LIBRARY(second_device, m) {
  m.def("allocated", []() -> int64_t { return ledger.allocated; });
  m.def("peak", []() -> int64_t { return ledger.peak; });
  m.def("reset_peak", []() { ledger.peak = ledger.allocated; });
  m.def("limit", []() -> int64_t { return ledger.limit; });
  m.def("set_limit", [](int64_t bytes) { ledger.limit = bytes; });
  m.def("allocations", []() -> int64_t { return ledger.allocations; });
  m.def("plant", [](int64_t from, int64_t count) {
    ledger.allocations = 0;
    ledger.fail_from = from;
    ledger.fail_to = from + count;
  });
}
