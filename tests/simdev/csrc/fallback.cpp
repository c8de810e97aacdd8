// at::native::cpu_fallback would not do: it copies, it lets an embedding or a layer norm mix devices without a word,
// and it refuses generators. This one runs the CPU kernel on the same memory, so results are bit-equal to the CPU's.
#include "fallback.h"

#include "aliasing.h"
#include "generators.h"

#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <algorithm>

namespace sim {
namespace {
using c10::IValue;
using Arguments = c10::ArrayRef<IValue>;

template <class F>
void for_each_tensor(const IValue& value, F visit) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const auto& tensor : value.toTensorVector()) {
      if (tensor.defined()) visit(tensor);
    }
  } else if (value.isOptionalTensorList()) {
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorList()) {
      if (tensor && tensor->defined()) visit(*tensor);
    }
  }
}

template <class F>
IValue map_tensors(const IValue& value, F change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> changed;
    for (const auto& tensor : value.toTensorVector()) changed.push_back(change(tensor));
    return changed;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> changed;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorList()) {
      changed.push_back(tensor ? std::make_optional(change(*tensor)) : std::nullopt);
    }
    return changed;
  }
  return value;
}

bool writes(const c10::Argument& argument) { return argument.alias_info() && argument.alias_info()->isWrite(); }

// Views and in-place changes of geometry touch no data: on a real device they launch nothing.
bool only_geometry(const c10::OperatorHandle& op) {
  if (op.hasTag(at::Tag::inplace_view)) return true;
  const auto& returns = op.schema().returns();
  return std::any_of(returns.begin(), returns.end(), [](const c10::Argument& result) {
    return result.alias_info() && !result.alias_info()->isWrite();
  });
}

// A result that the host reads (a number, a shape) makes it wait for the kernel's stream.
bool host_reads_result(const c10::OperatorHandle& op) {
  return op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape);
}

[[noreturn]] void raise_mixed_devices(const c10::FunctionSchema& schema, Device one, Device other) {
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ", one, " and ",
              other, "! (when checking arguments of ", schema.name(), ")");
}

// As on CUDA, two kinds of CPU tensor may be mixed in: numbers that are only read, and the index tensors of x[i, j].
bool may_stay_on_cpu(const Tensor& tensor, const IValue& value, const c10::Argument& argument) {
  return tensor.is_cpu() && (value.isOptionalTensorList() || (tensor.dim() == 0 && !writes(argument)));
}

// The device of the call: of its tensors, else of its device argument, else the current one.
DeviceIndex common_device(const c10::FunctionSchema& schema, Arguments arguments) {
  std::optional<Device> device, misplaced;
  for (size_t i = 0; i < arguments.size(); i++) {
    for_each_tensor(arguments[i], [&](const Tensor& tensor) {
      if (on_sim(tensor)) {
        if (device && *device != tensor.device()) raise_mixed_devices(schema, *device, tensor.device());
        device = tensor.device();
      } else if (!may_stay_on_cpu(tensor, arguments[i], schema.arguments()[i])) {
        misplaced = tensor.device();
      }
    });
  }
  for (const auto& argument : arguments) {
    if (!device && argument.isDevice() && argument.toDevice().type() == kSim) device = argument.toDevice();
  }
  const auto index = device ? resolve(device->index()) : current_device();
  if (misplaced) raise_mixed_devices(schema, Device(kSim, index), *misplaced);
  return index;
}

void note_uses(const c10::FunctionSchema& schema, Arguments arguments, StreamKey stream, Position position) {
  for (size_t i = 0; i < arguments.size(); i++) {
    const auto use = writes(schema.arguments()[i]) ? Use::kWrite : Use::kRead;
    for_each_tensor(arguments[i], [&](const Tensor& tensor) {
      Block* block = on_sim(tensor) ? block_of(tensor.storage()) : nullptr;
      if (block) block->accesses.add({bytes_of(tensor), use, stream, position, schema.name().c_str()});
    });
  }
}

// Kernels are eager: everything before one on its stream runs first, and then the kernel has its place in the order.
void launch(const c10::OperatorHandle& op, Arguments arguments, DeviceIndex device) {
  if (!async_mode() || only_geometry(op)) return;
  Lock lock(mutex());
  const auto stream = current_stream(device);
  run_until(stream);
  note_uses(op.schema(), arguments, stream, advance(stream));
}

IValue cpu_argument(const IValue& value, const c10::Argument& argument, Aliases& aliases, DeviceIndex device) {
  if (value.isDevice() && value.toDevice().type() == kSim) return Device(c10::kCPU);
  if (value.isGenerator() && value.toGenerator().device().type() == kSim) return cpu_generator(value.toGenerator());
  if (value.isNone() && argument.name() == "generator") return cpu_generator(default_generator(device));
  return map_tensors(value, [&](const Tensor& tensor) {
    if (on_sim(tensor)) return aliases.to_cpu(tensor);
    if (tensor.defined()) aliases.keep_on_cpu(tensor);
    return tensor;
  });
}
}  // namespace

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto arguments = torch::jit::last(*stack, schema.arguments().size());
  const auto device = common_device(schema, arguments);
  launch(op, arguments, device);
  // A view of a tensor made outside inference mode is no inference tensor either, in whatever mode it is made.
  const bool views_normal = only_geometry(op) && !arguments.empty() && arguments[0].isTensor() &&
                            !arguments[0].toTensor().is_inference();

  Aliases aliases;
  const auto first_argument = stack->size() - arguments.size();
  for (size_t i = 0; i < schema.arguments().size(); i++) {
    auto& value = (*stack)[first_argument + i];
    value = cpu_argument(value, schema.arguments()[i], aliases, device);
  }
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  aliases.write_back();
  c10::InferenceMode mode(c10::InferenceMode::is_enabled() && !views_normal);
  const auto first_result = stack->size() - schema.returns().size();
  for (size_t i = first_result; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    value = map_tensors(value, [&](const Tensor& tensor) { return aliases.to_sim(tensor, device); });
  }
  if (async_mode() && host_reads_result(op)) host_wait(current_stream(device));
}

std::vector<std::string> prefer_cpu_kernels() {
  // Where there is a decomposition it wins over a fallback, and it does not round as the CPU's own kernel does
  // (native_layer_norm, native_group_norm, ...). Only the dispatcher knows which operators these are.
  using c10::DispatchKey;
  static auto& library = *new torch::Library(torch::Library::IMPL, "aten", kSimKey, __FILE__, __LINE__);
  std::vector<std::string> registered;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findSchema(name);
    if (name.name.rfind("aten::", 0) != 0 || !op) continue;
    const auto has = [&](DispatchKey key) { return op->hasKernelForDispatchKey(key); };
    const bool decomposes = has(DispatchKey::CompositeExplicitAutograd) || has(DispatchKey::CompositeImplicitAutograd);
    if (has(kSimKey) || !has(DispatchKey::CPU) || !decomposes) continue;
    const auto suffix = name.overload_name.empty() ? "" : "." + name.overload_name;
    registered.push_back(name.name.substr(6) + suffix);
    library.impl(registered.back().c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  }
  return registered;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  // Composite on every backend, but for PrivateUse1 they end in *_overrideable, which nobody implements.
  for (const char* name : {"convolution", "_convolution", "convolution_backward", "convolution_overrideable",
                           "convolution_backward_overrideable"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
  }
}
}  // namespace sim
