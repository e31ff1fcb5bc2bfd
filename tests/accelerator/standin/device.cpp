// A device "vgpu" (PrivateUse1) whose memory is the CPU's: real numbers, real device checks, real
// worker threads of autograd, a random state per device, and counts of bytes and of waits.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/native/Fill.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Generator.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/Allocator.h>
#include <torch/library.h>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/resize_native.h>

using namespace at;
static constexpr DeviceIndex DEVICES = 2;
static thread_local DeviceIndex g_cur = 0;
static std::atomic<int64_t> g_now{0}, g_peak{0}, g_waits{0}, g_uploads{0};

// What the device is behind the host, by work that was only launched; in milliseconds.
static std::atomic<double> g_behind{0};
static double device_time() {
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  return g_behind + std::chrono::duration<double, std::milli>(now).count();
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::PrivateUse1; }
  Device exchangeDevice(Device d) const override { auto o = g_cur; g_cur = d.index() < 0 ? g_cur : d.index(); return Device(DeviceType::PrivateUse1, o); }
  Device getDevice() const override { return Device(DeviceType::PrivateUse1, g_cur); }
  void setDevice(Device d) const override { if (d.index() >= 0) g_cur = d.index(); }
  void uncheckedSetDevice(Device d) const noexcept override { if (d.index() >= 0) g_cur = d.index(); }
  Stream getStream(Device d) const noexcept override { return Stream(Stream::DEFAULT, Device(DeviceType::PrivateUse1, d.index() < 0 ? g_cur : d.index())); }
  Stream getDefaultStream(Device d) const override { return getStream(d); }
  Stream getNewStream(Device d, int) const override { return getStream(d); }
  Stream getStreamFromGlobalPool(Device d, bool) const override { return getStream(d); }
  Stream exchangeStream(Stream s) const noexcept override { return s; }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void record(void** e, const Stream&, const DeviceIndex, const EventFlag) const override {
    if (!*e) *e = new double;
    *static_cast<double*>(*e) = device_time();
  }
  double elapsedTime(void* a, void* b, const DeviceIndex) const override { return *static_cast<double*>(b) - *static_cast<double*>(a); }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void* e, const DeviceIndex) const noexcept override { delete static_cast<double*>(e); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { g_waits++; }
  void synchronizeEvent(void*) const override { g_waits++; }
  void synchronizeDevice(const DeviceIndex) const override { g_waits++; }
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

static void del(void* p) {
  if (!p) return;
  int64_t* h = reinterpret_cast<int64_t*>(static_cast<char*>(p) - 64);
  g_now -= h[0];
  std::free(h);
}
struct Alloc final : c10::Allocator {
  DataPtr allocate(size_t n) override {
    Device d(DeviceType::PrivateUse1, g_cur);
    if (n == 0) return {nullptr, nullptr, &del, d};
    size_t total = ((n + 64 + 63) / 64) * 64;
    void* raw = std::aligned_alloc(64, total);
    static_cast<int64_t*>(raw)[0] = n;
    int64_t now = (g_now += n);
    int64_t peak = g_peak.load();
    while (now > peak && !g_peak.compare_exchange_weak(peak, now)) {}
    void* p = static_cast<char*>(raw) + 64;
    return {p, p, &del, d};
  }
  DeleterFnPtr raw_deleter() const override { return &del; }
  void copy_data(void* d, const void* s, std::size_t n) const override { memcpy(d, s, n); }
};
static Alloc g_alloc;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &g_alloc);

// Memory of the host that copies go to without a wait.
static std::mutex g_pins;
static std::set<void*> g_pinned;
static void unpin(void* p) {
  std::lock_guard<std::mutex> lock(g_pins);
  g_pinned.erase(p);
  std::free(p);
}
struct Pinned final : c10::Allocator {
  DataPtr allocate(size_t n) override {
    void* p = n ? std::aligned_alloc(64, (n + 63) / 64 * 64) : nullptr;
    std::lock_guard<std::mutex> lock(g_pins);
    if (p) g_pinned.insert(p);
    return {p, p, &unpin, Device(kCPU)};
  }
  DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* d, const void* s, std::size_t n) const override { memcpy(d, s, n); }
};
static Pinned g_pinning;
static bool is_pinned(const void* p) {
  std::lock_guard<std::mutex> lock(g_pins);
  return g_pinned.count(const_cast<void*>(p)) > 0;
}

static Tensor as_cpu(const Tensor& t) {  // a CPU view of the same memory
  auto storage_bytes = t.storage().nbytes();
  auto opts = TensorOptions().dtype(t.dtype()).device(kCPU);
  if (t.numel() == 0) return at::empty(t.sizes(), opts);
  Tensor held = t;
  return at::from_blob(const_cast<void*>(t.storage().data()), t.sizes(), t.strides(), t.storage_offset(), [held](void*) {}, opts, Device(kCPU));
}

static Tensor v_empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device> device, std::optional<bool>, std::optional<MemoryFormat> mf) {
  c10::DeviceGuard g(device.value_or(Device(DeviceType::PrivateUse1, g_cur)));
  constexpr c10::DispatchKeySet ks(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &g_alloc, ks, c10::dtype_or_default(dtype), mf);
}
static Tensor v_empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard g(device.value_or(Device(DeviceType::PrivateUse1, g_cur)));
  constexpr c10::DispatchKeySet ks(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &g_alloc, ks, c10::dtype_or_default(dtype));
}
static bool is_v(const Tensor& t) { return t.device().type() == DeviceType::PrivateUse1; }

// Within a fallback, whose own copies between CPU and device are no copies of a GPU.
static thread_local int g_inside = 0;
struct Inside {
  Inside() { g_inside++; }
  ~Inside() { g_inside--; }
};

static Tensor v_copy_from(const Tensor& self, const Tensor& dst, bool non_blocking) {
  bool at_once = non_blocking && !is_v(dst) && is_pinned(dst.storage().data());
  if (!g_inside && is_v(self) && !is_v(dst) && !at_once) g_waits++;
  if (!g_inside && !is_v(self) && is_v(dst) && !non_blocking) g_uploads++;
  Tensor d = is_v(dst) ? as_cpu(dst) : dst, s = is_v(self) ? as_cpu(self) : self;
  if (dst.numel()) d.copy_(s);
  return dst;
}
static const Tensor& v_resize_(const Tensor& self, c10::SymIntArrayRef size, std::optional<MemoryFormat> mf) {
  auto sz = C10_AS_INTARRAYREF_SLOW(size);
  auto* impl = self.unsafeGetTensorImpl();
  int64_t n = 1; for (auto s : sz) n *= s;
  size_t need = n * self.dtype().itemsize();
  if (self.storage().nbytes() < need) {
    auto* st = self.storage().unsafeGetStorageImpl();
    auto old = self.storage().nbytes();
    DataPtr p = g_alloc.allocate(need);
    if (old) memcpy(p.get(), st->data(), old);
    st->set_data_ptr(std::move(p)); st->set_nbytes(need);
  }
  impl->set_sizes_contiguous(sz);
  return self;
}
static Tensor v_copy_from_and_resize(const Tensor& self, const Tensor& dst) {
  if (dst.sizes() != self.sizes()) { std::vector<c10::SymInt> s; for (auto x : self.sizes()) s.emplace_back(x); v_resize_(dst, s, std::nullopt); }
  Tensor d = is_v(dst) ? as_cpu(dst) : dst, s = is_v(self) ? as_cpu(self) : self;
  if (dst.numel()) d.copy_(s);
  return dst;
}
static Tensor v_as_strided(const Tensor& s, IntArrayRef a, IntArrayRef b, std::optional<int64_t> o) { return at::native::as_strided_tensorimpl(s, a, b, o); }
static Tensor v_view(const Tensor& s, IntArrayRef a) { return at::native::view(s, a); }
static Tensor v_reshape_alias(const Tensor& s, IntArrayRef a, IntArrayRef b) { return at::native::_reshape_alias(s, a, b); }
static Tensor v_unfold(const Tensor& s, int64_t d, int64_t n, int64_t st) { return at::native::unfold(s, d, n, st); }
static Tensor& v_set(Tensor& r, Storage st, int64_t off, IntArrayRef size, IntArrayRef stride) {
  r.unsafeGetTensorImpl()->set_storage_keep_dtype(st);
  r.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, off);
  return r;
}
static Tensor& v_set_st(Tensor& r, Storage st) {
  int64_t n = st.nbytes() / r.dtype().itemsize();
  r.unsafeGetTensorImpl()->set_storage_keep_dtype(st);
  r.unsafeGetTensorImpl()->set_sizes_contiguous({n}); r.unsafeGetTensorImpl()->set_storage_offset(0);
  return r;
}
static Scalar v_local_scalar(const Tensor& s) { g_waits++; return as_cpu(s).item(); }

// Random numbers come from the device's own generator: its state takes the place of the CPU's.
static std::mutex g_random;
static Generator& generator(DeviceIndex i) {
  static Generator held[DEVICES] = {at::detail::createCPUGenerator(), at::detail::createCPUGenerator()};
  return held[i];
}
struct OwnRandom {
  std::lock_guard<std::mutex> lock{g_random};
  Generator cpu = at::detail::getDefaultCPUGenerator(), own;
  Tensor before = cpu.get_state();
  explicit OwnRandom(DeviceIndex i) : own(generator(i)) { cpu.set_state(own.get_state()); }
  ~OwnRandom() { own.set_state(cpu.get_state()); cpu.set_state(before); }
};
static bool draws(const c10::OperatorHandle& op, at::ArrayRef<c10::IValue> args) {
  const auto& schema = op.schema();
  for (size_t i = 0; i < args.size(); i++) {
    auto kind = schema.arguments()[i].type()->annotation_str();
    if (kind.find("Generator") != std::string::npos) return args[i].isNone();
  }
  return schema.name() == "aten::native_dropout";
}

// What makes the host wait, since the size of the result depends on values.
static bool waits(const std::string& name, at::ArrayRef<c10::IValue> args) {
  static const std::set<std::string> sized{
      "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::equal", "aten::_unique2",
      "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave"};
  if (sized.count(name)) return true;
  // reading by a mask asks for its nonzeros first; a single value is filled in without
  if (name != "aten::_index_put_impl_" || args[2].toTensor().numel() == 1) return false;
  for (const std::optional<Tensor>& t : args[1].toOptionalTensorVector())
    if (t && t->defined() && (t->scalar_type() == kBool || t->scalar_type() == kByte)) return true;
  return false;
}

static void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  auto n = schema.arguments().size();
  auto args = torch::jit::last(stack, n);
  const std::string& name = schema.name();
  std::optional<Device> seen;
  auto look = [&](const Tensor& t, bool index) {
    if (!t.defined()) return;
    if (t.device().type() == DeviceType::CPU) {
      TORCH_CHECK(t.dim() == 0 || index, "MIXED DEVICES: ", name, " got a CPU tensor of shape ", t.sizes(), " beside vgpu tensors");
      return;
    }
    if (is_v(t)) {
      TORCH_CHECK(!seen || *seen == t.device(), "MIXED DEVICES: ", name, " got ", t.device(), " beside ", *seen);
      seen = t.device();
    }
  };
  bool idx = name == "aten::index" || name == "aten::index_put_" || name == "aten::index_put" || name == "aten::_index_put_impl_";
  for (const auto& a : args) {
    if (a.isTensor()) look(a.toTensor(), false);
    else if (a.isTensorList()) for (const Tensor& t : a.toTensorVector()) look(t, false);
    else if (a.isOptionalTensorList()) for (const std::optional<Tensor>& t : a.toOptionalTensorVector()) if (t) look(*t, idx);
  }
  if (waits(name, args)) g_waits++;
  std::optional<OwnRandom> own;
  if (draws(op, args)) own.emplace(seen ? seen->index() : g_cur);
  Inside inside;
  at::native::cpu_fallback(op, stack, false);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", v_empty);
  m.impl("empty_strided", v_empty_strided);
  m.impl("_copy_from", v_copy_from);
  m.impl("_copy_from_and_resize", v_copy_from_and_resize);
  m.impl("as_strided", v_as_strided);
  m.impl("view", v_view);
  m.impl("_reshape_alias", v_reshape_alias);
  m.impl("unfold", v_unfold);
  m.impl("resize_", v_resize_);
  m.impl("set_.source_Storage_storage_offset", v_set);
  m.impl("set_.source_Storage", v_set_st);
  m.impl("_local_scalar_dense", v_local_scalar);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

// autocast, the ops that matter here
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(baddbmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(softmax, int, fp32)
  KERNEL_PRIVATEUSEONE(log_softmax, int, fp32)
  KERNEL_PRIVATEUSEONE(cross_entropy_loss, fp32)
  KERNEL_PRIVATEUSEONE(mse_loss, fp32)
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  const Generator& getDefaultGenerator(DeviceIndex i) const override { return generator(i < 0 ? g_cur : i); }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  bool isPinnedPtr(const void* p) const override { return is_pinned(p); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &g_pinning; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  Device getDeviceFromPtr(void*) const override { return Device(DeviceType::PrivateUse1, g_cur); }
  void resizePrivateUse1Bytes(const Storage& s, size_t n) const override {
    auto* st = s.unsafeGetStorageImpl();
    DataPtr p = g_alloc.allocate(n);
    if (n && st->nbytes()) memcpy(p.get(), st->data(), std::min(n, st->nbytes()));
    st->set_data_ptr(std::move(p)); st->set_nbytes(n);
  }
};

static std::vector<int64_t> v_stats(bool reset) {
  std::vector<int64_t> r{g_now, g_peak, g_waits, g_uploads};
  if (reset) { g_peak = g_now.load(); g_waits = 0; g_uploads = 0; }
  return r;
}
static int64_t v_set_device(int64_t i) { auto o = g_cur; if (i >= 0) g_cur = i; return o; }
static void v_launch(double seconds) { g_behind = g_behind + 1000 * seconds; }
static Tensor v_get_state(int64_t i) { return generator(i).get_state(); }
static void v_set_state(int64_t i, const Tensor& state) { generator(i).set_state(state); }
static void v_seed(int64_t i, int64_t seed) { generator(i).set_current_seed(seed); }
TORCH_LIBRARY(vgpu, m) {
  m.def("stats(bool reset) -> int[]", v_stats);
  m.def("launch(float seconds) -> ()", v_launch);
  m.def("set_device(int i) -> int", v_set_device);
  m.def("get_rng_state(int i) -> Tensor", v_get_state);
  m.def("set_rng_state(int i, Tensor state) -> ()", v_set_state);
  m.def("seed(int i, int seed) -> ()", v_seed);
}
static int init = [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); return 0; }();
