#include "copies.h"

#include <c10/core/InferenceMode.h>

#include <cstring>
#include <limits>

namespace sim {
namespace {
Traffic traffic_of[kMaxDevices];

void note_use(const Tensor& tensor, Use use, StreamKey stream, Position position) {
  if (Block* block = block_of(tensor.storage())) {
    block->accesses.add({bytes_of(tensor), use, stream, position, "copy"});
  }
}

void copy_bytes(const Tensor& source, Tensor destination) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::InferenceMode normal_mode(false);  // a deferred copy may run inside whatever mode its waiter is in
  destination.copy_(source);
}

// What a reader gets who does not wait: NaN, in integers -1.
void poison(Tensor destination) {
  if (destination.is_contiguous()) {
    std::memset(destination.mutable_data_ptr(), 0xFF, destination.nbytes());
  } else if (destination.is_floating_point()) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    destination.fill_(std::numeric_limits<double>::quiet_NaN());
  }
}

// What a real device does asynchronously: pinned memory, and no conversion that needs a staging buffer.
bool defers(const Tensor& on_device, const Tensor& on_host, bool non_blocking) {
  return async_mode() && non_blocking && on_device.dtype() == on_host.dtype() && block_of(on_device.storage()) &&
      pinned_block(on_host.const_data_ptr());
}

void copy_later(const Tensor& source, const Tensor& destination, StreamKey stream) {
  Lock lock(mutex());
  const bool to_device = on_sim(destination);
  const Tensor& on_device = to_device ? destination : source;
  Tensor from = borrowed_alias(source), to = borrowed_alias(destination);
  const auto position = defer(stream, [from, to] { copy_bytes(from, to); });
  to_device ? note_host_read(bytes_of(source), stream, position) : check_host_reads(bytes_of(destination));
  pinned_block((to_device ? source : destination).const_data_ptr())->pending[stream] = position;
  // Deferred copies out of these bytes came first in the caller's order: the poison must not reach them.
  if (to_device) block_of(on_device.storage())->accesses.finish(bytes_of(on_device), /*reads_only=*/true);
  note_use(on_device, to_device ? Use::kWrite : Use::kRead, stream, position);
  poison(to);
}

void copy_now(const Tensor& source, const Tensor& destination, StreamKey stream, bool non_blocking) {
  Aliases aliases;
  if (async_mode()) {
    Lock lock(mutex());
    run_until(stream);
    const bool to_device = on_sim(destination);
    if (!to_device) check_host_reads(bytes_of(destination));
    note_use(to_device ? destination : source, to_device ? Use::kWrite : Use::kRead, stream, advance(stream));
  }
  copy_bytes(on_sim(source) ? aliases.to_cpu(source) : source,
             on_sim(destination) ? aliases.to_cpu(destination) : destination);
  if (async_mode() && !non_blocking) host_wait(stream);
}

// The current streams of both devices wait for each other around the copy, as on CUDA.
void copy_between_devices(const Tensor& source, const Tensor& destination) {
  Aliases aliases;
  if (async_mode()) {
    Lock lock(mutex());
    const auto from = current_stream(source.device().index()), to = current_stream(destination.device().index());
    run_until(from);
    run_until(to);
    wait_event(from, record_event(to));
    const auto position = advance(from);
    note_use(source, Use::kRead, from, position);
    note_use(destination, Use::kWrite, from, position);
    wait_event(to, record_event(from));
  }
  copy_bytes(aliases.to_cpu(source), aliases.to_cpu(destination));
}

void count(const Tensor& source, const Tensor& destination) {
  Lock lock(mutex());
  const int64_t nbytes = destination.nbytes();  // a conversion happens before the transfer
  if (!on_sim(source)) {
    traffic_of[destination.device().index()].host_to_device += nbytes;
  } else if (!on_sim(destination)) {
    traffic_of[source.device().index()].device_to_host += nbytes;
  } else if (source.device() != destination.device()) {
    traffic_of[destination.device().index()].device_to_device += nbytes;
  }
}
}  // namespace

Traffic traffic(DeviceIndex device) {
  check_device(device);
  Lock lock(mutex());
  return traffic_of[device];
}

void reset_traffic() {
  Lock lock(mutex());
  for (auto& traffic : traffic_of) traffic = {};
}

Tensor copy_from(const Tensor& source, const Tensor& destination, bool non_blocking) {
  if (destination.numel() == 0) return destination;
  const Tensor& on_device = on_sim(destination) ? destination : source;
  const Tensor& other = on_sim(destination) ? source : destination;
  TORCH_CHECK(other.is_cpu() || on_sim(other), "sim: cannot copy between ", on_device.device(), " and ",
              other.device());
  count(source, destination);
  const auto stream = current_stream(on_device.device().index());
  if (on_sim(other)) {
    copy_between_devices(source, destination);
  } else if (defers(on_device, other, non_blocking)) {
    copy_later(source, destination, stream);
  } else {
    copy_now(source, destination, stream, non_blocking);
  }
  return destination;
}
}  // namespace sim
