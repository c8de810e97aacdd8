#include "memory.h"

#include <algorithm>
#include <cstdlib>

namespace sim {
namespace {
using c10::CachingDeviceAllocator::DeviceStats;

constexpr size_t kUnlimited = SIZE_MAX >> 1;  // still fits PyTorch's signed counters
constexpr size_t kDeviceAlignment = 64;
constexpr size_t kPageSize = 4096;

struct Account {
  DeviceStats stats;
  size_t capacity = kUnlimited;
  size_t used() const { return stats.allocated_bytes[0].current; }
  size_t available() const { return capacity - std::min(capacity, used()); }
};

struct Memory {
  Account accounts[kMaxDevices];
  std::map<uintptr_t, Block*> blocks;
  std::map<uintptr_t, HostBlock*> pinned;
  int64_t pinned_bytes = 0;
  int64_t pinned_peak = 0;
};

Memory& all() {
  static auto& instance = *new Memory();  // leaked: tensors may die after static destructors
  return instance;
}

template <class B>
B* find(const std::map<uintptr_t, B*>& blocks, const void* pointer) {
  auto address = reinterpret_cast<uintptr_t>(pointer);
  auto after = blocks.upper_bound(address);
  if (after == blocks.begin()) return nullptr;
  auto [begin, block] = *std::prev(after);
  return address < begin + block->nbytes ? block : nullptr;
}

void* aligned(size_t alignment, size_t nbytes) {
  void* data = nullptr;
  TORCH_CHECK_WITH(OutOfMemoryError, posix_memalign(&data, alignment, nbytes) == 0, "sim: the host has no ",
                   c10::CachingAllocator::format_size(nbytes), " left to simulate device or pinned memory with");
  return data;
}

template <class F>
void for_each_stat(DeviceStats& stats, F change) {
  for (auto* stat : {&stats.allocation, &stats.segment, &stats.active, &stats.allocated_bytes, &stats.reserved_bytes,
                     &stats.active_bytes, &stats.requested_bytes}) {
    change((*stat)[0]);
  }
}

// There is no caching, so reserved, active and requested are what is allocated.
void count(DeviceStats& stats, size_t nbytes, bool allocated) {
  for (auto* stat : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes}) {
    allocated ? (*stat)[0].increase(nbytes) : (*stat)[0].decrease(nbytes);
  }
  for (auto* stat : {&stats.allocation, &stats.segment, &stats.active}) {
    allocated ? (*stat)[0].increase(1) : (*stat)[0].decrease(1);
  }
  (allocated ? stats.num_device_alloc : stats.num_device_free)++;
}

void require(DeviceIndex device, size_t nbytes) {
  auto& account = all().accounts[device];
  if (nbytes <= account.available()) return;
  account.stats.num_ooms++;
  using c10::CachingAllocator::format_size;
  TORCH_CHECK_WITH(OutOfMemoryError, false, "sim out of memory: tried to allocate ", format_size(nbytes), " on sim:",
                   int(device), ", which has a capacity of ", format_size(account.capacity), " of which ",
                   format_size(account.available()), " is free");
}

Access whole_block(const Block& block, const char* what) {
  return {block.range(), Use::kWrite, block.born, position(block.born), what};
}

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  Lock lock(mutex());
  block->accesses.check_free(whole_block(*block, "free"), block->recorded);
  block->accesses.finish(block->range(), /*reads_only=*/false);
  count(all().accounts[block->device].stats, block->nbytes, /*allocated=*/false);
  if (block->data) all().blocks.erase(block->range().begin);
  if (!block->adopted) std::free(block->data);
  delete block;
}

c10::DataPtr charge(Block* block) {
  count(all().accounts[block->device].stats, block->nbytes, /*allocated=*/true);
  if (block->data) all().blocks[block->range().begin] = block;
  block->accesses.add(whole_block(*block, "allocation"));
  return {block->data, block, &free_block, Device(kSim, block->device)};
}

struct SimAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t nbytes) override {
    Lock lock(mutex());
    const auto device = current_device();
    require(device, nbytes);
    void* data = nbytes ? aligned(kDeviceAlignment, nbytes) : nullptr;
    return charge(new Block{device, nbytes, current_stream(device), data});
  }
  void copy_data(void* to, const void* from, size_t nbytes) const override { default_copy_data(to, from, nbytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
    Lock lock(mutex());
    if (data.get_deleter() != &free_block) return;
    static_cast<Block*>(data.get_context())->recorded.insert({stream.device_index(), stream.id()});
  }
  DeviceStats getDeviceStats(DeviceIndex device) override {
    check_device(device);
    Lock lock(mutex());
    return all().accounts[device].stats;
  }
  void resetAccumulatedStats(DeviceIndex device) override {
    check_device(device);
    Lock lock(mutex());
    for_each_stat(all().accounts[device].stats, [](auto& stat) { stat.reset_accumulated(); });
  }
  void resetPeakStats(DeviceIndex device) override {
    check_device(device);
    Lock lock(mutex());
    for_each_stat(all().accounts[device].stats, [](auto& stat) { stat.reset_peak(); });
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    check_device(device);
    Lock lock(mutex());
    const auto& account = all().accounts[device];
    return {account.available(), account.capacity};
  }
};

void free_pinned(void* context) {
  auto* block = static_cast<HostBlock*>(context);
  Lock lock(mutex());
  for (const auto& [stream, position] : block->pending) run_until(stream, position);
  const auto begin = reinterpret_cast<uintptr_t>(block->data);
  check_host_reads({begin, begin + block->nbytes});
  all().pinned_bytes -= block->nbytes;
  if (block->data) all().pinned.erase(reinterpret_cast<uintptr_t>(block->data));
  std::free(block->data);
  delete block;
}

struct SimHostAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t nbytes) override {
    Lock lock(mutex());
    auto* block = new HostBlock{nbytes ? aligned(kPageSize, nbytes) : nullptr, nbytes, {}};
    if (block->data) all().pinned[reinterpret_cast<uintptr_t>(block->data)] = block;
    all().pinned_bytes += nbytes;
    all().pinned_peak = std::max(all().pinned_peak, all().pinned_bytes);
    return {block->data, block, &free_pinned, Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t nbytes) const override { default_copy_data(to, from, nbytes); }
  bool record_event(void*, void*, c10::Stream) override { return true; }  // HostBlock::pending does this
  void empty_cache() override {}
  at::HostStats get_stats() override {
    Lock lock(mutex());
    at::HostStats stats;
    stats.allocated_bytes.current = all().pinned_bytes;
    stats.allocated_bytes.peak = all().pinned_peak;
    return stats;
  }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {
    Lock lock(mutex());
    all().pinned_peak = all().pinned_bytes;
  }
};

auto& the_device_allocator = *new SimAllocator();
auto& the_host_allocator = *new SimHostAllocator();
REGISTER_ALLOCATOR(kSim, &the_device_allocator);
REGISTER_HOST_ALLOCATOR(kSim, &the_host_allocator);
}  // namespace

c10::DeviceAllocator& device_allocator() { return the_device_allocator; }

at::HostAllocator& host_allocator() { return the_host_allocator; }

Block* block_of(const c10::Storage& storage) {
  const auto& data = storage.data_ptr();
  if (data.get_deleter() == &free_block) return static_cast<Block*>(data.get_context());
  Lock lock(mutex());
  return find(all().blocks, data.get());  // a storage over part of another's bytes, as DLPack makes them
}

HostBlock* pinned_block(const void* address) {
  Lock lock(mutex());
  return find(all().pinned, address);
}

DeviceIndex device_of(const void* address) {
  Lock lock(mutex());
  const Block* block = find(all().blocks, address);
  TORCH_CHECK(block, "sim: ", address, " is not an address in any device's memory");
  return block->device;
}

c10::DataPtr adopt(const c10::Storage& cpu_storage, DeviceIndex device) {
  Lock lock(mutex());
  require(device, cpu_storage.nbytes());
  void* data = cpu_storage.mutable_data();
  return charge(new Block{device, cpu_storage.nbytes(), current_stream(device), data, cpu_storage});
}

void set_capacity(DeviceIndex device, std::optional<size_t> nbytes) {
  check_device(device);
  Lock lock(mutex());
  all().accounts[device].capacity = nbytes.value_or(kUnlimited);
}

int64_t pinned_bytes() {
  Lock lock(mutex());
  return all().pinned_bytes;
}
}  // namespace sim
