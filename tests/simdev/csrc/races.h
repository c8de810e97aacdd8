// Races: two uses of the same device bytes, one of them a write, which no event, stream or host wait has ordered.
//
// Kernels are eager here, so a prefetch into weights that are still being read gives right results; on a real device
// it gives garbage. Hence each block of device memory remembers who used which bytes, and a later use that conflicts
// must come after it by the vector clocks. Allocation and free are writes by the stream that allocated: the real
// allocator gives the memory to that stream's next request at once, without waiting for anyone.
//
// The host's own writes to pinned memory pass no one who could note them. So what a deferred copy is to read is
// remembered, and compared when the host first knows that the copy has run: until then nobody may write there.
// Only asynchronous mode records anything.
#pragma once
#include "streams.h"

#include <set>
#include <string>
#include <vector>

namespace sim {
enum class Use { kRead, kWrite };

// Addresses, end excluded. A strided tensor counts as everything between its first and last byte.
struct Range {
  uintptr_t begin = 0;
  uintptr_t end = 0;
  bool empty() const { return begin >= end; }
  bool overlaps(Range other) const { return begin < other.end && other.begin < end; }
  bool covers(Range other) const { return begin <= other.begin && other.end <= end; }
};

struct Access {
  Range range;
  Use use;
  StreamKey stream;
  Position position;
  const char* what;  // the operation's name, which lives as long as the process
  bool reported = false;
};

class AccessLog {
 public:
  // Checks against the uses so far, counts at most one violation for each of them, and remembers this one.
  void add(const Access& access);
  // The same check for the end of the block; streams passed to record_stream are waited for by the allocator.
  void check_free(const Access& access, const std::set<StreamKey>& recorded);
  // Runs the deferred copies that touch the range (reads only, or all of them).
  void finish(Range range, bool reads_only) const;

 private:
  std::vector<Access> accesses_;
};

// A deferred copy reads these bytes of pinned memory.
void note_host_read(Range range, StreamKey stream, Position position);
// Compares, and forgets: of the copies that the host has waited for, or of all that read from a range.
void check_host_reads();
void check_host_reads(Range range);

std::vector<std::string> violations();
void clear_violations();
}  // namespace sim
