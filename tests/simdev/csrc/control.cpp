// What tests set and read, reached as torch.ops.sim.*; device_module.py gives it names and types.
#include "copies.h"
#include "fallback.h"
#include "generators.h"

#include <torch/library.h>

namespace sim {
namespace {
void set_capacity_op(int64_t device, std::optional<int64_t> nbytes) {
  TORCH_CHECK(!nbytes || *nbytes >= 0, "sim: a capacity is a number of bytes or None, not ", *nbytes);
  set_capacity(device, nbytes ? std::optional<size_t>(*nbytes) : std::nullopt);
}

std::vector<int64_t> copied_bytes(int64_t device) {
  const auto moved = traffic(device);
  return {moved.host_to_device, moved.device_to_host, moved.device_to_device};
}

void manual_seed_all(int64_t seed) {
  for (DeviceIndex device = 0; device < device_count(); device++) {
    cpu_generator(default_generator(device)).set_current_seed(seed);
  }
}

Tensor get_rng_state(int64_t device) {
  return Tensor(default_generator(device).unsafeGetGeneratorImpl()->get_state());
}

void set_rng_state(int64_t device, const Tensor& state) {
  default_generator(device).unsafeGetGeneratorImpl()->set_state(*state.unsafeGetTensorImpl());
}
}  // namespace

TORCH_LIBRARY(sim, library) {
  library.def("prefer_cpu_kernels", prefer_cpu_kernels);
  library.def("set_capacity", set_capacity_op);
  library.def("set_async", set_async_mode);
  library.def("violations", violations);
  library.def("clear_violations", clear_violations);
  library.def("pinned_bytes", pinned_bytes);
  library.def("copied_bytes", copied_bytes);
  library.def("reset_copies", reset_traffic);
  library.def("manual_seed_all", manual_seed_all);
  library.def("get_rng_state", get_rng_state);
  library.def("set_rng_state", set_rng_state);
}
}  // namespace sim
