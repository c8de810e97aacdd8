#include "generators.h"

#include <ATen/CPUGeneratorImpl.h>

#include <vector>

namespace sim {
namespace {
struct SimGenerator final : c10::GeneratorImpl {
  SimGenerator(DeviceIndex device, at::Generator cpu)
      : c10::GeneratorImpl(Device(kSim, device), c10::DispatchKeySet(kSimKey)), inner(std::move(cpu)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  SimGenerator* clone_impl() const override { return new SimGenerator(device_.index(), inner.clone()); }

  at::Generator inner;
};
}  // namespace

at::Generator new_generator(DeviceIndex device) {
  return at::make_generator<SimGenerator>(resolve(device), at::make_generator<at::CPUGeneratorImpl>());
}

const at::Generator& default_generator(DeviceIndex device) {
  static const auto& generators = *new std::vector<at::Generator>([] {
    std::vector<at::Generator> made;
    for (DeviceIndex index = 0; index < device_count(); index++) made.push_back(new_generator(index));
    return made;
  }());
  check_device(resolve(device));
  return generators[resolve(device)];
}

at::Generator cpu_generator(const at::Generator& generator) {
  return static_cast<SimGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
}
}  // namespace sim
